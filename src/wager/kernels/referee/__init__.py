"""FastKernels' referee: is a kernel right on the shapes that models produce, is it faster than the baseline, does it win inside the engine?

Paper: "FastKernels: Benchmarking GPU Kernel Generation in Production" (arXiv 2605.23215).

1. `capture` runs small faithful definitions of 34 architectures and writes down what every operator was built with and called with.
2. `judge` gives a candidate (a file with a class of the operator's name) and the baseline a process each. The judging process makes the
   inputs and keeps the oracle (float64) to itself: a candidate never shares memory with an expected output.
3. Right means: within a bound that follows how rounding of inputs and parameters spreads to each output (`oracle`), on captured shapes,
   on held-out shapes, at several magnitudes, and in the timed runs themselves, which all see fresh values at fresh addresses.
4. Fast means: medians of interleaved runs with a cold cache, beside the baseline's own A/A noise.
5. `end_to_end` swaps winners into the serving engine: greedy text must not change, and the engine's own time is what counts.

Exact: verdicts on the cheats that the tests seed. Approximate: a static check can be evaded; the numeric and timing checks do not rely on it.
"""
