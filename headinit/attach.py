"""One call that gives a pretrained backbone a new head, started by a scheme, and touches nothing else."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from headinit import schemes
from headinit.errors import HeadError, SchemeError, unknown_name
from headinit.features.extract import FeatureSet
from headinit.head_values import HiddenStart, fill_missing, for_site, initialise_heads, restore_values
from headinit.heads.locate import find_head, is_layer, library_of, parameters_under
from headinit.heads.pooled import HeadedBackbone
from headinit.heads.record import (
    HeadRecord,
    PretrainedHeads,
    has_record,
    is_adapted,
    keep_pretrained_heads,
    pretrained_heads,
    record_of,
    set_record,
    unwrap,
)
from headinit.heads.top import top_parameters
from headinit.schemes.fixed import Library
from headinit.schemes.reinitialise import ReinitTop
from headinit.schemes.scheme import Scheme
from headinit.schemes.variance_scaling import suits
from headinit.surgery import place, protect, replace_record, tell_model, undone_on_error

TASKS = ("single_label", "multi_label", "regression", "token")
_ZERO_HIDDEN = (
    "zeros in a hidden layer makes its units equal, and equal units get equal gradients for ever (an all-zero MLP "
    "never moves at all). Zero the last layer only: init=zeros with another hidden_init."
)


# --- public -----------------------------------------------------------------------------------------------------------


def attach_head(
    model: Any,
    num_classes: int,
    *,
    init: str | Scheme | Mapping[str, Any] = "he",
    head: str = "linear",
    data: Any = None,
    seed: int = 0,
    init_options: Mapping[str, Any] | None = None,
    head_options: Mapping[str, Any] | None = None,
    pooling: str = "native",
    class_names: Sequence[str] | None = None,
    bias: bool | None = None,
    task: str = "single_label",
    weights: Any = None,
    pretrained: bool = True,
    **load_options: Any,
) -> nn.Module:
    """Replace the head of a model by a new one for `num_classes` classes, and initialise it.

    Only new parameters change: the head, and what the checkpoint did not fill (a BERT pooler, say), which gets the
    library's own initialisation. Every other tensor is checked to be the same memory, unwritten. The same seed gives
    the same head whatever else drew random numbers; the global generators are left as they were.

    Args:
        model: a catalog name (``"resnet50"``, ``"bert"``, ``"timm/..."``, ``"torchvision/..."``, ``"hf/..."``, a
            folder), a loaded `Backbone`, or any `nn.Module`. It is changed in place.
        num_classes: number of logits K (of targets for regression).
        init: name of a scheme (`headinit.schemes.available()`), a mapping with ``"name"``, or a `Scheme`.
        head: ``"linear"``, ``"mlp"``, ``"cosine"``, ``"multi_proxy"``, ``"attention_pool"``, ``"recurrent"`` or
            ``"conv"``.
        data: for schemes that need it: a `FeatureSet`, a pair `(inputs, labels)`, or an iterable of batches.
        seed: seed of the head.
        init_options: options of the scheme, if `init` is a name.
        head_options: options of the kind of head; an mlp also takes `hidden_init` and `hidden_bias`.
        pooling: ``"native"`` keeps the model's class and its own pooling; ``"cls"``, ``"pooler"``, ``"mean"``,
            ``"max"`` or ``"last"`` put the head on its pooled tokens (`HeadedBackbone`). A model without a head gets
            ``"mean"``.
        class_names: K names in logit order.
        bias: whether the logits have a bias; None keeps the library's choice.
        task: ``"single_label"``, ``"multi_label"``, ``"regression"`` or ``"token"``.
        weights, pretrained, **load_options: passed on to `load_backbone` where `model` is a name. For a module,
            `pretrained=False` records that its weights are random.

    Returns:
        The model, in its own class (a `HeadedBackbone` where tokens are pooled); `record_of(model)` says what is new.

    Raises:
        HeadError: the model has no head that can be replaced, or an argument is out of range; nothing was changed.
        SchemeError: the scheme is unknown or does not suit; nothing was changed.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1000))
        >>> model = attach_head(model, 10, init="zeros")
        >>> model(torch.ones(1, 8)).shape, record_of(model).new_parameters
        (torch.Size([1, 10]), ('2.weight', '2.bias'))
    """
    names = _check_arguments(num_classes, task, class_names)
    scheme = _scheme_of(init, init_options)
    options, hidden = _split_head_options(head, head_options)
    start = _resolve(model, weights, pretrained, load_options)
    _refuse_adapted(start.model)
    if any(tensor.is_meta for tensor in start.model.parameters()):
        raise HeadError("The model is on the meta device: it has no values to keep. Load its weights first.")
    with undone_on_error() as undo:
        example = _example_of(data) if library_of(start.model) == "torch" else None
        old_heads = pretrained_classifiers(start, example)
        root, sites, pooling = place(start.model, num_classes, head, options, pooling, bias, undo, example)
        new_modules = [site.path for site in sites]
        missing = _missing_parameters(root, start, new_modules)
        anew, anew_notes = _started_anew(root, scheme, new_modules)
        missing = tuple(dict.fromkeys((*missing, *anew)))
        kept = _snapshot(root, new_modules, missing)
        fill_missing(root, missing, num_classes, seed, start.source, undo)
        record = HeadRecord(
            sites=sites,
            head=head,
            num_classes=num_classes,
            new_parameters=(*parameters_under(root, new_modules), *missing),
            new_modules=(*new_modules, *dict.fromkeys(name.rpartition(".")[0] for name in missing)),
            init=_description(init, scheme, init_options),
            seed=seed,
            pretrained=start.pretrained,
            task=task,
            class_names=names,
            source=start.source,
            head_options=dict(head_options or {}),
            pooling=pooling,
            kept_tensors=len(kept),
        )
        replace_record(root, record, undo)
        keep_pretrained_heads(root, old_heads)
        started = initialise_heads(root, record, scheme, hidden, data)
        _check_kept(root, kept)
        tell_model(root, record, undo)
        intended = started.intended | dict.fromkeys(missing)
        notes = (*anew_notes, *started.notes)
        set_record(root, dataclasses.replace(record, intended_std=intended, from_data=started.from_data, notes=notes))
        protect(root, record)
    if start.preprocessing is not None:
        root.headinit_preprocessing = start.preprocessing  # type: ignore[assignment]
    for note in started.notes:
        warnings.warn(note, UserWarning, stacklevel=2)
    return root


def init_head(
    model: nn.Module,
    init: str | Scheme | Mapping[str, Any],
    *,
    data: Any = None,
    seed: int = 0,
    hidden_init: str | Scheme | Mapping[str, Any] | None = None,
    **init_options: Any,
) -> nn.Module:
    """Re-initialise the head that is there, attached by `attach_head` or the model's own; nothing else changes.

    Args:
        model: a model with a head.
        init, data, seed: as in `attach_head`.
        **init_options: options of the scheme, if `init` is a name.
        hidden_init: scheme of the hidden layers of an mlp head; None takes the one that fits their activation.

    Returns:
        The same model.

    Raises:
        HeadError: the model has no head, or PEFT has wrapped it.
        SchemeError: the scheme is unknown or does not suit; the head is as it was.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 3))
        >>> init_head(model, "zeros")[0].weight.abs().sum().item()
        0.0
    """
    root = unwrap(model)
    _refuse_adapted(root)
    scheme = _scheme_of(init, init_options)
    before = record_of(root) if has_record(root) else None
    sites = find_head(root)
    if any(site.kind == "none" for site in sites):
        raise HeadError("The model was built without a classifier (num_classes=0). Use attach_head to give it one.")
    paths = [site.path for site in sites]
    record = before or HeadRecord(
        sites=sites,
        head=sites[0].kind,
        num_classes=sites[0].out_features,
        new_parameters=parameters_under(root, paths),
        new_modules=tuple(paths),
    )
    anew, anew_notes = _started_anew(root, scheme, paths)
    if not set(anew) <= set(record.new_parameters):
        raise SchemeError(
            "reinit_top starts a part of the backbone anew, and init_head changes the head alone. Give it to "
            "attach_head; in a comparison, to all inits at once (init.reinit_top=1)."
        )
    record = dataclasses.replace(record, init=_description(init, scheme, init_options), seed=seed)
    if hidden_init is None and before is not None:
        hidden_init = before.head_options.get("hidden_init")
    hidden = HiddenStart(
        None if hidden_init is None else _scheme_of(hidden_init, None), record.head_options.get("hidden_bias", 0.0)
    )
    _check_hidden(hidden, record.head_options.get("activation", "relu") if record.head == "mlp" else None)
    with undone_on_error() as undo:
        for name in parameters_under(root, paths):
            undo.append(restore_values(root.get_parameter(name)))
        kept = _snapshot(root, paths, ())
        replace_record(root, record, undo)
        started = initialise_heads(root, record, scheme, hidden, data)
        _check_kept(root, kept)
        intended = {**record.intended_std, **started.intended}
        record = dataclasses.replace(
            record,
            intended_std=intended,
            from_data=started.from_data,
            kept_tensors=len(kept),
            notes=(*anew_notes, *started.notes),
        )
        set_record(root, record)
        protect(root, record)
    for note in started.notes:
        warnings.warn(note, UserWarning, stacklevel=2)
    return model


def _refuse_adapted(model: nn.Module) -> None:
    if is_adapted(model):
        raise HeadError(
            f"PEFT has wrapped the model ({type(model).__name__}), and trains a copy of the head that was there. Call "
            "attach_head or init_head first, then get_peft_model(model, LoraConfig(..., "
            "modules_to_save=list(record_of(model).new_modules)))."
        )


def rebuild_heads(model: nn.Module, record: HeadRecord) -> nn.Module:
    """The structure that a record describes, on a model of the same architecture; values are for the caller to fill."""
    options = {k: v for k, v in record.head_options.items() if k not in ("hidden_init", "hidden_bias")}
    pooling = "native" if record.pooling == "none" else record.pooling
    bias = record.sites[0].bias if record.head != "cosine" else None
    with undone_on_error() as undo:
        root, _, _ = place(model, record.num_classes, record.head, options, pooling, bias, undo)
        tell_model(root, record, undo)
    return root


# --- arguments --------------------------------------------------------------------------------------------------------


def _check_arguments(num_classes: Any, task: str, class_names: Sequence[str] | None) -> tuple[str, ...] | None:
    if task not in TASKS:
        raise unknown_name("task", task, TASKS, HeadError)
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise HeadError(f"num_classes must be a whole number of at least 1, got {num_classes!r}.")
    if num_classes == 1 and task in ("single_label", "token"):
        raise HeadError(
            f"num_classes=1 with task={task}: one class has nothing to be told from (its loss is 0 for any head), and "
            "transformers would take it for regression. Use num_classes=2, or task='multi_label' for one yes-or-no "
            "label, or task='regression' for one target."
        )
    if class_names is None:
        return None
    if len(class_names) != num_classes or len(set(class_names)) != len(class_names):
        raise HeadError(
            f"class_names must be {num_classes} different names, one per class; got {len(class_names)}: "
            f"{list(class_names)[:8]}."
        )
    return tuple(str(name) for name in class_names)


def _scheme_of(init: Any, options: Mapping[str, Any] | None) -> Scheme:
    if options:
        if not isinstance(init, str):
            raise SchemeError("init_options go with the name of a scheme; give a Scheme its options when you make it.")
        return schemes.build(init, **options)
    return schemes.as_scheme(init)


def _description(init: Any, scheme: Scheme, options: Mapping[str, Any] | None) -> dict[str, Any]:
    if isinstance(init, str):
        return {"name": init, **(options or {})}
    if isinstance(init, Mapping):
        return dict(init)
    return schemes.description_of(scheme)


def _split_head_options(head: str, given: Mapping[str, Any] | None) -> tuple[dict[str, Any], HiddenStart]:
    """Options of the kind of head, and how its hidden layers start."""
    options = dict(given or {})
    if head != "mlp":
        return options, HiddenStart()
    chosen = options.pop("hidden_init", None)
    bias = options.pop("hidden_bias", 0.0)
    if not isinstance(bias, int | float) or bias < 0:
        raise HeadError(f"hidden_bias must be 0 or a small positive constant, got {bias!r}.")
    hidden = HiddenStart(None if chosen is None else _scheme_of(chosen, None), float(bias))
    _check_hidden(hidden, options.get("activation", "relu"))
    return options, hidden


def _check_hidden(hidden: HiddenStart, activation: str | None) -> None:
    scheme = hidden.scheme
    if scheme is None or activation is None:
        return
    if not getattr(scheme, "breaks_symmetry", True):
        raise SchemeError(f"hidden_init={type(scheme).__name__.lower()} is refused: {_ZERO_HIDDEN}")
    if scheme.needs_data or isinstance(scheme, Library):
        raise SchemeError(
            f"hidden_init={type(scheme).__name__} is a scheme for the layer that makes the logits. Use he, xavier, "
            "lecun, orthogonal, ..."
        )
    advice = suits(scheme, "linear" if activation == "identity" else activation)
    if advice:
        warnings.warn(f"hidden_init: {advice}", UserWarning, stacklevel=4)


# --- the model to start from ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Start:
    """A model before its head is replaced, and what is known about it."""

    model: nn.Module
    missing: tuple[str, ...] = ()
    source: Mapping[str, Any] | None = None
    pretrained: bool = True
    preprocessing: Any = None


def _resolve(model: Any, weights: Any, pretrained: bool, load_options: Mapping[str, Any]) -> _Start:
    if isinstance(model, str):
        from headinit.backbones.load import load_backbone

        model = load_backbone(model, weights=weights, pretrained=pretrained, **load_options)
    elif weights is not None or load_options:
        extra = ", ".join([*(["weights"] if weights is not None else []), *load_options])
        raise HeadError(f"{extra}: these options load a model by its name, and a {type(model).__name__} was given.")
    if isinstance(model, nn.Module):
        root = unwrap(model)
        if root is not model:
            raise HeadError(
                f"Attach the head before the model is wrapped in {type(model).__name__}: the wrapper has already "
                "counted its parameters. Give the model inside (model.module or model._orig_mod)."
            )
        return _known_of_module(root, pretrained)
    if isinstance(getattr(model, "model", None), nn.Module) and hasattr(model, "weights"):
        report = model.weights
        return _Start(
            model.model,
            tuple(getattr(report, "missing", ())),
            getattr(model, "source", None),
            getattr(report, "source", None) != "random",
            getattr(model, "preprocessing", None),
        )
    raise HeadError(f"Cannot attach a head to {model!r}: give a model's name, a Backbone or an nn.Module.")


def _known_of_module(model: nn.Module, pretrained: bool) -> _Start:
    """transformers marks what `from_pretrained` filled; for other modules only what is replaced is known to be new."""
    earlier = record_of(model) if has_record(model) else None
    source = earlier.source if earlier else None
    preprocessing = getattr(model, "headinit_preprocessing", None)
    if earlier is not None:
        gone = tuple(f"{site.path}." for site in earlier.sites)
        missing = tuple(name for name in earlier.new_parameters if not name.startswith(gone))
        return _Start(model, missing, source, earlier.pretrained, preprocessing)
    if library_of(model) == "transformers":
        filled = {n: getattr(p, "_is_hf_initialized", False) for n, p in model.named_parameters()}
        if any(filled.values()):
            return _Start(model, tuple(n for n, f in filled.items() if not f), source, pretrained, preprocessing)
        return _Start(model, (), source, False, preprocessing)
    return _Start(model, (), source, pretrained, preprocessing)


def pretrained_classifiers(model: Any, example: Any = None) -> PretrainedHeads:
    """Weight and bias of the classifiers that a model was pretrained with, by path: empty if it has none.

    Args:
        model: a `Backbone`, or a module; of one that has a head of headinit's, what it kept of the heads before that.
        example: one example, to find the head of a plain module by.
    """
    start = model if isinstance(model, _Start) else _resolve(model, None, True, {})
    if has_record(start.model) or not start.pretrained:
        return pretrained_heads(start.model)
    try:
        sites = find_head(start.model, example)
    except HeadError:
        return {}
    layers: dict[str, Any] = {site.path: start.model.get_submodule(site.path) for site in sites}
    return {
        path: (layer.weight.detach(), None if layer.bias is None else layer.bias.detach())
        for path, layer in layers.items()
        if is_layer(layer) and f"{path}.weight" not in start.missing
    }


def check_init(model: nn.Module, init: str | Scheme | Mapping[str, Any]) -> None:
    """Say before any features are computed that a scheme does not suit a model's heads.

    Raises:
        SchemeError: it does not.
    """
    scheme = _scheme_of(init, None)
    for site in record_of(model).sites:
        for_site(scheme, unwrap(model), site)


def _started_anew(
    root: nn.Module, scheme: Scheme, new_modules: Sequence[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the pretrained parameters that `reinit_top` starts anew, and a note that says so; both may be empty."""
    chain: Any = scheme
    while chain is not None and not isinstance(chain, ReinitTop):
        chain = getattr(chain, "scheme", None)
    if chain is None:
        return (), ()
    names = tuple(
        name
        for name in top_parameters(root, chain.blocks)
        if not any(name.startswith(f"{path}.") for path in new_modules)
    )
    count = sum(root.get_parameter(name).numel() for name in names)
    return names, (
        f"reinit_top={chain.blocks}: {count:,} pretrained values, from {names[0]} to {names[-1]}, start anew by the "
        "library's own rule. They count as new: they train whatever is frozen, at the learning rate of the head.",
    )


