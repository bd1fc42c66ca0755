"""Where the head of a model is: from what its library declares, checked by what the tensors do.

A head is the layer whose output becomes the logits. Each library says in its own way where to look: timm by a path in
the model's configuration, transformers by what lies beside the base model, a plain module by what comes last. One rule
then picks the layer: the last Linear or convolution there that makes as many outputs as the model says it has classes.
`check_head` proves the choice on an input: when the layer's output is replaced by constants, so are the logits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headinit.errors import HeadError
from headinit.heads.record import HeadSite, call_model, has_record, record_of, unwrap

# Further heads, by the names their authors gave them. They are declared here because no library lists them all (timm's
# levit_384_s8 names one of its two) and because a trained second head left at the old classes breaks the model.
_SIBLINGS = {
    # A second head on a distillation token or on the same features; the library predicts with the mean of both
    # (deit, levit, pit, efficientformer, swiftformer, repvit, iformer, efficientvim).
    "distilled": re.compile(r"(^|[._])dist(ill|illation)?([._]|$)|distill|heads?_dist|dist_head"),
    # A head in the middle of the network that only adds a term to the training loss (inception, googlenet).
    "auxiliary": re.compile(r"(^|[._])aux(_|iliary|\d|[._]|$)|AuxLogits"),
}

Inputs = Tensor | Mapping[str, Tensor]


# --- what the libraries declare ---------------------------------------------------------------------------------------


def library_of(model: nn.Module) -> str:
    """``"transformers"``, ``"timm"``, ``"torchvision"`` or ``"torch"``, by where the model's classes come from.

    Example:
        >>> library_of(nn.Linear(2, 2))
        'torch'
    """
    origins = [base.__module__ for base in type(model).__mro__]
    if any(origin.startswith("transformers.modeling_utils") for origin in origins):
        return "transformers"
    if getattr(model, "pretrained_cfg", None) is not None or any(o.startswith("timm.") for o in origins):
        return "timm"
    if any(origin.startswith("torchvision.") for origin in origins):
        return "torchvision"
    return "torch"


def is_made_for_a_task(model: nn.Module) -> bool:
    """Whether a transformers class has a head: its name says what it is for (``BertForSequenceClassification``).

    Example:
        >>> is_made_for_a_task(type("SwiftFormerModel", (nn.Module,), {})())
        False
    """
    return re.search("For[A-Z]", type(model).__name__) is not None


def layer_width(layer: nn.Module) -> tuple[int, int]:
    """Input and output width of a Linear or convolution."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels  # type: ignore[return-value]


def is_layer(module: nn.Module) -> bool:
    """Whether a module can make logits: a Linear or a two-dimensional convolution."""
    return isinstance(module, nn.Linear | nn.Conv2d)


def child_path(prefix: str, name: str) -> str:
    """Join two dotted paths, either of which may be empty."""
    return f"{prefix}.{name}" if prefix and name else prefix or name


def _layers(scope: nn.Module, prefix: str) -> list[tuple[str, nn.Module]]:
    return [(child_path(prefix, name), m) for name, m in scope.named_modules() if is_layer(m)]


def _transformers_layers(model: Any) -> list[tuple[str, nn.Module]]:
    """transformers keeps the head beside the base model; a few classes hold it inside (perceiver), or have no base."""
    wrapped = getattr(model, "timm_model", None)
    if wrapped is not None:  # TimmWrapper: timm's own declaration holds inside it
        return [(child_path("timm_model", path), layer) for path, layer in _timm_layers(wrapped)]
    if not is_made_for_a_task(model):
        raise HeadError(
            f"{type(model).__name__} is a base model without a classification head. Give attach_head "
            "pooling='mean' (or cls, pooler, max, last), or load its ...ForSequenceClassification class."
        )
    classes = model.config.num_labels
    fitting = [(p, m) for p, m in _layers(model, "") if layer_width(m)[1] == classes and _role(p) == "main"]
    outside = [(p, m) for p, m in fitting if p.partition(".")[0] != model.base_model_prefix]
    if not fitting:
        raise HeadError(
            f"{type(model).__name__} has no layer that makes config.num_labels = {classes} logits, so it is not a "
            "classifier. Load its ...ForSequenceClassification or ...ForImageClassification class, or give "
            "attach_head pooling='mean' to put a head on its base model."
        )
    return [(outside or fitting)[-1]]


