"""What headinit knows about a model that it gave a head: carried by the model itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from headinit.errors import HeadError

_ATTRIBUTE = "headinit_record"
_PRETRAINED_HEADS = "headinit_pretrained_heads"


@dataclass(frozen=True)
class HeadSite:
    """Where one head of a model is.

    Attributes:
        path: dotted path of the module that makes the logits, such as ``"fc"`` or ``"classifier.out_proj"``.
        kind: ``"linear"``, ``"conv"`` or the class name of a composite head.
        in_features: width d of what the head receives.
        out_features: number of logits K that the head makes now.
        bias: whether the logits have a bias.
        role: ``"main"``; ``"distilled"``: its logits are averaged with (or added to) the main ones, so that the main
            head alone does not give the model's logits; or ``"auxiliary"``: read by the training loss alone.
    """

    path: str
    kind: str
    in_features: int
    out_features: int
    bias: bool = True
    role: str = "main"


@dataclass(frozen=True)
class HeadRecord:
    """What was attached to a model, by whom it is read: freezing, parameter groups, describe, save.

    Attributes:
        sites: the heads, the main one first.
        head: kind of head attached (``"linear"``, ``"mlp"``, ...).
        num_classes: number of logits K.
        new_parameters: names, as in ``model.named_parameters()``, of every parameter that is not pretrained: the head
            and whatever the checkpoint did not fill (a BERT pooler, say).
        new_modules: dotted paths of the modules that hold them, the head modules first; dropout and norms inside
            belong to the head.
        init: name and options of the scheme, as given.
        seed: seed of the head.
        intended_std: per new parameter, the std the scheme intended (None where the values come from data).
        from_data: whether the weights of the head were computed from data, so that it predicts before any training.
        pretrained: False if the backbone's weights are random by explicit request.
        task: ``"single_label"``, ``"multi_label"``, ``"regression"`` or ``"token"``.
        class_names: names of the classes in logit order, if known.
        source: catalog or library name and options that rebuild the architecture, if known.
        head_options: options of the kind of head, as given.
        pooling: ``"native"`` (the model's own), or how `HeadedBackbone` pools.
        kept_tensors: number of parameters and buffers that were checked to be untouched by the attachment.
        notes: facts worth telling the user, such as a head cast to the backbone's float16.
    """

    sites: tuple[HeadSite, ...]
    head: str
    num_classes: int
    new_parameters: tuple[str, ...]
    new_modules: tuple[str, ...]
    init: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    intended_std: Mapping[str, float | None] = field(default_factory=dict)
    from_data: bool = False
    pretrained: bool = True
    task: str = "single_label"
    class_names: tuple[str, ...] | None = None
    source: Mapping[str, Any] | None = None
    head_options: Mapping[str, Any] = field(default_factory=dict)
    pooling: str = "native"
    kept_tensors: int = 0
    notes: tuple[str, ...] = ()


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel or torch.compile wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def is_adapted(model: nn.Module) -> bool:
    """Whether PEFT has wrapped the model, and put copies of its own in the place of new modules."""
    return type(unwrap(model)).__module__.startswith("peft.")


def has_record(model: nn.Module) -> bool:
    """Whether headinit attached a head to this model."""
    return hasattr(unwrap(model), _ATTRIBUTE)


def record_of(model: nn.Module) -> HeadRecord:
    """The record of the attached head.

    Raises:
        HeadError: headinit did not attach a head to this model.
    """
    record = getattr(unwrap(model), _ATTRIBUTE, None)
    if record is None:
        raise HeadError(
            f"{type(unwrap(model)).__name__} has no head attached by headinit, so its new parameters are unknown. "
            "Call headinit.attach_head(model, num_classes) first, or headinit.init_head(model, init) on the head it "
            "has."
        )
    return record


def set_record(model: nn.Module, record: HeadRecord) -> None:
    """Store the record on the model; deepcopy and pickle carry it along."""
    setattr(unwrap(model), _ATTRIBUTE, record)


PretrainedHeads = Mapping[str, tuple[Tensor, Tensor | None]]
"""Weight `(S, d)` (of a convolution `(S, d, h, w)`) and bias `(S,)` of pretrained classifiers, by their paths."""


def pretrained_heads(model: nn.Module) -> PretrainedHeads:
    """The classifiers that the model was pretrained with, kept when new heads took their places; empty if none were."""
    return getattr(unwrap(model), _PRETRAINED_HEADS, {})


def keep_pretrained_heads(model: nn.Module, heads: PretrainedHeads) -> None:
    """Keep the classifiers that the model was pretrained with: no parameters of it, and never saved."""
    setattr(unwrap(model), _PRETRAINED_HEADS, dict(heads))


def call_model(model: nn.Module, inputs: Tensor | Mapping[str, Tensor]) -> Tensor:
    """Logits of one forward pass: tensors are given by position, mappings by name.

    Returns:
        The logits, `(B, K)` (or `(B, T, K)` for token tasks), whatever the library's output type is. A distilled
        model in training mode gives a pair: its mean is what the library itself predicts with.
    """
    output = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    return logits_of(output)


def logits_of(output: Any) -> Tensor:
    """The main logits in a library's output: a tensor, an object with ``logits``, a tuple or a mapping."""
    if isinstance(output, Tensor):
        return output
    if getattr(output, "logits", None) is not None:
        return output.logits
    if isinstance(output, Mapping):
        for key in ("logits", "out"):
            if key in output:
                return output[key]
    hidden = getattr(output, "last_hidden_state", None)
    if isinstance(hidden, Tensor) and hidden.ndim == 2:
        return hidden  # transformers' PPLCNetForImageClassification gives its logits under this name
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        return output[0]
    raise HeadError(f"Cannot find the logits in an output of type {type(output).__name__}.")
