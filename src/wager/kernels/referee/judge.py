"""The verdict on one candidate: static check, correctness, conduct, then speed, each case with the baseline beside it."""

from __future__ import annotations

import json
import random
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wager.kernels.referee import oracle, static_check
from wager.kernels.referee.capture import Case
from wager.kernels.referee.process import Worker, WorkerFailed

ROUNDS = ((200, 1.0), (201, 3.0), (202, 1 / 16))  # seed and magnitude of the inputs
TOP_BANDWIDTH = 4e11  # bytes a second that no memory of one processor delivers: a faster call did not read its inputs
FAST_CALL_S = 2e-6
LEAST_CHECKED = 2  # timed calls of a round whose outputs are compared with the oracle; all of them where inputs and weights are small
CHECKED_ELEMENTS = 1 << 22
CLOCK_FACTOR, CLOCK_GRACE_S = (
    4.0,
    1.0,
)  # how much longer our clock may see than the worker's: busy machines deliver messages late


class Status(StrEnum):
    PASSED = "PASSED"
    INCORRECT_NUMERICAL = "INCORRECT_NUMERICAL"
    INCORRECT_SHAPE = "INCORRECT_SHAPE"
    INCORRECT_DTYPE = "INCORRECT_DTYPE"
    RUNTIME_ERROR = "RUNTIME_ERROR"
    REWARD_HACK = "REWARD_HACK"
    SKIPPED = "SKIPPED"


@dataclass(frozen=True)
class Options:
    """`rounds` of `iterations` timed calls alternate between baseline and candidate; `library` allows the framework's operators."""

    iterations: int = 10
    rounds: int = 3
    warmup: int = 3
    threads: int = 1
    library: bool = True
    timeout_s: float = 60.0
    flush_bytes: int = 64 << 20
    timing: bool = True
    compiled: bool = False  # also time torch.compile of the baseline


DEFAULTS = Options()


@dataclass(frozen=True)
class CaseResult:
    """`error` is the largest deviation in units of what is allowed. Times are medians in seconds, cold cache."""

    label: str
    held_out: bool
    status: Status
    reason: str = ""
    error: float | None = None
    baseline_s: float | None = None
    candidate_s: float | None = None
    noise: float | None = None
    compiled_s: float | None = None

    @property
    def speedup(self) -> float | None:
        return None if not (self.baseline_s and self.candidate_s) else self.baseline_s / self.candidate_s

    @property
    def compiled_speedup(self) -> float | None:
        """Against torch.compile of the baseline."""
        return None if not (self.compiled_s and self.candidate_s) else self.compiled_s / self.candidate_s


@dataclass(frozen=True)
class Verdict:
    """A candidate's result on one operator; `speedup` is the geometric mean over its timed cases."""

    operator: str
    source: str
    status: Status
    reason: str = ""
    cases: list[CaseResult] = field(default_factory=list)

    @property
    def speedup(self) -> float | None:
        speedups = [c.speedup for c in self.cases if c.status is Status.PASSED and c.speedup]
        return statistics.geometric_mean(speedups) if speedups and self.status is Status.PASSED else None

    @property
    def compiled_speedup(self) -> float | None:
        speedups = [c.compiled_speedup for c in self.cases if c.status is Status.PASSED and c.compiled_speedup]
        return statistics.geometric_mean(speedups) if speedups and self.status is Status.PASSED else None

    def as_dict(self) -> dict:
        cases = [{**asdict(c), "speedup": c.speedup, "compiled_speedup": c.compiled_speedup} for c in self.cases]
        return {**asdict(self), "speedup": self.speedup, "compiled_speedup": self.compiled_speedup, "cases": cases}


class Bench:
    """A folder, and one process each for the candidate and for the baseline, for all cases of an operator."""

    def __init__(self, options: Options):
        self.options, self._stack = options, ExitStack()
        self.loaded: list[Worker] = []

    def __enter__(self) -> Bench:
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="wager-judge-")))
        return self

    @cached_property
    def candidate(self) -> Worker:
        return self._start("candidate")

    @cached_property
    def compiled(self) -> Worker:
        return self._start("compiled")

    @cached_property
    def baseline(self) -> Worker:
        return self._start("baseline")

    def _start(self, name: str) -> Worker:
        return self._stack.enter_context(
            Worker(self.options.timeout_s, self.options.threads, self.folder / f"{name}.log")
        )

    def __exit__(self, *exc: object) -> None:
        self._stack.close()


class Rejected(Exception):
    def __init__(self, status: Status, reason: str):
        super().__init__(reason)
        self.status, self.reason = status, reason


def judge(
    operator: str, source: Path | None, timed: Sequence[Case], held: Sequence[Case], options: Options = Options()
) -> Verdict:
    """Judge the class `operator` of a file; None judges the baseline against itself. The first failing case decides."""
    name = "baseline" if source is None else str(source)
    if source is not None:
        try:
            complaints = static_check.check(source.read_text(), operator, options.library)
        except (SyntaxError, OSError, UnicodeDecodeError) as error:
            return Verdict(operator, name, Status.RUNTIME_ERROR, f"cannot be read: {error}")
        if complaints:
            return Verdict(operator, name, Status.REWARD_HACK, "; ".join(map(str, complaints)))
    return judge_dynamically(operator, source, timed, held, options)


