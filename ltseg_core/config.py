"""One typed, frozen, hashable description of a training run, and the named profiles."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import inspect
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from multiprocessing.context import BaseContext
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

IGNORE_INDEX = 255
STUDIES = Path(__file__).resolve().parents[1] / "results"
"""Where the repository keeps the runs of finished studies, without their weights."""


class UserError(ValueError):
    """Something the user can mend. The message says what was wrong, where, and what to do."""


def choose(kind: str, name: object, valid: Iterable[str]) -> str:
    """Return `name` if it is one of `valid` (case-insensitive); else refuse it, naming the nearest one."""
    options = {option.lower(): option for option in valid}
    if isinstance(name, str) and name.lower() in options:
        return options[name.lower()]
    near = difflib.get_close_matches(str(name).lower(), options, n=1, cutoff=0.5)
    hint = f"did you mean {options[near[0]]!r}?" if near else f"choose one of {', '.join(options.values())}"
    raise UserError(f"unknown {kind} {name!r}: {hint}")


def canonical(kind: str, values: Mapping[str, Any], valid: Iterable[str]) -> dict[str, Any]:
    """`values` under the names `choose` finds for theirs; refuses unknown names and one given twice (`a`, `A`)."""
    valid, named = list(valid), {}
    for name, value in values.items():
        chosen = name if name in valid else choose(kind, name, valid)
        if chosen in named:
            raise UserError(f"{kind} {chosen!r} is given twice, also as {name!r}: keep one")
        named[chosen] = value
    return named


def option_names(function: Callable[..., Any]) -> list[str]:
    """Its keyword-only parameters."""
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]


def check_options(
    kind: str, options: Mapping[str, Any], function: Callable[..., Any], hidden: tuple[str, ...] = ()
) -> dict[str, Any]:
    """`options` as the keyword-only parameters of `function`: their names (in any case) and annotated types.

    Refuses, with a UserError, names that are none (naming the nearest one) and values of another type.
    """
    valid = [name for name in option_names(function) if name not in hidden]
    if options and not valid:
        raise UserError(f"there is no {kind}, got {', '.join(options)}")
    hints = _hints(inspect.getattr_static(function, "__init__") if isinstance(function, type) else function)
    return {name: _typed(name, value, hints[name]) for name, value in canonical(kind, options, valid).items()}


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def sharing(modules: list[str]) -> BaseContext:
    """How to start processes: on Linux from a server that imports the modules once, elsewhere each by itself.

    Windows has no such server, and on macOS a process should not be forked once libraries are loaded.
    """
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(modules)
    return context


def data_root(root: str | os.PathLike[str] | None = None) -> Path:
    """The folder that holds the data sets: `root`, else $LTSEG_DATA, else ./data."""
    return Path(root or os.environ.get("LTSEG_DATA") or "data").expanduser()


_LATER = {"target": None, "class_mix": False, "pseudo_selection": "all", "pseudo_share": 0.5}
"""Fields of later versions and what earlier ones did: so set, they leave a key as it was."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Experiment:
    """Everything that decides the outcome of one training run; `key()` names its run directory.

    Where a run happens (device, data root, output folder, tracker) is not part of it: it is passed to
    `train.fit`. Two experiments are equal if their keys are: `checkpoint_every`, the one field that does not decide
    the outcome, is stored with the run but does not count. Mappings hold what JSON can; tuples in them become
    lists and 6.0 becomes 6, so that one setting is written in one way. Raises UserError for an unknown field, a
    wrong type or a value out of range.
    """

    dataset: str = "scenes"
    """`scenes`, `camvid`, `ccp`, or the path of a folder with images/ and labels/ in train/val/test."""
    data_options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the data set, e.g. the knobs of the embedded scenes."""
    size: tuple[int, int] | None = None
    """(height, width) in pixels to which images are resized; None keeps their own size."""

    architecture: str = "DeepLabV3Plus"
    """Any segmentation_models_pytorch architecture."""
    encoder: str = "tu-mobilenetv3_small_050"
    """Any of its encoders, `tu-<name>` for one of timm."""
    encoder_weights: str | None = None
    """None (random), the name or path of a local safetensors file, or a hub name such as `imagenet`."""
    model_options: Mapping[str, Any] = field(default_factory=dict)
    """Further keyword arguments of the architecture, e.g. {"decoder_channels": 64}, and of `models.build_model`:
    auxiliary, classifier ("cosine"), scale, learn_scale."""
    freeze_batch_norm: bool = False
    """Keep batch-norm statistics and affine parameters as they are (small batches, several CPU processes)."""

    method: str = "ce"
    """A key of `methods.METHODS`."""
    hyper: Mapping[str, Any] = field(default_factory=dict)
    """Hyper-parameters of the method, e.g. {"sigma": 6.0}."""

    steps: int = 400
    """Optimiser steps; a method that starts from a finished run adds its share of them."""
    batch_size: int = 8
    """Images per step, all processes together."""
    optimizer: Literal["sgd", "adamw"] = "adamw"
    lr: float = 1e-3
    """Peak learning rate of decoder and heads."""
    encoder_lr_factor: float = 1.0
    """Learning rate of the encoder divided by `lr`."""
    weight_decay: float = 1e-2
    momentum: float = 0.9
    """Momentum of SGD; not used by AdamW."""
    schedule: Literal["poly", "constant"] = "poly"
    poly_power: float = 0.9
    warmup_steps: int = 0
    """Steps of linear warm-up from lr / warmup_steps."""
    clip_norm: float | None = None
    """Largest gradient norm; None does not clip."""
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0

    scale_range: tuple[float, float] = (0.5, 2.0)
    """Random zoom of the augmentation; (1, 1) switches it off."""
    crop: tuple[int, int] | None = None
    """(height, width) in pixels of the training crop; None keeps the image size."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    colour: float = 0.25
    """Largest relative change of brightness, contrast and saturation."""

    ema_decay: float | None = None
    """Decay of the exponential moving average of the weights; it is then what is evaluated and stored."""
    labelled_images: int | None = None
    """Use the labels of this many training images; the others form the unlabelled stream."""
    target: Mapping[str, Any] | None = None
    """Domain adaptation: options of the images without labels, where they differ from `data_options`, e.g. {"style":
    "night", "seed": 1}; with a `dataset` among them, another data set and all its options. The unlabelled stream is
    then all its training images, and the run is evaluated on its other splits."""
    class_mix: bool = False
    """Paste half of the classes of a labelled image onto each unlabelled one, labels with them (ClassMix)."""
    unlabelled_weight: float = 1.0
    """Weight of the loss on the EMA teacher's pseudo-labels."""
    pseudo_threshold: float = 0.0
    """Pseudo-labels below this confidence are ignored."""
    pseudo_selection: Literal["all", "cbst", "dars"] = "all"
    """Which of the others are used: all, or the most confident of each class, "cbst" a share of it, "dars" so many that
    the classes have the shares of the labels (`self_training.most_confident`)."""
    pseudo_share: float = 0.5
    """Share that "cbst" and "dars" use at the end of a stage; it grows linearly from 0.4 of that."""

    eval_every: int | None = None
    """Steps between two evaluations on the validation split; None evaluates at the end only."""
    eval_images: int | None = None
    """Evaluate on at most this many images of each split, evenly spaced; None takes all."""
    checkpoint_every: int = 100
    """Steps between two checkpoints; not part of `key()`."""

    def __post_init__(self) -> None:
        hints = _hints(type(self))
        for f in dataclasses.fields(self):
            object.__setattr__(self, f.name, _typed(f.name, getattr(self, f.name), hints[f.name]))
            _plain(f.name, getattr(self, f.name))  # refuses infinity
        for name in ("steps", "batch_size", "checkpoint_every", "lr"):
            self._require(name, getattr(self, name) > 0, "> 0")
        for name in ("weight_decay", "warmup_steps", "encoder_lr_factor", "poly_power", "colour", "unlabelled_weight"):
            self._require(name, getattr(self, name) >= 0, ">= 0")
        for name in ("flip", "pseudo_threshold", "momentum"):
            self._require(name, 0 <= getattr(self, name) <= 1, "in [0, 1]")
        self._require("pseudo_share", 0 < self.pseudo_share <= 1, "in (0, 1]")
        self._require("seed", 0 <= self.seed < 2**31, "in [0, 2^31)")
        self._require("scale_range", 0 < self.scale_range[0] <= self.scale_range[1], "(low, high), 0 < low <= high")
        for name in ("size", "crop"):
            self._require(name, getattr(self, name) is None or min(getattr(self, name)) > 0, "(height, width) > 0")
        for name in ("labelled_images", "eval_every", "eval_images", "clip_norm"):
            self._require(name, getattr(self, name) is None or getattr(self, name) > 0, "> 0 or null")
        self._require("ema_decay", self.ema_decay is None or 0 < self.ema_decay < 1, "in (0, 1) or null")
        if self.target is not None:
            target = {"dataset" if k.lower() == "dataset" else k: v for k, v in self.target.items()}
            object.__setattr__(self, "target", target)
            if not isinstance(target.get("dataset", ""), str):
                raise UserError(f"target.dataset must be the name or path of a data set, got {target['dataset']!r}")
        unlabelled = [name for name in ("labelled_images", "target") if getattr(self, name) is not None]
        if unlabelled and self.ema_decay is None:
            raise UserError(f"{unlabelled[0]} needs ema_decay: the EMA teacher labels the unlabelled images")
        for name in ("class_mix", "pseudo_selection"):
            if getattr(self, name) != _LATER[name] and not unlabelled:
                raise UserError(f"{name} needs unlabelled images: set labelled_images or target")
        for name in ("name", "split", "root"):
            if name in {**self.data_options, **(self.target or {})}:
                raise UserError(f"{name!r} is no data option: data set, split and data root have their own arguments")

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise UserError(f"{name} must be {rule}, got {getattr(self, name)!r}")

    def key(self) -> str:
        """Sixteen hexadecimal digits that are equal for equal experiments, on every machine.

        Computed once: do not change the mappings of an experiment, `dataclasses.replace` it.
        """
        return self._key

    @cached_property
    def _key(self) -> str:
        decisive = {k: v for k, v in self.to_dict().items() if k != "checkpoint_every" and (k, v) not in _LATER.items()}
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def evaluated_on(self) -> tuple[str, dict[str, Any]]:
        """Name and options of the data set whose held-out splits the run is evaluated on."""
        if self.target is None:
            return self.dataset, dict(self.data_options)
        options = dict(self.target)
        name = options.pop("dataset", None)
        return (self.dataset, {**self.data_options, **options}) if name is None else (name, options)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Experiment) and self.key() == other.key()

    def __hash__(self) -> int:
        return hash(self.key())

    def to_dict(self) -> dict[str, Any]:
        return {f.name: _plain(f.name, getattr(self, f.name)) for f in dataclasses.fields(self)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), sort_keys=True, indent=1)

    @classmethod
    def named(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """`values` under the names of the fields; refuses what is none."""
        if not isinstance(values, Mapping):
            raise UserError(f"an experiment is a mapping of field to value, got {type(values).__name__}")
        return canonical("experiment field", values, [f.name for f in dataclasses.fields(cls)])

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Experiment:
        return cls(**cls.named(values))

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Experiment:
        """Read a YAML or JSON file (JSON is YAML)."""
        import yaml  # not needed to build experiments, and 30 ms at start-up

        try:
            return cls.from_dict(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise UserError(f"no experiment file at {path}") from None
        except OSError as error:
            raise UserError(f"{path} cannot be read as an experiment file: {error.strerror}") from None
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except (yaml.YAMLError, ValueError) as error:  # ValueError: bytes that are no text, 2020-13-45
            raise UserError(f"{path} is not valid YAML ({' '.join(str(error).split())})") from None


@dataclass(frozen=True)
class Profile:
    """A named setting of the whole collection: what it is for, the seeds, and the experiments' common fields.

    ablation_seeds: seeds of the arms that only an ablation needs; few where they are long to train
    """

    name: str
    purpose: str
    seeds: tuple[int, ...]
    ablation_seeds: tuple[int, ...]
    settings: Mapping[str, Any]

    def experiment(self, **changes: Any) -> Experiment:
        """The profile's experiment with some fields changed, e.g. `method="blv", seed=1`."""
        return Experiment.from_dict({**self.settings, **Experiment.named(changes)})


_SMALL = {
    "dataset": "scenes",
    "architecture": "DeepLabV3Plus",
    "encoder": "tu-mobilenetv3_small_050",
    # feature maps of 6 x 8: the usual atrous rates (12, 24, 36) would see nothing but padding
    "model_options": {"decoder_channels": 64, "decoder_aspp_dropout": 0.1, "decoder_atrous_rates": (2, 4, 6)},
    "scale_range": (0.75, 1.5),
    "lr": 1.2e-2,
    "warmup_steps": 20,
}
_PRETRAINED = {
    "architecture": "DeepLabV3Plus",
    "encoder": "mobilenet_v2",
    "encoder_weights": "mobilenet_v2_imagenet",
    "lr": 3e-3,
    "encoder_lr_factor": 0.3,
    "scale_range": (0.75, 1.5),
    "precision": "bf16",
    "warmup_steps": 50,
}
_REDUCED = {"steps": 600, "model_options": {"decoder_aspp_dropout": 0.1, "decoder_atrous_rates": (3, 6, 9)}}
_GPU = {"batch_size": 16}
PROFILES = {
    p.name: p
    for p in (
        Profile(
            "smoke",
            "embedded scenes, a few steps per run: does every notebook execute?",
            (0, 1),
            (0,),
            _SMALL
            | {"data_options": {"images": 48}, "steps": 6, "batch_size": 4, "eval_images": 24, "warmup_steps": 0},
        ),
        Profile(
            "quick",
            "embedded scenes, nothing to download: every effect on a laptop's CPU",
            (0, 1, 2),
            (0, 1, 2),
            _SMALL | {"steps": 200, "batch_size": 6},
        ),
        Profile(
            "camvid_cpu",
            "CamVid at 180x240, a pretrained encoder, minutes per run on a CPU",
            (0, 1, 2),
            (0,),
            _PRETRAINED | _REDUCED | {"dataset": "camvid", "size": (180, 240)},
        ),
        Profile(
            "camvid",
            "CamVid at full size: the real study, one GPU",
            (0, 1, 2, 3, 4),
            (0, 1, 2),
            _PRETRAINED | _GPU | {"dataset": "camvid", "steps": 3000, "eval_every": 500},
        ),
        Profile(
            "ccp_cpu",
            "Clothing Co-Parsing at 208x136, a pretrained encoder, minutes per run on a CPU",
            (0, 1, 2),
            (0,),
            _PRETRAINED | _REDUCED | {"dataset": "ccp", "size": (208, 136)},
        ),
        Profile(
            "ccp",
            "Clothing Co-Parsing at full size, one GPU",
            (0, 1, 2, 3, 4),
            (0, 1, 2),
            _PRETRAINED | _GPU | {"dataset": "ccp", "steps": 6000, "eval_every": 1000},
        ),
    )
}


def profile(name: str) -> Profile:
    """A profile by name. Raises UserError with the nearest name for an unknown one."""
    return PROFILES[choose("profile", name, PROFILES)]


_hints: Callable[[Any], dict[str, Any]] = lru_cache(get_type_hints)  # each call evaluates every annotation anew


def _typed(name: str, value: Any, hint: Any) -> Any:
    """`value` as the annotated type (a list becomes a tuple, an int a float), or a UserError."""
    for option in _options(hint):
        if option is type(None):
            if value is None:
                return None
        elif get_origin(option) is Literal:
            if value in get_args(option) and not isinstance(value, bool):  # True is no 1
                return value
        elif get_origin(option) is Sequence:
            if isinstance(value, (list, tuple)):
                return [_typed(name, v, get_args(option)[0]) for v in value]
        elif get_origin(option) is tuple:
            kinds = get_args(option)
            if isinstance(value, (list, tuple)) and len(value) == len(kinds):
                return tuple(_typed(name, v, kind) for v, kind in zip(value, kinds, strict=True))
        elif option is float:
            if isinstance(value, (int, float, str)) and not isinstance(value, bool):  # YAML reads 1e-3 as a string
                with contextlib.suppress(ValueError, OverflowError):
                    if not math.isnan(number := float(value)):
                        return number
        elif isinstance(option, type) and option in (int, str, bool):
            if isinstance(value, option) and not (option is int and isinstance(value, bool)):
                return value
        elif isinstance(value, Mapping):
            return _plain(name, value)
    expected = " or ".join(_type_name(option) for option in _options(hint))
    raise UserError(f"{name} must be {expected}, got {value!r}")


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _type_name(option: Any) -> str:
    if option is type(None):
        return "null"
    if get_origin(option) is Literal:
        return " or ".join(map(repr, get_args(option)))
    if get_origin(option) is tuple:
        return "[" + ", ".join(map(_type_name, get_args(option))) + "]"
    if get_origin(option) is Sequence:
        return f"[{_type_name(get_args(option)[0])}, ...]"
    return "a mapping" if get_origin(option) else option.__name__


def _plain(name: str, value: Any) -> Any:
    """A copy of `value` in the one way JSON writes it: lists, not tuples; 6, not 6.0. Refuses what JSON cannot hold."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise UserError(f"the names in {name} must be strings, got {key!r}")
        return {key: _plain(f"{name}.{key}", v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(name, v) for v in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            raise UserError(f"{name} must be finite, got {value}")
        return int(value) if value.is_integer() else float(value)
    if value is None or isinstance(value, (str, int)):
        return value
    raise UserError(f"{name} must be a number, string, boolean, null, list or mapping, got {value!r}")
