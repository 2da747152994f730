"""Experiments are typed, frozen, hashable and refuse what they do not know."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ltseg_core.config import PROFILES, Experiment, UserError, check_options, choose, data_root, profile

CHANGED = {
    "dataset": "camvid", "data_options": {"images": 10}, "size": (32, 48), "architecture": "Unet",
    "encoder": "resnet18", "encoder_weights": "imagenet", "model_options": {"decoder_channels": 64},
    "freeze_batch_norm": True, "method": "blv", "hyper": {"sigma": 6}, "steps": 5, "batch_size": 2,
    "optimizer": "sgd", "lr": 0.5, "encoder_lr_factor": 0.1, "weight_decay": 0.1, "momentum": 0.5,
    "schedule": "constant", "poly_power": 2, "warmup_steps": 3, "clip_norm": 1, "precision": "bf16", "seed": 1,
    "scale_range": (1, 1), "crop": (32, 32), "flip": 0, "colour": 0, "ema_decay": 0.9, "labelled_images": 4,
    "unlabelled_weight": 2, "pseudo_threshold": 0.5, "eval_every": 10, "eval_images": 10, "checkpoint_every": 7,
    "target": {"style": "night"}, "class_mix": True, "pseudo_selection": "dars", "pseudo_share": 0.9,
}  # fmt: skip


def test_key_depends_on_every_field_that_decides_the_outcome():
    base = Experiment(ema_decay=0.5, labelled_images=3)
    others = [dataclasses.replace(base, **{f.name: CHANGED[f.name]}) for f in dataclasses.fields(Experiment)]
    same = [e for e in others if e.key() == base.key()]
    assert [e.checkpoint_every for e in same] == [7]
    assert same == [base]
    assert same[0].to_dict()["checkpoint_every"] == 7
    assert len({base, *others}) == len(others) == len(CHANGED)


def test_one_setting_has_one_form():
    one = Experiment(hyper={"a": 6.0, "b": (1.0, 0.5), "c": {"d": -0.0}}, lr=1, flip=0, size=[32, 48])
    other = Experiment(hyper={"c": {"d": 0}, "b": [1, 0.5], "a": 6}, lr=1.0, flip=-0.0, size=(32, 48))
    assert one == other
    assert one.hyper == other.hyper
    assert repr(one.hyper) == "{'a': 6, 'b': [1, 0.5], 'c': {'d': 0}}"
    assert one.key() == other.key()
    flag = Experiment(hyper={"a": True})  # equal to 1 in Python, another setting
    assert flag.hyper["a"] is True
    assert flag != Experiment(hyper={"a": 1})
    settings = {"a": [1]}
    copied = Experiment(model_options=settings)
    settings["a"].append(2)
    assert copied.model_options == {"a": [1]}


def test_key_is_the_same_on_every_machine():
    # sha256 of the sorted JSON; a change here makes every finished run invisible: raise results.FORMAT as well
    fixed = Experiment(method="blv", hyper={"sigma": 6.0}, size=(180, 240), lr=3e-3, seed=3)
    assert fixed.key() == "1cc083ea2fecdd28"
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
        ({"steps": 5, "Steps": 6}, "'steps' is given twice, also as 'Steps'"),
        ({5: 5}, "unknown experiment field 5"),
        (["steps"], "an experiment is a mapping"),
        ({"steps": "5"}, "steps must be int, got '5'"),
        ({"steps": 2.5}, "steps must be int"),
        ({"steps": True}, "steps must be int"),
        ({"steps": 0}, "steps must be > 0"),
        ({"lr": float("nan")}, "lr must be float"),
        ({"lr": float("inf")}, "lr must be finite, got inf"),
        ({"lr": "inf"}, "lr must be finite, got inf"),
        ({"lr": 10**400}, "lr must be float"),
        ({"clip_norm": float("inf")}, "clip_norm must be finite, got inf"),
        ({"scale_range": (1, float("inf"))}, "scale_range must be finite"),
        ({"poly_power": -0.5}, "poly_power must be >= 0, got -0.5"),
        ({"hyper": {"a": float("inf")}}, "hyper.a must be finite, got inf"),
        ({"hyper": {"a": [float("nan")]}}, "hyper.a must be finite, got nan"),
        ({"model_options": {"a": {"b": {1, 2}}}}, "model_options.a.b must be a number, string, .*got {1, 2}"),
        ({"data_options": {"a": Path("b")}}, "data_options.a must be"),
        ({"data_options": {1: 2}}, "the names in data_options must be strings, got 1"),
        ({"data_options": {"split": "val"}}, "'split' is no data option"),
        ({"optimizer": "adam"}, "'sgd' or 'adamw'"),
        ({"size": [3]}, r"size must be \[int, int\] or null"),
        ({"size": [0, 5]}, "size must be"),
        ({"scale_range": [2, 1]}, "low <= high"),
        ({"hyper": 3}, "hyper must be a mapping"),
        ({"flip": 1.5}, r"flip must be in \[0, 1\]"),
        ({"ema_decay": 1.0}, "ema_decay must be"),
        ({"labelled_images": 5}, "labelled_images needs ema_decay"),
        ({"target": {"style": "night"}}, "target needs ema_decay"),
        ({"target": {"Dataset": 3}, "ema_decay": 0.9}, "target.dataset must be the name or path of a data set, got 3"),
        ({"target": {"root": "/data"}, "ema_decay": 0.9}, "'root' is no data option"),
        ({"pseudo_share": 0}, r"pseudo_share must be in \(0, 1\]"),
        ({"pseudo_selection": "darts"}, "pseudo_selection must be 'all' or 'cbst' or 'dars'"),
        ({"class_mix": True, "ema_decay": 0.9}, "class_mix needs unlabelled images: set labelled_images or"),
        ({"pseudo_selection": "cbst", "ema_decay": 0.9}, "pseudo_selection needs unlabelled images: set"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_refusals(values, message):
    with pytest.raises(UserError, match=message):
        Experiment.from_dict(values)


def test_a_target_is_named_by_what_is_other():
    e = Experiment(data_options={"images": 8, "seed": 2}, ema_decay=0.9)
    assert e.evaluated_on == ("scenes", {"images": 8, "seed": 2})
    night = dataclasses.replace(e, target={"style": "night", "seed": 1})
    assert night.evaluated_on == ("scenes", {"images": 8, "seed": 1, "style": "night"})
    elsewhere = dataclasses.replace(e, target={"Dataset": "camvid", "images": 3})
    assert elsewhere.evaluated_on == ("camvid", {"images": 3})


def test_file_refusals_name_the_file(tmp_path):
    with pytest.raises(UserError, match="no experiment file at"):
        Experiment.from_file(tmp_path / "missing.yaml")
    with pytest.raises(UserError, match=f"{tmp_path} cannot be read as an experiment file: Is a directory"):
        Experiment.from_file(tmp_path)
    bad = tmp_path / "bad.yaml"
    for content in (b"a: [1", b"steps: many", b"- 1", b"\x89PNG", b"a\0", b"hyper: {a: 2020-13-45}"):
        bad.write_bytes(content)
        with pytest.raises(UserError, match="bad.yaml") as refusal:
            Experiment.from_file(bad)
        assert "\n" not in str(refusal.value)


def test_field_names_in_any_case(tmp_path):
    assert Experiment.from_dict({"Steps": 5, "LR": 1}) == Experiment(steps=5, lr=1)
    assert profile("quick").experiment(Steps=5) == profile("quick").experiment(steps=5)


def test_choose_is_case_insensitive_and_names_the_nearest():
    assert choose("encoder", "RESNET18", ["resnet18", "resnet34"]) == "resnet18"
    with pytest.raises(UserError, match="did you mean 'resnet34'"):
        choose("encoder", "resnet35x", ["vgg", "resnet34"])
    with pytest.raises(UserError, match="choose one of vgg, resnet34"):
        choose("encoder", "zzz", ["vgg", "resnet34"])


def test_check_options_sees_keyword_only_parameters():
    def build(
        first: int, *, sigma: float, shares: Sequence[float] | None = None, sign: Literal[1, -1] = 1, secret: int
    ) -> None: ...

    given = {"sigma": 1, "shares": [1, "2e-3"]}
    assert check_options("option", given, build, hidden=("secret",)) == {"sigma": 1.0, "shares": [1.0, 0.002]}
    assert check_options("option", {"shares": None}, build) == {"shares": None}
    assert check_options("option", {"Sigma": 1}, build) == {"sigma": 1.0}
    assert check_options("option", {"sign": -1}, build) == {"sign": -1}
    with pytest.raises(UserError, match="option 'sigma' is given twice, also as 'SIGMA'"):
        check_options("option", {"sigma": 1, "SIGMA": 2}, build)
    for wrong in ({"sigma": "a"}, {"sigma": None}, {"shares": 3}, {"shares": ["a"]}):
        with pytest.raises(UserError, match="must be"):
            check_options("option", wrong, build)
    with pytest.raises(UserError, match="sign must be 1 or -1, got True"):
        check_options("option", {"sign": True}, build)
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
