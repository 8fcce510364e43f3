"""A progress bar for offline generation: rich on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def generation_progress(total: int, enabled: bool) -> Iterator[Callable[[Any], None]]:
    """Yields `advance(output)`, to be called once per finished request."""
    if not enabled:
        yield lambda output: None
        return
    begun, tokens, done = time.monotonic(), 0, 0

    def count(output: Any) -> str:
        nonlocal tokens, done
        done += 1
        tokens += sum(len(o.token_ids) for o in getattr(output, "outputs", ()))
        return f"{tokens / max(time.monotonic() - begun, 1e-9):.0f} tok/s"

    if not sys.stderr.isatty():

        def line(output: Any) -> None:
            rate = count(output)
            print(f"{done}/{total} prompts, {rate}", file=sys.stderr)

        yield line
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("prompts", total=total)
        yield lambda output: bar.update(task, advance=1, description=count(output))
