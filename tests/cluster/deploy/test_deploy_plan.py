"""The TOML of a deployment: what it means, and that every wrong edit is refused with its line and what to do."""

import random

import pytest

from wager.cli import main
from wager.cluster import plan_file
from wager.cluster.deploy import plan as deploy_plan
from wager.cluster.deploy.router import WeightedChoice
from wager.errors import UsageError

PLAN = """model = "demo"
layers = 5
links = ""

[deploy]
max_num_seqs = 8

[[node]]
name = "n0"
machine = "cpu"
layers = [0, 3]

[[node]]
name = "n1"
machine = "cpu"
layers = [2, 5]
"""


def read(tmp_path, text):
    path = tmp_path / "plan.toml"
    path.write_text(text)
    return deploy_plan.read(path)


def test_nodes_become_a_pipeline_with_partial_inference(tmp_path):
    plan = read(tmp_path, PLAN)
    (replica,) = plan.replicas
    assert [(s.node, s.first, s.last) for s in replica.stages] == [("n0", 0, 3), ("n1", 3, 5)]
    assert plan.checkpoint == "demo" and plan.engine == {"max_num_seqs": 8}


def test_named_replicas_and_weights(tmp_path):
    text = PLAN.replace('name = "n0"', 'name = "n0"\nreplica = "a"\nweight = 3.0').replace(
        'name = "n1"', 'name = "n1"\nreplica = "a"'
    )
    text += '\n[[node]]\nname = "n2"\nreplica = "b"\nlayers = [0, 5]\n'
    plan = read(tmp_path, text)
    assert [(r.name, r.weight, len(r.stages)) for r in plan.replicas] == [("a", 3.0, 2), ("b", 1.0, 1)]


def test_a_planners_file_is_a_deployment(tmp_path):
    path = tmp_path / "plan.toml"
    nodes = {"n0": ("a100", 0, 4), "n1": ("l4", 4, 6), "n2": ("l4", 0, 6), "n3": ("t4", 1, 3)}
    plan_file.write(plan_file.PlanFile("m", 6, "links.csv", nodes, {"flow_tokens_per_s": 10.0}), path)
    plan = deploy_plan.read(path)
    assert len(plan.replicas) == 2 and plan.idle == ("n3",)


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        ("layers = [0, 3]", "layers = [3, 1]", 11, "no range"),
        ("layers = [0, 3]", "layers = [0, 9]", 11, "within 0 to 5"),
        ("layers = [2, 5]", "layers = [4, 5]", None, "no chain of nodes"),
        ("max_num_seqs = 8", "max_num_seq = 8", 6, "did you mean max_num_seqs"),
        ("max_num_seqs = 8", "max_num_seqs = -1", 6, "must be positive"),
        ("max_num_seqs = 8", 'max_num_seqs = "8"', 6, "must be of type int"),
        ("max_num_seqs = 8", "max_num_seqs = true", 6, "must be of type int"),
        ('name = "n1"', 'name = "n0"', 14, "there twice"),
        ('name = "n1"', 'name = "n1"\nreplica = "a"', 8, "either every node"),
        ("layers = 5", "layers = 0", 2, "at least 1"),
        ("layers = 5", "", None, "layers = ... is missing"),
        ('[[node]]\nname = "n1"', '[[nodes]]\nname = "n1"', 13, "did you mean node"),
        ('machine = "cpu"', "machine = ", None, "is not TOML"),
        ('machine = "cpu"', "machine = 3", 10, "of type str"),
    ],
)
def test_a_wrong_edit_is_refused_with_its_line(tmp_path, old, new, line, says):
    assert old in PLAN
    with pytest.raises(UsageError) as refused:
        read(tmp_path, PLAN.replace(old, new, 1))
    assert says in str(refused.value)
    if line is not None:
        assert f"line {line} of" in str(refused.value)


def test_replicas_must_cover_the_model(tmp_path):
    a = PLAN.replace('name = "n0"', 'name = "n0"\nreplica = "a"').replace('name = "n1"', 'name = "n1"\nreplica = "a"')
    with pytest.raises(UsageError, match=r"line 13 .*|no node holds layer 3"):
        read(tmp_path, a.replace("layers = [2, 5]", "layers = [4, 5]"))
    with pytest.raises(UsageError, match="no node holds layer 4"):
        read(tmp_path, a.replace("layers = [2, 5]", "layers = [2, 4]"))
    with pytest.raises(UsageError, match="no layers left for node n1"):
        read(tmp_path, a.replace("layers = [2, 5]", "layers = [2, 3]"))


def test_pipelines_cover_every_layer_once_and_share_no_node():
    rng = random.Random(0)
    for _ in range(200):
        layers = rng.randint(1, 8)
        nodes = []
        for i in range(rng.randint(1, 9)):
            first = rng.randrange(layers)
            nodes.append({"name": f"n{i}", "layers": [first, rng.randint(first + 1, layers)]})
        try:
            replicas, idle = deploy_plan.form_pipelines(deploy_plan.Located("plan", ""), nodes, layers)
        except UsageError:
            continue
        used = [s.node for r in replicas for s in r.stages]
        assert len(set(used)) == len(used) and sorted(used + list(idle)) == sorted(n["name"] for n in nodes)
        held = {n["name"]: n["layers"] for n in nodes}
        for replica in replicas:
            assert [l for s in replica.stages for l in range(s.first, s.last)] == list(range(layers))
            assert all(held[s.node][0] <= s.first and s.last <= held[s.node][1] for s in replica.stages)


def test_weighted_choice_converges_to_the_weights():
    rng = random.Random(1)
    choice, got, largest = WeightedChoice([5.0, 3.0, 2.0]), [0, 0, 0], 0
    for _ in range(2000):
        tokens = rng.randint(1, 400)
        taken = choice.take(tokens, [True] * 3)
        assert taken is not None
        got[taken] += tokens
        largest = max(largest, tokens)
    total = sum(got)
    assert all(abs(g / total - w) <= 3 * largest / total for g, w in zip(got, (0.5, 0.3, 0.2), strict=True))
    assert choice.take(1, [False, True, False]) == 1 and choice.take(1, [False] * 3) is None


def test_the_command_describes_a_plan(tmp_path, capsys):
    path = tmp_path / "plan.toml"
    path.write_text(PLAN)
    main_exit(["deploy", str(path), "--check"])
    assert "n0 [0, 3) -> n1 [3, 5)" in capsys.readouterr().out
    path.write_text(PLAN.replace("[0, 3]", "[0, 30]"))
    assert main_exit(["deploy", str(path), "--check"]) == 2
    assert "line 11" in capsys.readouterr().err
    assert main_exit(["deploy", str(path), "--launcher", "magic"]) == 2


def main_exit(args):
    with pytest.raises(SystemExit) as left:
        main(args)
    return left.value.code
