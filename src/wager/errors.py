"""The errors a user of wager may see. Every message says what was wrong, where, and what to do."""


class WagerError(Exception):
    """Base of every error raised on purpose; the command line prints it in one line and exits 1."""


class UsageError(WagerError):
    """The caller asked for something malformed; the command line exits 2, the server answers 400."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.param = param
        self.code = code


class CheckpointError(WagerError):
    """A checkpoint cannot be read: unsupported architecture, missing tensor, wrong shape, damaged file."""


class CapacityError(WagerError):
    """A bounded resource (queue, KV cache, memory budget) is exhausted; retrying later may help."""

    def __init__(self, message: str, *, retry_after_s: float | None = None):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class BuildError(WagerError):
    """Native code cannot be compiled or loaded on this machine."""
