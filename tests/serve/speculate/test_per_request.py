"""Speculation as a client chooses it: an HTTP field per request, a list of methods on the command line, weights streamed within a budget."""

import httpx
import pytest

from tests.serve.conftest import build_llama
from tests.serve.http.conftest import serving
from tests.serve.http.test_metrics import samples
from wager.errors import UsageError
from wager.serve.cli import _json_option
from wager.serve.http.settings import ServerSettings
from wager.serve.llm import LLM
from wager.serve.params import SamplingParams
from wager.serve.speculate.speculator import Speculator

PROMPT = [7, 8, 9] * 6


def completion(url, **fields):
    body = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0, "ignore_eos": True, **fields}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=60)


def counters(url):
    return {
        name: value for name, value in samples(url).items() if name.startswith("spec_decode") and "created" not in name
    }


def test_a_request_chooses_its_method_over_http(tiny_dir, tiny_draft_dir, monkeypatch):
    """Each body's field reaches the drafter it names; the text is the same; "none" verifies nothing."""
    used = []
    real = Speculator.propose

    def spy(self, spans, num_running):
        trees = real(self, spans, num_running)
        used.extend(self._pending[request] for request in trees)
        return trees

    monkeypatch.setattr(Speculator, "propose", spy)
    config = [
        {"method": "suffix", "auto": False, "suffix_max_spec_factor": 2.0},
        {"method": "sequoia", "draft": str(tiny_draft_dir), "tree": [-1, -1, 0], "auto": False},
    ]
    with serving(tiny_dir, ServerSettings(drain_s=5), speculative_config=config) as (url, _):
        texts = set()
        for field, expected in (({}, "suffix"), ({"speculative_method": "sequoia"}, "sequoia")):
            used.clear()
            texts.add(completion(url, **field).json()["choices"][0]["text"])
            assert set(used) == {expected}
        before = counters(url)
        counted = ("drafts", "draft_tokens", "accepted_tokens", "accepted_tokens_per_pos")
        assert {f"spec_decode_num_{name}_total" for name in counted} <= before.keys()
        assert before["spec_decode_num_drafts_total"] > 0 and before["spec_decode_num_draft_tokens_total"] > 0
        used.clear()
        texts.add(completion(url, speculative_method="none").json()["choices"][0]["text"])
        chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "speculative_method": "none"}
        assert httpx.post(f"{url}/v1/chat/completions", json=chat, timeout=60).status_code == 200
        assert not used and counters(url) == before and len(texts) == 1
        refused = completion(url, speculative_method="ngram")
        assert refused.status_code == 400 and "suffix, sequoia, none" in refused.text
        assert refused.json()["error"]["param"] == "speculative_method"


def test_the_command_line_takes_one_method_or_a_list():
    assert _json_option('{"method": "suffix"}', "speculative-config") == {"method": "suffix"}
    assert _json_option('[{"method": "suffix"}, {"method": "ngram"}]', "speculative-config")[1] == {"method": "ngram"}
    for wrong in ("[]", "[1]", "3", '"suffix"'):
        with pytest.raises(UsageError, match="speculative-config must be"):
            _json_option(wrong, "speculative-config")


# -- weights within a budget -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deep_dir(tmp_path_factory):
    return build_llama(tmp_path_factory.mktemp("deep"), num_hidden_layers=4)


def test_a_budget_in_bytes_decides_how_many_layers_are_held(deep_dir):
    params = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
    expected = LLM(str(deep_dir)).generate(PROMPT, params)[0].outputs[0].token_ids
    whole = LLM(str(deep_dir), offload_layers=2).engine.core.runner.model.layer_ring
    layer = whole.file_bytes // 4
    for budget, slots in ((2 * layer, 2), (f"{3 * layer + 1}", 3), (4 * layer - 1, 3)):
        llm = LLM(str(deep_dir), offload_memory=budget)
        ring = llm.engine.core.runner.model.layer_ring
        assert ring.slots == slots and ring.resident_bytes <= int(budget)
        assert llm.generate(PROMPT, params)[0].outputs[0].token_ids == expected
        assert ring.stats.passes >= 10
    everything = LLM(str(deep_dir), offload_memory=4 * layer).engine.core.runner.model
    assert getattr(everything, "layer_ring", None) is None
    with pytest.raises(UsageError, match=rf"holds 1 of .*at least {2 * layer}"):
        LLM(str(deep_dir), offload_memory=2 * layer - 1)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"offload_memory": 0}, "offload_memory"),
        ({"offload_memory": "many"}, "many"),
        ({"offload_memory": "1MB", "offload_layers": 2}, "not both"),
        ({"offload_file": "x.bin"}, "needs offload_memory"),
        ({"offload_memory": "1MB", "offload_bytes_per_s": -1.0}, "above 0"),
    ],
)
def test_offload_options_that_say_nothing_are_refused(options, names):
    with pytest.raises(UsageError, match=names):
        LLM("demo", **options)
