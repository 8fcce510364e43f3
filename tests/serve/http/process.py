"""`wager serve` as a process of its own."""

import re
import subprocess
import sys
from contextlib import contextmanager


@contextmanager
def started(model_dir, *options):
    """(base URL, process) of `wager serve`, ready."""
    command = [
        sys.executable,
        "-m",
        "wager",
        "serve",
        str(model_dir),
        "--port",
        "0",
        "--served-model-name",
        "tiny",
        *options,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        url = re.search(r"http://\S+?:\d+", process.stdout.readline())[0]
        while "ready" not in process.stdout.readline():
            assert process.poll() is None, process.stderr.read()
        yield url, process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()
