"""The target of a clocked run: next-token prediction, one layer compiled on the shapes of the training."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F

from wager.models.demo.batched import BlockForward, block, hidden_of, logits_of, shape_of, weights_of
from wager.models.demo.export import save_weights
from wager.models.demo.timed import (
    LOG_EVERY,
    SAVE_EVERY_S,
    Clock,
    Place,
    Plan,
    apply,
    check_loss,
    fresh,
    read_stream,
    set_rate,
    windows,
)
from wager.models.demo.train import Recipe, make_optimizers, schedule


def compiled_block(plan: Plan, place: Place) -> BlockForward:
    """One layer, compiled forwards and backwards on the shapes of the training; a compiler that fails is reported and done without."""
    if not place.compiled:
        return block
    begun = time.monotonic()
    compiled = torch.compile(block, dynamic=False)
    model = fresh({**plan.target[1], "num_hidden_layers": 2}, place, 0)
    config = model.config
    try:
        x = torch.randn(
            _rows(plan), plan.window, config.hidden_size, dtype=place.dtype, device=place.device, requires_grad=True
        )
        angles = model.rope(torch.arange(plan.window, device=place.device))
        for layer in model.layers:
            out = compiled(x, *angles, weights_of(layer), shape_of(config), config.rms_norm_eps)  # type: ignore[arg-type]
            out.float().square().mean().backward()
        if place.device.type == "cuda":
            torch.cuda.synchronize()
    except Exception as error:
        place.say(f"torch.compile failed, training goes on without it: {error!r:.500}")
        return block
    place.say(f"compiled a layer in {time.monotonic() - begun:.1f} s")
    return compiled


def _rows(plan: Plan) -> int:
    return min(plan.most_rows, max(1, plan.batch_tokens // plan.window))


def train_target(plan: Plan, place: Place, layer_forward: BlockForward, seconds: float) -> None:
    """Next-token prediction; weights are written before, every half minute and after. Raises WagerError when the loss is lost."""
    name, config = plan.target
    model, rows = fresh(config, place, 0), _rows(plan)
    passes = max(1, plan.batch_tokens // (rows * plan.window))
    recipe = Recipe(1, learning_rate=plan.learning_rate)
    optimizers = make_optimizers(model, recipe)
    batches = windows(read_stream(place), plan.window, rows, place.generator(1))
    save_weights(model, place.out / name)
    parameters = sum(p.numel() for p in model.parameters())
    place.say(f"{name}: {parameters:,} parameters, {rows * passes * plan.window:,} tokens a step, {seconds:.0f} s")
    clock, saved_s = Clock(seconds, plan.steps), time.monotonic()
    while (progress := clock.progress) < 1:
        set_rate(optimizers, plan.learning_rate * schedule(progress, recipe.warmup, recipe.cooldown))
        total = torch.zeros((), device=place.device)
        for _ in range(passes):
            tokens = next(batches)
            hidden = hidden_of(model, tokens[:, :-1], place.dtype, layer_forward)
            loss = F.cross_entropy(logits_of(model, hidden).flatten(0, 1), tokens[:, 1:].flatten()) / passes
            loss.backward()
            total += loss.detach()
        apply(model, optimizers)
        clock.step(place.device)
        if clock.steps % LOG_EVERY == 0:
            speed = clock.steps * rows * passes * plan.window / clock.passed_s
            check_loss(total.item(), name)
            place.say(f"{name} step {clock.steps} {progress:6.1%} loss {total.item():.3f} {speed:,.0f} tokens/s")
        if time.monotonic() - saved_s > SAVE_EVERY_S:
            check_loss(total.item(), name)
            save_weights(model, place.out / name)
            saved_s = time.monotonic()
    if clock.steps:
        check_loss(total.item(), name)
        save_weights(model, place.out / name)
    place.say(f"{name}: {clock.steps} steps, {clock.steps * rows * passes * plan.window / 1e6:.1f} M tokens")