def judge_dynamically(
    operator: str, source: Path | None, timed: Sequence[Case], held: Sequence[Case], options: Options
) -> Verdict:
    """The same without reading the source."""
    results = []
    with Bench(options) as bench:
        for case in (*timed, *held):
            results.append(_judge_case(case, source, bench))
            if results[-1].status not in (Status.PASSED, Status.SKIPPED):
                break
    last = results[-1] if results else None
    status, reason = (Status.SKIPPED, "no case was captured") if last is None else (last.status, last.reason)
    if results and all(r.status in (Status.PASSED, Status.SKIPPED) for r in results):
        passed = any(r.status is Status.PASSED for r in results)
        status, reason = (Status.PASSED, "") if passed else (Status.SKIPPED, results[0].reason)
    return Verdict(operator, "baseline" if source is None else str(source), status, reason, results)


def _judge_case(case: Case, source: Path | None, bench: Bench) -> CaseResult:
    try:
        error = _correctness(case, source, bench)
        if error is None:
            return CaseResult(
                case.label,
                case.held_out,
                Status.SKIPPED,
                "the baseline itself rejects the inputs or is not right on them",
            )
        if case.held_out or not bench.options.timing:
            return CaseResult(case.label, case.held_out, Status.PASSED, error=error)
        times = _speed(case, bench)
    except Rejected as rejection:
        return CaseResult(case.label, case.held_out, rejection.status, rejection.reason)
    except WorkerFailed as failure:
        status = Status.REWARD_HACK if "wager.kernels.referee" in str(failure) else Status.RUNTIME_ERROR
        return CaseResult(case.label, case.held_out, status, str(failure))
    return CaseResult(case.label, case.held_out, Status.PASSED, "", error, **times)


def _build(worker: Worker, case: Case, source: Path | None, state: dict[str, Tensor], bench: Bench, seed: int) -> None:
    """A module with these parameters in the worker; its source is loaded once, before the first."""
    path = bench.folder / f"state{seed}.pt"
    torch.save(state, path)
    if worker not in bench.loaded:
        bench.loaded.append(worker)
        name = None if source is None else str(source.resolve())
        compiled = bench.options.compiled and worker is bench.compiled
        worker.call(
            "load", source=name, operator=case.operator, flush_bytes=bench.options.flush_bytes, compiled=compiled
        )
    worker.call("build", init=case.init, state=str(path), seed=seed)


def _correctness(case: Case, source: Path | None, bench: Bench) -> float | None:
    """Largest error over rounds with fresh parameters, values and magnitudes; None when no round is fit to judge by."""
    worst, judged, worker, folder = 0.0, 0, bench.candidate, bench.folder
    for seed, scale in ROUNDS:
        inputs, state = case.make_inputs(seed, scale), oracle.make_state(case, seed)
        wanted = _expectation(case, state, inputs)
        if wanted is None:
            continue
        _build(worker, case, source, state, bench, seed)
        torch.save(inputs, folder / "inputs.pt")
        seen = []
        for attempt in range(2 if scale == 1.0 else 1):
            reply = worker.call("run", inputs=str(folder / "inputs.pt"), outputs=str(folder / f"out{attempt}"), seed=7)
            if reply["hack"]:
                raise Rejected(Status.REWARD_HACK, reply["hack"])
            seen.append(_read(reply["outputs"], folder, wanted))
            worst = max(worst, _measure(seen[-1], wanted, f"magnitude {scale:g}"))
        if len(seen) == 2 and not all(torch.equal(a, b) for a, b in zip(*seen, strict=True)):
            raise Rejected(Status.INCORRECT_NUMERICAL, "two runs on the same inputs differ")
        judged += 1
    return worst if judged else None


def _expectation(case: Case, state: dict[str, Tensor], inputs: Sequence[Tensor | None]) -> oracle.Expectation | None:
    """None where the baseline raises, gives zeros only, or is itself outside the bound: no basis for a verdict."""
    module = oracle.baseline_class(case.operator)(**case.init)
    module.load_state_dict(state)
    try:
        wanted = oracle.expect(case, state, inputs)
        with torch.no_grad():
            own = wanted.worst(oracle.flatten(module(*inputs)))
    except (RuntimeError, ValueError, IndexError):
        return None
    alive = any(bool(y.any()) for y in wanted.outputs)
    return wanted if own <= 1 and alive else None


