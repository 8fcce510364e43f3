"""The fixtures of the graphs that are compiled."""

from tests.graph.conftest import compilers_data, rng

__all__ = ["compilers_data", "rng"]
