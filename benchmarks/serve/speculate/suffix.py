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

from benchmarks.harness import Report, Row, arguments, format_table, ratio_of_medians
from wager.serve.speculate.replay import PieceEncoder, encoded, read_pairs, replay_ngram, replay_suffix, shuffled
from wager.serve.speculate.suffix_tree import DraftLimits, SuffixSession, SuffixTree

DEPTH, FACTOR, MOST = 64, 2.0, 32
SIBLINGS = "marshmallow-1867"

Stream = list[tuple[list[int], list[int]]]


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
            rows += against_arctic(
                name, Arctic(args.arctic_python, stream), stream, limits, args.repeats or (2 if args.quick else 6)
            )
            peer = rows[-1]
            table.append([name, "arctic-inference path", f"{peer.baseline_value:.2f}", "", "", f"{rows[-3].baseline_value:.1f}"])  # fmt: skip
    facts = engineering(100_000 if args.quick else 1_000_000)
    report = Report("serve", "suffix", rows, facts)
    print(format_table(table))
    print(report.table())
    print("\n".join(f"{name}: {value:.3g}" for name, value in facts.items()))
    if not args.quick:
        print(f"written: {report.save()}")


def against_arctic(name: str, peer: Arctic, stream: Stream, limits: DraftLimits, rounds: int) -> list[Row]:
    """Both replay the stream in turn: microseconds per draft, per token taken in (prompts and outputs), and tokens per step."""
    theirs, ours = [], []
    peer.replay()  # warm up
    replay_suffix(stream, limits, DEPTH)
    for i in range(rounds):
        for one in (theirs, ours) if i % 2 else (ours, theirs):
            one.append(peer.replay() if one is theirs else replay_suffix(stream, limits, DEPTH))
    peer.close()
    rows = []
    for what, key in (("per draft", "speculate_us"), ("per token taken in", "update_us")):
        them, us = [t[key] for t in theirs], [getattr(o, key) for o in ours]
        ratio, low, high = ratio_of_medians(them, us, False, np.random.default_rng(0))
        noise = abs(float(np.median(them[::2]) / np.median(them[1::2])) - 1)
        samples = {"arctic-inference": them, "suffix path": us}
        medians = float(np.median(them)), float(np.median(us))
        rows.append(
            Row(f"{name}: microseconds {what}", "arctic-inference", "suffix path", "us", *medians, ratio, low, high, noise, rounds, samples)
        )  # fmt: skip
    return [*rows, exact_row(name, "arctic-inference", theirs[0]["tokens_per_step"], "suffix path", ours[0].tokens_per_step)]  # fmt: skip


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


class Arctic:
    """arctic-inference's cache in its own process, timed there."""

    def __init__(self, python: Path, stream: Stream):
        script = Path(__file__).with_name("arctic_replay.py")
        self.process = subprocess.Popen(
            [str(python), str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.ask(json.dumps({"stream": stream, "depth": DEPTH, "factor": FACTOR, "most": MOST}))

    def ask(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def replay(self) -> dict[str, float]:
        self.ask("again")
        assert self.process.stdout is not None
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit("arctic-inference failed; its complaint is above")
        return json.loads(answer)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


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
        session, stream, limits = SuffixSession(depth, tree), text(4000).tolist(), DraftLimits(MOST, FACTOR)
        session.extend(stream[:1000], output=False)
        update, speculate = [], []
        for at in range(1000, 4000, 3):
            a = time.perf_counter()
            session.extend(stream[at : at + 3], output=True)
            b = time.perf_counter()
            session.speculate(limits)
            c = time.perf_counter()
            update.append((b - a) / 3)
            speculate.append(c - b)
        facts[f"update_us_per_token_depth_{depth}"] = 1e6 * float(np.mean(update))
        facts[f"speculate_us_depth_{depth}"] = 1e6 * float(np.mean(speculate))
    return facts


if __name__ == "__main__":
    main()
