"""Discrete-event simulation of serving: the engine's own policies under a virtual clock, and clusters of unequal machines."""
