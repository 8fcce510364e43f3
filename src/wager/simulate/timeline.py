"""What a simulation says: one record per request, one per node, and the numbers made of them."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from wager.errors import UsageError, WagerError

REQUEST_COLUMNS = (
    "request", "arrival_s", "prompt_tokens", "output_tokens", "admitted_s", "first_token_s", "last_token_s", "tokens",
    "restarts", "recomputed_tokens", "stages",
)  # fmt: skip


@dataclass(eq=False)
class Record:
    """A request's life. `token_s`: the time each output token reached the coordinator. `restarts`: how often its KV was lost."""

    index: int
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    admitted_s: float | None = None
    token_s: list[float] = field(default_factory=list)
    restarts: int = 0
    recomputed_tokens: int = 0
    stages: int = 0

    @property
    def first_token_s(self) -> float:
        return self.token_s[0] - self.arrival_s

    @property
    def finished(self) -> bool:
        return len(self.token_s) == self.output_tokens

    @property
    def latency_s(self) -> float:
        return self.token_s[-1] - self.arrival_s


@dataclass
class Timeline:
    """Everything that happened until `end_s`."""

    records: list[Record]
    end_s: float
    busy: dict[str, list[tuple[float, float, int]]]
    node_busy_s: dict[str, float]
    node_up_s: dict[str, float]
    kv_peak: dict[str, float]
    cost_usd: float
    events: int
    batches: int

    @property
    def finished(self) -> list[Record]:
        return [r for r in self.records if r.finished]

    def decode_tokens_per_s(self, start_s: float = 0.0, end_s: float | None = None) -> float:
        """Output tokens after each request's first, per second of the window."""
        end = self.end_s if end_s is None else end_s
        times = np.array([t for r in self.records for t in r.token_s[1:]])
        return float(((times >= start_s) & (times < end)).sum() / (end - start_s))

    def tokens_per_s(self, start_s: float = 0.0, end_s: float | None = None) -> float:
        """Prompt (counted when its first token is out) and output tokens per second of the window."""
        end = self.end_s if end_s is None else end_s
        outputs = np.array([t for r in self.records for t in r.token_s])
        prompts = sum(r.prompt_tokens for r in self.records if r.token_s and start_s <= r.token_s[0] < end)
        return float((((outputs >= start_s) & (outputs < end)).sum() + prompts) / (end - start_s))

    def first_token_latencies(self, start_s: float = 0.0) -> np.ndarray:
        return np.array([r.first_token_s for r in self.records if r.token_s and r.arrival_s >= start_s])

    def inter_token_latencies(self, start_s: float = 0.0) -> np.ndarray:
        gaps = [np.diff(r.token_s) for r in self.records if len(r.token_s) > 1 and r.arrival_s >= start_s]
        return np.concatenate(gaps) if gaps else np.zeros(0)

    def quantile(self, values: np.ndarray, q: float) -> float:
        if not len(values):
            raise WagerError("nothing was served in the window, so there is no latency to report; simulate longer")
        return float(np.quantile(values, q))

    def goodput(self, first_token_s: float, between_s: float, start_s: float = 0.0) -> float:
        """Share of the requests that arrived from `start_s` on whose first token and mean gap were in time; the unserved are not."""
        counted = [r for r in self.records if r.arrival_s >= start_s]
        good = sum(
            r.finished
            and r.first_token_s <= first_token_s
            and (r.output_tokens == 1 or (r.token_s[-1] - r.token_s[0]) / (r.output_tokens - 1) <= between_s)
            for r in counted
        )
        return good / max(1, len(counted))

    def series(self, bucket_s: float = 1.0) -> dict[str, np.ndarray]:
        """Per bucket: output tokens/s and requests admitted but not finished."""
        edges = np.arange(0, self.end_s + bucket_s, bucket_s)
        tokens, _ = np.histogram([t for r in self.records for t in r.token_s], edges)
        begun, _ = np.histogram([r.admitted_s for r in self.records if r.admitted_s is not None], edges)
        ended, _ = np.histogram([r.token_s[-1] for r in self.finished], edges)
        return {"time_s": edges[:-1], "tokens_per_s": tokens / bucket_s, "active": np.cumsum(begun) - np.cumsum(ended)}

    def summary(self, warm_up_s: float = 0.0) -> dict[str, float]:
        first, gaps = self.first_token_latencies(warm_up_s), self.inter_token_latencies(warm_up_s)
        summary: dict[str, float] = {
            "requests": len(self.records),
            "finished": len(self.finished),
            "decode_tokens_per_s": self.decode_tokens_per_s(warm_up_s),
            "tokens_per_s": self.tokens_per_s(warm_up_s),
            "cost_usd": self.cost_usd,
            "restarts": sum(r.restarts for r in self.records),
        }
        for name, values in (("first_token_s", first), ("inter_token_s", gaps)):
            if len(values):
                summary |= {f"{name}_p50": float(np.median(values)), f"{name}_p99": float(np.quantile(values, 0.99))}
        return summary


def write_requests(timeline: Timeline, path: str | Path) -> Path:
    """A line per request as .csv: times since the start, empty where it did not come so far. Raises UsageError."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w", newline="") as handle:
            out = csv.writer(handle)
            out.writerow(REQUEST_COLUMNS)
            for r in timeline.records:
                ends = (r.token_s[0], r.token_s[-1]) if r.token_s else ("", "")
                admitted = "" if r.admitted_s is None else r.admitted_s
                shape = r.index, r.arrival_s, r.prompt_tokens, r.output_tokens
                out.writerow([*shape, admitted, *ends, len(r.token_s), r.restarts, r.recomputed_tokens, r.stages])
        temporary.replace(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from None
    return path
