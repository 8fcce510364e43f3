"""Throw schemathesis at the server's OpenAPI: no request may be answered with 5xx, and every 4xx must carry our error shape.

    python -m benchmarks.serve.fuzz_api [--model demo] [--examples 100] [--quick]

Exit 1 when a check failed; schemathesis prints the request that did it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.harness import arguments
from benchmarks.serve.server import Server

HOOKS = "benchmarks.serve.error_shape"
# Streams of server-sent events and the drain of the cache are driven by the tests; here every body counts.
CHECKS = "not_a_server_error,error_shape"


def main() -> None:
    parser = arguments("schemathesis against the OpenAPI of `wager serve`.", repeats=False)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--examples", type=int, default=100, help="test cases per operation")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    examples = 5 if args.quick else args.examples
    with Server(args.model, ["--max-model-len", "256"]) as server:
        command = [
            str(Path(sys.executable).with_name("schemathesis")), "run", f"{server.url}/openapi.json",
            "--checks", CHECKS, "--mode", "all", "--max-examples", str(examples), "--seed", str(args.seed),
            "--phases", "examples,coverage,fuzzing", "--request-timeout", "120", "--continue-on-failure",
            "--suppress-health-check", "all",
        ]  # fmt: skip
        environment = {**os.environ, "SCHEMATHESIS_HOOKS": HOOKS, "PYTHONPATH": os.pathsep.join(sys.path)}
        status = subprocess.run(command, env=environment).returncode
        healthy = server.wait_until_ready() is not None
    sys.exit(status or (0 if healthy else 1))


if __name__ == "__main__":
    main()
