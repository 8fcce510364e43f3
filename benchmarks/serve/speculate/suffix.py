"""Suffix-tree drafting replayed over recorded traces, and its speed, against prompt look-up and arctic-inference.

    python -m benchmarks.serve.speculate.suffix --data DIR [--arctic-python /path/to/venv/bin/python] [--quick]

DIR holds agent_traces.jsonl and text2sql.jsonl. Replay is exact (greedy acceptance is determined by the recorded text), so tokens per
step carry no noise; times are medians of interleaved rounds. arctic-inference runs in an environment of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.harness import Report, Row, arguments, compare, format_table, say
from wager.serve.speculate.replay import PieceEncoder, encoded, read_pairs, replay_ngram, replay_suffix, shuffled
from wager.serve.speculate.suffix_tree import DraftLimits, SuffixSession, SuffixTree

DEPTH, FACTOR, MOST = 64, 2.0, 32
SIBLINGS = "marshmallow-1867"


def main() -> None:
    parser = arguments("Suffix-tree drafting on recorded traces.")
    parser.add_argument("--data", type=Path, required=True, help="directory with agent_traces.jsonl and text2sql.jsonl")
    parser.add_argument("--arctic-python", type=Path, help="interpreter of an environment that has arctic-inference")
    args = parser.parse_args()
    streams = read_streams(args.data, quick=args.quick)
    rows, table = [], [["stream", "drafter", "tokens/step", "accepted", "drafted/step", "us/draft"]]
    for name, stream in streams.items():
        limits = DraftLimits(MOST, FACTOR, 0.0, 0.1, False)
        found = {
            "prompt look-up": replay_ngram(stream),
            "suffix path": replay_suffix(stream, limits, DEPTH),
            "suffix tree": replay_suffix(stream, DraftLimits(MOST, FACTOR, 2.0, 0.1, True), DEPTH),
            "suffix path, own text only": replay_suffix(stream, limits, DEPTH, shared=False),
        }
        for drafter, r in found.items():
            table.append([name, drafter, f"{r.tokens_per_step:.2f}", f"{r.accept_rate:.0%}", f"{r.drafted_per_step:.1f}", f"{r.speculate_us:.1f}"])  # fmt: skip
        ours = found["suffix tree"].tokens_per_step
        rows.append(exact_row(name, "prompt look-up", found["prompt look-up"].tokens_per_step, "suffix tree", ours))
        if args.arctic_python:
            peer = arctic(args.arctic_python, stream, args.repeats or (2 if args.quick else 5))
            mine = found["suffix path"]
            table.append(
                [
                    name,
                    "arctic-inference path",
                    f"{peer['tokens_per_step']:.2f}",
                    "",
                    "",
                    f"{peer['speculate_us'][0]:.1f}",
                ]
            )
            rows.append(
                exact_row(name, "arctic-inference", peer["tokens_per_step"], "suffix path", mine.tokens_per_step)
            )
            times = iter(peer["speculate_us"] * 10)
            rows += compare(
                f"{name}: microseconds per draft",
                {"arctic-inference": lambda t=times: next(t), "suffix path": lambda s=stream, lim=limits: replay_suffix(s, lim, DEPTH).speculate_us},
                repeats=args.repeats or (2 if args.quick else 5), warmup=0, unit="us", progress=say,
            )  # fmt: skip
    facts = engineering(100_000 if args.quick else 1_000_000)
    report = Report("serve", "suffix", rows, facts)
    print(format_table(table))
    print(report.table())
    print("\n".join(f"{name}: {value:.3g}" for name, value in facts.items()))
    if not args.quick:
        print(f"written: {report.save()}")


def read_streams(data: Path, quick: bool) -> dict[str, list[tuple[list[int], list[int]]]]:
    traces, sql = read_pairs(data / "agent_traces.jsonl"), read_pairs(data / "text2sql.jsonl")
    encode = PieceEncoder()
    streams = {
        "text-to-SQL": encoded(shuffled(sql), encode),
        "sibling agent runs": encoded([p for p in traces if SIBLINGS in p[0]], encode),
        "unrelated agent tasks": encoded([p for p in traces if SIBLINGS not in p[0]], encode),
    }
    return {name: stream[:20] for name, stream in streams.items()} if quick else streams


def exact_row(workload: str, baseline: str, theirs: float, ours_name: str, ours: float) -> Row:
    """A replay has no noise: the ratio is what it is."""
    ratio = ours / theirs
    return Row(workload, baseline, ours_name, "tokens/step", theirs, ours, ratio, ratio, ratio, 0.0, 1)


def arctic(python: Path, stream: list[tuple[list[int], list[int]]], repeats: int) -> dict:
    """The same replay by arctic-inference's cache, timed inside its own process."""
    script = Path(__file__).with_name("arctic_replay.py")
    job = json.dumps({"stream": stream, "depth": DEPTH, "factor": FACTOR, "most": MOST, "repeats": repeats})
    done = subprocess.run([str(python), str(script)], input=job, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"arctic-inference failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def engineering(tokens: int) -> dict[str, float]:
    """Cost per token and per draft over a tree of `tokens` cached tokens: text made of repeated templates with random edits."""
    rng = np.random.default_rng(0)
    templates = [rng.integers(0, 4000, rng.integers(10, 200)) for _ in range(2000)]

    def text(length: int) -> np.ndarray:
        parts, total = [], 0
        while total < length:
            part = templates[min(int(rng.zipf(1.3)), 1999)].copy()
            edited = rng.random(len(part)) < 0.03
            part[edited] = rng.integers(0, 4000, edited.sum())
            parts.append(part)
            total += len(part)
        return np.concatenate(parts)[:length]

    facts: dict[str, float] = {"cached_tokens": tokens}
    for depth in (24, 64):
        tree = SuffixTree(depth)
        texts = [text(1000) for _ in range(tokens // 1000)]
        begun = time.perf_counter()
        for piece in texts:
            tree.append(tree.open(), piece)
        facts[f"append_us_per_token_depth_{depth}"] = 1e6 * (time.perf_counter() - begun) / tokens
        facts[f"bytes_per_token_depth_{depth}"] = tree.nbytes / tokens
        session, stream = SuffixSession(depth, tree), text(4000).tolist()
        session.extend(stream[:1000], output=False)
        update, speculate = [], []
        for at in range(1000, 4000, 3):
            a = time.perf_counter()
            session.extend(stream[at : at + 3], output=True)
            b = time.perf_counter()
            session.speculate(DraftLimits(MOST, FACTOR))
            c = time.perf_counter()
            update.append((b - a) / 3)
            speculate.append(c - b)
        facts[f"update_us_per_token_depth_{depth}"] = 1e6 * float(np.mean(update))
        facts[f"speculate_us_depth_{depth}"] = 1e6 * float(np.mean(speculate))
    return facts


if __name__ == "__main__":
    main()
