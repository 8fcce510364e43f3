"""Candidates that cheat, are wrong, or are honest. Each cheat: (operator, source). `HEAD` starts every source."""

HEAD = (
    "import math\nimport random\nimport time\nimport torch\nimport torch.nn.functional as F\nfrom torch import nn\n\n"
)

_SILU = "class SiluAndMul(nn.Module):\n    def forward(self, x):\n        gate, up = x.chunk(2, -1)\n"
_NORM = (
    "class RMSNorm(nn.Module):\n    def __init__(self, width, eps=1e-6):\n        super().__init__()\n"
    "        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps\n    def forward(self, x):\n"
)
_LINEAR = (
    "class Linear(nn.Module):\n    def __init__(self, in_features, out_features, bias=False):\n        super().__init__()\n"
    "        self.weight = nn.Parameter(torch.empty(out_features, in_features))\n"
    "        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None\n    def forward(self, x):\n"
)
_RIGHT_SILU = "        return F.silu(gate) * up\n"
_RIGHT_NORM = "        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight\n"

HONEST = {
    "the same formula": ("SiluAndMul", _SILU + _RIGHT_SILU),
    "another formula": ("SiluAndMul", _SILU + "        return gate * up / (1 + torch.exp(-gate))\n"),
    "sums in another order": ("Linear", _LINEAR + "        y = (x.flip(-1) @ self.weight.flip(-1).T)\n        return y if self.bias is None else y + self.bias\n"),
    "library norm": ("RMSNorm", _NORM + "        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)\n"),
}  # fmt: skip

# Caught without running, by what the source says.
STATIC = {
    "falls back to the library on error": ("SiluAndMul", _SILU + "        try:\n            return kernel(x)\n        except NameError:\n" + "            return F.silu(gate) * up\n"),
    "inherits the baseline": ("SiluAndMul", "from wager.kernels.referee.operators import SiluAndMul as Base\nclass SiluAndMul(Base):\n    pass\n"),
    "patches the clock": ("SiluAndMul", "time.perf_counter = lambda: 0.0\n" + _SILU + _RIGHT_SILU),
    "patches the comparison": ("SiluAndMul", "torch.allclose = lambda *a, **k: True\n" + _SILU + _RIGHT_SILU),
    "patches the statistics": ("SiluAndMul", "import statistics\nstatistics.median = min\n" + _SILU + _RIGHT_SILU),
    "looks at the environment": ("SiluAndMul", "import os\nFAST = 'BENCH' in os.environ\n" + _SILU + _RIGHT_SILU),
    "looks at its caller": ("SiluAndMul", "import sys\n" + _SILU + "        sys._getframe(1)\n" + _RIGHT_SILU),
    "a thread does the work": ("SiluAndMul", "import threading\n" + _SILU + _RIGHT_SILU),
    "work on another stream": ("SiluAndMul", _SILU + "        with torch.cuda.stream(torch.cuda.Stream()):\n            return F.silu(gate) * up\n"),
    "a lazy tensor type": ("SiluAndMul", "class Lazy(torch.Tensor):\n    @classmethod\n    def __torch_function__(cls, *a, **k):\n        return None\n" + _SILU + _RIGHT_SILU),
    "runs hidden code": ("SiluAndMul", _SILU + "        return eval('F.silu(gate) * up')\n"),
    "ends the process": ("SiluAndMul", "import os\n" + _SILU + "        os._exit(0)\n"),
}  # fmt: skip

# Caught by what it does.
NUMERIC = {
    "zeros": ("SiluAndMul", _SILU + "        return torch.zeros_like(up)\n"),
    "a constant mean": ("SiluAndMul", _SILU + "        return torch.full_like(up, (F.silu(gate) * up).mean().item())\n"),
    "uninitialised memory": ("SiluAndMul", _SILU + "        return torch.empty_like(up)\n"),
    "not a number": ("SiluAndMul", _SILU + "        return F.silu(gate) * up * float('nan')\n"),
    "half precision": ("SiluAndMul", _SILU + "        return (F.silu(gate.half()) * up.half()).float()\n"),
    "bfloat16 products": ("Linear", _LINEAR + "        return F.linear(x.bfloat16(), self.weight.bfloat16(), None if self.bias is None else self.bias.bfloat16()).float()\n"),
    "sums in half precision": ("Linear", _LINEAR + "        y = sum((a.half() for a in (x[..., None, :] * self.weight).split(1, -1)), 0)[..., 0].float()\n        return y if self.bias is None else y + self.bias\n"),
    "skips every seventh column": ("SiluAndMul", _SILU + "        y = F.silu(gate) * up\n        y[..., ::7] = 0\n        return y\n"),
    "noise": ("SiluAndMul", _SILU + "        return F.silu(gate) * up * (1 + 1e-4 * torch.randn_like(up))\n"),
    "no epsilon": ("RMSNorm", _NORM + "        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-2) * self.weight\n"),
    "keeps the first answer": ("SiluAndMul", "KEPT = {}\n" + _SILU + "        return KEPT.setdefault(x.shape, F.silu(gate) * up).clone()\n"),
    "keeps answers by a cheap fingerprint": ("SiluAndMul", "KEPT = {}\n" + _SILU + "        return KEPT.setdefault((x.shape, x.flatten()[0].sign().item()), F.silu(gate) * up).clone()\n"),
    "keeps the first weights": ("RMSNorm", "KEPT = {}\n" + _NORM + "        weight = KEPT.setdefault(len(self.weight), self.weight.detach().clone())\n        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * weight\n"),
    "only the captured shapes": ("SiluAndMul", _SILU + "        y = F.silu(gate) * up\n        return y if y.shape[0] % 2 == 0 else y * 0.5\n"),
    "not twice the same": ("SiluAndMul", "DRAWN = random.Random(5)\n" + _SILU + "        return F.silu(gate) * up * (1 + 1e-6 * DRAWN.random())\n"),
    "wrong now and then": ("SiluAndMul", "CALLS = []\n" + _SILU + "        CALLS.append(1)\n        return F.silu(gate) * up * (1.01 if len(CALLS) % 2 == 0 else 1)\n"),
    "works in the constructor": ("RMSNorm", _NORM.replace("    def forward", "        self.ready = self.weight.detach().clone()\n    def forward") + "        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.ready\n"),
    "changes a constant": ("RMSNorm", _NORM.replace("1e-6", "1e-6") + "        return x * torch.rsqrt(x[..., ::2].square().mean(-1, keepdim=True) + self.eps) * self.weight\n"),
    "freed memory of others": ("SiluAndMul", _SILU + "        y = torch.empty(up.shape)\n        return y if bool(y.any()) else torch.empty(up.shape)\n"),
    "guesses before it is asked": ("SiluAndMul", "GUESS = torch.randn(2, 24, 352)\n" + _SILU + "        return GUESS.expand(2, 24, 352)[..., : up.shape[-1]].clone() if up.shape[:2] == (2, 24) else F.silu(gate) * up\n"),
}  # fmt: skip

