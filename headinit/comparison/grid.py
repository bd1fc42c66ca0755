"""What is compared with what."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headinit import schemes
from headinit.config import Settings, settings_from
from headinit.errors import ConfigError
from headinit.training.phases import SCHEDULED_POLICIES
from headinit.training.recipe import Recipe

GRADUAL_STAGES = 3
"""Stages that `gradual` frees one by one where none are given, as in `conf/freeze/gradual.yaml`."""

Freeze = str | int | Sequence[str] | Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """One run of a comparison.

    Attributes:
        init: name and options of the scheme.
        label: what the scheme is called in tables: its name, with options where they tell two schemes apart.
        lr, weight_decay, per_class: see `Recipe` and `load_data`.
        seed, order_seed, split_seed: of the head, of the order of the examples, of splits and subsets.
        freeze: fields of `FreezeSettings`.
    """

    init: Mapping[str, Any]
    label: str
    lr: float
    weight_decay: float
    seed: int
    order_seed: int
    split_seed: int
    per_class: int | None
    freeze: Mapping[str, Any]

    @property
    def frozen(self) -> bool:
        """Whether only the new head trains."""
        return self.freeze["policy"] == "all"


@dataclass(frozen=True)
class Grid:
    """What is compared with what: every combination is a cell.

    `seeds` and `order_seeds` go together, the first with the first: schemes that share a seed also share the order of
    the examples, so their results are paired.
    """

    inits: tuple[Mapping[str, Any], ...]
    lrs: tuple[float, ...]
    seeds: tuple[int, ...]
    order_seeds: tuple[int, ...]
    split_seeds: tuple[int, ...] = (0,)
    weight_decays: tuple[float, ...] = (0.0,)
    per_class: tuple[int | None, ...] = (None,)
    freezes: tuple[Mapping[str, Any], ...] = ({"policy": "all"},)

    @classmethod
    def of(
        cls,
        *,
        inits: Any,
        lrs: Any,
        seeds: Any = 5,
        order_seeds: Any = None,
        split_seeds: Any = 0,
        weight_decays: Any = 0.0,
        per_class: Any = None,
        freezes: Any = "all",
    ) -> Grid:
        """A grid from what users write: one value, or a list of them; a number of seeds counts from 0.

        Raises:
            ConfigError: a factor without values, a value twice, or one out of range.
            SchemeError: an unknown scheme or option.

        Example:
            >>> grid = Grid.of(inits=["he", {"name": "zeros"}], lrs=1e-3, seeds=2)
            >>> [(cell.label, cell.seed) for cell in grid.cells()]
            [('he', 0), ('zeros', 0), ('he', 1), ('zeros', 1)]
        """
        listed_inits = [dict(i) if isinstance(i, Mapping) else {"name": i} for i in _listed("inits", inits)]
        for init in listed_inits:
            schemes.as_scheme(init)
        seeds = range(seeds) if isinstance(seeds, int) and not isinstance(seeds, bool) else seeds
        listed_seeds = tuple(_whole("seeds", seed) for seed in _listed("seeds", seeds))
        orders = listed_seeds if order_seeds is None else tuple(_listed("order_seeds", order_seeds, unique=False))
        if len(orders) != len(listed_seeds):
            raise ConfigError(f"order_seeds has {len(orders)} values and seeds {len(listed_seeds)}: give one for each.")
        if "find" in _listed("lrs", lrs):
            raise ConfigError("A comparison names its rates, such as optim.lr=[1e-3,1e-2]: find is for one run.")
        rates = tuple(float(lr) for lr in _listed("lrs", lrs))
        decays = tuple(float(decay) for decay in _listed("weight_decays", weight_decays))
        for rate, decay in itertools.product(rates, decays):
            Recipe(lr=rate, weight_decay=decay)  # checks the ranges
        policies = tuple(freeze_mapping(freeze) for freeze in _listed_freezes(freezes))
        anew = {init.get("reinit_top") for init in listed_inits}
        if len(anew) > 1 and any(policy.get("policy") == "all" for policy in policies):
            raise ConfigError(
                "Heads on a frozen backbone share its features, and reinit_top changes the backbone: give it to all "
                "inits alike (init.reinit_top=1), or compare in two commands."
            )
        return cls(
            inits=tuple(listed_inits),
            lrs=rates,
            seeds=listed_seeds,
            order_seeds=tuple(_whole("order_seeds", seed) for seed in orders),
            split_seeds=tuple(_whole("split_seeds", seed) for seed in _listed("split_seeds", split_seeds)),
            weight_decays=decays,
            per_class=tuple(_listed("per_class", per_class)),
            freezes=policies,
        )

    @property
    def labels(self) -> tuple[str, ...]:
        """The scheme's names in tables, in the order of `inits`."""
        names = [init["name"] for init in self.inits]
        return tuple(
            init["name"] if names.count(init["name"]) == 1 else " ".join([init["name"], *_options_text(init)])
            for init in self.inits
        )

    def cells(self) -> list[Cell]:
        """All cells; those that are trained together are neighbours."""
        named = list(zip(self.inits, self.labels, strict=True))
        return [
            Cell(init, label, lr, decay, seed, order, split, count, freeze)
            for freeze, split, count, (seed, order), lr, decay, (init, label) in itertools.product(
                self.freezes,
                self.split_seeds,
                self.per_class,
                tuple(zip(self.seeds, self.order_seeds, strict=True)),
                self.lrs,
                self.weight_decays,
                named,
            )
        ]


