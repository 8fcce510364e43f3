"""Exactness on real prompts: greedy text of every method against plain decoding, and seeded samples of the matching methods, token by token.

    python -m benchmarks.serve.speculate.exactness --data DIR [--tokens N] [--prompts N] [--quick]

Runs every prompt of humaneval, spec_bench (all turns' first), text2sql and the agent traces in mixed batches, with chunked prefill and a
KV cache small enough for preemptions, in float32. A difference is reported with the prompt, the position and the two tokens, together with
how far the target's two best logits lay apart there: only a tie within rounding (batches of other shapes add up in another order) is not
the method's fault. Then the joint law of short texts is tested at every temperature and top-p with many more samples than the unit tests.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import Report, format_table, say
from benchmarks.serve.speculate.common import methods, speculation_arguments
from wager.serve.llm import LLM
from wager.serve.params import SamplingParams

TIE = 1e-3  # logits closer than that are a tie in float32 sums of another order
PROMPT = [7, 8, 9]


def main() -> None:
    parser = speculation_arguments("Exactness of every method on every prompt.", repeats=False)
    parser.add_argument("--samples", type=int, default=4096, help="texts per method and point of the grid")
    parser.set_defaults(prompts=0, tokens=12)
    args = parser.parse_args()
    prompts = all_prompts(args)
    table = [
        ["method", "prompts", "greedy: differ", "beyond ties", "seeded: differ", "beyond ties", "preemptions", "s"]
    ]
    params = [SamplingParams(temperature=0.0, max_tokens=args.tokens, ignore_eos=True, logprobs=2) for _ in prompts]
    grid = [(t, p) for t in (0.2, 0.6, 1.0) for p in (0.9, 1.0)]
    seeded = [
        SamplingParams(
            temperature=grid[i % 6][0], top_p=grid[i % 6][1], seed=i, max_tokens=args.tokens, ignore_eos=True, logprobs=2
        )
        for i in range(len(prompts))
    ]  # fmt: skip
    plain = engine(args, None)
    expected, expected_seeded = plain.generate(prompts, params), plain.generate(prompts, seeded)
    facts: dict[str, Any] = {"prompts": len(prompts), "tokens": args.tokens}
    wrong = 0
    chosen = ("chain 4", "specinfer 1,1,3,1", "sequoia", "specexec 32", "suffix", "suffix + draft", "ngram")
    for name in chosen:
        say(name)
        begun = time.perf_counter()
        llm = engine(args, {**methods(args.draft)[name], "auto": False})
        greedy = differences(expected, llm.generate(prompts, params))
        found = [name, str(len(prompts)), str(len(greedy)), str(sum(not tie for tie in greedy))]
        matches = name.split()[0] not in ("specinfer", "sequoia")
        drawn = differences(expected_seeded, llm.generate(prompts, seeded)) if matches else []
        found += [str(len(drawn)), str(sum(not tie for tie in drawn))] if matches else ["", ""]
        wrong += sum(not tie for tie in greedy + drawn)
        table.append([*found, str(llm.engine.core.preemptions_total), f"{time.perf_counter() - begun:.0f}"])
    laws = law_grid(256 if args.quick else args.samples)
    print(format_table(table))
    print(format_table(laws))
    facts |= {"table": table, "laws": laws, "differences_beyond_ties": wrong}
    if not args.quick:
        print(f"written: {Report('serve', 'speculation_exactness', [], facts).save()}")
    if wrong or any(float(row[-1]) < 1e-6 for row in laws[1:]):
        raise SystemExit("speculation changed the output")


def engine(args: Any, config: dict[str, Any] | None) -> LLM:
    """A pool of about 4,000 tokens for 24 requests of up to 400: preemption is sure."""
    per_token = LLM(args.model, dtype="float32", max_num_seqs=2).engine.core.runner.pool
    nbytes = sum(pool[0].nbytes for pool in [*per_token.k, *filter(lambda v: v is not None, per_token.v)])  # type: ignore[index]
    return LLM(
        args.model, dtype="float32", max_num_seqs=24, max_model_len=512, max_num_batched_tokens=384, speculative_config=config,
        kv_cache_memory=4_000 * nbytes,
    )  # fmt: skip


def all_prompts(args: Any) -> list[list[int]]:
    """Token ids of every prompt of the data set, cut to their last 320."""
    tokenizer = LLM(args.model).get_tokenizer()
    assert tokenizer is not None
    if args.data is None:
        texts = ["def main(argv):\n", "The history of the city begins with", "import os\n\n\nclass Node:\n"] * 4
    else:
        read = lambda name: [json.loads(line) for line in (args.data / name).read_text().splitlines()]
        texts = [row["prompt"] for row in read("humaneval.jsonl")]
        texts += [turn for row in read("spec_bench.jsonl") for turn in row["turns"]]
        texts += [f"{row['question']}\n{row['instructions'] or ''}" for row in read("text2sql.jsonl")]
        texts += [row["turns"][0]["text"] for row in read("agent_traces.jsonl")]
    prompts = [tokenizer.encode(text)[-320:] for text in texts]
    if args.quick:
        prompts = prompts[::40]
    return prompts[: args.prompts or len(prompts)]


def differences(expected: list[Any], found: list[Any]) -> list[bool]:
    """One entry per prompt whose tokens differ: whether the first difference is a tie of the two tokens' logits."""
    ties = []
    for theirs, ours in zip(expected, found, strict=True):
        a, b = theirs.outputs[0], ours.outputs[0]
        if a.token_ids == b.token_ids:
            continue
        at = next(i for i, pair in enumerate(zip(a.token_ids, b.token_ids, strict=False)) if pair[0] != pair[1])
        there, here = a.logprobs[at], b.logprobs[at]
        both = [row.get(token) for row in (there, here) for token in (a.token_ids[at], b.token_ids[at])]
        known = [entry.logprob for entry in both if entry is not None]
        shared = (
            max(abs(there[t].logprob - here[t].logprob) for t in there.keys() & here.keys())
            if there.keys() & here.keys()
            else 1.0
        )
        tie = len(known) == 4 and shared < TIE and max(known) - min(known) < TIE
        say(f"differs at output {at}: {a.token_ids[at]} against {b.token_ids[at]}, {'a tie' if tie else 'NOT a tie'}")
        ties.append(tie)
    return ties


