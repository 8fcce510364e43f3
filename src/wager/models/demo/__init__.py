"""The demo pair: a small target and a smaller draft distilled from it, shipped with the package, and the factory that trains them.

`python -m wager.models.demo` retrains a pair of any size in one command: corpus -> tokenizer -> train -> distill -> export -> evaluate.
"""

from pathlib import Path

NAMES = ("demo", "demo-draft")


def is_demo(name: str) -> bool:
    return name in NAMES


def path(name: str) -> Path:
    """The shipped checkpoint directory of "demo" or "demo-draft"."""
    return Path(__file__).parent / "weights" / name