def _head_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers that the declarations point at, the main one first; `_sites` adds the siblings."""
    library = library_of(model)
    if library == "transformers":
        return _transformers_layers(model)
    return _timm_layers(model) if library == "timm" else [_last_layer(model)]


def _timm_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """timm writes the classifier's path into each model's configuration; several paths for several heads."""
    cfg = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    declared = cfg.get("classifier") if isinstance(cfg, Mapping) else getattr(cfg, "classifier", None)
    if not declared:
        raise HeadError(
            f"{type(model).__name__} is an encoder: timm declares no classifier for it. "
            "Give attach_head pooling='mean' to put a head on its pooled output."
        )
    paths = [declared] if isinstance(declared, str) else list(declared)
    classes = getattr(model, "num_classes", None)
    found: list[tuple[str, nn.Module]] = []
    for path in paths:
        module = _submodule(model, path)
        if module is None:
            continue
        layers = [(p, m) for p, m in _layers(module, path) if not classes or layer_width(m)[1] == classes]
        if layers:
            found.append(layers[-1])
        elif isinstance(module, nn.Identity):
            found.append((path, module))
    if not found:
        raise HeadError(
            f"{type(model).__name__} declares its classifier at {', '.join(paths)}, but no Linear or Conv2d with "
            f"{classes} outputs is there. Replace it with nn.Linear, or build the model by timm.create_model."
        )
    return found


def _last_layer(model: nn.Module) -> tuple[str, nn.Module]:
    """By structure alone: the last module with parameters must be the Linear or convolution."""
    parametric = [
        (path, module)
        for path, module in model.named_modules()
        if (next(module.parameters(recurse=False), None) is not None or is_layer(module))
        and _role(path) == "main"
        and "parametrizations" not in path.split(".")  # they belong to the layer that they shape
    ]
    if not any(is_layer(module) for _, module in parametric):
        raise HeadError(
            f"{type(model).__name__} has no Linear or Conv2d layer, so there is no head to replace. "
            "End the model with nn.Linear(features, classes)."
        )
    path, last = parametric[-1]
    if not is_layer(last):
        raise HeadError(
            f"The last layer with parameters of {type(model).__name__} is {path!r} ({type(last).__name__}), not a "
            "Linear or Conv2d, so its head cannot be told from its backbone. Give an example input (find_head(model, "
            "inputs)), or end the model with nn.Linear."
        )
    return path, last


def _role(path: str) -> str:
    for role, pattern in _SIBLINGS.items():
        if pattern.search(path):
            return role
    return "main"


def parameters_under(root: nn.Module, paths: Sequence[str]) -> tuple[str, ...]:
    """Names of the parameters of the modules at these paths, as in `root.named_parameters()`."""
    return tuple(child_path(path, name) for path in paths for name, _ in root.get_submodule(path).named_parameters())


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


# --- sites ------------------------------------------------------------------------------------------------------------


def find_head(model: nn.Module, inputs: Inputs | None = None) -> tuple[HeadSite, ...]:
    """The heads of a model: the main one first, then distilled and auxiliary ones.

    Args:
        model: a model of torchvision, timm or transformers, or any module whose last layer is Linear or Conv2d.
        inputs: optional example batch. The sites are then checked with it (see `check_head`); where the declaration
            is wrong or missing, the layer that does make the logits is found by trying them.

    Raises:
        HeadError: the model has no head, or one that cannot be replaced; the message says why.

    Example:
        >>> find_head(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3)))[0].path
        '2'
    """
    model = unwrap(model)
    if has_record(model):
        return record_of(model).sites
    if inputs is None:
        return _sites(model, _head_layers(model))
    try:
        sites = _sites(model, _head_layers(model))
        if check_head(model, sites, inputs):
            return sites
    except HeadError:
        sites = ()
    return _search_by_trial(model, inputs)


def _sites(model: nn.Module, heads: Sequence[tuple[str, nn.Module]]) -> tuple[HeadSite, ...]:
    main_width = _width_of(model, heads[0])[1]
    known = {path for path, _ in heads}
    siblings = [
        (path, layer)
        for path, layer in _sibling_layers(model)
        if path not in known and layer_width(layer)[1] == main_width
    ]
    sites = []
    for number, (path, layer) in enumerate([*heads, *siblings]):
        # All that timm declares takes part in the prediction, whatever its name (crossvit and efficientvim average
        # several heads, volo adds half of its `aux_head`).
        role = _role(path) if path not in known else "distilled" if number else "main"
        sites.append(_site(model, path, layer, role))
    _refuse_tied(model, sites)
    return tuple(sites)


def _sibling_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The last layer under each outermost module that is named as a distilled or auxiliary head."""
    found: dict[str, tuple[str, nn.Module]] = {}
    for path, module in model.named_modules():
        if is_layer(module) and _role(path) != "main":
            parts = path.split(".")
            outermost = next(
                ".".join(parts[: i + 1]) for i in range(len(parts)) if _role(".".join(parts[: i + 1])) != "main"
            )
            found[outermost if not _is_list(model, outermost) else path] = (path, module)
    return list(found.values())


