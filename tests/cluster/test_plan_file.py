"""Plans survive writing and reading; a wrong edit is refused with its line; the commands run end to end on a made-up cluster."""

import pytest

from wager.cluster import plan_file
from wager.cluster.helix.refine import Tried, covers, refine
from wager.errors import UsageError


@pytest.fixture
def path(tmp_path):
    nodes = {"n0": ("l4", 0, 3), "n1": ("t4", 3, 5), "n2": ("t4", 2, 5)}
    plan_file.write(
        plan_file.PlanFile("m", 5, "links.csv", nodes, {"chosen": "cover", "flow": 12.5}), tmp_path / "plan.toml"
    )
    return tmp_path / "plan.toml"


def test_a_plan_is_the_same_after_writing_and_reading(path):
    plan = plan_file.read(path)
    assert plan.placement == {"n0": (0, 3), "n1": (3, 5), "n2": (2, 5)} and plan.nodes["n1"][0] == "t4"
    assert plan.notes == {"chosen": "cover", "flow": 12.5}


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("layers = [3, 5]", "layers = [3, 9]", "line 19 .*n1"),
        ("layers = [3, 5]", "layers = [3, 3]", "line 19"),
        ('name = "n1"', 'name = "n0"', "line 19 .*twice"),
        ('machine = "t4"\nlayers = [2, 5]', "layers = [2, 5]", "line 14 .*machine"),
        ("layers = [0, 3]", "layers = [1, 3]", "layer 0"),
        ('model = "m"', "model = 3", "model"),
        ("[notes]", "[notes", "not TOML"),
    ],
)
def test_a_wrong_edit_is_refused_with_its_line(path, old, new, said):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(UsageError, match=said):
        plan_file.read(path)


def test_refining_never_gets_worse_and_stays_lawful():
    import numpy as np

    def rate(placement):  # likes long windows that begin early
        return sum((end - start) / (1 + start) for start, end in placement.values())

    start = {"a": (0, 2), "b": (2, 4), "c": (4, 6)}
    most = {"a": 3, "b": 4, "c": 2, "d": 2}
    tried = []

    def simulate(placements):
        tried.extend(placements)
        return [Tried(p, rate(p)) for p in placements]

    def promise(placement):
        return 1.0 if placement.get("a", (0, 0))[0] == 0 else 0.5

    other = {"a": (0, 3), "b": (2, 5), "c": (4, 6)}
    starts = [Tried(start, rate(start)), Tried(other, rate(other))]
    found = refine(starts, most, 6, simulate, promise, 200, np.random.default_rng(0), at_once=3)
    best = found.placement
    assert covers(best, 6) and found.rate == rate(best) > max(rate(start), rate(other))
    assert 100 < len(tried) <= 201 and all(
        promise(p) == 1.0 for p in tried
    )  # what promises too little is not simulated
    assert all(0 <= s < e <= 6 and e - s <= most[n] for n, (s, e) in best.items())
