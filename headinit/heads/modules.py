"""The kinds of head: what turns features into logits.

Every kind has a layer that makes the logits (`output_layer`) and may have a part before it (`hidden_part`). The plain
linear head is the library's own layer type with the library's own parameter names, so that its checkpoints stay
readable by the library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headinit.errors import HeadError, unknown_name

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "identity": nn.Identity,
}
NORMS = ("none", "layer", "batch")
POOLINGS = ("cls", "pooler", "mean", "max", "last")
PROXY_POOLINGS = ("logsumexp", "max")


def output_layer(head: nn.Module) -> nn.Module:
    """The layer that makes the logits: the head itself, or its `output`.

    Example:
        >>> output_layer(build_head("mlp", 8, 3)).out_features
        3
    """
    output = getattr(head, "output", None)
    return output if isinstance(output, nn.Module) else head


def hidden_part(head: nn.Module) -> nn.Module | None:
    """What comes before `output_layer` and maps what the head receives to what that layer receives; None if nothing."""
    hidden = getattr(head, "hidden", None)
    return hidden if isinstance(hidden, nn.Module) else None


# --- linear -----------------------------------------------------------------------------------------------------------


class DroppedLinear(nn.Linear):
    """A Linear with dropout on its input; parameter names are those of `nn.Linear`."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, dropout: float = 0.1) -> None:
        super().__init__(in_features, out_features, bias)
        self.dropout = dropout

    def forward(self, input: Tensor) -> Tensor:
        """Logits `(..., K)` of features `(..., d)`."""
        return super().forward(F.dropout(input, self.dropout, self.training))


