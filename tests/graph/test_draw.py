"""Drawings: every box stands apart, and edges pass boxes by."""

from __future__ import annotations

import re
from itertools import combinations
from xml.etree import ElementTree

import pytest

from tests.graph.test_layout import two_kernels
from tests.graph.test_verify import attention_kernel
from wager.graph.draw import BOX_W, _layers, svg
from wager.graph.program import Builder


@pytest.mark.parametrize("program", [attention_kernel(), two_kernels()])
def test_boxes_stand_apart_and_edges_pass_between_them(program):
    root = ElementTree.fromstring(svg(program))
    boxes = [
        tuple(float(r.get(k, "0")) for k in ("x", "y", "width", "height"))
        for r in root.iter("{http://www.w3.org/2000/svg}rect")
        if r.get("rx")
    ]
    assert len(boxes) == len(program.nodes) + sum(len(n.block.nodes) for n in program.kernels)
    for (ax, ay, aw, ah), (bx, by, bw, bh) in combinations(boxes, 2):
        assert ax + aw <= bx or bx + bw <= ax or ay + ah <= by or by + bh <= ay
    for path in root.iter("{http://www.w3.org/2000/svg}path"):
        for x, y in re.findall(r"L ([\d.]+) ([\d.]+)", path.get("d", "")):  # where an edge passes a layer
            assert not any(bx <= float(x) <= bx + bw and by <= float(y) <= by + bh for bx, by, bw, bh in boxes)


def test_an_input_that_is_read_late_stands_late():
    b = Builder()
    x, y = b.input((2, 2), "x"), b.input((2, 2), "y")
    rows, paths = _layers(b.build(b.add("add", [b.exp(b.exp(x)), y])).nodes)
    assert 1 in rows[2] and all(len(p) == 2 for p in paths) and BOX_W > 0
