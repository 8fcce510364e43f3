"""Batched passes are the model's own passes; what is continued at once is what the model says one by one."""

import pytest
import torch

from wager.errors import UsageError
from wager.models.attend import causal_attention
from wager.models.demo import __main__ as factory
from wager.models.demo.batched import Continuer, block, hidden_of, logits_of
from wager.models.llama import Llama, LlamaConfig

VOCAB = 40


@pytest.fixture(scope="module")
def model():
    config = factory.model_config(factory.Size(32, 48, 3, 4, 2), VOCAB, max_positions=64)
    made = Llama(LlamaConfig.from_checkpoint(config), torch.float32, torch.Generator().manual_seed(3))
    for parameter in made.parameters():  # far from its start: favourites are clear
        parameter.data.mul_(4 if parameter.dim() == 2 else 1)
    return made


def logits_alone(model, tokens):
    hidden = model(tokens, torch.arange(len(tokens)), causal_attention(model))
    return model.logits(hidden)


def prompts(rows, context, seed=0):
    return torch.randint(VOCAB, (rows, context), generator=torch.Generator().manual_seed(seed))


def test_a_batched_pass_is_the_models_own_pass_forwards_and_backwards(model):
    tokens = prompts(3, 11)
    logits = logits_of(model, hidden_of(model, tokens, torch.float32))
    alone = torch.stack([logits_alone(model, row) for row in tokens])
    torch.testing.assert_close(logits, alone, atol=1e-4, rtol=1e-4)
    parameters = list(model.parameters())
    weights = torch.randn(alone.shape, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((logits * weights).sum(), parameters)
    theirs = torch.autograd.grad((alone * weights).sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-2, rtol=1e-3)


def test_bfloat16_passes_are_near_and_keep_exact_angles(model):
    tokens = prompts(2, 40)
    exact = logits_of(model, hidden_of(model, tokens, torch.float32)).softmax(-1)
    rounded = logits_of(model, hidden_of(model, tokens, torch.bfloat16)).softmax(-1)
    assert (exact - rounded).abs().sum(-1).mean() < 0.15


def test_one_compilation_serves_all_layers(model):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(block, dynamic=False, backend=backend)
    tokens = prompts(2, 9)
    for _ in range(2):
        logits = logits_of(model, hidden_of(model, tokens, torch.float32, compiled))
    assert len(graphs) == 1
    torch.testing.assert_close(logits, logits_of(model, hidden_of(model, tokens, torch.float32)))


def test_greedy_continuations_are_the_models_favourites(model):
    given = prompts(4, 5)
    texts = Continuer(model, torch.zeros(4), 20, torch.float32, torch.Generator().manual_seed(0))(given)
    assert torch.equal(texts[:, :5], given)
    for text in texts:
        favourites = logits_alone(model, text).argmax(-1)
        assert torch.equal(text[5:], favourites[4:-1])


def test_a_continuer_can_be_used_again_with_other_contexts(model):
    continuer = Continuer(model, torch.zeros(3), 16, torch.float32, torch.Generator().manual_seed(0))
    longer = continuer(prompts(3, 9))
    again = Continuer(model, torch.zeros(3), 16, torch.float32, torch.Generator().manual_seed(0))
    assert torch.equal(continuer(prompts(3, 4, 7)), again(prompts(3, 4, 7)))
    assert torch.equal(continuer(prompts(3, 9)), longer)


def test_samples_follow_the_models_law_at_each_rows_temperature(model):
    rows, given = 6000, torch.tensor([3, 17, 5])
    temperatures = torch.tensor([0.7, 1.3]).repeat(rows // 2)
    texts = Continuer(model, temperatures, 4, torch.float32, torch.Generator().manual_seed(5))(given.repeat(rows, 1))
    logits = logits_alone(model, given)[-1]
    for row, temperature in enumerate((0.7, 1.3)):
        law = (logits / temperature).softmax(-1) * (rows // 2)
        seen = torch.bincount(texts[row::2, 3], minlength=VOCAB).float()
        kept = law >= 5
        merged = lambda x: torch.cat([x[kept], x[~kept].sum()[None]])  # noqa: B023
        statistic = ((merged(seen) - merged(law)) ** 2 / merged(law).clamp_min(1e-9)).sum().item()
        assert statistic < 40 + 2 * int(kept.sum())


def test_prompts_that_cannot_be_continued_and_other_families_are_refused(model):
    continuer = Continuer(model, torch.zeros(1), 8, torch.float32, torch.Generator())
    for context in (1, 8):
        with pytest.raises(UsageError, match="2 to 7 tokens"):
            continuer(prompts(1, context))
    biased = {**factory.model_config(factory.Size(32, 48, 1, 2, 1), VOCAB), "attention_bias": True}
    with pytest.raises(UsageError, match="plain Llamas"):
        hidden_of(
            Llama(LlamaConfig.from_checkpoint(biased), torch.float32, torch.Generator()), prompts(1, 3), torch.float32
        )
