"""A backbone that has no head of its own, or whose own pooling is not wanted: tokens in, one pooled feature, a head."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headinit.errors import HeadError, unknown_name
from headinit.heads.locate import evaluating, is_made_for_a_task, library_of
from headinit.heads.modules import POOLINGS, TOKEN_KINDS


class HeadedBackbone(nn.Module):
    """`head(pool(tokens))`: called as the backbone is called, with `labels` too where the backbone is of transformers.

    Attributes:
        backbone: gives tokens `(B, T, d)` or a map `(B, d, h, w)`.
        pooling: ``"cls"``, ``"pooler"``, ``"mean"``, ``"max"``, ``"last"``, or ``"none"`` for a head that looks at all
            tokens.
        head: gives logits `(B, K)`.
    """

    def __init__(self, backbone: nn.Module, pooling: str, head: nn.Module, library: str) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head
        self.pooling, self.library = pooling, library
        # transformers' Trainer and pipelines look for these on any model they are given.
        if library == "transformers":
            self.config: Any = backbone.config
            self.main_input_name = getattr(backbone, "main_input_name", "input_ids")

    @property
    def num_labels(self) -> int:
        """Number of logits K."""
        return int(self.head.out_features)  # type: ignore[arg-type]

    # transformers' Trainer divides the loss by the accumulation steps only for models that do not do so themselves.
    accepts_loss_kwargs = False

    def forward(
        self,
        *args: Tensor,
        labels: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        **inputs: Any,
    ) -> Any:
        """Logits `(B, K)`; of a transformers backbone a `SequenceClassifierOutput`, with `loss` if given `labels`.

        The usual inputs are named because transformers' `Trainer` drops every column that the signature does not name.
        """
        named = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "pixel_values": pixel_values,
        }
        inputs |= {name: value for name, value in named.items() if value is not None}
        if self.library != "transformers":
            features = body_features(self.backbone, *args, **inputs)
            return self.head(pool_tokens(features, self.pooling)) if self.pooling != "none" else self.head(features)
        from transformers.modeling_outputs import SequenceClassifierOutput

        inputs.pop("return_dict", None)
        inputs |= dict(zip(inspect.signature(self.backbone.forward).parameters, args, strict=False))
        mask = inputs.get("attention_mask")
        output = self.backbone(**inputs, return_dict=True)
        logits = self._logits(output, mask)
        loss = None if labels is None else self._loss(logits, labels)
        return SequenceClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=getattr(output, "hidden_states", None),
            attentions=getattr(output, "attentions", None),
        )

    def _logits(self, output: Any, mask: Tensor | None) -> Tensor:
        tokens = hidden_states(output)
        if mask is not None and (mask.ndim != 2 or tokens.ndim != 3 or mask.shape[1] != tokens.shape[1]):
            mask = None  # a mask over something else, such as pixels or a longer input that the backbone shortened
        if self.pooling == "none":
            return self.head(tokens, mask)
        if self.pooling == "pooler":
            return self.head(output.pooler_output.flatten(1))
        return self.head(pool_tokens(tokens, self.pooling, mask))

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        kind = getattr(self.config, "problem_type", None) or "single_label_classification"
        if kind == "regression":
            return F.mse_loss(logits.view(labels.shape), labels.to(logits.dtype))
        if kind == "multi_label_classification":
            return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        return F.cross_entropy(logits, labels)


def pool_tokens(features: Tensor, pooling: str, mask: Tensor | None = None) -> Tensor:
    """One feature `(B, d)` of tokens `(B, T, d)` or a map `(B, d, h, w)`; padding, where `mask` is 0, does not count.

    Example:
        >>> pool_tokens(torch.tensor([[[1.0], [3.0], [9.0]]]), "mean", torch.tensor([[1, 1, 0]]))
        tensor([[2.]])
    """
    if features.ndim == 2:
        return features
    tokens = features.flatten(2).transpose(1, 2) if features.ndim == 4 else features
    real = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device) if mask is None else mask != 0
    if pooling == "mean":
        weights = real.unsqueeze(-1).to(tokens.dtype)
        return (tokens * weights).sum(1) / weights.sum(1).clamp(min=1)
    if pooling == "max":
        return tokens.masked_fill(~real.unsqueeze(-1), torch.finfo(tokens.dtype).min).amax(1)
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand(real.shape)
    if pooling == "cls":  # the first real token: the padding may be on the left
        index = positions.masked_fill(~real, tokens.shape[1]).amin(1).clamp(max=tokens.shape[1] - 1)
    elif pooling == "last":
        index = positions.masked_fill(~real, 0).amax(1)
    else:
        raise unknown_name("pooling", pooling, ("native", *POOLINGS), HeadError)
    return tokens[torch.arange(tokens.shape[0], device=tokens.device), index]


def body_features(backbone: Any, *args: Tensor, **inputs: Any) -> Tensor:
    """Tokens `(B, T, d)` or a map `(B, d, h, w)`, before any pooling, of a timm or torchvision model."""
    if hasattr(backbone, "forward_features"):
        features = backbone.forward_features(*args, **inputs)
    elif hasattr(backbone, "_process_input"):  # torchvision's VisionTransformer has no method for its tokens alone
        patches = backbone._process_input(*args)
        features = backbone.encoder(torch.cat([backbone.class_token.expand(len(patches), -1, -1), patches], dim=1))
    elif map_of := _map_function(backbone):
        features = map_of(backbone, *args)
    else:
        features = _before_pooling(backbone, *args)
    if isinstance(features, tuple):
        features = features[0]
    if features.ndim == 4 and str(getattr(backbone, "output_fmt", "NCHW")).endswith("NHWC"):
        features = features.permute(0, 3, 1, 2)
    return features


# torchvision's models that pool by a function inside `forward`, so that no layer receives their last map, and
# SqueezeNet, which pools behind its classifier.
_MAPS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "DenseNet": lambda model, x: F.relu(model.features(x)),
    "MNASNet": lambda model, x: model.layers(x),
    "MobileNetV2": lambda model, x: model.features(x),
    "SqueezeNet": lambda model, x: model.features(x),
    "ShuffleNetV2": lambda m, x: m.conv5(m.stage4(m.stage3(m.stage2(m.maxpool(m.conv1(x)))))),
}


def _map_function(backbone: nn.Module) -> Callable[[Any, Tensor], Tensor] | None:
    origins = [base.__name__ for base in type(backbone).__mro__ if base.__module__.startswith("torchvision.")]
    return next((_MAPS[name] for name in origins if name in _MAPS), None)


def unread_layers(backbone: nn.Module) -> list[str]:
    """Paths of a torchvision model's layers behind its global pooling, which no feature passes through.

    Example:
        >>> from torchvision.models import mobilenet_v3_small
        >>> unread_layers(mobilenet_v3_small())
        ['classifier.0', 'classifier.3']
    """
    paths = [path for path, module in backbone.named_modules() if any(True for _ in module.parameters(recurse=False))]
    pooling = _pooling_path(backbone)
    if pooling is None:
        return []
    order = [path for path, _ in backbone.named_modules()]
    return [path for path in paths if order.index(path) > order.index(pooling)]


def _pooling_layer(backbone: nn.Module) -> nn.Module | None:
    """The global pooling layer; those of squeeze-and-excitation lie inside the blocks."""
    path = _pooling_path(backbone)
    return None if path is None else backbone.get_submodule(path)


def _pooling_path(backbone: nn.Module) -> str | None:
    layers = [
        path
        for path, module in backbone.named_modules()
        if isinstance(module, nn.AdaptiveAvgPool2d) and path.split(".")[0] in ("avgpool", "classifier")
    ]
    return layers[-1] if layers else None


def _before_pooling(backbone: nn.Module, *args: Tensor) -> Tensor:
    """What the global pooling layer of a torchvision model receives."""
    received: list[Tensor] = []
    layer = _pooling_layer(backbone)
    assert layer is not None, "split_body lets no other model through"
    handle = layer.register_forward_pre_hook(lambda _, inputs: received.append(inputs[0]))
    try:
        backbone(*args)
    finally:
        handle.remove()
    return received[-1]


def split_body(model: nn.Module, pooling: str, head: str) -> tuple[nn.Module, int, str]:
    """The part of a model that gives tokens, the width of its features, and how they are pooled.

    Raises:
        HeadError: the model has no such part, or no pooler where one is asked for.
    """
    if pooling not in ("native", *POOLINGS):
        raise unknown_name("pooling", pooling, ("native", *POOLINGS), HeadError)
    if head in TOKEN_KINDS and pooling != "native":
        raise HeadError(f"A head of kind {head} pools by itself; leave pooling='native' (it was {pooling!r}).")
    chosen = "none" if head in TOKEN_KINDS else "mean" if pooling == "native" else pooling
    library = library_of(model)
    if library == "transformers":
        body = _transformers_body(model)
        if chosen == "pooler" and not _has_pooler(body):
            raise HeadError(f"{type(body).__name__} has no pooler. Use pooling=mean, cls, max or last.")
        return body, _transformers_width(body), chosen
    if library == "timm" and hasattr(model, "forward_features"):
        if chosen == "pooler":
            raise HeadError(f"{type(model).__name__} has no pooler. Use pooling=mean, cls, max or last.")
        return model, int(model.num_features), chosen  # type: ignore[arg-type]
    if library == "torchvision" and chosen != "pooler":
        if hasattr(model, "_process_input"):
            return model, int(model.hidden_dim), chosen  # type: ignore[arg-type]
        if _map_function(model) is not None or _pooling_layer(model) is not None:
            return model, _map_width(model), chosen
    wanted = "a pooler" if chosen == "pooler" else "tokens"
    raise HeadError(
        f"Cannot take {wanted} out of {type(model).__name__} ({library}): models of transformers and timm give tokens, "
        "and those of torchvision that end in a pooling layer. Use head=linear, mlp or cosine with pooling=native."
    )


def _map_width(model: nn.Module) -> int:
    """Channels of a torchvision model's last map, as one picture shows; maxvit takes pictures of one size alone."""
    parameter = next(model.parameters())
    with evaluating(model):
        try:
            return body_features(model, parameter.new_zeros(1, 3, 96, 96)).shape[1]
        except RuntimeError:
            return body_features(model, parameter.new_zeros(1, 3, 224, 224)).shape[1]


