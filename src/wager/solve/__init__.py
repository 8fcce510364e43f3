"""Linear, integer and constraint programs behind one face: every answer carries its bound, its gap and the time it took."""

from wager.solve.model import LinearModel, Solution
from wager.solve.solvers import METHODS, solve

__all__ = ["METHODS", "LinearModel", "Solution", "solve"]
