"""Replays recorded (prompt, response) pairs through the model-free drafters: exact greedy acceptance without any model.

A step drafts, accepts the longest root path that agrees with the recorded response, and commits one more token. A response enters the
shared tree as it is committed, never before, so nothing is predicted from its own future.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wager.errors import UsageError
from wager.serve.speculate.ngram import NGramIndex
from wager.serve.speculate.suffix import SuffixCache
from wager.serve.speculate.suffix_tree import DraftLimits, SuffixSession

Pair = tuple[str, str]
Encode = Callable[[str], list[int]]


@dataclass
class ReplayResult:
    """tokens_per_step counts the token that the target adds. update_us: per token taken in; speculate_us: per draft."""

    tokens: int = 0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    update_s: float = 0.0
    speculate_s: float = 0.0
    taken_in: int = 0

    @property
    def tokens_per_step(self) -> float:
        return self.tokens / max(self.steps, 1)

    @property
    def accept_rate(self) -> float:
        return self.accepted / max(self.drafted, 1)

    @property
    def drafted_per_step(self) -> float:
        return self.drafted / max(self.steps, 1)

    @property
    def update_us(self) -> float:
        return 1e6 * self.update_s / max(self.taken_in, 1)

    @property
    def speculate_us(self) -> float:
        return 1e6 * self.speculate_s / max(self.steps, 1)


def accepted_path(tokens: Sequence[int], parents: Sequence[int], future: Sequence[int]) -> int:
    """How many of the next tokens the tree holds as a root path."""
    node, depth = -1, 0
    while depth < len(future):
        child = next((i for i, p in enumerate(parents) if p == node and tokens[i] == future[depth]), None)
        if child is None:
            break
        node, depth = child, depth + 1
    return depth


def replay_suffix(
    pairs: Iterable[tuple[list[int], list[int]]],
    limits: DraftLimits,
    depth: int = 64,
    local: bool = True,
    shared: bool = True,
    cache: SuffixCache | None = None,
) -> ReplayResult:
    """SuffixDecoding over a stream of requests, one after another, from a cold start (or a warm `cache`).

    local: use the request's own tree; without it the prompt is still matched against earlier outputs.
    """
    result = ReplayResult()
    cache = cache or SuffixCache(depth, max_requests=-1 if shared else 0)
    for prompt, response in pairs:
        tree = cache.tree((None, None))
        session = SuffixSession(depth, tree)
        begun = time.perf_counter()
        session.extend(prompt, output=False)
        at = 0
        result.update_s += time.perf_counter() - begun
        result.taken_in += len(prompt)
        while at < len(response):
            begun = time.perf_counter()
            draft = session.speculate(limits, local=local)
            spoke = time.perf_counter()
            room = len(response) - at - 1
            accepted = min(accepted_path(draft.tokens.tolist(), draft.parents.tolist(), response[at:]), room)
            committed = response[at : at + accepted + 1]
            resumed = time.perf_counter()
            session.extend(committed, output=True)
            result.update_s += time.perf_counter() - resumed
            result.speculate_s += spoke - begun
            _count(result, len(draft.tokens), accepted)
            at += len(committed)
        if tree is not None:
            cache.finish((None, None), session.sequence, response)
    return result


def replay_ngram(
    pairs: Iterable[tuple[list[int], list[int]]], tokens: int = 5, shortest: int = 1, longest: int = 4
) -> ReplayResult:
    """Prompt look-up over the same stream."""
    result = ReplayResult()
    for prompt, response in pairs:
        index = NGramIndex(shortest, longest)
        begun = time.perf_counter()
        index.extend(prompt)
        result.update_s += time.perf_counter() - begun
        result.taken_in += len(prompt)
        at = 0
        while at < len(response):
            begun = time.perf_counter()
            draft = index.continuation(tokens)
            spoke = time.perf_counter()
            accepted = min(accepted_path(draft, range(-1, len(draft) - 1), response[at:]), len(response) - at - 1)
            resumed = time.perf_counter()
            index.extend(response[at : at + accepted + 1])
            result.update_s += time.perf_counter() - resumed
            result.speculate_s += spoke - begun
            _count(result, len(draft), accepted)
            at += accepted + 1
    return result


def _count(result: ReplayResult, drafted: int, accepted: int) -> None:
    result.steps += 1
    result.tokens += accepted + 1
    result.taken_in += accepted + 1
    result.drafted += drafted
    result.accepted += accepted


# -- recorded pairs --------------------------------------------------------------------------------------------------------------


def read_pairs(path: str | Path) -> list[tuple[str, str, str]]:
    """(group, prompt, response) of a JSONL file of conversations (`turns` with roles), text-to-SQL rows, or prompt/response rows.

    In a conversation every assistant turn is a response to everything before it.
    """
    pairs: list[tuple[str, str, str]] = []
    try:
        lines = Path(path).read_text().splitlines()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            raise UsageError(f"line {number} of {path} is not JSON") from None
        pairs += _pairs_of(row, f"line {number} of {path}")
    return pairs


def _pairs_of(row: dict[str, Any], where: str) -> list[tuple[str, str, str]]:
    if "sql" in row:
        answer = row["sql"].split(";")[0]
        return [(row.get("db_name", ""), f"{row['question']}\n{row.get('instructions', '')}", answer)]
    if "response" in row:
        return [(row.get("group", ""), row["prompt"], row["response"])]
    if row.get("turns") and isinstance(row["turns"][0], dict):
        pairs, before = [], ""
        for turn in row["turns"]:
            if turn["role"] == "assistant" and before:
                pairs.append((row.get("trace", ""), before, turn["text"]))
            before += turn["text"] + "\n"
        return pairs
    raise UsageError(f"{where} has neither turns with roles, sql, nor response")


PIECES = re.compile(r"[A-Za-z]{1,6}|[0-9]{1,3}|\s+|[^A-Za-z0-9\s]")


class PieceEncoder:
    """Words cut into pieces of at most six letters: a tokenizer that needs no file. Numbers are given as pieces come."""

    def __init__(self):
        self.numbers: dict[str, int] = {}

    def __call__(self, text: str) -> list[int]:
        return [self.numbers.setdefault(piece, len(self.numbers)) for piece in PIECES.findall(text)]


def encoded(
    pairs: Sequence[tuple[str, str, str]], encode: Encode, prompt_tail: int = 1200
) -> list[tuple[list[int], list[int]]]:
    """Token ids, prompts cut to their last `prompt_tail` tokens; empty responses are left out."""
    made = [(encode(prompt)[-prompt_tail:], encode(response)) for _, prompt, response in pairs]
    return [pair for pair in made if pair[1]]


def shuffled(pairs: Sequence[Any], seed: int = 0) -> list[Any]:
    order = np.random.default_rng(seed).permutation(len(pairs))
    return [pairs[i] for i in order]
