"""Setting the values of new heads: hidden layers by their activation, the last layer by the chosen scheme."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from headinit.errors import HeadError, SchemeError
from headinit.features.extract import FeatureSet
from headinit.heads.locate import child_path, is_layer, layer_width, parameters_under, relu_follows
from headinit.heads.modules import Mlp, ProxyHead, hidden_part, output_layer
from headinit.heads.pooled import HeadedBackbone
from headinit.heads.record import HeadRecord, HeadSite, pretrained_heads
from headinit.library_init import library_tensors
from headinit.schemes.fixed import Library
from headinit.schemes.prototypes import MultiProxy, Source
from headinit.schemes.scaling import LSUV
from headinit.schemes.scheme import HeadShape, HeadWeights, Scheme
from headinit.schemes.variance_scaling import for_activation
from headinit.seeding import generator_for


@dataclass(frozen=True)
class HiddenStart:
    """How the hidden layers of a head start.

    Attributes:
        scheme: their scheme; None takes the one that fits the activation.
        bias: a constant, 0 or a little more.
    """

    scheme: Scheme | None = None
    bias: float = 0.0


def restore_values(parameter: nn.Parameter) -> Any:
    """A function that gives the parameter the values back that it has now."""
    values = parameter.detach().clone()

    def restore() -> None:
        with torch.no_grad():
            parameter.copy_(values)

    return restore


def _write(parameter: Tensor, values: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(values.view(parameter.shape))


def fill_missing(
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
        undo.append(restore_values(parameter))
        _write(parameter, values[name])


@dataclass
class Started:
    """What initialising the heads did: the std intended per parameter, where values are from, notes for the user."""

    intended: dict[str, float | None] = field(default_factory=dict)
    from_data: bool = False
    notes: list[str] = field(default_factory=list)


def initialise_heads(root: nn.Module, record: HeadRecord, scheme: Scheme, hidden: HiddenStart, data: Any) -> Started:
    """Start every head of the record by the scheme, each from a generator of its own.

    Raises:
        SchemeError: the scheme does not suit a head, or needs data that it was not given.
        HeadError: a head has no weight that can be written.
    """
    started = Started()
    for site in record.sites:
        module = root.get_submodule(site.path)
        started.intended |= _start_hidden(module, site.path, hidden, record.seed)
    library = _library_values(root, record) if isinstance(innermost(scheme), Library) else {}
    for site in record.sites:
        module = root.get_submodule(site.path)
        layer: Any = output_layer(module)
        _refuse_parametrised(layer, site.path)
        path = site.path if layer is module else f"{site.path}.output"
        own = with_innermost(scheme, _GivenValues(*library[site.path])) if library else scheme
        own = for_site(own, root, site)
        features = _features_for(root, record, site, path, data) if own.needs_data else None
        result = own(_shape_of(layer, site.path), generator_for(record.seed, f"head/{site.path}"), features)
        _check_result(root, site, layer, result, path)
        _write(layer.weight, result.weight)
        started.intended[f"{path}.weight"] = result.std
        # LSUV reads data, but its values are drawn, as are those of a random scheme under a modifier that reads data.
        started.from_data = result.std is None and innermost(scheme).needs_data
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


def _start_hidden(module: nn.Module, path: str, hidden: HiddenStart, seed: int) -> dict[str, float | None]:
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


def innermost(scheme: Scheme) -> Scheme:
    """The scheme under all modifiers."""
    while isinstance(inner := getattr(scheme, "scheme", None), Scheme):
        scheme = inner
    return scheme


def with_innermost(scheme: Scheme, replacement: Scheme) -> Scheme:
    """The same modifiers on top of another scheme."""
    if not isinstance(inner := getattr(scheme, "scheme", None), Scheme):
        return replacement
    return dataclasses.replace(scheme, scheme=with_innermost(inner, replacement))  # type: ignore[call-arg]


def for_site(scheme: Scheme, root: nn.Module, site: HeadSite) -> Scheme:
    """The scheme with what it takes from this head: the classifier that stood there, how proxies are joined.

    Raises:
        SchemeError: the scheme does not suit the head.
    """
    inner, module = innermost(scheme), root.get_submodule(site.path)
    if isinstance(module, ProxyHead) and module.proxies > 1:
        if not getattr(inner, "breaks_symmetry", True):
            raise SchemeError(
                f"head=multi_proxy with init={type(inner).__name__.lower()} is refused: the proxies of a class would "
                "be equal, get equal gradients and stay equal. Use init=multi_proxy, or a random one such as lecun."
            )
        if inner.needs_data and not isinstance(inner, LSUV | MultiProxy):
            raise SchemeError(
                f"init={type(inner).__name__.lower()} makes one row per class and head=multi_proxy holds "
                f"{module.proxies}. Use init=multi_proxy, or head=linear."
            )
    if isinstance(inner, MultiProxy):
        pooling = module.pooling if isinstance(module, ProxyHead) else None
        if inner.pooling is not None and pooling not in (None, inner.pooling):
            raise SchemeError(
                f"init=multi_proxy with pooling={inner.pooling} is for another head than this one, which joins its "
                f"proxies by {pooling}. Leave the init's pooling out, or set the head's to {inner.pooling}."
            )
        return with_innermost(scheme, dataclasses.replace(inner, pooling=pooling or inner.pooling))
    if isinstance(inner, Source):
        return with_innermost(scheme, inner.with_source(*_classifier_at(root, site)))
    return scheme


def _classifier_at(root: nn.Module, site: HeadSite) -> tuple[Tensor, Tensor | None]:
    """The pretrained classifier that read what the layer which makes the logits now reads."""
    reason = ""
    if isinstance(root, HeadedBackbone):
        reason = "the head is on tokens that headinit pools, which no classifier was pretrained on"
    elif hidden_part(root.get_submodule(site.path)) is not None:
        reason = "the new logits are made from a hidden layer, which no classifier was pretrained on"
    elif site.path not in pretrained_heads(root):
        reason = f"the weights of this {type(root).__name__} came without one"
    if reason:
        raise SchemeError(
            "init=source mixes the rows of the classifier that the backbone was pretrained with, by its own "
            f"predictions, and there is none: {reason}. Use a model with its pretrained classifier and head=linear, or "
            "init=class_mean or ridge, which need none."
        )
    weight, bias = pretrained_heads(root)[site.path]
    return weight.flatten(1), bias


def _library_values(root: nn.Module, record: HeadRecord) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Weight and bias of each head as its library builds them for K classes."""
    layers: dict[str, Any] = {site.path: root.get_submodule(site.path) for site in record.sites}
    if isinstance(root, HeadedBackbone) or not all(is_layer(layer) for layer in layers.values()):
        raise SchemeError(
            f"init=library: the library builds no {record.head} head (pooling={record.pooling}) for this model. "
            "Use head=linear with pooling=native, or another init."
        )
    names = parameters_under(root, list(layers))
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
