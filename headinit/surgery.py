"""Putting new head modules where the old heads are, so that a failure puts everything back."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from headinit.errors import HeadError
from headinit.heads.locate import find_head, is_made_for_a_task, library_of
from headinit.heads.modules import TOKEN_KINDS, build_head, output_layer
from headinit.heads.pooled import HeadedBackbone, split_body, unread_layers
from headinit.heads.record import HeadRecord, HeadSite, has_record, record_of, set_record
from headinit.seeding import global_generators_kept

_PROBLEM_TYPES = {
    "single_label": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
    "token": None,
}

Undo = list[Any]
"""Functions that put things back, in the order in which the changes were made."""


@contextmanager
def undone_on_error() -> Iterator[Undo]:
    """A list of functions that put things back, run in reverse if the block fails."""
    undo: Undo = []
    try:
        yield undo
    except BaseException:
        for step in reversed(undo):
            step()
        raise


def _set_module(root: nn.Module, path: str, module: nn.Module | None, undo: Undo) -> None:
    parent_path, _, name = path.rpartition(".")
    parent = root.get_submodule(parent_path)
    old = parent._modules[name]
    undo.append(lambda: parent._modules.__setitem__(name, old))
    parent._modules[name] = module


def place(
    model: nn.Module,
    num_classes: int,
    head: str,
    options: Mapping[str, Any],
    pooling: str,
    bias: bool | None,
    undo: Undo,
    example: Any = None,
) -> tuple[nn.Module, tuple[HeadSite, ...], str]:
    """Put new head modules where the heads are; gives the model, the new sites and the pooling in force."""
    if pooling == "native" and head not in TOKEN_KINDS:
        try:
            return model, _replace_heads(model, num_classes, head, options, bias, undo, example), pooling
        except HeadError as error:
            if not _is_headless(model):
                raise
            reason = error
        try:
            return _wrap(model, num_classes, head, options, pooling, bias, undo)
        except HeadError:
            raise reason from None
    return _wrap(model, num_classes, head, options, pooling, bias, undo)


def _is_headless(model: Any) -> bool:
    """A base model that its library never gives a classifier."""
    library = library_of(model)
    if library == "transformers":
        return not is_made_for_a_task(model)
    return library == "timm" and hasattr(model, "forward_features") and not hasattr(model, "get_classifier")


def _replace_heads(
    model: nn.Module,
    num_classes: int,
    head: str,
    options: Mapping[str, Any],
    bias: bool | None,
    undo: Undo,
    example: Any = None,
) -> tuple[HeadSite, ...]:
    if isinstance(model, HeadedBackbone):
        old_sites: tuple[HeadSite, ...] = (dataclasses.replace(record_of(model).sites[0]),)
    else:
        old_sites = find_head(model, example)
    sites = []
    for site in old_sites:
        old = model.get_submodule(site.path)
        like = output_layer(old)
        keeps_bias = site.bias if bias is None else bias
        kind, own = (head, options) if site.role != "auxiliary" else ("linear", {})
        with global_generators_kept(0):
            new = build_head(kind, site.in_features, num_classes, bias=keeps_bias, like=like, options=own)
        _match(new, model, old)
        if not site.path:
            raise HeadError("The model is a single layer, so there is no backbone. Wrap it: nn.Sequential(layer).")
        _set_module(model, site.path, new, undo)
        has_bias = getattr(output_layer(new), "bias", None) is not None
        sites.append(
            HeadSite(
                site.path,
                "conv" if kind == "linear" and isinstance(new, nn.Conv2d) else kind,
                site.in_features,
                num_classes,
                has_bias,
                site.role,
            )
        )
    return tuple(sites)


def _match(new: nn.Module, model: nn.Module, old: nn.Module) -> None:
    """The device, dtype and mode of what is replaced (of the model, where nothing was there)."""
    like = next(old.parameters(), None)
    like = next(model.parameters()) if like is None else like
    new.to(device=like.device, dtype=like.dtype).train(model.training)


def _wrap(
    model: nn.Module,
    num_classes: int,
    head: str,
    options: Mapping[str, Any],
    pooling: str,
    bias: bool | None,
    undo: Undo,
) -> tuple[nn.Module, tuple[HeadSite, ...], str]:
    if isinstance(model, HeadedBackbone):
        raise HeadError("The model already pools its own tokens. Attach to model.backbone to pool in another way.")
    body, width, chosen = split_body(model, pooling, head)
    if head == "conv" and options.get("dims") is None:
        gives_tokens = library_of(model) == "transformers" or hasattr(model, "_process_input")
        options = {**options, "dims": 1 if gives_tokens else 2}
    with global_generators_kept(0):
        new = build_head(head, width, num_classes, bias=True if bias is None else bias, options=options)
    _match(new, body, new if not list(body.parameters()) else body)
    if body is model and library_of(model) in ("timm", "torchvision") and not _is_headless(model):
        for site in find_head(model):
            if site.role == "auxiliary":  # a branch for the training loss: the libraries allow for its absence
                _set_module(model, site.path.partition(".")[0], None, undo)
                continue
            _set_module(model, site.path, nn.Identity(), undo)  # a classifier that no pass reads never gets a gradient
        for path in unread_layers(model) if library_of(model) == "torchvision" else ():
            _set_module(model, path, nn.Identity(), undo)  # nor do the layers before it
    optional = "add_pooling_layer" in inspect.signature(type(body).__init__).parameters
    if chosen != "pooler" and optional and body._modules.get("pooler") is not None:
        _set_module(body, "pooler", None, undo)  # the same holds for a pooler; the library allows for its absence
    wrapped = HeadedBackbone(body, chosen, new, library_of(model)).train(model.training)
    has_bias = getattr(output_layer(new), "bias", None) is not None
    return wrapped, (HeadSite("head", head, width, num_classes, has_bias),), chosen


# --- what the model and its library must know ------------------------------------------------------------------------


def replace_record(root: nn.Module, record: HeadRecord, undo: Undo) -> None:
    """Set the record; undone, the earlier one is back."""
    before = record_of(root) if has_record(root) else None
    undo.append(lambda: set_record(root, before) if before is not None else delattr(root, "headinit_record"))
    set_record(root, record)


def _set_attribute(owner: Any, name: str, value: Any, undo: Undo) -> None:
    before = getattr(owner, name, None)
    undo.append(lambda: setattr(owner, name, before))
    setattr(owner, name, value)


def tell_model(root: nn.Module, record: HeadRecord, undo: Undo) -> None:
    """Set the class count wherever the library keeps it, so that its loss, its saving and its loading are right."""
    site = record.sites[0]
    around = ["", *(site.path[:i] for i, letter in enumerate(site.path) if letter == ".")]
    for path in around:
        owner = root.get_submodule(path)
        for name in ("num_classes", "num_labels", "n_classes"):
            if isinstance(vars(owner).get(name), int):
                _set_attribute(owner, name, record.num_classes, undo)
    config = getattr(root, "config", None)
    if config is None or not hasattr(config, "num_labels"):
        return
    before = copy.deepcopy({k: getattr(config, k, None) for k in ("id2label", "label2id", "problem_type")})
    undo.append(lambda: vars(config).update(before))
    names = record.class_names or tuple(f"LABEL_{k}" for k in range(record.num_classes))
    config.num_labels = record.num_classes
    config.id2label = dict(enumerate(names))
    config.label2id = {name: k for k, name in enumerate(names)}
    config.problem_type = _PROBLEM_TYPES[record.task]


def protect(root: nn.Module, record: HeadRecord) -> None:
    """transformers' `init_weights()` and `post_init()` would overwrite what they take for uninitialised."""
    if library_of(root) != "transformers" and not isinstance(root, HeadedBackbone):
        return
    for path in record.new_modules:
        for module in root.get_submodule(path).modules():
            module._is_hf_initialized = True  # type: ignore[assignment]
    for name in record.new_parameters:
        root.get_parameter(name)._is_hf_initialized = True  # type: ignore[attr-defined]
