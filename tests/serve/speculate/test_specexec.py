"""SpecExec in the engine: how deep its trees reach, and how it learns what the draft's probabilities are worth."""

import numpy as np
import pytest

from wager.serve.llm import LLM
from wager.serve.params import SamplingParams
from wager.serve.speculate.specexec import TEMPERATURES, Calibration, Proposed, at_temperature

PROMPTS = ["def main(argv):\n", "import os\n\n\nclass Node:\n", "The history of the city begins with"]


class Steps:
    """Counts the target's passes."""

    def __init__(self):
        self.steps = 0

    def on_step(self, record):
        self.steps += record.decode_tokens

    def on_tokens(self, request, num_new_tokens, now_s): ...

    def on_finished(self, request): ...


def run(draft, **options):
    counter = Steps()
    config = {"method": "specexec", "draft": draft, "budget": 12, "max_depth": 10, "auto": False, **options}
    llm = LLM("demo", max_model_len=256, speculative_config=config, observers=[counter])
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    texts = [o.outputs[0].token_ids for o in llm.generate(PROMPTS, params)]
    return counter.steps, texts, llm.engine.core.speculator.drafters["specexec"]


def test_greedy_requests_follow_a_good_draft_further():
    """The draft is the target: its favourite always comes, however unsure it is. Same tokens, fewer passes than the paper's trees."""
    ours, texts, drafter = run("demo")
    papers, same, _ = run("demo", draft_temperature=1.0)
    assert texts == same and ours < papers
    assert drafter.calibrations[0].temperature == TEMPERATURES[0]


def test_a_temperature_that_is_given_is_kept():
    steps, texts, drafter = run("demo-draft", draft_temperature=0.7)
    assert drafter.temperature == 0.7 and len(texts[0]) == 40 and steps < 120
    assert (drafter.calibrations[0].loss != Calibration(0.5).loss).all()  # counted all the same


@pytest.mark.parametrize("truth", TEMPERATURES)
def test_the_temperature_that_foretells_best_is_found(truth):
    rng, calibration = np.random.default_rng(0), Calibration(1.0)
    for _ in range(3000):
        logprobs = np.log(rng.dirichlet(np.full(8, 0.5)) + 1e-9)
        weights = np.exp(logprobs / truth)
        calibration.add(logprobs, rng.choice(8, p=weights / weights.sum()))
    assert calibration.temperature == truth


def test_what_lies_outside_keeps_its_share():
    logprobs = np.log([[0.5, 0.2, 0.1], [0.05, 0.3, 0.3]])
    for temperature in TEMPERATURES:
        made = at_temperature(logprobs, temperature)
        assert np.allclose(np.exp(made).sum(1), [0.8, 0.65])
        assert (made.argmax(1) == logprobs.argmax(1)).all()


def test_decisions_end_where_nothing_was_offered():
    """Root, an expanded node, a node that was not expanded; a token that was not among the children is no decision."""
    offered = [(np.array([7, 8]), np.array([-0.1, -2.0])), (np.array([5, 6]), np.array([-0.3, -1.0]))]
    proposed = Proposed(np.array([7, 8, 6]), np.array([0, -1, -1]), offered)
    assert [c for _, c in proposed.decisions([0, 2], 9)] == [0, 1]
    assert [c for _, c in proposed.decisions([0], 5)] == [0, 0]
    assert [c for _, c in proposed.decisions([], 4)] == []
    assert [c for _, c in proposed.decisions([1], None)] == [1]