def _is_list(model: nn.Module, path: str) -> bool:
    return isinstance(model.get_submodule(path), nn.ModuleList)


def _width_of(model: nn.Module, head: tuple[str, nn.Module]) -> tuple[int, int]:
    path, layer = head
    if is_layer(layer):
        return layer_width(layer)
    # A headless timm model (num_classes=0) keeps an Identity where its classifier goes.
    owner: Any = model.timm_model if path.startswith("timm_model.") else model
    width = getattr(owner, "head_hidden_size", None) or getattr(owner, "num_features", None)
    if not isinstance(width, int):
        raise HeadError(f"{type(model).__name__} has no classifier and does not say how wide its features are.")
    return width, 0


def _site(model: nn.Module, path: str, layer: nn.Module, role: str) -> HeadSite:
    in_features, out_features = _width_of(model, (path, layer))
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        raise HeadError(
            f"The head {path!r} is a grouped convolution, in which classes see different features. Use groups=1."
        )
    weight = getattr(layer, "weight", None)
    if isinstance(weight, nn.parameter.UninitializedParameter):
        raise HeadError(f"The head {path!r} is a lazy layer of unknown width. Run one batch through the model first.")
    kind = "linear" if isinstance(layer, nn.Linear) else "conv" if isinstance(layer, nn.Conv2d) else "none"
    return HeadSite(
        path, kind, in_features, out_features, getattr(layer, "bias", None) is not None or kind == "none", role
    )


def _refuse_tied(model: nn.Module, sites: Sequence[HeadSite]) -> None:
    """A head whose weight is also used elsewhere (a language model's input embedding) is not a head of its own."""
    for site in sites:
        weight = getattr(model.get_submodule(site.path), "weight", None)
        if weight is None:
            continue
        owners = [
            child_path(path, name)
            for path, module in model.named_modules()
            for name, parameter in module.named_parameters(recurse=False)
            if parameter is weight
        ]
        if len(owners) > 1:
            raise HeadError(
                f"The weight of the last layer {site.path!r} is also {owners[0]!r}: they are tied, so replacing or "
                "re-initialising it would change pretrained weights. Load a classification class of this model, or "
                "give attach_head pooling='mean' to put a head on its base model."
            )