def freeze_mapping(freeze: Freeze) -> dict[str, Any]:
    """Fields of `FreezeSettings` from what `headinit.freeze` takes, and from the policies that change during a run.

    Example:
        >>> freeze_mapping(2), freeze_mapping("gradual")
        ({'policy': 'stages', 'stages': 2}, {'policy': 'gradual', 'stages': 3})
    """
    if isinstance(freeze, Mapping):
        return {**freeze, **({"stages": GRADUAL_STAGES} if _lacks_stages(freeze) else {})}
    if isinstance(freeze, str):
        return freeze_mapping({"policy": freeze})
    if isinstance(freeze, int):
        return {"policy": "stages", "stages": freeze}
    return {"policy": "patterns", "patterns": [str(pattern) for pattern in freeze]}


def _lacks_stages(freeze: Mapping[str, Any]) -> bool:
    return freeze.get("policy") == "gradual" and freeze.get("stages") is None


def _listed(factor: str, values: Any, unique: bool = True) -> list[Any]:
    found = list(values) if isinstance(values, (list, tuple, range, set)) else [values]
    if not found:
        raise ConfigError(f"{factor} is empty: give at least one value.")
    if unique and any(found.count(value) > 1 for value in found):
        raise ConfigError(f"{factor}={found} names a value twice: give each once.")
    return found


def _listed_freezes(freezes: Any) -> list[Any]:
    return [freezes] if isinstance(freezes, (str, int, Mapping)) else _listed("freezes", freezes)


def _whole(factor: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{factor} must be whole numbers, got {value!r}.")
    return value


def _options_text(init: Mapping[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in init.items() if key != "name"]


def cell_settings(settings: Settings, cell: Cell) -> Settings:
    """The settings of the ordinary run that a cell stands for."""
    own = copy.deepcopy(settings)
    own.init = dict(cell.init)
    own.data = {**own.data, "per_class": cell.per_class, "split_seed": cell.split_seed}
    own.freeze = dataclasses.replace(own.freeze, **{"stages": None, "patterns": [], **cell.freeze})
    own.optim = dataclasses.replace(own.optim, lr=cell.lr, weight_decay=cell.weight_decay)
    own.seed, own.order_seed = cell.seed, cell.order_seed
    return own


def freeze_text(freeze: Mapping[str, Any]) -> str:
    """A freeze policy as tables name it.

    Example:
        >>> freeze_text({"policy": "stages", "stages": 2}), freeze_text({"policy": "lp_ft", "probe_epochs": 5})
        ('stages(2)', 'lp_ft(probe_epochs=5)')
    """
    policy = freeze["policy"]
    detail = freeze.get(policy)  # stages or patterns, under their own names
    if policy in SCHEDULED_POLICIES:
        usual = {**freeze_mapping(policy), "norm": None}
        own = [f"{key}={value}" for key, value in freeze.items() if key not in usual or value != usual[key]]
        detail = ", ".join(own) or None
    return policy if detail is None else f"{policy}({detail})"


def plan_from(config: Mapping[str, Any]) -> tuple[Settings, Grid]:
    """Settings and grid from the mapping that `conf/compare.yaml` composes to: what is a list is compared.

    ``inits`` and ``freezes`` are lists of names or mappings; ``optim.lr``, ``optim.weight_decay``, ``data.per_class``,
    ``data.split_seed`` and ``seeds`` may be lists. Modifiers under ``init`` (``init.prior_bias=true``) hold for every
    scheme.

    Raises:
        ConfigError: lists every mistake found.

    Example:
        >>> names = {"model": "resnet50", "head": "linear", "data": "digits"}
        >>> groups = {group: {"name": name} for group, name in names.items()}
        >>> config = {**groups, "inits": ["he", "zeros"], "seeds": 2, "optim": {"lr": [0.1, 0.01]}}
        >>> settings, grid = plan_from(config)
        >>> settings.optim.lr, len(grid.cells())
        (0.1, 8)
    """
    own = json.loads(json.dumps(dict(config), default=str))
    shared = {k: v for k, v in (own.get("init") or {}).items() if k in schemes.modifiers() and v not in (None, False)}
    inits = [{**(init if isinstance(init, dict) else {"name": init}), **shared} for init in _as_list(own.pop("inits"))]
    freezes = [_freeze_from(freeze, own.get("freeze") or {}) for freeze in _as_list(own.pop("freezes", "all"))]
    optim, data = own.setdefault("optim", {}), own["data"]
    factors = {
        "lrs": optim.get("lr", 1e-3),
        "weight_decays": optim.get("weight_decay", 0.0),
        "per_class": data.get("per_class"),
        "split_seeds": data.get("split_seed", 0),
    }
    grid = Grid.of(inits=inits, seeds=own.pop("seeds", 5), freezes=freezes, **factors)
    optim["lr"], optim["weight_decay"] = grid.lrs[0], grid.weight_decays[0]
    data["per_class"], data["split_seed"] = grid.per_class[0], grid.split_seeds[0]
    known = {f.name for f in dataclasses.fields(Settings)}
    base = {key: value for key, value in own.items() if key in known}
    return settings_from({**base, "init": dict(grid.inits[0]), "freeze": dict(grid.freezes[0])}), grid


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _freeze_from(freeze: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """A freeze policy by name takes its options (stages, patterns, norm) from the ``freeze`` section."""
    found = freeze_mapping(freeze)
    if not isinstance(freeze, str):
        return found
    if freeze == "stages":
        return {**found, "stages": options.get("stages") or 1, "norm": options.get("norm")}
    if freeze == "patterns":
        return {**found, "patterns": options.get("patterns") or [], "norm": options.get("norm")}
    return {**found, "norm": options.get("norm")} if freeze in ("none", *SCHEDULED_POLICIES) else found
