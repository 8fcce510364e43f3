"""`python -m wager.serve.parallel.tensor_worker FD`: one process of a tensor-parallel target, started by the engine. See `tensor.py`."""

import signal
import sys
from multiprocessing.connection import Connection

from wager.serve.parallel.tensor import work

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C stops the engine, which then closes the pipe
    work(Connection(int(sys.argv[1])))
