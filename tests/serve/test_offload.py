"""A model streamed through a ring of buffers computes the same bits, reads each layer once per pass, and says when reading fails."""

import gc
import os
import threading
import time

import pytest

from tests.serve.conftest import build_llama
from wager.errors import UsageError, WagerError
from wager.serve.llm import LLM
from wager.serve.params import SamplingParams

PROMPTS = [[5, 9, 300, 17], [44] * 20, list(range(100, 133))]
PARAMS = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=1)


@pytest.fixture(scope="module")
def deep_dir(tmp_path_factory):
    return build_llama(tmp_path_factory.mktemp("deep"), num_hidden_layers=5)


@pytest.fixture(scope="module")
def expected(deep_dir):
    return [o.outputs[0] for o in LLM(str(deep_dir)).generate(PROMPTS, PARAMS)]


def ring_of(llm):
    return llm.engine.core.runner.model.layer_ring


@pytest.mark.parametrize("slots", [2, 3, 5])
def test_streamed_layers_compute_the_same_bits(slots, deep_dir, expected):
    llm = LLM(str(deep_dir), offload_layers=slots)
    for ours, theirs in zip(llm.generate(PROMPTS, PARAMS), expected, strict=True):
        assert ours.outputs[0].token_ids == theirs.token_ids
        for a, b in zip(ours.outputs[0].logprobs, theirs.logprobs, strict=True):
            assert {t: e.logprob for t, e in a.items()} == {t: e.logprob for t, e in b.items()}
    ring = ring_of(llm)
    assert ring.stats.passes * 5 <= ring.stats.layers_read <= (ring.stats.passes + 1) * 5
    assert ring.resident_bytes <= slots * (ring.file_bytes // 5 + 4096)


def test_a_slow_or_jittery_reader_changes_nothing(deep_dir, expected, monkeypatch):
    """Slots are never overwritten while in use, whatever the reader's timing."""
    real, calls = os.preadv, []

    def jittery(fd, buffers, offset):
        calls.append(offset)
        time.sleep(0.004 * (len(calls) % 3))
        return real(fd, buffers, offset)

    llm = LLM(str(deep_dir), offload_layers=2)
    monkeypatch.setattr(os, "preadv", jittery)
    assert [o.outputs[0].token_ids for o in llm.generate(PROMPTS, PARAMS)] == [e.token_ids for e in expected]
    assert len(calls) > 20


def test_a_failed_read_reaches_the_caller(deep_dir, monkeypatch):
    llm = LLM(str(deep_dir), offload_layers=2)
    llm.generate(PROMPTS[0], PARAMS)

    def broken(fd, buffers, offset):
        raise OSError("disk on fire")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(WagerError, match="disk on fire"):
        llm.generate(PROMPTS[0], PARAMS)


def test_a_throttled_reader_is_as_slow_as_asked(deep_dir):
    llm = LLM(str(deep_dir), offload_layers=2)
    rate = 20 * ring_of(llm).file_bytes  # twenty passes a second
    llm = LLM(str(deep_dir), offload_layers=2, offload_bytes_per_s=rate)
    begun = time.perf_counter()
    llm.generate(PROMPTS[0], PARAMS)
    assert time.perf_counter() - begun >= 11 / 20


def test_speculation_over_streamed_layers(deep_dir, expected):
    config = {"method": "specexec", "draft": str(deep_dir), "budget": 24, "beams": 4, "max_depth": 6, "auto": False}
    llm = LLM(str(deep_dir), offload_layers=2, speculative_config=config)
    assert [o.outputs[0].token_ids for o in llm.generate(PROMPTS, PARAMS)] == [e.token_ids for e in expected]
    assert ring_of(llm).stats.passes <= 9


def test_the_file_and_the_reader_end_with_the_engine(deep_dir, tmp_path):
    """The file has no name while it is read, so that nothing is left of it even when the process is killed."""
    path = tmp_path / "layers.bin"
    llm = LLM(str(deep_dir), offload_layers=2, offload_file=str(path))
    llm.generate(PROMPTS[0], PARAMS)
    ring = ring_of(llm)
    file = os.fstat(ring._fd)
    assert (file.st_nlink, file.st_size, path.exists()) == (0, ring.file_bytes, False)
    before, descriptor = threading.active_count(), ring._fd
    ring.close()
    assert threading.active_count() < before
    with pytest.raises(OSError):
        os.fstat(descriptor)
    del llm
    gc.collect()


def test_a_file_that_exists_is_not_overwritten(deep_dir, tmp_path):
    path = tmp_path / "layers.bin"
    path.write_text("mine")
    with pytest.raises(UsageError, match=r"layers\.bin exists"):
        LLM(str(deep_dir), offload_layers=2, offload_file=str(path))
    assert path.read_text() == "mine"


@pytest.mark.parametrize("slots", [1, 9])
def test_impossible_rings_are_refused(slots, deep_dir):
    with pytest.raises(UsageError, match=rf"\[2, 5\].*{slots}"):
        LLM(str(deep_dir), offload_layers=slots)