# --- what the tensors do ----------------------------------------------------------------------------------------------


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a block in evaluation mode without gradients, and put every module's mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def check_head(model: nn.Module, sites: Sequence[HeadSite], inputs: Inputs) -> bool:
    """Whether the outputs of these layers are the logits, by a test of cause and effect.

    The layers' outputs are replaced by the constants 1, 2, ..., K at every position. Whatever comes after a head (a
    mean over positions or over two heads, a ReLU before pooling, the choice of the last token) leaves them in
    proportion, so the logits must be c, 2 c, ..., K c (c is 1; 1.5 where half of a second head is added); anything else
    that comes after changes them.
    """
    main = [site for site in sites if site.role != "auxiliary"]

    def constant(module: nn.Module, _: Any, output: Tensor) -> Tensor:
        values = torch.arange(1.0, site_width(module) + 1, dtype=output.dtype, device=output.device)
        convolves = isinstance(getattr(module, "output", module), nn.Conv2d)
        values = values.view(-1, 1, 1) if convolves else values
        return values.expand_as(output).clone()  # what follows may work in place

    with _hooked([model.get_submodule(s.path) for s in main], constant), evaluating(model):
        logits = call_model(model, inputs)
    width = logits.shape[-1]
    scale = logits[..., :1]
    expected = scale * torch.arange(1.0, width + 1, dtype=logits.dtype, device=logits.device)
    tolerance = 1e-2 if logits.dtype.itemsize < 4 else 1e-5
    fits = width == main[0].out_features and bool((scale > 0).all())
    return fits and torch.allclose(logits, expected, rtol=tolerance)


def site_width(module: nn.Module) -> int:
    """Number of outputs of a head module."""
    return layer_width(module)[1] if is_layer(module) else int(module.out_features)  # type: ignore[arg-type]


@contextmanager
def _hooked(modules: Sequence[nn.Module], hook: Any) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _search_by_trial(model: nn.Module, inputs: Inputs) -> tuple[HeadSite, ...]:
    """The last executed layer whose output, replaced by constants, makes the logits those constants."""
    order: list[str] = []
    names = {module: path for path, module in model.named_modules() if is_layer(module)}
    with _hooked(list(names), lambda module, *_: order.append(names[module])), evaluating(model):
        width = call_model(model, inputs).shape[-1]
    for path in reversed(order):
        layer = model.get_submodule(path)
        if layer_width(layer)[1] == width:
            sites = _sites(model, [(path, layer)])
            if check_head(model, sites, inputs):
                return sites
    raise HeadError(
        f"No Linear or Conv2d of {type(model).__name__} makes its {width} outputs: something with an effect of its own "
        "comes after the last one. End the model with nn.Linear(features, classes)."
    )


def relu_follows(root: nn.Module, path: str) -> bool:
    """Whether the head stands right before a ReLU in a Sequential (SqueezeNet: conv, ReLU, pool)."""
    parent_path, _, name = path.rpartition(".")
    parent = root.get_submodule(parent_path)
    if not isinstance(parent, nn.Sequential):
        return False
    names = list(parent._modules)
    after = names[names.index(name) + 1 :]
    return bool(after) and isinstance(parent._modules[after[0]], nn.ReLU)


# --- what the head receives -------------------------------------------------------------------------------------------


@dataclass
class HeadInput:
    """What a head received in the latest forward pass."""

    latest: Tensor | None = None

    @property
    def tensor(self) -> Tensor:
        """`(B, d)`; `(B, d, h, w)` for convolutions over an unpooled map; `(B, T, d)` for heads over tokens.

        Raises:
            HeadError: the head has not run yet.
        """
        if self.latest is None:
            raise HeadError(
                "The head received nothing: no forward pass reached it. Run model(inputs) inside the block."
            )
        return self.latest


@contextmanager
def capture_head_input(model: nn.Module, site: HeadSite | None = None) -> Iterator[HeadInput]:
    """Give access to what a head (default: the main one) received in the latest forward pass.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(6, 2))
        >>> with capture_head_input(model) as seen:
        ...     _ = model(torch.zeros(5, 2, 3))
        >>> seen.tensor.shape
        torch.Size([5, 6])
    """
    model = unwrap(model)
    site = site or find_head(model)[0]
    seen = HeadInput()

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = args[0] if args else next(iter(kwargs.values()))
        pooled = value.ndim == 4 and value.shape[-1] == value.shape[-2] == 1
        seen.latest = value.flatten(1) if pooled else value

    handle = model.get_submodule(site.path).register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
