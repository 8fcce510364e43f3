"""The shipped demo pair: held-out loss per domain, and what its draft saves, plain decoding against guessing ahead, interleaved in one run.

    python -m benchmarks.models.demo [--data DIR] [--quick]

Prompts are the beginnings of held-out documents. `--data` (a folder with wikitext2/valid.txt) adds the wiki domain.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import tokenizers

from benchmarks.harness import Report, Row, arguments, compare, say
from wager import LLM, SamplingParams
from wager.models import demo
from wager.models.demo.corpus import DOMAINS, Document, documents
from wager.models.demo.dataset import write_streams
from wager.models.demo.evaluate import evaluate_pair, format_table
from wager.serve.observe import StepRecord

GUESSES = 3
PROMPT_TOKENS, NEW_TOKENS = 64, 96


class Counter:
    """Observer: drafts and accepted tokens since `start`."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.drafts = self.accepted = 0

    def on_step(self, record: StepRecord) -> None:
        self.drafts += record.drafts
        self.accepted += record.accepted_tokens

    def on_tokens(self, request: Any, num_new_tokens: int, now_s: float) -> None: ...

    def on_finished(self, request: Any) -> None: ...


def main() -> None:
    parser = arguments("Loss and acceptance of the shipped demo pair.")
    parser.add_argument(
        "--data", type=Path, help="folder with wikitext2/valid.txt; without it the wiki domain is left out"
    )
    args = parser.parse_args()
    held = [d for d in documents(args.data) if d.held_out]
    tokenizer = tokenizers.Tokenizer.from_file(str(demo.path("demo") / "tokenizer.json"))
    with tempfile.TemporaryDirectory() as folder:
        # every document is held out, so the "training" stream needs one stand-in
        write_streams([*held, next(d for d in documents(None, 1) if not d.held_out)], tokenizer, Path(folder))
        report = evaluate_pair(
            demo.path("demo"), demo.path("demo-draft"), Path(folder), most_tokens=2048 if args.quick else 32_768
        )
    print(format_table(report) + "\n")

    counter = Counter()
    plain = LLM("demo")
    guessing = LLM(
        "demo", speculative_config={"model": "demo-draft", "num_speculative_tokens": GUESSES}, observers=[counter]
    )
    rows: list[Row] = []
    accepted: dict[str, float] = {}
    for temperature in (0.0, 0.7):
        for domain in DOMAINS:
            prompts = beginnings(held, domain, tokenizer, 1 if args.quick else 4)
            if not prompts:
                continue
            workload = f"{domain}, T={temperature}"
            say(workload)
            params = SamplingParams(temperature=temperature, max_tokens=NEW_TOKENS, ignore_eos=True, seed=0)
            contenders = {"plain decoding": rate(plain, prompts, params), "demo-draft": rate(guessing, prompts, params)}
            counter.start()
            rows += compare(
                workload,
                contenders,
                repeats=args.repeats or (2 if args.quick else 5),
                warmup=1,
                unit="tok/s",
                higher_is_better=True,
            )
            accepted[workload] = counter.accepted / max(1, counter.drafts)
    print_and_save(rows, report, accepted, args.quick)


def beginnings(held: list[Document], domain: str, tokenizer: tokenizers.Tokenizer, count: int) -> list[list[int]]:
    """The first tokens of the domain's first long documents."""
    found = []
    for document in held:
        if document.domain == domain and len(ids := tokenizer.encode(document.text).ids) > PROMPT_TOKENS:
            found.append(ids[:PROMPT_TOKENS])
        if len(found) == count:
            break
    return found


def rate(llm: LLM, prompts: list[list[int]], params: SamplingParams):
    """Tokens per second of answering the prompts one after the other."""

    def run() -> float:
        begun = time.perf_counter()
        tokens = sum(len(llm.generate([prompt], params)[0].outputs[0].token_ids) for prompt in prompts)
        return tokens / (time.perf_counter() - begun)

    return run


def print_and_save(rows: list[Row], report: dict[str, Any], accepted: dict[str, float], quick: bool) -> None:
    result = Report("models", "demo", rows)
    result.facts = {**report, "guesses": GUESSES, "accepted_per_draft": accepted}
    print(result.table())
    print("\naccepted of " + str(GUESSES) + " guesses: " + ", ".join(f"{k} {v:.2f}" for k, v in accepted.items()))
    if not quick:
        print(f"written: {result.save()}")


if __name__ == "__main__":
    main()
