"""The commands of `wager cluster` run end to end, on a small made-up market and on made-up profiles."""

import csv

import pytest

from wager import cli
from wager.cluster import plan_file


def run(*args):
    with pytest.raises(SystemExit) as left:
        cli.main(["cluster", *map(str, args)])
    return left.value.code


@pytest.fixture
def profiles(tmp_path):
    """Two machines for the 80-layer card; the first is three times faster."""
    with open(tmp_path / "helix-layer-latency.csv", "w", newline="") as handle:
        out = csv.writer(handle)
        out.writerow(["model", "machine", "phase", "batch_tokens", "one_layer_latency_ms"])
        for machine, slow in (("a100", 1), ("l4", 3)):
            for phase, points in (("prompt", ((0, 0), (250, 2), (2048, 16))), ("decode", ((0, 0), (2, 1), (500, 8)))):
                out.writerows(["llama2_70b", machine, phase, size, ms * slow] for size, ms in points)
    with open(tmp_path / "helix-machine-capacity.csv", "w", newline="") as handle:
        out = csv.writer(handle)
        out.writerow(
            [
                "model",
                "machine",
                "max_layers",
                "layers_held",
                "kv_blocks_of_16_tokens",
                "prompt_max_requests_per_batch",
                "decode_max_tokens_per_batch",
            ]
        )
        for machine, most in (("a100", 24), ("l4", 12)):
            out.writerows(["llama2_70b", machine, most, k, 200000 // k, 1, 200] for k in range(1, most + 1))
    return tmp_path


def test_plan_then_simulate(profiles, tmp_path, capsys):
    machines = ["a100"] * 3 + ["l4"] * 2
    ends = ["source", "sink", *map(str, range(5))]
    rows = [f"{a},{b},1000,1" for i, a in enumerate(ends) for b in ends[i + 1 :] if {a, b} != {"source", "sink"}]
    (tmp_path / "links.csv").write_text("from,to,bandwidth_MB_per_s,latency_ms\n" + "\n".join(rows))
    (tmp_path / "trace.csv").write_text(
        "arrival_s,context_tokens,generated_tokens\n" + "".join(f"{i * 0.2},300,20\n" for i in range(60))
    )
    common = ["--profiles", profiles, "--trace", tmp_path / "trace.csv"]
    plan = tmp_path / "plan.toml"
    code = run(
        "plan",
        "--machines",
        ",".join(machines),
        "--links",
        tmp_path / "links.csv",
        "--time-limit",
        0.3,
        "--simulate-s",
        30,
        "-o",
        plan,
        *common,
    )
    assert code == 0 and "no placement has a flow above" in capsys.readouterr().out
    assert plan_file.read(plan).layers == 80
    assert run("simulate", plan, "--seconds", 60, "--warm-up", 0, *common) == 0
    assert "finished                 60" in capsys.readouterr().out

    requests, events = tmp_path / "requests.csv", tmp_path / "events.csv"
    events.write_text(
        "time_ms,event,node\n" + "".join(f"{t},{e},n0\n" for t, e in ((0, "add"), (4000, "remove"), (9000, "add")))
    )
    away = ["--availability", events, "--timeline", requests]
    assert run("simulate", plan, "--seconds", 300, "--warm-up", 0, *away, *common) == 0
    lines = list(csv.DictReader(requests.read_text().splitlines()))
    assert [int(r["request"]) for r in lines] == list(range(60)) and all(int(r["tokens"]) == 20 for r in lines)
    assert all(float(r["arrival_s"]) <= float(r["first_token_s"]) <= float(r["last_token_s"]) for r in lines)
    assert "restarts" in capsys.readouterr().out
    if "n0" in plan_file.read(plan).nodes:
        assert any(int(r["restarts"]) for r in lines)
    events.write_text("time_ms,event,node\n0,add,n9\n")
    assert run("simulate", plan, *away, *common) == 2 and "'n9'" in capsys.readouterr().err

    alone = [
        "plan",
        "--machines",
        ",".join(machines),
        "--links",
        tmp_path / "links.csv",
        "--simulate-s",
        20,
        "-o",
        plan,
    ]
    assert run(*alone, "--method", "petals", *common) == 0
    said = capsys.readouterr().out
    assert "petals" in said and "cover" not in said
    assert run(*alone, "--method", "cover", "--max-hops", 4, "--time-limit", 0.3, *common) == 0
    assert run(*alone, "--method", "lottery", *common) == 2 and "lottery" in capsys.readouterr().err
    plan.write_text(plan.read_text().replace("layers = [0,", "layers = [90,", 1))
    assert run("simulate", plan, *common) == 2 and "line" in capsys.readouterr().err


DEMAND = """
[roofline]
flops_efficiency = 0.35
read_efficiency = 0.66
fixed_s = 0.0003
[[model]]
name = "m14"
layers = 40
hidden = 5120
layer_gb = 0.735
kv_bytes = 5120
decode_ms = 60
decode_tokens_per_s = 2000
"""


def test_coral_plan(tmp_path, capsys):
    (tmp_path / "models.toml").write_text(DEMAND)
    (tmp_path / "offers.csv").write_text(
        "region,device,count,usd_per_h,available\na,L4,4,6.7,8\na,A100,1,3.4,3\nb,A100,1,3.3,1\n"
    )
    files = ["--demand", tmp_path / "models.toml", "--offers", tmp_path / "offers.csv", "-o", tmp_path / "plan.toml"]
    assert run("plan", "--planner", "coral", *files) == 0
    assert "no plan costs less than" in capsys.readouterr().out
    assert 'machines = ["1xA100"]' in (tmp_path / "plan.toml").read_text()
    plan = tmp_path / "plan.toml"
    again = ["plan", "--planner", "coral", *files[:-1], tmp_path / "next.toml", "--current", plan]
    assert run(*again) == 0 and "nothing changes" in capsys.readouterr().out
    (tmp_path / "models.toml").write_text("start_up_share = 0.1\n" + DEMAND.replace("= 2000", "= 6000"))
    assert run(*again) == 0
    said = capsys.readouterr().out
    assert "start " in said and "drain" not in said and "start-up counts 0.00" not in said
    text = plan.read_text()
    for old, new, what in (
        ("1xA100", "1xTPU", "TPU"),
        ("count = ", "count = -", "number"),
        ('"decode"', '"prefill"', "prefill"),
    ):
        plan.write_text(text.replace(old, new, 1))
        assert run(*again) == 2
        assert what in (said := capsys.readouterr().err) and "line 5" in said
    plan.write_text(text)
    (tmp_path / "offers.csv").write_text("region,device,count,usd_per_h,available\na,TPU,4,6.7,8\n")
    assert run("plan", "--planner", "coral", *files) == 2 and "TPU" in capsys.readouterr().err
    (tmp_path / "models.toml").write_text("[roofline")
    assert run("plan", "--planner", "coral", *files) == 2 and "not TOML" in capsys.readouterr().err
    assert run("plan", "--planner", "oracle") == 2


def test_spot(data, capsys):
    folder = data / "spot-traces"
    code = run(
        "spot", "--profile", "T4-4x/megatron_h7168_profile", "--profiles", data / "gpu-serving-profiles",
        "--availability", folder / "spotserve-segments.csv", "--segment", "trace_0203",
        "--trace", folder / "requests-gamma-rate0.2_cv6.csv", "--rate", 0.2,
    )  # fmt: skip
    assert code == 0 and "reroute" in capsys.readouterr().out


def test_a_planner_names_the_options_that_are_missing(capsys, tmp_path):
    assert run("plan", "--machines", "a100", "--trace", tmp_path / "requests.csv") == 2
    assert capsys.readouterr().err == "wager: error: the helix planner also needs --links\n"
    assert run("plan", "--planner", "coral", "--demand", tmp_path / "models.toml") == 2
    assert capsys.readouterr().err == "wager: error: the coral planner also needs --offers offers.csv\n"
