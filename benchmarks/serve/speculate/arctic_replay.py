"""Runs in arctic-inference's own environment: reads a job from stdin, replays it whenever asked, prints tokens per step and microseconds per draft
and per token taken in (prompts and outputs)."""

import json
import sys
import time

import numpy as np
from arctic_inference.suffix_decoding import SuffixDecodingCache  # pyright: ignore[reportMissingImports]


def replay(stream, depth, factor, most):
    cache = SuffixDecodingCache(max_tree_depth=depth)
    steps = tokens = taken_in = 0
    spent = updating = 0.0
    for number, (prompt, response) in enumerate(stream):
        text = np.array(prompt + response, dtype=np.int32)
        begun = time.perf_counter()
        cache.start_request(number, text[: len(prompt)])
        updating += time.perf_counter() - begun
        at = 0
        while at < len(response):
            end = len(prompt) + at
            context = text[max(0, end - depth) : end]
            begun = time.perf_counter()
            draft = cache.speculate(number, context, max_spec_tokens=most, max_spec_factor=factor, min_token_prob=0.1)
            spent += time.perf_counter() - begun
            accepted, room = 0, len(response) - at - 1
            while accepted < min(len(draft.token_ids), room) and draft.token_ids[accepted] == response[at + accepted]:
                accepted += 1
            begun = time.perf_counter()
            cache.add_active_response(number, text[end : end + accepted + 1])
            updating += time.perf_counter() - begun
            at += accepted + 1
            steps += 1
            tokens += accepted + 1
        cache.stop_request(number)
        taken_in += len(text)
    return tokens / steps, 1e6 * spent / steps, 1e6 * updating / taken_in


def main():
    """The first line is the job; every further line asks for one more replay."""
    job = json.loads(sys.stdin.readline())
    for _ in sys.stdin:
        tokens_per_step, speculate_us, update_us = replay(job["stream"], job["depth"], job["factor"], job["most"])
        found = {"tokens_per_step": tokens_per_step, "speculate_us": speculate_us, "update_us": update_us}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