def _read(entries: list[dict], folder: Path, wanted: oracle.Expectation) -> list[Tensor]:
    if len(entries) != len(wanted.outputs):
        raise Rejected(Status.INCORRECT_SHAPE, f"{len(entries)} outputs instead of {len(wanted.outputs)}")
    outputs = []
    for entry, want, dtype in zip(entries, wanted.outputs, wanted.dtypes, strict=True):
        if entry["dtype"] != str(dtype).removeprefix("torch."):
            raise Rejected(Status.INCORRECT_DTYPE, f"{entry['dtype']} instead of {dtype}")
        array = np.load(folder / Path(entry["file"]).name, allow_pickle=False)
        if list(array.shape) != list(want.shape):
            raise Rejected(Status.INCORRECT_SHAPE, f"{list(array.shape)} instead of {list(want.shape)}")
        tensor = torch.from_numpy(array)
        outputs.append(tensor.view(torch.bfloat16) if dtype == torch.bfloat16 else tensor)
    return outputs


def _measure(outputs: list[Tensor], wanted: oracle.Expectation, where: str) -> float:
    worst = wanted.worst(outputs)
    if worst > 1:
        raise Rejected(Status.INCORRECT_NUMERICAL, f"error is {worst:.3g} times what rounding explains ({where})")
    return worst


def _speed(case: Case, bench: Bench) -> dict[str, float]:
    """Median seconds of baseline and candidate over alternating rounds, and the baseline's A/A noise. Timed outputs are checked too."""
    rng, folder, options = random.SystemRandom(), bench.folder, bench.options
    seed = rng.randrange(1 << 30)
    inputs, state = case.make_inputs(seed), oracle.make_state(case, 203)
    torch.save(inputs, folder / "timed.pt")
    times: dict[str, list[float]] = {"candidate": [], "baseline": [], "again": []}
    _build(bench.baseline, case, None, state, bench, 203)
    _build(bench.candidate, case, None, state, bench, 203)
    runs = [("baseline", bench.baseline), ("candidate", bench.candidate), ("again", bench.baseline)]
    if options.compiled:
        _build(bench.compiled, case, None, state, bench, 203)
        runs, times["compiled"] = [*runs, ("compiled", bench.compiled)], []
    for _ in range(options.rounds):
        for name, worker in runs:
            factors = [rng.uniform(0.9, 1.0) for _ in range(options.iterations)]
            reply = worker.call(
                "time",
                inputs=str(folder / "timed.pt"),
                factors=factors,
                warmup=options.warmup,
                outputs=str(folder / f"timed-{name}"),
            )
            if name == "candidate":
                _check_timed(case, reply, worker.window_s, inputs, state, factors, folder, rng)
            times[name] += reply["seconds"]
    medians = {name: statistics.median(values) for name, values in times.items()}
    if too_fast(medians["candidate"], sum(t.nbytes for t in inputs if t is not None)):
        raise Rejected(Status.REWARD_HACK, f"{medians['candidate']:.2g} s is faster than memory delivers the inputs")
    found = {
        "baseline_s": statistics.median(times["baseline"] + times["again"]),
        "candidate_s": medians["candidate"],
        "noise": abs(medians["baseline"] / medians["again"] - 1),
    }
    return found | ({"compiled_s": medians["compiled"]} if options.compiled else {})


def too_fast(seconds: float, moved_bytes: int) -> bool:
    """Whether a call claims to have read its inputs faster than any memory delivers them: a roofline floor for every single case."""
    return seconds < min(moved_bytes / TOP_BANDWIDTH, FAST_CALL_S if moved_bytes > 1 << 20 else 0)


def _check_timed(
    case: Case, reply: dict, window_s: float, inputs: Sequence[Tensor | None], state: dict[str, Tensor], factors: list[float], folder: Path,
    rng: random.Random,
) -> None:  # fmt: skip
    if reply["hack"]:
        raise Rejected(Status.REWARD_HACK, reply["hack"])
    if window_s > CLOCK_FACTOR * reply["loop_s"] + CLOCK_GRACE_S or reply["loop_s"] < sum(reply["seconds"]):
        raise Rejected(Status.REWARD_HACK, f"claims {reply['loop_s']:.3g} s where our clock saw {window_s:.3g} s")
    elements = sum(t.numel() for t in (*inputs, *state.values()) if t is not None)
    count = min(len(factors), max(LEAST_CHECKED, CHECKED_ELEMENTS // max(1, elements)))
    for i in rng.sample(range(len(factors)), count):
        scaled = [t * factors[i] if t is not None and t.dtype.is_floating_point else t for t in inputs]
        wanted = oracle.expect(case, state, scaled)
        try:
            _measure(_read(reply["outputs"][i], folder, wanted), wanted, "in a timed call")
        except Rejected as rejection:
            raise Rejected(Status.REWARD_HACK, f"right when asked, wrong when timed: {rejection.reason}") from None


def save_verdicts(verdicts: Sequence[Verdict], path: Path, score: dict | None = None) -> None:
    """Whole or not at all."""
    record = {"version": 1, "verdicts": [v.as_dict() for v in verdicts]} | ({} if score is None else {"score": score})
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1, default=str) + "\n")
    temporary.replace(path)
