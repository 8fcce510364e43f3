"""Check that the command line is light: `import wager` and `wager --help` take less than 0.5 s and never import torch.

    python scripts/check_startup.py

The time is the best of several runs, each in a fresh interpreter, less what a bare interpreter takes: it must hold on a busy machine.
"""

from __future__ import annotations

import subprocess
import sys
import time

LIMIT_S = 0.5
REPEATS = 5
HEAVY = ("torch", "numpy", "fastapi", "transformers")

CASES = {
    "import wager": "import wager",
    "wager --help": "import sys; sys.argv = ['wager', '--help']\nfrom wager.cli import main\ntry: main()\nexcept SystemExit: pass",
}


def best_seconds(code: str) -> float:
    """The shortest of a few runs of `code` in a fresh interpreter, process start included."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return min(times)


def heavy_imports(code: str) -> list[str]:
    """Which of the HEAVY packages `code` pulls in."""
    probe = f"{code}\nimport sys\nprint('heavy:', *(m for m in {HEAVY!r} if m in sys.modules))"
    out = subprocess.run([sys.executable, "-c", probe], check=True, capture_output=True, text=True).stdout
    return out.rsplit("heavy:", 1)[1].split()


def main() -> int:
    bare_s = best_seconds("pass")
    failures = 0
    for name, code in CASES.items():
        seconds, heavy = best_seconds(code) - bare_s, heavy_imports(code)
        ok = seconds < LIMIT_S and not heavy
        failures += not ok
        print(
            f"{name}: {seconds:.2f} s (limit {LIMIT_S} s), imports {', '.join(heavy) or 'nothing heavy'}: {'ok' if ok else 'FAILED'}"
        )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