def _missing_parameters(root: nn.Module, start: _Start, new_modules: Sequence[str]) -> tuple[str, ...]:
    """What the checkpoint did not fill inside the backbone, by today's names. Random on request is not missing."""
    if not start.pretrained:
        return ()
    prefix = "backbone." if isinstance(root, HeadedBackbone) else ""
    known = dict(root.named_parameters())
    renamed = {}
    if prefix:
        # The base model may sit one level down in what was loaded (bert.pooler...), and is at the top in the wrapper.
        inner = {id(p): n for n, p in known.items()}
        renamed = {n: inner[id(p)] for n, p in start.model.named_parameters() if id(p) in inner}
    names = [renamed.get(name, name) for name in start.missing]
    return tuple(n for n in names if n in known and not any(n == m or n.startswith(f"{m}.") for m in new_modules))


def _example_of(data: Any) -> Any:
    """The first example of the data, to prove on a plain module which layer makes the logits; None if there is none."""
    from headinit.features.extract import as_batches, split_batch
    from headinit.features.moments import Moments

    if data is None or isinstance(data, FeatureSet | Moments | Iterator):
        return None  # an iterator would lose its first batch
    inputs, _, _ = split_batch(next(iter(as_batches(data, 1))))
    return {k: v[:1] for k, v in inputs.items()} if isinstance(inputs, Mapping) else inputs[:1]


