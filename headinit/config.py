"""The settings of a run: their schema, the checks across fields, and the name that follows from them.

Hydra composes `conf/` and the command line into a plain mapping; `settings_from` turns it into typed, checked values
and reports every mistake at once. What belongs to one registry (the options of a scheme, a head, a data set) stays a
mapping here and is checked by that registry.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from headinit.errors import ConfigError, unknown_name

AUGMENTATIONS = ("none", "crop", "basic", "trivial_augment")
FREEZE_POLICIES = ("all", "none", "norm", "stages", "patterns", "lp_ft", "gradual")

# These change how fast a run goes or what it shows, not what it computes.
_NOT_SEMANTIC = (
    *("hydra", "tracker"),
    *("trainer.workers", "trainer.progress", "trainer.save_every_steps", "trainer.cache", "trainer.drift"),
    "trainer.prefix_cache_gb",
)


@dataclass
class FreezeSettings:
    """Which part of the backbone stays as it was pretrained, and how long.

    `head_lr` and `epochs` are what suits the policy; the files of optim and trainer refer to them.
    """

    policy: str = "all"
    stages: int | None = None
    patterns: list[str] = field(default_factory=list)
    norm: str | None = None
    probe_epochs: int = 30
    probe_lr: float | None = None
    stage_epochs: int = 1
    head_lr: float = 1e-2
    epochs: int = 30


@dataclass
class OptimSettings:
    """The optimiser and its learning rates; `lr` may be ``"find"``."""

    name: str = "adamw"
    lr: Any = 1e-3
    backbone_lr: float | None = None
    backbone_share: float | None = None
    layer_decay: float | None = None
    weight_decay: float = 0.01
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    bias_correction: bool = True
    momentum: float = 0.9
    nesterov: bool = True


@dataclass
class ScheduleSettings:
    """How the learning rates change over the steps."""

    name: str = "cosine"
    warmup: float = 0.1
    step_epochs: int = 10
    step_gamma: float = 0.1
    milestones: list[int] = field(default_factory=list)


@dataclass
class TrainerSettings:
    """How long and in what portions to train."""

    epochs: int = 10
    steps: int | None = None
    steps_per_epoch: int | None = None
    rule: str | None = None
    batch_size: int = 32
    clip_norm: float | None = 1.0
    accumulation: int = 1
    label_smoothing: float = 0.0
    mixup: float = 0.0
    patience: int | None = None
    evaluate_every: int = 1
    monitor: str | None = None
    select: str = "best"
    precision: str = "fp32"
    channels_last: bool = True
    drift: bool = True
    ema: float | None = None
    compile: Any = False
    prefix_cache_gb: float | None = 4.0
    workers: int = 2
    save_every_steps: int | None = None
    progress: bool = True
    cache: str | None = None


@dataclass
class Settings:
    """Everything that defines a run.

    Attributes:
        model, head, init, data: `name` and the options of that catalog, head, scheme or data set.
        freeze, optim, schedule, trainer: see their classes.
        tracker: `name` and the options of an experiment tracker.
        seed: of the head. order_seed: of example order, augmentation and dropout.
    """

    model: dict[str, Any]
    head: dict[str, Any]
    init: dict[str, Any]
    data: dict[str, Any]
    freeze: FreezeSettings = field(default_factory=FreezeSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    tracker: dict[str, Any] = field(default_factory=lambda: {"name": "none"})
    seed: int = 0
    order_seed: int = 0


def settings_from(config: DictConfig | Mapping[str, Any]) -> Settings:
    """Typed and checked settings.

    Args:
        config: what Hydra composed, or a plain mapping of the same form.

    Raises:
        ConfigError: lists every mistake found.

    Example:
        >>> names = {"model": "resnet50", "head": "linear", "init": "he", "data": "digits"}
        >>> groups = {group: {"name": name} for group, name in names.items()}
        >>> settings_from(groups).optim.lr
        0.001
    """
    plain = OmegaConf.create({key: value for key, value in _plain(config).items() if key != "hydra"})
    try:
        settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Settings), plain))
    except OmegaConfBaseException as error:
        raise ConfigError(_readable(error)) from error
    assert isinstance(settings, Settings)
    mistakes = list(_mistakes(settings))
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return settings


def composed_settings(configurations: str | Path, overrides: Sequence[str]) -> Settings:
    """The settings that `scripts/finetune.py` would have with these arguments.

    Args:
        configurations: the folder `conf`.
        overrides: as on the command line.

    Raises:
        ConfigError: lists every mistake found.
        HydraException: an argument that Hydra does not understand, or an unknown name.
    """
    return settings_from(composed(configurations, overrides))


def composed(configurations: str | Path, overrides: Sequence[str], script: str = "finetune") -> dict[str, Any]:
    """What the arguments of a script compose to, as a plain mapping.

    Args:
        configurations: the folder `conf`.
        overrides: as on the command line.
        script: whose: ``"finetune"`` or ``"compare"``.

    Raises:
        HydraException: an argument that Hydra does not understand, or an unknown name.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import OverrideType

    folder = Path(configurations).resolve()
    choices = tuple(item for item in overrides if (folder / item.partition("=")[0]).is_dir())
    parsed = OverridesParser.create().parse_overrides([item for item in overrides if item not in choices])
    if all(item.type is OverrideType.CHANGE and not item.is_sweep_override() for item in parsed):
        # The files are composed once for all that share them: Hydra takes 0.1 s for it.
        config = copy.deepcopy(_composed_files(folder, script, choices))
        with suppress(OmegaConfBaseException):  # what is wrong with a value is for Hydra to say
            for item in parsed:
                OmegaConf.update(config, item.key_or_group, item.value(), merge=True)
            return _plain(config, complete=False)
    return _plain(_composed_files(folder, script, tuple(overrides)), complete=False)