def law_grid(samples: int) -> list[list[str]]:
    """p-values of the joint law of three-token texts, per method and point of the grid."""
    from tests.serve.conftest import build_llama
    from tests.serve.speculate.grid import ALLOWED, BY_RATIO, SAMPLED_GRID, TextLaw, configs, g_test, tokens_of

    table = [["method", "temperature", "top-p", "texts", "p-value"]]
    small: dict[str, Any] = dict(
        num_hidden_layers=1, hidden_size=32, intermediate_size=32, vocab_size=416, initializer_range=0.25
    )
    with tempfile.TemporaryDirectory() as folder:
        target, draft = (build_llama(_made(Path(folder) / str(seed)), seed=seed, **small) for seed in (11, 12))
        law = TextLaw(target, PROMPT)
        for name in (*BY_RATIO, "specexec", "chain", "suffix", "hybrid", "ngram"):
            llm = LLM(str(target), speculative_config={**configs(target, draft)[name], "auto": False}, max_model_len=16)
            for temperature, top_p in SAMPLED_GRID:
                params = SamplingParams(
                    temperature=temperature,
                    top_p=top_p,
                    max_tokens=3,
                    ignore_eos=True,
                    allowed_token_ids=ALLOWED,
                    n=128,
                )
                texts = [tuple(t) for _ in range(samples // 128) for t in tokens_of(llm.generate(PROMPT, params))]
                p = g_test(texts, law.at(temperature, top_p))
                table.append([name, f"{temperature:g}", f"{top_p:g}", str(len(texts)), f"{p:.3g}"])
            say(f"law of {name}: {', '.join(row[-1] for row in table if row[0] == name)}")
    return table


def _made(path: Path) -> Path:
    path.mkdir()
    return path


if __name__ == "__main__":
    main()
