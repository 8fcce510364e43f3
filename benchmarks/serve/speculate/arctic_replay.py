"""Runs in arctic-inference's own environment: reads a job from stdin, replays it, prints tokens per step and microseconds per draft."""

import json
import sys
import time

import numpy as np
from arctic_inference.suffix_decoding import SuffixDecodingCache  # pyright: ignore[reportMissingImports]


def replay(stream, depth, factor, most):
    cache = SuffixDecodingCache(max_tree_depth=depth)
    steps = tokens = 0
    spent = 0.0
    for number, (prompt, response) in enumerate(stream):
        cache.start_request(number, np.array(prompt, dtype=np.int32))
        text = np.array(prompt + response, dtype=np.int32)
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
            cache.add_active_response(number, text[end : end + accepted + 1])
            at += accepted + 1
            steps += 1
            tokens += accepted + 1
        cache.stop_request(number)
    return tokens / steps, 1e6 * spent / steps


def main():
    job = json.load(sys.stdin)
    runs = [replay(job["stream"], job["depth"], job["factor"], job["most"]) for _ in range(job["repeats"])]
    print(json.dumps({"tokens_per_step": runs[0][0], "speculate_us": [us for _, us in runs]}))


if __name__ == "__main__":
    main()
