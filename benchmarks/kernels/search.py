"""What the mutation search finds: constants of the C++ linear, judged on captured shapes.

    python -m benchmarks.kernels.search [--quick] [--attempts 12]

Every attempt is compiled, judged for correctness and timed against torch with a cold cache. The best by that score is then measured again,
interleaved with the shipped constants on a decode-shaped linear: picking the best of many noisy scores flatters, the second run does not.
"""

from __future__ import annotations

import random
import re
import tempfile
from pathlib import Path

import torch

from benchmarks.harness import Report, arguments, compare, say
from benchmarks.kernels.linear import contender
from wager.kernels.native_linear import NativeLinear
from wager.kernels.referee.architectures import architecture
from wager.kernels.referee.capture import capture, merge, select
from wager.kernels.referee.judge import Options
from wager.kernels.referee.search import SHIPPED, Mutation, flags_of, search


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--attempts", type=int, default=0, help="sources to try; default 12, quick 2")
    chosen = parser.parse_args()
    names = ("llama",) if chosen.quick else ("llama", "flux", "whisper")
    cases = select(
        merge(c for n in names for held in (False, True) for c in capture(architecture(n), held)), "Linear", 3
    )
    driver = Mutation(random.Random(0), chosen.attempts or (2 if chosen.quick else 12))
    options = Options(iterations=10, rounds=3, timeout_s=300)
    with tempfile.TemporaryDirectory() as folder:
        found = search("Linear", driver, *cases, Path(folder), options, say)
    tried = [{**driver.tried[a.source], "status": str(a.verdict.status), "speedup": a.verdict.speedup} for a in found]
    best = max(found, key=lambda a: a.verdict.speedup or 0.0)
    constants = driver.tried[best.source]
    report = Report(
        "kernels", "search", confirm(constants, chosen.quick, chosen.repeats), {"best": constants, "tried": tried}
    )
    for line in tried:
        print(re.sub(r"[{}']", "", str(line)))
    print(report.table())
    if not chosen.quick:
        say(f"saved {report.save()}")


def confirm(constants: dict[str, int], quick: bool, repeats: int | None):
    weight = torch.randn(2048, 512) if quick else torch.randn(8192, 2048)
    rows = []
    for tokens in (1, 16, 256):
        x = torch.randn(tokens, weight.shape[1])
        layers = {"shipped": flags_of(SHIPPED), "found": flags_of(constants)}
        contenders = {
            name: contender(lambda flags=flags: NativeLinear(weight, None, flags=flags), weight.nbytes, x)
            for name, flags in layers.items()
        }
        rows += compare(f"{tokens} rows, float32", contenders, repeats=repeats or (3 if quick else 15), progress=say)
    return rows


if __name__ == "__main__":
    main()
