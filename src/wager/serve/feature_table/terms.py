"""What the rows of all branches are written with: degrees of exactness, the files of tests, a row of what is absent."""

from __future__ import annotations

from wager.serve.features import Exactness, Feature

EXACT, SAME, APPROX, NONE = Exactness.EXACT, Exactness.DISTRIBUTION, Exactness.APPROXIMATE, Exactness.NONE

ENGINE = "tests/serve/test_engine.py::"
ASYNC = "tests/serve/test_async_llm.py::"
RUNNER = "tests/serve/test_runner.py::"
BLOCKS = "tests/serve/cache/test_block_manager.py::"
SCHEDULER = "tests/serve/schedule/test_continuous.py::"
SAMPLER = "tests/serve/sampling/test_sampler.py::"
GRAMMAR = "tests/serve/sampling/test_grammar.py::"
VERIFY = "tests/serve/speculate/test_verify.py::"
DETOKENIZE = "tests/serve/text/test_detokenize.py::"
TEMPLATE = "tests/serve/text/test_chat_template.py::"
LOADER = "tests/models/test_loader.py::"
LORA = "tests/serve/test_lora.py::"
LATER = "to come as a system of its own, see `wager systems`"
TOOLS = "tests/serve/text/test_tools.py::"
CLIENT = "tests/serve/http/test_openai_client.py::"
FAMILIES = "tests/models/test_families.py::test_family"
DEPLOY = "tests/cluster/deploy/"
NATIVE = "tests/kernels/test_native.py::"
METHODS = "tests/serve/speculate/test_methods.py::"
LAW = "tests/serve/speculate/test_law.py::"
SUFFIX = "tests/serve/speculate/test_suffix_tree.py::"


def absent(id_: str, branch: str, title: str, why: str) -> Feature:
    return Feature(id_, branch, title, note=why)
