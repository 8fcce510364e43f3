"""The native forms of a product over windows: direct sums over taps, sums over channel lanes, minimal filtering in tiles.

Every form is checked before it may be timed: on integer inputs against the expression at sampled points and all corners, exactly where the
form only multiplies and adds integers, within the rounding bound of its transforms otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from math import prod

import numpy as np
import torch

from wager.compile.ollie.windows import Windows, filterable, match_windows, recognise, tabulate
from wager.graph.expression import Read, Scope, Tensor, evaluate
from wager.graph.lower import filtering
from wager.graph.lower.windows import Chain, Epilogue, LayoutOperator, Operator, WindowOperator, WinogradOperator, width
from wager.graph.verify.floating import UNIT

FEW_FEATURES = 16  # below, lanes over channels waste less than padded features


@dataclass
class Form:
    """One way to compute a convolution natively, channels last in; `error` is its rounding bound per unit of (taps x channels x |x| x |w|)."""

    name: str
    build: Callable[[Windows, Epilogue], Operator]
    error: float
    writes_any_layout: bool


def windows_of(scope: Scope) -> Windows | None:
    """The expression as a product over windows (see match_windows)."""
    for _, done in match_windows(scope, "w"):
        body = done.body
        assert isinstance(body, Read) and isinstance(body.object, Tensor) and body.object.source is not None
        return recognise(body.object.source.expr)
    return None


def forms(windows: Windows, kernel: np.ndarray) -> list[Form]:
    """Those that the sizes allow. Building one packs the weights."""
    lanes, channels, features = width() // 2, windows.channel[2], windows.feature[2]
    found = []
    whole = channels % lanes == 0
    few = channels >= lanes // 2 and features < FEW_FEATURES
    if not few or features >= lanes:
        found.append(Form("windows", lambda w, how: WindowOperator(tabulate(w, kernel), how), 0.0, True))
    if few:
        found.append(
            Form("windows, channel lanes", lambda w, how: WindowOperator(tabulate(w, kernel), how, True), 0.0, True)
        )
    filters = filterable(windows, kernel) if whole and features % lanes == 0 else None
    if filters is not None:
        taps = filters.weights_rscf[0].shape[0]
        for tile in (m for m, r in filtering.SIZES if r == taps):
            error = UNIT * (channels + 4 * (tile + taps) + 8) * filtering.amplification(tile, taps) / taps**2
            for alone in (True, False):
                name = f"minimal filtering {tile}x{tile}" + (", tiles per thread" if alone else "")
                found.append(
                    Form(name, lambda w, how, t=tile, a=alone: WinogradOperator(filters, how, t, a), error, False)
                )
    return found


def operators(form: Form, windows: Windows, how: Epilogue, channels_first: bool = False) -> list[Operator]:
    """The form as steps of a chain; with `channels_first` the result is laid out (n, f, h, w)."""
    shape = windows.scope.shape
    n, pixels, features = shape[0], prod(shape[1:-1]), shape[-1]
    if not channels_first or pixels == 1 or features == 1:
        return [form.build(windows, how)]
    if form.writes_any_layout and features < FEW_FEATURES:
        loops = (windows.scope.loops[0], windows.scope.loops[-1], *windows.scope.loops[1:-1])
        return [form.build(replace(windows, scope=replace(windows.scope, loops=loops)), how)]
    return [form.build(windows, how), LayoutOperator(n, pixels, features)]


def checks(form: Form, windows: Windows, kernel: np.ndarray, rng: np.random.Generator, points: int = 48) -> str:
    """Why the form is wrong, or nothing: it is built over small integers and compared with the expression."""
    data = windows.data.object
    assert isinstance(data, Tensor)
    x = rng.integers(-3, 4, data.shape).astype(np.float64)
    w = rng.integers(-3, 4, kernel.shape).astype(np.float64)
    integer = next(f for f in forms(windows, w.astype(np.float32)) if f.name == form.name)
    loops = windows.scope.loops
    corners = np.array(list(product(*((a, b - 1) for _, a, b in loops))))
    inside = np.stack([rng.integers(a, b, points) for _, a, b in loops], axis=1)
    at = np.concatenate([inside, corners])
    names = (data.name, windows.kernel.object.name)  # type: ignore[union-attr]
    want = evaluate(windows.scope, dict(zip(names, (x, w), strict=True)), at)
    got = Chain(operators(integer, windows, Epilogue()), windows.scope.shape)(torch.from_numpy(x).float()).numpy()
    got = got[tuple(at[:, d] - loops[d][1] for d in range(len(loops)))]
    terms = prod(b - a for _, a, b in windows.taps) * windows.channel[2]
    bound = form.error * terms * 9.0
    worst = float(np.abs(got - want).max())
    return f"{form.name}: {worst:.3g} off at sampled outputs, bound {bound:.3g}" if not worst <= bound else ""
