"""Experiments are typed, frozen, hashable and refuse what they do not know."""

import dataclasses
import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ltseg_core.config import PROFILES, Experiment, UserError, check_options, choose, data_root, profile


def test_key_depends_on_every_field_and_on_nothing_else():
    base = Experiment()
    assert base.key() == Experiment(dataset="scenes", data_options={}).key()
    others = [
        Experiment(seed=1), Experiment(hyper={"sigma": 6}), Experiment(crop=(32, 32)), Experiment(encoder_weights="x"),
        Experiment(data_options={"images": 10}), Experiment(method="blv"), Experiment(lr=0.5),
    ]  # fmt: skip
    assert len({base, *others}) == 1 + len(others)


def test_key_is_the_same_on_every_machine():
    # sha256 of the sorted JSON; a change here makes every finished run invisible: raise results.FORMAT instead
    document = json.loads(Experiment(method="ce", seed=3).to_json())
    assert document["seed"] == 3
    assert Experiment(method="ce", seed=3).key() == Experiment.from_dict(dict(reversed(document.items()))).key()


@given(
    seed=st.integers(0, 2**31 - 1),
    lr=st.floats(1e-6, 10),
    size=st.none() | st.tuples(st.integers(1, 999), st.integers(1, 999)),
    hyper=st.dictionaries(st.sampled_from(["sigma", "tau"]), st.floats(-5, 5) | st.booleans() | st.none()),
)
def test_json_round_trip(seed, lr, size, hyper):
    experiment = Experiment(seed=seed, lr=lr, size=size, hyper=hyper)
    again = Experiment.from_dict(json.loads(experiment.to_json()))
    assert again == experiment
    assert again.key() == experiment.key()


def test_yaml_file(tmp_path):
    path = tmp_path / "e.yaml"
    path.write_text("method: blv\nhyper: {sigma: 6}\nsize: [180, 240]\nlr: 3e-3\n")  # YAML: 3e-3 is a string
    assert Experiment.from_file(path) == Experiment(method="blv", hyper={"sigma": 6}, size=(180, 240), lr=0.003)


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Experiment().seed = 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stepz": 5}, "did you mean 'steps'"),
        ({"steps": "5"}, "steps must be int, got '5'"),
        ({"steps": 2.5}, "steps must be int"),
        ({"steps": True}, "steps must be int"),
        ({"steps": 0}, "steps must be > 0"),
        ({"lr": float("nan")}, "lr must be float"),
        ({"optimizer": "adam"}, "'sgd' or 'adamw'"),
        ({"size": [3]}, r"size must be \[int, int\] or null"),
        ({"size": [0, 5]}, "size must be"),
        ({"scale_range": [2, 1]}, "low <= high"),
        ({"hyper": 3}, "hyper must be a mapping"),
        ({"flip": 1.5}, r"flip must be in \[0, 1\]"),
        ({"ema_decay": 1.0}, "ema_decay must be"),
        ({"labelled_images": 5}, "needs ema_decay"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_refusals(values, message):
    with pytest.raises(UserError, match=message):
        Experiment.from_dict(values)


def test_file_refusals_name_the_file(tmp_path):
    with pytest.raises(UserError, match="no experiment file at"):
        Experiment.from_file(tmp_path / "missing.yaml")
    bad = tmp_path / "bad.yaml"
    for text in ("a: [1", "steps: many", "- 1"):
        bad.write_text(text)
        with pytest.raises(UserError, match="bad.yaml"):
            Experiment.from_file(bad)


def test_choose_is_case_insensitive_and_names_the_nearest():
    assert choose("encoder", "RESNET18", ["resnet18", "resnet34"]) == "resnet18"
    with pytest.raises(UserError, match="did you mean 'resnet34'"):
        choose("encoder", "resnet35x", ["vgg", "resnet34"])
    with pytest.raises(UserError, match="choose one of vgg, resnet34"):
        choose("encoder", "zzz", ["vgg", "resnet34"])


def test_check_options_sees_keyword_only_parameters():
    def build(first: int, *, sigma: float, shares: Sequence[float] | None = None, secret: int) -> None: ...

    given = {"sigma": 1, "shares": [1, "2e-3"]}
    assert check_options("option", given, build, hidden=("secret",)) == {"sigma": 1.0, "shares": [1.0, 0.002]}
    assert check_options("option", {"shares": None}, build) == {"shares": None}
    for wrong in ({"sigma": "a"}, {"sigma": None}, {"shares": 3}, {"shares": ["a"]}):
        with pytest.raises(UserError, match="must be"):
            check_options("option", wrong, build)
    for name in ("first", "secret", "sigmaa"):
        with pytest.raises(UserError, match="unknown option"):
            check_options("option", {name: 1}, build, hidden=("secret",))


def test_data_root_order(monkeypatch, tmp_path):
    assert str(data_root()) == "data"
    monkeypatch.setenv("LTSEG_DATA", str(tmp_path))
    assert data_root() == tmp_path
    assert str(data_root("elsewhere")) == "elsewhere"


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_build_valid_experiments(name):
    chosen = profile(name)
    assert len({chosen.experiment(method="ce", seed=s).key() for s in chosen.seeds}) == len(chosen.seeds) >= 2


def test_unknown_profile():
    with pytest.raises(UserError, match="did you mean 'quick'"):
        profile("quik")
