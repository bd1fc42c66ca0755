"""One call that gives a pretrained backbone a new head, started by a scheme, and touches nothing else."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from headinit import schemes
from headinit.errors import HeadError, SchemeError, unknown_name
from headinit.features.extract import FeatureSet
from headinit.heads.locate import child_path, find_head, is_layer, layer_width, library_of, relu_follows
from headinit.heads.modules import TOKEN_KINDS, Mlp, build_head, hidden_part, output_layer
from headinit.heads.pooled import HeadedBackbone, split_body
from headinit.heads.record import HeadRecord, HeadSite, has_record, record_of, set_record, unwrap
from headinit.library_init import library_tensors
from headinit.schemes.fixed import Library
from headinit.schemes.scheme import HeadShape, HeadWeights, Scheme
from headinit.schemes.variance_scaling import for_activation, suits
from headinit.seeding import generator_for, global_generators_kept

TASKS = ("single_label", "multi_label", "regression", "token")
_PROBLEM_TYPES = {
    "single_label": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
    "token": None,
}
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
        head: ``"linear"``, ``"mlp"``, ``"cosine"``, ``"attention_pool"``, ``"recurrent"`` or ``"conv"``.
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
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1000))
        >>> model = attach_head(model, 10, init="zeros")
        >>> model(torch.ones(1, 8)).shape, record_of(model).new_parameters
        (torch.Size([1, 10]), ('2.weight', '2.bias'))
    """
    names = _check_arguments(num_classes, task, class_names)
    scheme = _scheme_of(init, init_options)
    options, hidden = _split_head_options(head, head_options, scheme)
    start = _resolve(model, weights, pretrained, load_options)
    if any(tensor.is_meta for tensor in start.model.parameters()):
        raise HeadError("The model is on the meta device: it has no values to keep. Load its weights first.")
    with _undone_on_error() as undo:
        example = _example_of(data) if library_of(start.model) == "torch" else None
        root, sites, pooling = _place(start, num_classes, head, options, pooling, bias, undo, example)
        new_modules = [site.path for site in sites]
        missing = _missing_parameters(root, start, new_modules)
        kept = _snapshot(root, new_modules, missing)
        _fill_missing(root, missing, num_classes, seed, start.source, undo)
        record = HeadRecord(
            sites=sites,
            head=head,
            num_classes=num_classes,
            new_parameters=(*_parameters_under(root, new_modules), *missing),
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
        _replace_record(root, record, undo)
        started = _initialise(root, record, scheme, hidden, data)
        _check_kept(root, kept)
        _tell_model(root, record, undo)
        intended = started.intended | dict.fromkeys(missing)
        set_record(root, dataclasses.replace(record, intended_std=intended, notes=tuple(started.notes)))
        _protect(root, record)
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
        HeadError: the model has no head.
        SchemeError: the scheme is unknown or does not suit; the head is as it was.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 3))
        >>> init_head(model, "zeros")[0].weight.abs().sum().item()
        0.0
    """
    root = unwrap(model)
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
        new_parameters=_parameters_under(root, paths),
        new_modules=tuple(paths),
    )
    record = dataclasses.replace(record, init=_description(init, scheme, init_options), seed=seed)
    if hidden_init is None and before is not None:
        hidden_init = before.head_options.get("hidden_init")
    hidden = _Hidden(
        None if hidden_init is None else _scheme_of(hidden_init, None), record.head_options.get("hidden_bias", 0.0)
    )
    _check_hidden(hidden, record.head_options.get("activation", "relu") if record.head == "mlp" else None)
    with _undone_on_error() as undo:
        for name in _parameters_under(root, paths):
            undo.append(_restore_values(root.get_parameter(name)))
        kept = _snapshot(root, paths, ())
        _replace_record(root, record, undo)
        started = _initialise(root, record, scheme, hidden, data)
        _check_kept(root, kept)
        intended = {**record.intended_std, **started.intended}
        record = dataclasses.replace(record, intended_std=intended, kept_tensors=len(kept), notes=tuple(started.notes))
        set_record(root, record)
        _protect(root, record)
    for note in started.notes:
        warnings.warn(note, UserWarning, stacklevel=2)
    return model


def rebuild_heads(model: nn.Module, record: HeadRecord) -> nn.Module:
    """The structure that a record describes, on a model of the same architecture; values are for the caller to fill."""
    options = {k: v for k, v in record.head_options.items() if k not in ("hidden_init", "hidden_bias")}
    pooling = "native" if record.pooling == "none" else record.pooling
    bias = record.sites[0].bias if record.head != "cosine" else None
    with _undone_on_error() as undo:
        root, _, _ = _place(_Start(model), record.num_classes, record.head, options, pooling, bias, undo)
        _tell_model(root, record, undo)
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
    return {"name": type(scheme).__name__, **dataclasses.asdict(scheme)}


@dataclass(frozen=True)
class _Hidden:
    """How the hidden layers of a head start: a scheme (None: the one that fits the activation) and a constant bias."""

    scheme: Scheme | None = None
    bias: float = 0.0


def _split_head_options(head: str, given: Mapping[str, Any] | None, scheme: Scheme) -> tuple[dict[str, Any], _Hidden]:
    options = dict(given or {})
    if head != "mlp":
        return options, _Hidden()
    chosen = options.pop("hidden_init", None)
    bias = options.pop("hidden_bias", 0.0)
    if not isinstance(bias, int | float) or bias < 0:
        raise HeadError(f"hidden_bias must be 0 or a small positive constant, got {bias!r}.")
    hidden = _Hidden(None if chosen is None else _scheme_of(chosen, None), float(bias))
    _check_hidden(hidden, options.get("activation", "relu"))
    return options, hidden


def _check_hidden(hidden: _Hidden, activation: str | None) -> None:
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


# --- structure --------------------------------------------------------------------------------------------------------


@contextmanager
def _undone_on_error() -> Iterator[list[Any]]:
    """A list of functions that put things back, run in reverse if the block fails."""
    undo: list[Any] = []
    try:
        yield undo
    except BaseException:
        for step in reversed(undo):
            step()
        raise


def _set_module(root: nn.Module, path: str, module: nn.Module | None, undo: list[Any]) -> None:
    parent_path, _, name = path.rpartition(".")
    parent = root.get_submodule(parent_path)
    old = parent._modules[name]
    undo.append(lambda: parent._modules.__setitem__(name, old))
    parent._modules[name] = module


def _place(
    start: _Start,
    num_classes: int,
    head: str,
    options: Mapping[str, Any],
    pooling: str,
    bias: bool | None,
    undo: list[Any],
    example: Any = None,
) -> tuple[nn.Module, tuple[HeadSite, ...], str]:
    """Put new head modules where the heads are; gives the model, the new sites and the pooling in force."""
    model = start.model
    if pooling == "native" and head not in TOKEN_KINDS:
        try:
            return model, _replace_heads(model, num_classes, head, options, bias, undo, example), pooling
        except HeadError as error:
            if not _is_headless(model):
                raise
            reason = error
        try:
            return _wrap(start, num_classes, head, options, pooling, bias, undo)
        except HeadError:
            raise reason from None
    return _wrap(start, num_classes, head, options, pooling, bias, undo)


def _is_headless(model: Any) -> bool:
    """A base model that its library never gives a classifier."""
    library = library_of(model)
    if library == "transformers":
        return "For" not in type(model).__name__
    return library == "timm" and hasattr(model, "forward_features") and not hasattr(model, "get_classifier")


def _replace_heads(
    model: nn.Module,
    num_classes: int,
    head: str,
    options: Mapping[str, Any],
    bias: bool | None,
    undo: list[Any],
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
    start: _Start,
    num_classes: int,
    head: str,
    options: Mapping[str, Any],
    pooling: str,
    bias: bool | None,
    undo: list[Any],
) -> tuple[nn.Module, tuple[HeadSite, ...], str]:
    model = start.model
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
            _set_module(model, site.path, nn.Identity(), undo)  # a classifier that no pass reads never gets a gradient
    optional = "add_pooling_layer" in inspect.signature(type(body).__init__).parameters
    if chosen != "pooler" and optional and body._modules.get("pooler") is not None:
        _set_module(body, "pooler", None, undo)  # the same holds for a pooler; the library allows for its absence
    wrapped = HeadedBackbone(body, chosen, new, library_of(model)).train(model.training)
    has_bias = getattr(output_layer(new), "bias", None) is not None
    return wrapped, (HeadSite("head", head, width, num_classes, has_bias),), chosen


def _parameters_under(root: nn.Module, paths: Sequence[str]) -> tuple[str, ...]:
    return tuple(child_path(path, name) for path in paths for name, _ in root.get_submodule(path).named_parameters())


# --- values -----------------------------------------------------------------------------------------------------------


def _restore_values(parameter: nn.Parameter) -> Any:
    values = parameter.detach().clone()

    def restore() -> None:
        with torch.no_grad():
            parameter.copy_(values)

    return restore


def _write(parameter: Tensor, values: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(values.view(parameter.shape))


def _fill_missing(
    root: nn.Module, missing: Sequence[str], num_classes: int, seed: int, source: Any, undo: list[Any]
) -> None:
    """Start what the checkpoint did not fill by the library's own rule, from generators of its own."""
    if not missing:
        return
    owner, prefix = (root.backbone, "backbone.") if isinstance(root, HeadedBackbone) else (root, "")
    names = [name.removeprefix(prefix) for name in missing]
    values = library_tensors(owner, names, num_classes, seed=seed, source=source)
    for full, name in zip(missing, names, strict=True):
        parameter = root.get_parameter(full)
        undo.append(_restore_values(parameter))
        _write(parameter, values[name])