def _transformers_body(model: Any) -> nn.Module:
    body = model.base_model
    body = body if hasattr(body, "config") else model  # TimmWrapperModel's base is the timm model itself
    if body is model and is_made_for_a_task(model):
        # CLIP-like classes: `base_model` is the classifier itself; its largest child without a head is the body.
        children = [child for child in model.children() if hasattr(child, "config")]
        if not children:
            raise HeadError(f"{type(model).__name__} does not say which part of it is the backbone.")
        body = max(children, key=lambda child: sum(p.numel() for p in child.parameters()))
    if hasattr(body, "vision_model") and hasattr(body, "text_model"):
        raise HeadError(
            f"{type(body).__name__} has two towers, one for pictures and one for text. Give the one that you want: "
            "model.vision_model or model.text_model."
        )
    if getattr(body.config, "is_encoder_decoder", False) and hasattr(body, "get_encoder"):
        body = body.get_encoder()
    return body


def _has_pooler(body: nn.Module) -> bool:
    return any(
        name.split(".")[-1] == "pooler" and any(True for _ in m.parameters()) for name, m in body.named_modules()
    )


def _transformers_width(body: Any) -> int:
    """Width of the last hidden states: for text as the configuration declares it, for pictures as one picture shows."""
    config = body.config.get_text_config() if hasattr(body.config, "get_text_config") else body.config
    if getattr(body, "main_input_name", "input_ids") == "pixel_values":
        size = getattr(config, "image_size", None) or 224
        height, width = (size, size) if isinstance(size, int) else size
        parameter = next(body.parameters())
        picture = parameter.new_zeros(1, getattr(config, "num_channels", 3), height, width)
        with evaluating(body):
            tokens = hidden_states(body(pixel_values=picture))
        return tokens.shape[1 if tokens.ndim == 4 else -1]
    for name in ("d_latents", "hidden_size", "d_model", "dim", "n_embd"):  # perceiver gives its latents
        if isinstance(getattr(config, name, None), int):
            doubled = config.model_type == "reformer"  # its reversible layers give two streams side by side
            return getattr(config, name) * (2 if doubled else 1)
    raise HeadError(f"{type(body).__name__} does not say how wide its hidden states are (no config.hidden_size).")


def hidden_states(output: Any) -> Tensor:
    """The last hidden states in the output of a transformers base model."""
    tokens = getattr(output, "last_hidden_state", None)
    maps = getattr(output, "feature_maps", None)  # of base models that transformers names backbones
    if tokens is not None:
        return tokens
    if not maps:
        raise HeadError(f"An output of type {type(output).__name__} has no hidden states to pool.")
    return maps[-1]
