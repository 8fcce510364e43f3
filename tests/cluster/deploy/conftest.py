import pytest

from wager.cluster.deploy.engine import deploy_engine, run_all, stage_layers
from wager.cluster.deploy.process import LocalLauncher
from wager.serve.config import EngineConfig
from wager.serve.llm import LLM
from wager.serve.params import SamplingParams

OPTIONS = dict(max_num_seqs=4, max_model_len=96, skip_tokenizer_init=True, kv_cache_memory=2_000_000)
TOKENS = 24
PROMPTS = [[5, 6, 7, 8] * 5, [100, 200, 300], [9, 8, 7, 6, 5] * 4]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True),
    SamplingParams(temperature=1.0, seed=3, max_tokens=TOKENS, ignore_eos=True),
    SamplingParams(temperature=0.7, top_p=0.9, frequency_penalty=0.5, seed=9, max_tokens=TOKENS, ignore_eos=True),
]


@pytest.fixture(scope="session")
def undisturbed():
    """What one process generates."""
    return [o.outputs[0].token_ids for o in LLM("demo", **OPTIONS).generate(PROMPTS, PARAMS)]


@pytest.fixture(scope="session")
def local_pipeline():
    """Two stages in processes of this machine, shared by the tests of this folder: each leaves it working."""
    launcher = LocalLauncher()
    engine, replica = deploy_engine(EngineConfig(model="demo", **OPTIONS), stage_layers(5, 2), launcher)
    yield engine, replica
    replica.close()
    launcher.close()


def tokens_of(outputs):
    return [o.outputs[0].token_ids for o in outputs]


def generate(engine, on_output=None):
    return tokens_of(run_all(engine, PROMPTS, PARAMS, on_output))
