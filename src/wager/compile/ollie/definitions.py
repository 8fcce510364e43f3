"""Operators as index expressions: where derivations start. Activations are channels last (n, h, w, c), weights as torch keeps them."""

from __future__ import annotations

from collections.abc import Sequence

from wager.compile.ollie.rules import pad_for
from wager.graph.expression import Body, Call, Number, Read, Scope, Tensor
from wager.graph.index import floordiv, it, remainder


def matmul(m: int, k: int, n: int) -> Scope:
    a, b = Tensor("A", (m, k)), Tensor("B", (k, n))
    body = Call("mul", (Read(a, (it("m"), it("k"))), Read(b, (it("k"), it("n")))))
    return Scope((("m", 0, m), ("n", 0, n)), (("k", 0, k),), body)


def conv(
    x_nhwc: Sequence[int], w_fcrs: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Scope:
    """Output (n, h, w, f)."""
    (n, height, width, c), (f, _, r, s) = x_nhwc, w_fcrs
    oh = (height + 2 * padding[0] - dilation[0] * (r - 1) - 1) // stride[0] + 1
    ow = (width + 2 * padding[1] - dilation[1] * (s - 1) - 1) // stride[1] + 1
    x, w = Tensor("A", tuple(x_nhwc)), Tensor("K", tuple(w_fcrs))
    at_h = it("h") * stride[0] + it("r") * dilation[0] - padding[0]
    at_w = it("w") * stride[1] + it("s") * dilation[1] - padding[1]
    body = Call("mul", (Read(x, (it("n"), at_h, at_w, it("c"))), Read(w, (it("f"), it("c"), it("r"), it("s")))))
    loops = (("n", 0, n), ("h", 0, oh), ("w", 0, ow), ("f", 0, f))
    return pad_for(Scope(loops, (("c", 0, c), ("r", 0, r), ("s", 0, s)), body))


def conv_transpose(
    x_nhwc: Sequence[int],
    w_cfrs: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    extra: Sequence[int] = (0, 0),
) -> Scope:
    """Output (n, h, w, f). Position h gathers A[(h+p)//s - x] * K[(h+p)%s + s*x]: (quotient, phase) are loops of an inner stage."""
    (n, height, width, c), (_, f, r, s) = x_nhwc, w_cfrs
    oh = (height - 1) * stride[0] - 2 * padding[0] + r + extra[0]
    ow = (width - 1) * stride[1] - 2 * padding[1] + s + extra[1]
    x, w = Tensor("A", tuple(x_nhwc)), Tensor("K", tuple(w_cfrs))
    index, loops, sums, reads_x, reads_w = [it("n")], [("n", 0, n)], [("c", 0, c)], [it("n")], []
    for d, (_size, window, out) in enumerate(((height, r, oh), (width, s, ow))):
        step, pad, name = stride[d], padding[d], "hw"[d]
        position = it(name) + pad
        first, last = pad // step, (out - 1 + pad) // step
        taps = -(-window // step)
        index.append(floordiv(position, step))
        loops.append((f"{name}q", first, last + 1))
        tap = it(f"{name}t")
        if step > 1:
            index.append(remainder(position, step))
            loops.append((f"{name}p", 0, step))
            reads_w.append(it(f"{name}p") + tap * step)
        else:
            reads_w.append(tap)
        sums.append((f"{name}t", 0, taps))
        reads_x.append(it(f"{name}q") - tap)
    body = Call("mul", (Read(x, (*reads_x, it("c"))), Read(w, (it("c"), it("f"), *reads_w))))
    inner = pad_for(Scope((*loops, ("f", 0, f)), tuple(sums), body))
    outer = (("n", 0, n), ("h", 0, oh), ("w", 0, ow), ("f", 0, f))
    return Scope(outer, (), Read(inner, (*index, it("f"))))


def banded_matmul(heads: int, length: int, features: int, width: int, dilation: int = 1) -> Scope:
    """Banded batched product out[b,m,w] = sum over k of A[b,m,k] * B[b, m + dilation*(w - width), k]; rows outside are zero."""
    a, b = Tensor("A", (heads, length, features)), Tensor("B", (heads, length, features))
    row = it("m") + it("w") * dilation - dilation * width
    body = Call("mul", (Read(a, (it("b"), it("m"), it("k"))), Read(b, (it("b"), row, it("k")))))
    loops = (("b", 0, heads), ("m", 0, length), ("w", 0, 2 * width + 1))
    return pad_for(Scope(loops, (("k", 0, features),), body))


def banded_sum(heads: int, length: int, features: int, width: int, dilation: int = 1) -> Scope:
    """out[b,m,k] = sum over w of A[b,m,w] * B[b, m + dilation*(w - width), k]: a band times a matrix; rows outside are zero."""
    a, b = Tensor("A", (heads, length, 2 * width + 1)), Tensor("B", (heads, length, features))
    row = it("m") + it("w") * dilation - dilation * width
    body = Call("mul", (Read(a, (it("b"), it("m"), it("w"))), Read(b, (it("b"), row, it("k")))))
    loops = (("b", 0, heads), ("m", 0, length), ("k", 0, features))
    return pad_for(Scope(loops, (("w", 0, 2 * width + 1),), body))


def with_epilogue(scope: Scope, bias: bool, activation: str = "", attrs: tuple[tuple[str, float], ...] = ()) -> Scope:
    """activation(scope + bias) over the last loop; one more stage, computed inside the generated kernel."""
    index = tuple(it(n) for n, _, _ in scope.loops)
    body: Body = Read(scope, index)
    if bias:
        name, low, high = scope.loops[-1]
        body = Call("add", (body, Read(Tensor("bias", (high - low,)), (it(name),))))
    if activation == "prelu":
        slope = Read(Tensor("slope", (scope.shape[-1],)), (index[-1],))
        down = Call("sub", (Number(0.0), Call("relu", (Call("sub", (Number(0.0), body)),))))
        body = Call("add", (Call("relu", (body,)), Call("mul", (slope, down))))
    elif activation:
        body = Call(activation, (body,), attrs)
    return Scope(scope.loops, (), body)