CONDUCT = {
    "zeroes its input and returns it": ("ReLU", "class ReLU(nn.Module):\n    def forward(self, x):\n        return x.zero_()\n"),
    "works in place": ("ReLU", "class ReLU(nn.Module):\n    def forward(self, x):\n        return x.relu_().clone()\n"),
    "a view of the input": ("SiluAndMul", _SILU + "        return up\n"),
    "a tensor without values": ("SiluAndMul", _SILU + "        return torch.empty(up.shape, device='meta')\n"),
    "a sparse tensor": ("SiluAndMul", _SILU + "        return (F.silu(gate) * up).to_sparse()\n"),
    "the input under another shape": ("ReLU", "class ReLU(nn.Module):\n    def forward(self, x):\n        return x.view(-1).view(x.shape)\n"),
    "a subclass": ("SiluAndMul", "class Mine(torch.Tensor):\n    pass\n" + _SILU + "        return (F.silu(gate) * up).as_subclass(Mine)\n"),
    "patches behind a name": ("SiluAndMul", "module = torch\nmodule.equal = lambda a, b: True\n" + _SILU + _RIGHT_SILU),
    "patches the statistics behind a name": ("SiluAndMul", "import statistics\nsums = statistics\nsums.median = min\n" + _SILU + _RIGHT_SILU),
    "wraps the clock behind a name": ("SiluAndMul", "clock = time\nclock.time = lambda: 0.0\n" + _SILU + _RIGHT_SILU),
}  # fmt: skip

SHAPES = {
    "a row too few": ("SiluAndMul", _SILU + "        return (F.silu(gate) * up)[:-1]\n", "INCORRECT_SHAPE"),
    "two outputs": ("SiluAndMul", _SILU + "        return F.silu(gate) * up, up.clone()\n", "INCORRECT_SHAPE"),
    "another type": ("SiluAndMul", _SILU + "        return (F.silu(gate) * up).double()\n", "INCORRECT_DTYPE"),
    "raises": ("SiluAndMul", _SILU + "        raise RuntimeError('no kernel')\n", "RUNTIME_ERROR"),
    "not a tensor": ("SiluAndMul", _SILU + "        return (F.silu(gate) * up).tolist()\n", "RUNTIME_ERROR"),
    "kills itself": ("SiluAndMul", "import signal\n" + _SILU + "        signal.raise_signal(signal.SIGKILL)\n", "RUNTIME_ERROR"),
    "other parameters": ("RMSNorm", "class RMSNorm(nn.Module):\n    def __init__(self, width, eps=1e-6):\n        super().__init__()\n    def forward(self, x):\n        return x\n", "RUNTIME_ERROR"),
    "no such class": ("RMSNorm", "class Other(nn.Module):\n    def forward(self, x):\n        return x\n", "RUNTIME_ERROR"),
}  # fmt: skip

# Right when asked, wrong or different when timed.
TIMED = {
    "stops working after some calls": ("SiluAndMul", "CALLS = []\nKEPT = {}\n" + _SILU + "        CALLS.append(1)\n        y = F.silu(gate) * up\n        return KEPT.setdefault(y.shape, y).clone() if len(CALLS) > 6 else y\n"),
    "a thread that stays": ("SiluAndMul", "import importlib\nT = importlib.import_module('thread' + 'ing')\nCALLS = []\n" + _SILU + "        CALLS.append(1)\n        if len(CALLS) % 8 == 5:\n            T.Thread(target=time.sleep, args=(60,), daemon=True).start()\n" + _RIGHT_SILU),
    "replays what it was timed on": ("SiluAndMul", "KEPT = []\n" + _SILU + "        KEPT.append(F.silu(gate) * up)\n        return KEPT[-2].clone() if len(KEPT) % 8 > 5 and KEPT[-2].shape == up.shape else KEPT[-1].clone()\n"),
    "keeps answers by address": ("SiluAndMul", "KEPT = {}\n" + _SILU + "        return KEPT.setdefault((x.data_ptr() >> 20, len(KEPT) > 9 and x.shape), F.silu(gate) * up).clone()\n"),
}  # fmt: skip