@dataclass
class _Started:
    """What initialising the heads did: the std intended per parameter, and notes for the user."""

    intended: dict[str, float | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def _initialise(root: nn.Module, record: HeadRecord, scheme: Scheme, hidden: _Hidden, data: Any) -> _Started:
    started = _Started()
    for site in record.sites:
        module = root.get_submodule(site.path)
        started.intended |= _start_hidden(module, site.path, hidden, record.seed)
    library = _library_values(root, record) if _innermost(scheme) else {}
    for site in record.sites:
        module = root.get_submodule(site.path)
        layer: Any = output_layer(module)
        _refuse_parametrised(layer, site.path)
        path = site.path if layer is module else f"{site.path}.output"
        own = _given(scheme, *library[site.path]) if library else scheme
        features = _features_for(root, record, site, path, data) if own.needs_data else None
        result = own(_shape_of(layer, site.path), generator_for(record.seed, f"head/{site.path}"), features)
        _check_result(root, site, layer, result, path)
        _write(layer.weight, result.weight)
        started.intended[f"{path}.weight"] = result.std
        if getattr(layer, "bias", None) is not None:
            _write(layer.bias, result.bias if result.bias is not None else torch.zeros(site.out_features))
            started.intended[f"{path}.bias"] = result.bias_std
        if hasattr(layer, "initial_scale"):
            _write(layer.scale, torch.tensor([float(layer.initial_scale)]))
            started.intended[f"{path}.scale"] = 0.0
    dtype = output_layer(root.get_submodule(record.sites[0].path)).weight.dtype
    if dtype in (torch.float16, torch.bfloat16):
        started.notes.append(
            f"The head was initialised in float32 and cast to the backbone's {str(dtype).removeprefix('torch.')}. "
            "Training a 16-bit head loses small updates: call model.float(), or load the model with "
            "dtype=torch.float32."
        )
    return started


def _refuse_parametrised(layer: nn.Module, path: str) -> None:
    if nn.utils.parametrize.is_parametrized(layer):
        raise HeadError(
            f"The weight of {path!r} is parametrised (weight or spectral norm), so values written to it are lost. "
            "Remove it first: torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight'); or use attach_head."
        )


def _shape_of(layer: Any, path: str) -> HeadShape:
    if isinstance(layer, nn.Conv2d):
        kernel = layer.kernel_size[0] * layer.kernel_size[1]
        return HeadShape(layer.in_channels, layer.out_channels, layer.bias is not None, kernel)
    if isinstance(layer, nn.Linear) or hasattr(layer, "in_features"):
        return HeadShape(layer.in_features, layer.out_features, layer.bias is not None)
    raise HeadError(f"The head at {path!r} ({type(layer).__name__}) has no layer with a weight to initialise.")


def _start_hidden(module: nn.Module, path: str, hidden: _Hidden, seed: int) -> dict[str, float | None]:
    """Hidden layers by the scheme that fits their activation, norms 1 and 0, biases constant."""
    part = hidden_part(module)
    if part is None:
        return {}
    intended: dict[str, float | None] = {}
    activation = module.activation if isinstance(module, Mlp) else "relu"
    fitting = for_activation("linear" if activation == "identity" else activation)
    for name, child in part.named_modules():
        where = child_path(f"{path}.hidden", name)
        own = getattr(child, "initialise", None)
        if callable(own):
            intended |= {f"{where}.{key}": std for key, std in own(generator_for(seed, f"head/{where}")).items()}
        elif isinstance(child, nn.Linear | nn.Conv1d | nn.Conv2d):
            kernel = 1 if isinstance(child, nn.Linear) else child.weight[0, 0].numel()
            inputs, outputs = layer_width(child)
            result = (hidden.scheme or fitting)(
                HeadShape(inputs, outputs, True, kernel), generator_for(seed, f"head/{where}"), None
            )
            _write(child.weight, result.weight)
            _write(child.bias, torch.full((outputs,), hidden.bias))  # type: ignore[arg-type]
            intended |= {f"{where}.weight": result.std, f"{where}.bias": 0.0}
        elif isinstance(child, nn.LayerNorm | nn.GroupNorm | nn.modules.batchnorm._BatchNorm):
            child.reset_parameters()  # constants 1 and 0; no random numbers
            intended |= {f"{where}.weight": 0.0, f"{where}.bias": 0.0}
    return intended


# --- schemes that need a model or data --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _GivenValues(Scheme):
    """Values that a library has drawn, for the modifiers around `Library` to work on."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, shape: HeadShape, generator: torch.Generator, data: Any = None) -> HeadWeights:
        """The given values."""
        std = self.weight.std(correction=0).item() if self.weight.numel() else None
        spread = 0.0 if self.bias is None else self.bias.std(correction=0).item()
        return HeadWeights(self.weight.clone(), None if self.bias is None else self.bias.clone(), std, spread)


def _innermost(scheme: Scheme) -> bool:
    """Whether the scheme, under its modifiers, is `Library`."""
    while not isinstance(scheme, Library):
        inner = getattr(scheme, "scheme", None)
        if not isinstance(inner, Scheme):
            return False
        scheme = inner
    return True


def _given(scheme: Scheme, weight: Tensor, bias: Tensor | None) -> Scheme:
    if isinstance(scheme, Library):
        return _GivenValues(weight, bias)
    return dataclasses.replace(scheme, scheme=_given(scheme.scheme, weight, bias))  # type: ignore[attr-defined, call-arg]


def _library_values(root: nn.Module, record: HeadRecord) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Weight and bias of each head as its library builds them for K classes."""
    layers: dict[str, Any] = {site.path: root.get_submodule(site.path) for site in record.sites}
    if isinstance(root, HeadedBackbone) or not all(is_layer(layer) for layer in layers.values()):
        raise SchemeError(
            f"init=library: the library builds no {record.head} head (pooling={record.pooling}) for this model. "
            "Use head=linear with pooling=native, or another init."
        )
    names = _parameters_under(root, list(layers))
    fresh = library_tensors(root, names, record.num_classes, seed=record.seed, source=record.source)
    values: dict[str, tuple[Tensor, Tensor | None]] = {}
    for path, layer in layers.items():
        weight, bias = fresh[f"{path}.weight"], fresh.get(f"{path}.bias")
        if weight.shape != layer.weight.shape:
            raise SchemeError(
                f"init=library: the library's head at {path!r} has shape {tuple(weight.shape)}, this one "
                f"{tuple(layer.weight.shape)}. Use another init."
            )
        values[path] = (weight.float().flatten(1), None if bias is None else bias.float())
    return values


def _features_for(root: nn.Module, record: HeadRecord, site: HeadSite, path: str, data: Any) -> Any:
    """What the layer that makes the logits receives on the user's data."""
    if data is None:
        raise SchemeError(
            f"init={record.init.get('name')} is computed from data, and none was given. Pass data=: batches, a pair "
            "(inputs, labels), or a FeatureSet."
        )
    from headinit.features.moments import Moments

    if isinstance(data, Moments):
        if path != site.path:
            raise SchemeError(
                "Moments of the backbone's features do not describe those of a hidden layer. Pass batches."
            )
        return data
    if isinstance(data, FeatureSet):
        return _through_hidden(root.get_submodule(site.path), data, site)
    from headinit.features.extract import extract_features

    # Seen from the layer that makes the logits, the hidden layers of the head belong to what comes before it.
    layer = output_layer(root.get_submodule(site.path))
    inputs = layer_width(layer)[0] if is_layer(layer) else site.in_features
    kind = "conv" if isinstance(layer, nn.Conv2d) else "linear"
    here = HeadSite(path, kind, inputs, site.out_features, site.bias, site.role)
    return extract_features(root, data, site=here, num_classes=record.num_classes)


def _through_hidden(module: nn.Module, data: FeatureSet, site: HeadSite) -> FeatureSet:
    part = hidden_part(module)
    if part is None:
        return data
    if data.features.ndim != 2:
        raise SchemeError("A FeatureSet for this head must hold features (N, d).")
    mode, layer = part.training, next(part.parameters())
    part.eval()
    with torch.no_grad():
        chunks = [part(chunk.to(layer)).float().cpu() for chunk in data.features.split(4096)]
    part.train(mode)
    return dataclasses.replace(data, features=torch.cat(chunks))


def _check_result(root: nn.Module, site: HeadSite, layer: Any, result: HeadWeights, path: str) -> None:
    """Refuse what would be wrong in silence: wrong shape, values that are not finite, a head that can never move."""
    if result.weight.numel() != layer.weight.numel() or not torch.isfinite(result.weight).all():
        raise SchemeError(
            f"The scheme gave a weight of shape {tuple(result.weight.shape)} with "
            f"finite={bool(torch.isfinite(result.weight).all())} for the head {path!r}, which needs "
            f"{tuple(layer.weight.shape)}."
        )
    if getattr(layer, "bias", None) is None and result.bias is not None and result.bias.abs().max() > 0:
        raise SchemeError(
            f"The scheme gives the logits a bias, and the head {path!r} has none. Attach with bias=True, or choose a "
            "scheme without bias."
        )
    dead = not result.weight.any() and (result.bias is None or bool((result.bias <= 0).all()))
    if dead and relu_follows(root, site.path):
        raise SchemeError(
            f"A zero head at {site.path!r} would never move: its output goes through a ReLU, whose gradient at 0 is 0. "
            "Use a small random head (init=scaled_down), or a positive bias (init_options={'bias': 0.01})."
        )


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


def _replace_record(root: nn.Module, record: HeadRecord, undo: list[Any]) -> None:
    before = record_of(root) if has_record(root) else None
    undo.append(lambda: set_record(root, before) if before is not None else delattr(root, "headinit_record"))
    set_record(root, record)


def _set_attribute(owner: Any, name: str, value: Any, undo: list[Any]) -> None:
    before = getattr(owner, name, None)
    undo.append(lambda: setattr(owner, name, before))
    setattr(owner, name, value)


def _tell_model(root: nn.Module, record: HeadRecord, undo: list[Any]) -> None:
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


def _protect(root: nn.Module, record: HeadRecord) -> None:
    """transformers' `init_weights()` and `post_init()` would overwrite what they take for uninitialised."""
    if library_of(root) != "transformers" and not isinstance(root, HeadedBackbone):
        return
    for path in record.new_modules:
        for module in root.get_submodule(path).modules():
            module._is_hf_initialized = True  # type: ignore[assignment]
    for name in record.new_parameters:
        root.get_parameter(name)._is_hf_initialized = True  # type: ignore[attr-defined]


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
