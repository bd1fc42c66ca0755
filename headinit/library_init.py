"""What a model's own library would have built: tensors of a freshly made model, for the head and for missing parts."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from headinit.errors import SchemeError
from headinit.heads.locate import library_of
from headinit.seeding import derived_seed, global_generators_kept


def library_tensors(
    model: nn.Module,
    names: Iterable[str],
    num_classes: int,
    *,
    seed: int,
    source: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Fresh values for these parameters, distributed as the model's own library builds them for this class count.

    transformers: the library's `_init_weights`, run on a copy of the module that holds the parameter and on every
    module around it; each module draws from a generator of its own, so that its values do not depend on what else is
    new. timm and torchvision: the same architecture, built again. A plain module: `reset_parameters` of its layers.

    Raises:
        SchemeError: the library's model cannot be built again; the message says what to do.
    """
    names = list(names)
    if not names:
        return {}
    library = library_of(model)
    if library == "transformers":
        return _transformers_tensors(model, names, num_classes, seed)
    if library == "torch":
        return _plain_tensors(model, names, seed)
    fresh = _rebuilt(model, num_classes, source, derived_seed(seed, "library"))
    state = fresh.state_dict()
    absent = [name for name in names if name not in state]
    if absent:
        raise SchemeError(
            f"A fresh {type(fresh).__name__} has no {absent[0]!r}, so its library's own values for it are unknown. "
            "Choose another init."
        )
    return {name: state[name] for name in names}


def _rebuilt(model: Any, num_classes: int, source: Mapping[str, Any] | None, seed: int) -> nn.Module:
    if source is not None and source.get("library") in ("timm", "torchvision"):
        from headinit.backbones.load import build_library_model

        return build_library_model(source, num_classes, seed=seed)
    cfg = getattr(model, "pretrained_cfg", None)
    architecture = (cfg or {}).get("architecture") if isinstance(cfg, Mapping) else getattr(cfg, "architecture", None)
    if architecture:
        import timm

        with global_generators_kept(seed):
            return timm.create_model(architecture, pretrained=False, num_classes=num_classes)
    raise SchemeError(
        f"init=library needs the builder of this {type(model).__name__}, which the model does not name. Attach by "
        "name, such as attach_head('torchvision/resnet50', ...), or choose another init."
    )


def _transformers_tensors(model: Any, names: list[str], num_classes: int, seed: int) -> dict[str, Tensor]:
    config = copy.deepcopy(model.config)
    config.num_labels = num_classes
    with global_generators_kept(0), torch.device("meta"):
        fresh = type(model)(config)
    owners = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    for path in owners:
        with global_generators_kept(derived_seed(seed, f"library/{path}") % 2**31):
            _materialise(fresh, path)
            for module, initialise in _around(fresh, path):
                initialise(module)
    parameters = dict(fresh.named_parameters())
    absent = [name for name in names if name not in parameters]
    if absent:
        raise SchemeError(f"A fresh {type(model).__name__} has no {absent[0]!r}. Choose another init.")
    return {name: parameters[name].detach() for name in names}


def _materialise(fresh: nn.Module, path: str) -> None:
    """Give one module real memory, filled as its class fills it, where a class does (nn.Linear, nn.LayerNorm)."""
    module = fresh.get_submodule(path)
    module.to_empty(device="cpu", recurse=False)
    reset = getattr(module, "reset_parameters", None)
    if callable(reset):
        reset()
    else:
        for parameter in module.parameters(recurse=False):
            parameter.data.zero_()


def _around(fresh: Any, path: str) -> list[tuple[nn.Module, Any]]:
    """The module at a path, then those around it from the inside out, each with the `_init_weights` that rules it."""
    chain: list[tuple[nn.Module, Any]] = []
    module, rule = fresh, fresh._init_weights
    chain.append((module, rule))
    for name in path.split(".") if path else []:
        module = module.get_submodule(name)
        rule = getattr(module, "_init_weights", rule)
        chain.append((module, rule))
    return chain[::-1]


def _plain_tensors(model: nn.Module, names: list[str], seed: int) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in dict.fromkeys(name.rpartition(".")[0] for name in names):
        module = copy.deepcopy(model.get_submodule(path))
        reset = getattr(module, "reset_parameters", None)
        if not callable(reset):
            raise SchemeError(f"{type(module).__name__} at {path!r} has no reset_parameters(). Choose another init.")
        with global_generators_kept(derived_seed(seed, f"library/{path}") % 2**31):
            reset()
        found |= {f"{path}.{name}" if path else name: p.detach() for name, p in module.named_parameters()}
    return {name: found[name] for name in names}