# --- what must not change, and what the library must know -------------------------------------------------------------


def _snapshot(root: nn.Module, new_modules: Sequence[str], missing: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Memory address and write counter of every tensor that must stay as it is: no copy, and any write would show."""
    from itertools import chain

    kept = {}
    for name, tensor in chain(root.named_parameters(), root.named_buffers()):
        if name not in missing and not any(name.startswith(f"{path}.") for path in new_modules):
            kept[name] = (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
    return kept


def _check_kept(root: nn.Module, kept: Mapping[str, tuple[int, int]]) -> None:
    tensors = dict(root.named_parameters()) | dict(root.named_buffers())
    for name, (address, version) in kept.items():
        tensor = tensors[name]
        if tensor.data_ptr() != address or (0 if tensor.is_inference() else tensor._version) != version:
            raise HeadError(
                f"Attaching a head wrote to {name!r}, which is not part of it. This must not happen; the cause is "
                "likely a forward hook or a scheme that changes the model."
            )


def __getattr__(name: str) -> Any:
    # Told apart from attaching, but asked for here; they import this module, so it cannot import them first.
    if name in ("describe", "Description"):
        from headinit import description

        return getattr(description, name)
    if name in ("save", "load", "preprocessing_of", "read_manifest"):
        from headinit import persistence

        return getattr(persistence, name)
    raise AttributeError(f"module 'headinit.attach' has no attribute {name!r}")


__all__ = ["attach_head", "init_head", "rebuild_heads"]
