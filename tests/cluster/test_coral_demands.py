"""What is wrong with a demand file is said in one line that names it."""

import pytest

from wager.cluster.coral.rent import read_demands
from wager.errors import UsageError

MODEL = {
    "name": "m", "layers": 4, "hidden": 64, "layer_gb": 0.1, "kv_bytes": 256.0, "decode_ms": 50.0, "decode_tokens_per_s": 100.0,
}  # fmt: skip
ROOFLINE = {"flops_efficiency": 0.5, "read_efficiency": 0.6, "fixed_s": 1e-5}


def test_a_demand_is_read():
    (demand,), _ = read_demands({"model": [MODEL], "roofline": ROOFLINE})
    assert (demand.model.name, demand.phase, demand.tokens_per_s) == ("m", "decode", 100.0)


@pytest.mark.parametrize(
    "raw, said",
    [
        ({"model": "m", "roofline": ROOFLINE}, "model = 'm' .* no list"),
        (
            {"model": [{k: v for k, v in MODEL.items() if k != "hidden"}], "roofline": ROOFLINE},
            "model m .* lacks 'hidden'",
        ),
        ({"model": [MODEL | {"decode_ms": "fast"}], "roofline": ROOFLINE}, "model m .* wrong type"),
        ({"model": [MODEL], "roofline": ROOFLINE | {"speed": 1}}, "roofline.*speed"),
        ({"model": [MODEL]}, "needs .*roofline"),
    ],
)
def test_a_wrong_one_is_refused(raw, said):
    with pytest.raises(UsageError, match=said):
        read_demands(raw)
