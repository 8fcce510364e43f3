"""Many machines: planners that place models on them, what their plans cost, and running them."""