class DroppedConv2d(nn.Conv2d):
    """A convolution with dropout on its input; parameter names are those of `nn.Conv2d`."""

    def __init__(self, *args: Any, dropout: float = 0.1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.dropout = dropout

    def forward(self, input: Tensor) -> Tensor:
        """Logits `(B, K, h, w)` of a map `(B, d, h, w)`."""
        return super().forward(F.dropout(input, self.dropout, self.training))


def _layer(inputs: int, outputs: int, bias: bool, like: nn.Module | None, dropout: float = 0.0) -> nn.Module:
    """A layer that makes `outputs`, with the geometry of the convolution it stands in for, if it does."""
    if not isinstance(like, nn.Conv2d):
        return DroppedLinear(inputs, outputs, bias, dropout) if dropout else nn.Linear(inputs, outputs, bias)
    geometry: dict[str, Any] = {
        name: getattr(like, name) for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    }
    if dropout:
        return DroppedConv2d(inputs, outputs, bias=bias, dropout=dropout, **geometry)
    return nn.Conv2d(inputs, outputs, bias=bias, **geometry)


def _linear(inputs: int, outputs: int, bias: bool, like: nn.Module | None, *, dropout: float = 0.0) -> nn.Module:
    return _layer(inputs, outputs, bias, like, _checked_rate(dropout))


# --- mlp --------------------------------------------------------------------------------------------------------------


class ClassifierHead(nn.Module):
    """A part before (`hidden`) and the layer that makes the logits (`output`)."""

    def __init__(self, hidden: nn.Module, output: nn.Module) -> None:
        super().__init__()
        self.hidden = hidden
        self.output = output

    @property
    def out_features(self) -> int:
        """Number of logits K."""
        return int(getattr(self.output, "out_features", None) or self.output.out_channels)  # type: ignore[arg-type]

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits of features: `(B, d)`, or what `hidden` takes; `mask` marks the real tokens for parts over tokens."""
        hidden = self.hidden(features) if mask is None else self.hidden(features, mask)
        return self.output(hidden)


class Mlp(ClassifierHead):
    """Hidden layers, each followed by norm, activation and dropout, then the output layer."""

    @property
    def activation(self) -> str:
        """Name of the activation of the hidden layers."""
        return self._activation

    def __init__(self, hidden: nn.Module, output: nn.Module, activation: str) -> None:
        super().__init__(hidden, output)
        self._activation = activation


def _mlp(
    inputs: int,
    outputs: int,
    bias: bool,
    like: nn.Module | None,
    *,
    hidden: int | Sequence[int] = (512,),
    activation: str = "relu",
    norm: str = "none",
    dropout: float = 0.0,
) -> nn.Module:
    sizes = [hidden] if isinstance(hidden, int) else [int(size) for size in hidden]
    if not sizes or min(sizes) < 1:
        raise HeadError(f"An mlp head needs hidden sizes of at least 1, such as hidden=[512]; got {hidden!r}.")
    make_activation = _activation(activation)
    convolutional = isinstance(like, nn.Conv2d)
    layers: list[nn.Module] = []
    for size in sizes:
        # Over an unpooled map the hidden layers are 1x1 convolutions: the same layer at every position.
        layers.append(nn.Conv2d(inputs, size, 1) if convolutional else nn.Linear(inputs, size))
        layers += _norm(norm, size, convolutional)
        layers.append(make_activation())
        if _checked_rate(dropout):
            layers.append(nn.Dropout(dropout))
        inputs = size
    return Mlp(nn.Sequential(*layers), _layer(inputs, outputs, bias, like), activation)


def _norm(norm: str, size: int, convolutional: bool) -> list[nn.Module]:
    if norm not in NORMS:
        raise unknown_name("norm of the mlp head", norm, NORMS, HeadError)
    if norm == "none":
        return []
    if norm == "layer":
        return [nn.GroupNorm(1, size) if convolutional else nn.LayerNorm(size)]
    return [nn.BatchNorm2d(size) if convolutional else nn.BatchNorm1d(size)]


def _activation(name: str) -> Callable[[], nn.Module]:
    if name not in ACTIVATIONS:
        raise unknown_name("activation", name, ACTIVATIONS, HeadError)
    return ACTIVATIONS[name]


def _checked_rate(dropout: float) -> float:
    if not 0.0 <= dropout < 1.0:
        raise HeadError(f"dropout must lie in [0, 1), got {dropout!r}.")
    return float(dropout)


# --- cosine -----------------------------------------------------------------------------------------------------------


class CosineHead(nn.Module):
    """Logits are cosines times a learned scale: s <x, w> / (|x| |w|) (Gidaris & Komodakis 2018; Qi et al. 2018).

    Lengths are sqrt(|w|^2 + eps^2): a zero head then has zero logits and a gradient of ordinary size (at most 1 / eps
    times that of a linear head), where division by the plain length gives a gradient of 1e12.

    Attributes:
        weight: `(K, d)`; only its direction matters while it is longer than `eps`.
        scale: `(1,)`, learned.
    """

    def __init__(self, in_features: int, out_features: int, scale: float | None = None, eps: float = 0.05) -> None:
        super().__init__()
        if (scale is not None and scale <= 0) or eps <= 0:
            raise HeadError(f"The scale and eps of a cosine head must be positive, got scale={scale!r}, eps={eps!r}.")
        self.in_features, self.out_features, self.eps = in_features, out_features, eps
        # Cosines with random directions have std 1 / sqrt(d): this scale keeps the std of the logits at 0.3 or less,
        # which puts the initial loss within 0.05 of ln K. (A scale of 30 starts 4 classes at 6.25, where ln 4 = 1.39.)
        self.initial_scale = scale if scale is not None else min(10.0, 0.3 * in_features**0.5)
        self.weight = nn.Parameter(torch.zeros(out_features, in_features))
        self.scale = nn.Parameter(torch.full((1,), float(self.initial_scale)))
        self.register_parameter("bias", None)

    def forward(self, features: Tensor) -> Tensor:
        """Logits `(..., K)` of features `(..., d)`."""
        weight = self.weight * (self.weight.square().sum(-1, keepdim=True) + self.eps**2).rsqrt()
        return self.scale * F.linear(F.normalize(features, dim=-1, eps=1e-6), weight)


def _cosine(
    inputs: int, outputs: int, bias: bool, like: nn.Module | None, *, scale: float | None = None, eps: float = 0.05
) -> nn.Module:
    if isinstance(like, nn.Conv2d):
        raise HeadError(
            "A cosine head needs pooled features, and this model's head is a convolution. Use linear or mlp."
        )
    return CosineHead(inputs, outputs, scale, eps)


# --- several proxies per class ----------------------------------------------------------------------------------------


def pool_proxies(scores: Tensor, proxies: int, pooling: str = "logsumexp") -> Tensor:
    """Class logits `(..., K)` from the scores `(..., K * m)` of m proxies per class.

    Example:
        >>> pool_proxies(torch.tensor([[1.0, 3.0, 2.0, 0.0]]), 2, "max").tolist()
        [[3.0, 2.0]]
    """
    grouped = scores.unflatten(-1, (-1, proxies))
    return grouped.amax(dim=-1) if pooling == "max" else torch.logsumexp(grouped, dim=-1)


class ProxyHead(nn.Module):
    """m rows per class, whose class logit is the log-sum-exp or the maximum of their scores (IMPRINT, TMLR 2025).

    Attributes:
        output: the layer of K m rows; row k m + j is proxy j of class k.
    """

    def __init__(self, output: nn.Linear, proxies: int, pooling: str) -> None:
        super().__init__()
        self.output = output
        self.proxies, self.pooling = proxies, pooling

    @property
    def in_features(self) -> int:
        """Width d of the features."""
        return self.output.in_features

    @property
    def out_features(self) -> int:
        """Number of logits K."""
        return self.output.out_features // self.proxies

    def forward(self, features: Tensor) -> Tensor:
        """Logits `(..., K)` of features `(..., d)`."""
        return pool_proxies(self.output(features), self.proxies, self.pooling)


def _multi_proxy(
    inputs: int,
    outputs: int,
    bias: bool,
    like: nn.Module | None,
    *,
    proxies: int = 4,
    pooling: str = "logsumexp",
) -> nn.Module:
    if isinstance(like, nn.Conv2d):
        raise HeadError(
            "A multi_proxy head needs pooled features, and this model's head is a convolution. Use linear or mlp."
        )
    if isinstance(proxies, bool) or not isinstance(proxies, int) or proxies < 1:
        raise HeadError(f"A multi_proxy head needs proxies of at least 1 per class, got {proxies!r}.")
    if pooling not in PROXY_POOLINGS:
        raise unknown_name("pooling of the multi_proxy head", pooling, PROXY_POOLINGS, HeadError)
    # The scores are squared distances but for a bias, so there is one whatever the library's own head has.
    return ProxyHead(nn.Linear(inputs, outputs * proxies, True), proxies, pooling)


# --- heads over tokens or positions -----------------------------------------------------------------------------------


def as_tokens(features: Tensor) -> Tensor:
    """Tokens `(B, T, d)` of tokens or of a map `(B, d, h, w)`.

    Raises:
        HeadError: the features are pooled already.
    """
    if features.ndim == 4:
        return features.flatten(2).transpose(1, 2)
    if features.ndim == 3:
        return features
    raise HeadError(
        "This head looks at tokens (B, T, d) or a map (B, d, h, w), and got pooled features of shape "
        f"{tuple(features.shape)}."
    )


class AttentionPool(nn.Module):
    """A learned query attends over tokens or patches: sum_t softmax_t(<q, x_t> / sqrt(d)) x_t."""

    def __init__(self, width: int, num_heads: int = 1) -> None:
        super().__init__()
        if num_heads < 1 or width % num_heads:
            raise HeadError(f"num_heads={num_heads} does not divide the feature width {width}.")
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.zeros(width))

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """`(B, d)` of `(B, T, d)` or `(B, d, h, w)`; `mask` `(B, T)` is nonzero at real tokens."""
        tokens = as_tokens(features)
        split = tokens.unflatten(-1, (self.num_heads, -1))  # (B, T, H, d / H)
        query = self.query.view(self.num_heads, -1)
        scores = (split * query).sum(-1) / split.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(mask.unsqueeze(-1) == 0, torch.finfo(scores.dtype).min)
        return (scores.softmax(1).unsqueeze(-1) * split).sum(1).flatten(1)

    def initialise(self, generator: torch.Generator) -> dict[str, float | None]:
        """A small query: attention starts near the mean. Returns the std intended per parameter."""
        _fill(self.query, torch.randn(self.query.shape, generator=generator) * 0.02)
        return {"query": 0.02}


def _attention_pool(inputs: int, outputs: int, bias: bool, like: nn.Module | None, *, num_heads: int = 1) -> nn.Module:
    return ClassifierHead(AttentionPool(inputs, num_heads), nn.Linear(inputs, outputs, bias))


class RecurrentPool(nn.Module):
    """An LSTM or GRU over the tokens; the last state of each direction is the feature."""

    def __init__(self, width: int, hidden: int, cell: str, layers: int, bidirectional: bool, dropout: float) -> None:
        super().__init__()
        cells = {"lstm": nn.LSTM, "gru": nn.GRU}
        if cell not in cells:
            raise unknown_name("cell of the recurrent head", cell, cells, HeadError)
        if hidden < 1 or layers < 1:
            raise HeadError(f"A recurrent head needs hidden and layers of at least 1, got {hidden} and {layers}.")
        self.cell = cell
        between = dropout if layers > 1 else 0.0
        self.rnn = cells[cell](width, hidden, layers, batch_first=True, bidirectional=bidirectional, dropout=between)
        self.dropout = nn.Dropout(dropout)

    @property
    def width(self) -> int:
        """Width of the feature."""
        return self.rnn.hidden_size * (2 if self.rnn.bidirectional else 1)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """`(B, width)` of `(B, T, d)` or `(B, d, h, w)`; `mask` `(B, T)` is nonzero at real tokens."""
        tokens = as_tokens(features)
        if mask is None:
            _, state = self.rnn(tokens)
        else:
            real = mask != 0
            # Real tokens first, whichever side the padding is on, so that the sequence can be packed.
            order = torch.argsort((~real).to(torch.uint8), dim=1, stable=True)
            tokens = tokens.gather(1, order.unsqueeze(-1).expand_as(tokens))
            lengths = real.sum(1).clamp(min=1).cpu()
            _, state = self.rnn(
                nn.utils.rnn.pack_padded_sequence(tokens, lengths, batch_first=True, enforce_sorted=False)
            )
        last = state[0] if isinstance(state, tuple) else state  # (layers * directions, B, hidden)
        directions = 2 if self.rnn.bidirectional else 1
        return self.dropout(torch.cat(list(last[-directions:]), dim=-1))

    def initialise(self, generator: torch.Generator) -> dict[str, float | None]:
        """Orthogonal recurrent matrices (Saxe 2014), Xavier inputs, forget-gate bias 1 (Gers 2000, Jozefowicz 2015)."""
        intended: dict[str, float | None] = {}
        size = self.rnn.hidden_size
        for name, parameter in self.rnn.named_parameters():
            values = torch.zeros(parameter.shape)
            if name.startswith("bias"):
                if self.cell == "lstm" and name.startswith("bias_ih"):
                    values[size : 2 * size] = 1.0  # gates are stored as input, forget, cell, output
                intended[f"rnn.{name}"] = None if values.any() else 0.0
            else:
                recurrent = name.startswith("weight_hh")
                for gate in values.split(size):
                    fill = nn.init.orthogonal_ if recurrent else nn.init.xavier_uniform_
                    fill(gate, generator=generator)
                width = parameter.shape[1]
                intended[f"rnn.{name}"] = size**-0.5 if recurrent else (2 / (size + width)) ** 0.5
            _fill(parameter, values)
        return intended


def _recurrent(
    inputs: int,
    outputs: int,
    bias: bool,
    like: nn.Module | None,
    *,
    hidden: int = 256,
    cell: str = "lstm",
    layers: int = 1,
    bidirectional: bool = False,
    dropout: float = 0.0,
) -> nn.Module:
    pool = RecurrentPool(inputs, hidden, cell, layers, bidirectional, _checked_rate(dropout))
    return ClassifierHead(pool, nn.Linear(pool.width, outputs, bias))


class ConvolutionPool(nn.Module):
    """A convolution over a map or over tokens, an activation, the maximum over positions (Kim's TextCNN, 2014)."""

    def __init__(self, width: int, channels: int, kernel_size: int, dims: int, activation: str) -> None:
        super().__init__()
        if channels < 1 or kernel_size < 1 or kernel_size % 2 == 0 or dims not in (1, 2):
            raise HeadError(
                "A conv head needs channels >= 1, an odd kernel_size and dims 1 (tokens) or 2 (maps), got "
                f"channels={channels}, kernel_size={kernel_size}, dims={dims}."
            )
        layer = nn.Conv1d if dims == 1 else nn.Conv2d
        self.convolution = layer(width, channels, kernel_size, padding=kernel_size // 2)
        self.activation = _activation(activation)()

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """`(B, channels)` of `(B, T, d)` or `(B, d, h, w)`; `mask` `(B, T)` is nonzero at real tokens."""
        if isinstance(self.convolution, nn.Conv1d):
            tokens = as_tokens(features)
            if mask is not None:
                tokens = tokens * (mask.unsqueeze(-1) != 0)
            features = tokens.transpose(1, 2)
        elif features.ndim != 4:
            raise HeadError(
                f"This conv head needs a map (B, d, h, w), got {tuple(features.shape)}. Set dims=1 for tokens."
            )
        mapped = self.activation(self.convolution(features))
        if mask is not None and mapped.ndim == 3:
            mapped = mapped.masked_fill(mask.unsqueeze(1) == 0, torch.finfo(mapped.dtype).min)
        return mapped.flatten(2).amax(-1)


def _conv(
    inputs: int,
    outputs: int,
    bias: bool,
    like: nn.Module | None,
    *,
    channels: int = 256,
    kernel_size: int = 3,
    activation: str = "relu",
    dims: int | None = None,
) -> nn.Module:
    return ClassifierHead(
        ConvolutionPool(inputs, channels, kernel_size, dims or 1, activation), nn.Linear(channels, outputs, bias)
    )


# --- the registry -----------------------------------------------------------------------------------------------------

KINDS: dict[str, Callable[..., nn.Module]] = {
    "linear": _linear,
    "mlp": _mlp,
    "cosine": _cosine,
    "multi_proxy": _multi_proxy,
    "attention_pool": _attention_pool,
    "recurrent": _recurrent,
    "conv": _conv,
}
TOKEN_KINDS = ("attention_pool", "recurrent", "conv")


def build_head(
    kind: str,
    in_features: int,
    num_classes: int,
    *,
    bias: bool = True,
    like: nn.Module | None = None,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Build a head of this kind. Its values are for `headinit.attach` to set; torch's defaults stand in it.

    Args:
        kind: ``"linear"``, ``"mlp"``, ``"cosine"``, ``"multi_proxy"``, ``"attention_pool"``, ``"recurrent"`` or
            ``"conv"``.
        in_features: width d of the features.
        num_classes: number of logits K.
        bias: whether the logits have a bias (a cosine head has none).
        like: the layer it stands in for; a convolution's geometry is kept.
        options: the kind's own options, such as ``{"hidden": [512], "activation": "gelu"}`` for an mlp.

    Raises:
        HeadError: unknown kind or option, or a value out of range.

    Example:
        >>> build_head("mlp", 8, 3, options={"hidden": [4]})(torch.zeros(2, 8)).shape
        torch.Size([2, 3])
    """
    if kind not in KINDS:
        raise unknown_name("head", kind, KINDS, HeadError)
    factory = KINDS[kind]
    known = tuple(factory.__kwdefaults__ or {})
    for option in options or {}:
        if option not in known:
            raise unknown_name(f"option of the {kind} head", option, known, HeadError)
    return factory(in_features, num_classes, bias, like, **(options or {}))


def _fill(parameter: Tensor, values: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(values)
