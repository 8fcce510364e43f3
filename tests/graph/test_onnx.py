"""ONNX import: exported torch modules compute the same; what has no form is named with its node."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from wager.errors import UsageError
from wager.graph import onnx as wager_onnx
from wager.graph.execute import Executable
from wager.graph.trace import trace

onnx = pytest.importorskip("onnx")


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.gate = nn.Linear(12, 20), nn.Linear(20, 6), nn.Linear(12, 20, bias=False)

    def forward(self, x):
        return torch.softmax(self.b(nn.functional.silu(self.gate(x)) * nn.functional.gelu(self.a(x))), -1)


class Norm(nn.Module):
    def forward(self, x, w):
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (y.transpose(1, 2).reshape(2, -1, 3).unsqueeze(1) / (1 + torch.exp(-w))).squeeze(1), y.sum(1)


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8), nn.PReLU(8), nn.ConvTranspose2d(8, 6, 4, 2, 1),
        nn.LeakyReLU(0.2), nn.MaxPool2d(2, 2), nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=2), nn.ReLU6(), nn.Flatten(),
        nn.Linear(6 * 16, 5), nn.Tanh(),
    )  # fmt: skip


CASES = {
    "mlp": (Mlp(), (torch.randn(4, 12),)),
    "norm": (Norm(), (torch.randn(2, 3, 4), torch.randn(3))),
    "network": (network(), (torch.randn(2, 3, 8, 8),)),
}


def exported(module, inputs, path, dynamo):
    if dynamo:
        pytest.importorskip("onnxscript")
        torch.onnx.export(module.eval(), inputs, str(path), dynamo=True, verbose=False, optimize=True)
    else:
        torch.onnx.export(module.eval(), inputs, str(path), dynamo=False, opset_version=20)
    return path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("name", list(CASES))
def test_exported_modules_compute_the_same(name, dynamo, tmp_path):
    module, inputs = CASES[name]
    read = wager_onnx.load(exported(module, inputs, tmp_path / "m.onnx", dynamo))
    with torch.no_grad():
        want = module.eval()(*inputs)
    got = Executable(read.program, read.constants)(*inputs)
    for w, g in zip([want] if isinstance(want, torch.Tensor) else want, got, strict=True):
        torch.testing.assert_close(g, w, atol=1e-5, rtol=1e-5)
    traced = trace(module, inputs)
    assert read.program.output_shapes == traced.program.output_shapes


def model(op, shapes, outputs, *, opset=17, domain="", **attrs):
    make = onnx.helper
    info = lambda n, s: make.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s)
    node = make.make_node(op, [f"x{i}" for i in range(len(shapes))], ["y"], name="the_node", domain=domain, **attrs)
    graph = make.make_graph([node], "g", [info(f"x{i}", s) for i, s in enumerate(shapes)], [info("y", outputs)])
    return make.make_model(graph, opset_imports=[make.make_opsetid("", opset)])


@pytest.mark.parametrize(
    "bad, message",
    [
        (lambda: model("CumSum", [(2,), (1,)], (2,)), "ONNX operator CumSum .*the_node.* has no form"),
        (lambda: model("Relu", [(2,)], (2,), domain="com.example"), r"com\.example\.Relu"),
        (lambda: model("Relu", [("batch", 2)], ("batch", 2)), "dimension 0 of input 'x0' is batch"),
        (lambda: model("Relu", [(2,)], (2,), opset=9), "operator set 9"),
        (lambda: model("MatMul", [(2, 3), (4, 5)], (2, 5)), "contracted dimensions differ.*the_node"),
        (lambda: model("Reshape", [(2,), (1,)], (2,)), "computed at run time.*the_node"),
        (lambda: "/nonexistent.onnx", "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_named(bad, message):
    with pytest.raises(UsageError, match=message):
        wager_onnx.load(bad())


def test_a_product_with_alpha_and_beta():
    proto = model("Gemm", [(4, 3), (5, 4), (5,)], (3, 5), alpha=0.5, beta=2.0, transA=1, transB=1)
    a, b, c = torch.randn(4, 3), torch.randn(5, 4), torch.randn(5)
    (got,) = Executable(wager_onnx.load(proto).program, {})(a, b, c)
    torch.testing.assert_close(got, 0.5 * a.T @ b.T + 2 * c)