@functools.lru_cache(maxsize=64)
def _composed_files(folder: Path, script: str, overrides: tuple[str, ...]) -> DictConfig:
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(folder), version_base="1.3"):
        return compose(script, list(overrides))


def run_id(config: DictConfig | Mapping[str, Any]) -> str:
    """The name of a run's folder: readable parts and a digest of every setting that changes what is computed.

    Example:
        >>> names = {"model": "resnet50", "head": "linear", "init": "he", "data": "digits"}
        >>> groups = {group: {"name": name} for group, name in names.items()}
        >>> run_id(groups)[:26], run_id(groups) == run_id({**groups, "trainer": {"workers": 4}})
        ('resnet50-digits-he-linear-', True)
    """
    semantic = _plain(config, complete=False)  # what is missing is reported when the settings are read
    for path in _NOT_SEMANTIC:
        *parents, last = path.split(".")
        node: Any = semantic
        for parent in parents:
            node = node.get(parent) or {}
        node.pop(last, None)
    semantic = {key: value for key, value in semantic.items() if value != {}}
    digest = hashlib.sha256(json.dumps(semantic, sort_keys=True, default=str).encode()).hexdigest()[:10]
    named = [str((semantic.get(group) or {}).get("name", group)) for group in ("model", "data", "init", "head")]
    policy = (semantic.get("freeze") or {}).get("policy")
    readable = "-".join([*named, *([f"freeze_{policy}"] if policy else [])])
    return f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', readable)[:100]}-{digest}"


def as_mapping(settings: Settings) -> dict[str, Any]:
    """The settings as a plain mapping, as `result.json` keeps them."""
    return asdict(settings)


def _plain(config: DictConfig | Mapping[str, Any], *, complete: bool = True) -> dict[str, Any]:
    """A deep plain copy with interpolations resolved; the `hydra` node, which has its own, is left out."""
    if isinstance(config, DictConfig):
        own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
        try:
            container = OmegaConf.to_container(own, resolve=True, throw_on_missing=complete)
        except OmegaConfBaseException as error:
            raise ConfigError(_readable(error)) from error
        return container  # type: ignore[return-value]
    return json.loads(json.dumps(dict(config), default=str))


def _mistakes(settings: Settings):
    """Everything that is wrong with the values or between them, as messages."""
    for group in ("model", "head", "init", "data"):
        options = getattr(settings, group)
        if not options.get("name"):
            yield f"{group}.name is not set. Choose {group}=NAME, or give {group}.name=..."
        for key in _keys(options):
            if key.startswith("_") and key.endswith("_"):
                yield f"{group}.{key} is not allowed: settings name what headinit has, they do not point at code."
    augmentation = settings.data.get("augmentation", "none")
    if augmentation not in AUGMENTATIONS:
        yield str(unknown_name("data.augmentation", augmentation, AUGMENTATIONS))
    elif augmentation != "none" and settings.data.get("modality") == "text":
        yield f"data.augmentation={augmentation} is for pictures, data={settings.data['name']} is text: set it to none."
    if settings.freeze.policy not in FREEZE_POLICIES:
        yield str(unknown_name("freeze.policy", settings.freeze.policy, FREEZE_POLICIES))
    if settings.freeze.policy == "stages" and settings.freeze.stages is None:
        yield "freeze.policy=stages needs freeze.stages=K, the number of last stages that train."
    if settings.freeze.policy in ("lp_ft", "gradual") and settings.trainer.steps is not None:
        yield f"freeze.policy={settings.freeze.policy} is counted in epochs: leave trainer.steps at null."
    if settings.freeze.policy == "gradual" and settings.freeze.stages is None:
        yield "freeze.policy=gradual needs freeze.stages=K, the number of stages that begin to train one by one."
    if settings.freeze.policy == "patterns" and not settings.freeze.patterns:
        yield "freeze.policy=patterns needs freeze.patterns=[...], globs over the names of the parameters to freeze."
    rate = settings.optim.lr
    if rate == "find" and settings.freeze.policy in ("lp_ft", "gradual"):
        yield f"optim.lr=find looks for one rate, and freeze={settings.freeze.policy} trains in phases: give a number."
    elif rate != "find" and not (type(rate) in (int, float) and 0.0 < rate < float("inf")):
        yield f"optim.lr={rate} is not a positive learning rate: give a number such as 1e-3, or find."
    if settings.trainer.epochs < 0 or settings.trainer.batch_size < 1 or settings.trainer.accumulation < 1:
        yield "trainer.epochs must be at least 0, trainer.batch_size and trainer.accumulation at least 1."


def _keys(node: Any):
    """Every key of a nested mapping."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield str(key)
            yield from _keys(value)
    elif isinstance(node, list):
        for value in node:
            yield from _keys(value)


def _readable(error: OmegaConfBaseException) -> str:
    """The first line of an OmegaConf error with the full key, without its object dump."""
    key = getattr(error, "full_key", None)
    message = str(error).splitlines()[0]
    if isinstance(error, MissingMandatoryValue):
        return f"{key} is not set: give {key}=..."
    return f"{key}: {message}" if key and key not in message else message
