"""Starts a deeper model from a shallower one, so that it computes the same before its first step of training.

The layers of the source are spread over the new depth; every layer between two of them is a copy of the one before it whose two output
projections are zero, so it adds nothing until it has learned something. (Block expansion: LLaMA Pro, arXiv 2401.02415.) Whatever the
training reaches, the model costs its full depth and is at least as good as the source; a checkpoint is usable at any time.

The other way, `thin` leaves some layers of a model: the start of a draft that is distilled from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from wager.errors import UsageError
from wager.models.llama import Block, Llama


def grow(model: Llama, source: Llama) -> None:
    """Give `model` the function of `source`. Same widths, vocabulary and heads; `model` has at least as many layers.

    Raises UsageError when a shape differs or the model is shallower.
    """
    old, new = list(source.layers), list(model.layers)
    if len(new) < len(old):
        raise UsageError(f"a model of {len(old)} layers cannot grow into one of {len(new)}; give it more layers")
    _copy(model.embed, source.embed)
    _copy(model.norm, source.norm)
    _copy(model.head, source.head)
    before = -1
    for place, layer in enumerate(new):
        origin = place * len(old) // len(new)
        _copy(layer, old[origin])
        if origin == before:
            _silence(layer)
        before = origin


def thin(source: Llama, layers: Sequence[int]) -> Llama:
    """A model of these layers of the source, in this order; weights are copies. Raises UsageError for a layer that is not there."""
    if not layers or len(set(layers)) < len(layers) or not all(0 <= i < len(source.layers) for i in layers):
        raise UsageError(
            f"layers takes different numbers below {len(source.layers)}, got {list(layers)}", param="layers"
        )
    windows = tuple(source.config.window_of_layer[i] for i in layers)
    model = Llama(replace(source.config, num_hidden_layers=len(layers), windows=windows), source.dtype)
    for ours, theirs in ((model.embed, source.embed), (model.norm, source.norm), (model.head, source.head)):
        _copy(ours, theirs)
    for layer, origin in zip(model.layers, layers, strict=True):
        _copy(layer, source.layers[origin])
    return model


def _copy(ours, theirs) -> None:
    wanted = {name: tuple(p.shape) for name, p in ours.named_parameters()}
    given = {name: tuple(p.shape) for name, p in theirs.named_parameters()}
    if wanted != given:
        name = next(n for n in {**wanted, **given} if wanted.get(n) != given.get(n))
        raise UsageError(
            f"{name} is {given.get(name)} in the source and {wanted.get(name)} here: only the depth may differ"
        )
    ours.load_state_dict({name: p.detach() for name, p in theirs.named_parameters()})


def _silence(layer: nn.Module) -> None:
    """Make a block add nothing to the residual stream."""
    assert isinstance(layer, Block)
    layer.attention.output.weight.data.zero_()
    layer.mlp.get_submodule("down").get_parameter("weight").data.zero_()
