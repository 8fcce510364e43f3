"""Reads the kernel graphs that Mirage publishes (`benchmark/saved_mugraphs`), and builds the programs they were found for.

Source: "Mirage: A Multi-Level Superoptimizer for Tensor Programs", arXiv 2405.05751.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from wager.errors import UsageError
from wager.graph.operators import Shape
from wager.graph.program import BlockGraph, Builder, Node, Program, check, pack

BLOCK_OPERATORS = {
    "tb_accum_nored_op": "accum",
    "tb_accum_red_ld_sum_op": "accum_sum",
    "tb_accum_red_ld_rms_op": "accum_rms",
    "tb_accum_redtox_ld_sum_op": "accum_width",
}


def load(path: Path) -> list[Program]:
    """Every graph of one file. Raises UsageError for an unknown operator, ShapeError for a graph that does not fit together."""
    return [read(graph) for graph in json.loads(Path(path).read_text())]


def read(operators: list[Mapping[str, Any]]) -> Program:
    """One graph: a list of kernel-level operators."""
    build, place, outputs = Builder(), {}, []
    for operator in operators:
        kind, ins, outs = operator["op_type"], operator["input_tensors"], operator["output_tensors"]
        inputs = [place[t["guid"]] for t in ins]
        if kind == "kn_input_op":
            results = [build.input(_shape(outs[0]))]
        elif kind == "kn_output_op":
            outputs.append(inputs[0])
            continue
        elif kind == "kn_customized_op":
            results = build.kernel(inputs, _block(operator["bgraph"], [t["guid"] for t in ins]))
        else:
            results = [build.add(_plain_name(kind, "kn_"), inputs)]
        place |= {t["guid"]: r for t, r in zip(outs, results, strict=True)}
    program = build.build(*outputs)
    check(program)
    return program


def _shape(tensor: Mapping[str, Any]) -> Shape:
    return tuple(tensor["dim"][: tensor["num_dims"]])


def _plain_name(kind: str, prefix: str) -> str:
    name = kind.removeprefix(prefix).removesuffix("_op")
    if name not in ("matmul", "add", "mul", "div", "exp", "silu", "rms_norm", "square", "sqrt", "relu", "gelu"):
        raise UsageError(f"operator {kind!r} of the published graph is not known here")
    return name


def _xyz(value: Mapping[str, int]) -> tuple[int, int, int]:
    return (value["x"], value["y"], value["z"])


def _block(graph: Mapping[str, Any], arguments: list[int]) -> BlockGraph:
    nodes: list[Node] = []
    place: dict[int, int] = {}
    for operator in graph["operators"]:
        kind, ins, outs = operator["op_type"], operator["input_tensors"], operator["output_tensors"]
        inputs = tuple(place[t["guid"]] for t in ins)
        if kind == "tb_input_op":
            attrs = {
                "arg": arguments.index(operator["dtensor"]["guid"]),
                "imap": _xyz(operator["input_map"]),
                "fmap": operator["forloop_dim"],
            }
            node = Node("input", (), _shape(outs[0]), pack(attrs))
        elif kind == "tb_output_op":
            node = Node("output", inputs, nodes[inputs[0]].shape, pack({"omap": _xyz(operator["output_map"])}))
        else:
            name = BLOCK_OPERATORS.get(kind) or _plain_name(kind, "tb_")
            width = {"width": graph["reduction_dimx"]} if name == "accum_width" else {}
            node = Node(name, inputs, _shape(outs[0]), pack(width))
        nodes.append(node)
        place |= {t["guid"]: len(nodes) - 1 for t in outs}
    return BlockGraph(_xyz(graph["grid_dim"]), graph["forloop_range"], tuple(nodes), graph["block_dim"]["x"])


def rmsnorm_matmul(tokens: int = 16, hidden: int = 4096, out: int = 6144) -> Program:
    b = Builder()
    x, w = b.input((tokens, hidden), "x"), b.input((hidden, out), "w")
    return b.build(b.matmul(b.rms_norm(x), w))


def gated_mlp(tokens: int = 8, hidden: int = 4096, out: int = 4096) -> Program:
    b = Builder()
    x, w1, w2 = b.input((tokens, hidden), "x"), b.input((hidden, out), "w1"), b.input((hidden, out), "w2")
    return b.build(b.mul(b.silu(b.matmul(x, w1)), b.matmul(x, w2)))


def lora(tokens: int = 16, hidden: int = 256, rank: int = 16, out: int = 4096) -> Program:
    b = Builder()
    x, w = b.input((tokens, hidden), "x"), b.input((hidden, out), "w")
    a, bb = b.input((hidden, rank), "a"), b.input((rank, out), "b")
    return b.build(b.add("add", [b.matmul(x, w), b.matmul(b.matmul(x, a), bb)]))


def ntrans(tokens: int = 8, hidden: int = 4096) -> Program:
    b = Builder()
    h, x, alpha = (b.input((tokens, hidden), n) for n in ("h", "x", "alpha"))
    inner = b.add("add", [b.rms_norm(h), x])
    return b.build(b.rms_norm(b.add("add", [x, b.mul(alpha, inner)])))


def attention(heads: int = 16, queries: int = 256, keys: int = 4096, width: int = 64) -> Program:
    """exp(QK) / rowsum(exp(QK)) · V, as written: no maximum is subtracted."""
    b = Builder()
    q, k, v = (
        b.input((heads, queries, width), "q"),
        b.input((heads, width, keys), "k"),
        b.input((heads, keys, width), "v"),
    )
    weights = b.exp(b.matmul(q, k))
    return b.build(b.matmul(b.div(weights, b.sum(weights, dim=-1)), v))


def qk_norm_attention(heads: int = 16, queries: int = 256, keys: int = 4096, width: int = 64) -> Program:
    """Attention over RMS-normalised queries; keys arrive normalised by row, so K is [heads, keys, width] transposed on the way in."""
    b = Builder()
    q, k, v = (
        b.input((heads, queries, width), "q"),
        b.input((heads, width, keys), "k"),
        b.input((heads, keys, width), "v"),
    )
    weights = b.exp(b.matmul(b.rms_norm(q), k))
    return b.build(b.matmul(b.div(weights, b.sum(weights, dim=-1)), v))


PROGRAMS: dict[str, Callable[[], Program]] = {
    "rmsnorm_bs1": lambda: rmsnorm_matmul(2),
    "rmsnorm_bs8": lambda: rmsnorm_matmul(16),
    "gated_mlp": gated_mlp,
    "lora": lora,
    "ntrans_bs1": ntrans,
    "gqa_bs8": attention,
    "mqa_bs1": lambda: attention(1, 1024),
}
"""The program that each published file's graphs compute."""
