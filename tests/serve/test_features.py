"""No row may claim more than the repository holds."""

import ast
import dataclasses
import importlib
import json
from functools import cache
from pathlib import Path

import pytest

from wager.errors import UsageError
from wager.serve import features as registry_module
from wager.serve.build import build_engine
from wager.serve.config import EngineConfig
from wager.serve.features import Exactness, Feature, check_conflicts, enabled_features, features, registry

ROOT = Path(__file__).parents[2]
FEATURES = registry()
# What a user must say to start any engine; it selects no technique.
BASIC_OPTIONS = {"model", "tokenizer", "seed", "device", "max_model_len"}


@cache
def functions_of(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize("feature", [f for f in FEATURES.values() if f.available], ids=lambda f: f.id)
def test_a_claimed_feature_has_code_and_tests(feature):
    module, _, name = feature.implementation.partition(":")
    found = importlib.import_module(module)
    for part in name.split("."):
        if dataclasses.is_dataclass(found) and part in {f.name for f in dataclasses.fields(found)}:
            break
        found = getattr(found, part)
    assert feature.test_ids, f"{feature.id} is claimed without a test"
    for test in feature.test_ids:
        path, _, function = test.partition("::")
        assert (ROOT / path).is_file(), f"{feature.id}: {path} does not exist"
        assert function in functions_of(path), f"{feature.id}: {path} has no test {function}"
    for bench in feature.bench_ids:
        assert (ROOT / bench).is_file(), f"{feature.id}: {bench} does not exist"


@pytest.mark.parametrize("feature", [f for f in FEATURES.values() if not f.available], ids=lambda f: f.id)
def test_an_absent_feature_says_why(feature):
    assert feature.note and not feature.test_ids


def test_every_engine_option_belongs_to_a_feature():
    options = {f.name for f in dataclasses.fields(EngineConfig)} - BASIC_OPTIONS
    covered = {knob for f in FEATURES.values() for knob in f.knobs}
    assert options <= covered, f"options without a feature: {sorted(options - covered)}"


def test_approximate_features_are_off_by_default():
    on = enabled_features(EngineConfig())
    assert not [id_ for id_ in on if FEATURES[id_].exactness is Exactness.APPROXIMATE and FEATURES[id_].enabled_when]


def test_conflicts_name_known_features():
    for feature in FEATURES.values():
        for other, reason in feature.conflicts:
            assert other in FEATURES and reason


def test_the_default_engine_has_no_conflict_and_configured_ones_are_refused():
    check_conflicts(enabled_features(EngineConfig()))
    config = EngineConfig(skip_tokenizer_init=True, chat_template="{{ messages }}")
    with pytest.raises(UsageError, match="skip_tokenizer_init.*chat_template|chat_template.*skip_tokenizer_init"):
        check_conflicts(enabled_features(config))
    with pytest.raises(UsageError, match="chat_template"):
        build_engine(config)


def test_a_conflict_is_found_whichever_side_declares_it(monkeypatch):
    a = Feature("a", "x", "feature A", knobs=("a_knob",), implementation="m:a")
    b = Feature("b", "x", "feature B", knobs=("b_knob",), implementation="m:b", conflicts=(("a", "they share a pool"),))
    monkeypatch.setattr(registry_module, "_REGISTRY", {"a": a, "b": b})
    with pytest.raises(
        UsageError, match="feature B .b_knob. cannot be combined with feature A .a_knob.: they share a pool"
    ):
        check_conflicts({"a", "b"})
    check_conflicts({"a"})
    with pytest.raises(ValueError, match="twice"):
        registry_module.register(a)


def test_json_is_complete(capsys):
    features(json_=True, missing=False)
    rows = json.loads(capsys.readouterr().out)
    assert [row["id"] for row in rows] == list(FEATURES)
    assert {row["available"] for row in rows} == {True, False}
