"""Random heads: one primitive, std^2 = gain^2 / fan, and every named scheme one line over it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from headinit.errors import SchemeError, unknown_name
from headinit.features.extract import FeatureSet
from headinit.features.moments import Moments
from headinit.schemes.scheme import HeadShape, HeadWeights, Scheme, check_finite, check_positive, constant_bias

MODES = ("fan_in", "fan_out", "fan_average")
DISTRIBUTIONS = ("normal", "truncated_normal", "uniform")

# The std of a standard normal that is truncated to [-2, 2]. Dividing by it makes the std that is measured the one
# that was asked for; without it, "truncated normal with std .02" has std .0176.
TRUNCATED_STD = 0.87962566103423978


def variance_scaling(
    shape: HeadShape,
    generator: torch.Generator,
    *,
    gain: float = 1.0,
    fan: float | str = "fan_in",
    distribution: str = "normal",
) -> Tensor:
    """Draw a weight with mean 0 and std = gain / sqrt(fan), the primitive under every random scheme.

    Args:
        shape: the head's shape.
        generator: the only source of random numbers.
        gain: numerator of the std.
        fan: ``"fan_in"``, ``"fan_out"``, ``"fan_average"``, or a number (1 makes `gain` the std itself).
        distribution: ``"normal"``; ``"truncated_normal"``, cut at two std of the parent and corrected, so that the
            result has the std asked for; ``"uniform"`` on +-sqrt(3) std.

    Returns:
        `(K, d * kernel_size)`, float32.

    Raises:
        SchemeError: unknown fan or distribution.

    Example:
        >>> w = variance_scaling(HeadShape(4096, 64), torch.Generator().manual_seed(0), gain=math.sqrt(2.0))
        >>> round(w.std().item() * math.sqrt(4096 / 2), 2)
        1.0
    """
    size = (shape.out_features, shape.fan_in)
    return draw(size, gain / math.sqrt(_fan_of(shape, fan)), distribution, generator)


def draw(size: tuple[int, ...], std: float, distribution: str, generator: torch.Generator) -> Tensor:
    """Independent draws with mean 0 and this std: `size`, float32, from `generator` alone.

    Example:
        >>> draw((2, 3), 0.02, "uniform", torch.Generator().manual_seed(0)).abs().max().item() <= 0.02 * math.sqrt(3)
        True
    """
    if distribution == "normal":
        return torch.randn(size, generator=generator, dtype=torch.float32) * std
    if distribution == "uniform":
        return (torch.rand(size, generator=generator, dtype=torch.float32) * 2.0 - 1.0) * (std * math.sqrt(3.0))
    if distribution == "truncated_normal":
        # Inverse CDF in float64: one uniform number an entry, whatever its value, so nothing is drawn again.
        edge = math.erf(math.sqrt(2.0))  # P(|z| <= 2)
        central = (torch.rand(size, generator=generator, dtype=torch.float64) * 2.0 - 1.0) * edge
        return (torch.erfinv(central) * (math.sqrt(2.0) * std / TRUNCATED_STD)).float()
    raise unknown_name("distribution", distribution, DISTRIBUTIONS, SchemeError)


def _fan_of(shape: HeadShape, fan: float | str) -> float:
    if isinstance(fan, int | float):
        return float(fan)
    fans = {
        "fan_in": shape.fan_in,
        "fan_out": shape.fan_out,
        "fan_average": (shape.fan_in + shape.fan_out) / 2,
    }
    if fan not in fans:
        raise unknown_name("mode", fan, MODES, SchemeError)
    return float(fans[fan])


# The gains.


def _variance_keeping_gain(activation: Callable[[Tensor], Tensor]) -> float:
    """1 / sqrt(E[f(z)^2]) for z ~ N(0, 1): the gain under which f passes on a second moment of 1.

    The trapezoid rule converges faster than any power of the step for a smooth integrand that vanishes at both ends;
    the one kink that occurs (elu's curvature at 0) costs 1e-9.
    """
    z = torch.linspace(-12.0, 12.0, 48_001, dtype=torch.float64)
    density = torch.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)
    return torch.trapezoid(activation(z).square() * density, z).rsqrt().item()


_GAINS: dict[str, Callable[[float | None], float]] = {
    "linear": lambda _: 1.0,
    "identity": lambda _: 1.0,
    "relu": lambda _: math.sqrt(2.0),
    "leaky_relu": lambda slope: math.sqrt(2.0 / (1.0 + (0.01 if slope is None else slope) ** 2)),
    # 5/3 is LeCun's and torch's value: a little more than 1, against the shrinking of tanh over many layers.
    "tanh": lambda _: 5.0 / 3.0,
    "sigmoid": lambda _: 1.0,
    # Self-normalising networks (Klambauer 2017) have their fixed point at std = 1/sqrt(fan_in), LeCun's gain of 1.
    # torch's `calculate_gain` says 3/4, which gives that fixed point up for smaller gradients.
    "selu": lambda _: 1.0,
    "gelu": lambda _: _variance_keeping_gain(torch.nn.functional.gelu),
    "silu": lambda _: _variance_keeping_gain(torch.nn.functional.silu),
    "elu": lambda alpha: _variance_keeping_gain(
        partial(torch.nn.functional.elu, alpha=1.0 if alpha is None else alpha)  # type: ignore[arg-type]
    ),
}
ACTIVATIONS = tuple(_GAINS)


@functools.cache
def gain(activation: str, parameter: float | None = None) -> float:
    """The gain that a layer needs under an activation, so that the signal keeps its size.

    relu sqrt(2); leaky_relu sqrt(2 / (1 + a^2)); tanh 5/3; sigmoid, selu and linear 1; gelu, silu and elu
    1 / sqrt(E[f(z)^2]) with z ~ N(0, 1).

    Args:
        activation: one of `ACTIVATIONS`.
        parameter: the negative slope of leaky_relu (0.01 if None) or alpha of elu (1 if None); others have none.

    Raises:
        SchemeError: unknown activation.

    Example:
        >>> round(gain("relu"), 4), round(gain("leaky_relu", 5**0.5), 4), round(gain("gelu"), 4)
        (1.4142, 0.5774, 1.5335)
    """
    if activation not in _GAINS:
        raise unknown_name("activation", activation, ACTIVATIONS, SchemeError)
    return _GAINS[activation](parameter)


# The schemes: dataclasses whose fields are the options.


@dataclass(frozen=True)
class VarianceScaling(Scheme):
    """A head whose std follows from its fan: std = gain / sqrt(fan).

    He et al. 2015 (gain sqrt(2), fan-in), Glorot and Bengio 2010 (gain 1, average fan), LeCun et al. 1998 (gain 1,
    fan-in) and the default of `torch.nn.Linear` (U(+-1/sqrt(fan_in)) for weight and bias) are settings of this class.
    `std`, if given, decides; then `gain`; then `activation`.

    Attributes:
        mode: ``"fan_in"``, ``"fan_out"`` or ``"fan_average"``.
        distribution: ``"normal"``, ``"truncated_normal"`` (at two std, corrected) or ``"uniform"``.
        activation: the gain is the one for this activation, see `gain`.
        slope: negative slope, read for leaky_relu alone.
        gain: the gain itself, in place of the activation's.
        std: the std itself, in place of gain / sqrt(fan).
        bias: constant bias.
        random_bias: draw the bias as the weight is drawn, around `bias`.

    Example:
        >>> head = VarianceScaling(activation="relu")(HeadShape(2048, 10), torch.Generator().manual_seed(0))
        >>> head.weight.shape, round(head.std, 5)
        (torch.Size([10, 2048]), 0.03125)
    """

    mode: str = "fan_in"
    distribution: str = "normal"
    activation: str = "linear"
    slope: float | None = None
    gain: float | None = None
    std: float | None = None
    bias: float = 0.0
    random_bias: bool = False

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise unknown_name("mode", self.mode, MODES, SchemeError)
        _check_distribution(self.distribution)
        if self.activation not in ACTIVATIONS:
            raise unknown_name("activation", self.activation, ACTIVATIONS, SchemeError)
        for name in ("gain", "std"):
            check_positive(name, getattr(self, name), zero=True)
        check_finite("slope", self.slope)
        check_finite("bias", self.bias)

    @property
    def effective_gain(self) -> float:
        """The gain in use, whether given or the activation's."""
        if self.gain is not None:
            return self.gain
        return gain(self.activation, self.slope if self.activation == "leaky_relu" else None)

    def __call__(
        self, shape: HeadShape, generator: torch.Generator, data: FeatureSet | Moments | None = None
    ) -> HeadWeights:
        """Weights drawn at the scale that the shape asks for; `data` is not read."""
        scale: float = self.effective_gain if self.std is None else self.std
        fan: float | str = self.mode if self.std is None else 1.0
        weight = variance_scaling(shape, generator, gain=scale, fan=fan, distribution=self.distribution)
        std = scale / math.sqrt(_fan_of(shape, fan))
        bias = constant_bias(shape, self.bias)
        if bias is not None and self.random_bias:
            bias += draw((shape.out_features,), std, self.distribution, generator)
        return HeadWeights(weight, bias, std=std, bias_std=std if self.random_bias and shape.bias else 0.0)


@dataclass(frozen=True)
class FixedStd(Scheme):
    """A head with one std whatever its shape, as BERT (.02), DINOv2's probe (.01) and the ViT family (.02) have.

    Attributes:
        std: std of the weight before `scale`.
        distribution: ``"normal"``, ``"truncated_normal"`` (at two std, corrected) or ``"uniform"``.
        bias: constant bias before `scale`.
        scale: factor on weight and bias, ConvNeXt's `head_init_scale`.

    Example:
        >>> FixedStd(std=0.02, scale=1e-3)(HeadShape(8, 3), torch.Generator()).std
        2e-05
    """

    std: float = 0.01
    distribution: str = "normal"
    bias: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_positive("std", self.std, zero=True)
        _check_distribution(self.distribution)
        check_finite("bias", self.bias)
        check_positive("scale", self.scale, zero=True)

    def __call__(
        self, shape: HeadShape, generator: torch.Generator, data: FeatureSet | Moments | None = None
    ) -> HeadWeights:
        """Weights drawn with the fixed std; `data` is not read."""
        std = self.std * self.scale
        weight = variance_scaling(shape, generator, gain=std, fan=1.0, distribution=self.distribution)
        bias = constant_bias(shape, self.bias * self.scale)
        return HeadWeights(weight, bias, std=std)


@dataclass(frozen=True)
class UniformRange(Scheme):
    """U(-a, a) whatever the shape; a = 1 is the textbook's "random initialisation", far too large for wide features.

    Attributes:
        a: bound of the range; the std is a / sqrt(3).
        bias: constant bias.

    Example:
        >>> UniformRange(a=0.5)(HeadShape(64, 3), torch.Generator().manual_seed(0)).weight.abs().max().item() <= 0.5
        True
    """

    a: float = 1.0
    bias: float = 0.0

    def __post_init__(self) -> None:
        check_positive("a", self.a, zero=True)
        check_finite("bias", self.bias)

    def __call__(
        self, shape: HeadShape, generator: torch.Generator, data: FeatureSet | Moments | None = None
    ) -> HeadWeights:
        """Weights drawn from the range; `data` is not read."""
        std = self.a / math.sqrt(3.0)
        weight = variance_scaling(shape, generator, gain=std, fan=1.0, distribution="uniform")
        bias = constant_bias(shape, self.bias)
        return HeadWeights(weight, bias, std=std)


def _check_distribution(distribution: str) -> None:
    if distribution not in DISTRIBUTIONS:
        raise unknown_name("distribution", distribution, DISTRIBUTIONS, SchemeError)


SCHEMES: dict[str, Callable[..., Scheme]] = {
    "he": partial(VarianceScaling, activation="relu"),
    "xavier": partial(VarianceScaling, mode="fan_average", distribution="uniform"),
    "lecun": VarianceScaling,
    # kaiming_uniform_(a=sqrt(5)) is how torch itself writes U(+-1/sqrt(fan_in)): its gain is sqrt(2/6) = 1/sqrt(3).
    "torch": partial(
        VarianceScaling, distribution="uniform", activation="leaky_relu", slope=math.sqrt(5.0), random_bias=True
    ),
    "normal": FixedStd,
    "bert": partial(FixedStd, std=0.02),
    "trunc_normal": partial(FixedStd, std=0.02, distribution="truncated_normal"),
    "scaled_down": partial(FixedStd, std=0.02, distribution="truncated_normal", scale=1e-3),
    "uniform": UniformRange,
}


# Which scheme goes with which activation.


def for_activation(activation: str) -> Scheme:
    """The scheme that a hidden layer under this activation should start with.

    tanh and sigmoid get Xavier (uniform, average fan), selu and linear LeCun, every other one the variance-keeping gain
    over the fan-in (He for relu).

    Raises:
        SchemeError: unknown activation.

    Example:
        >>> for_activation("relu") == SCHEMES["he"](), for_activation("tanh") == SCHEMES["xavier"]()
        (True, True)
    """
    if activation not in ACTIVATIONS:
        raise unknown_name("activation", activation, ACTIVATIONS, SchemeError)
    if activation in ("tanh", "sigmoid"):
        return SCHEMES["xavier"]()
    if activation in ("selu", "linear", "identity"):
        return SCHEMES["lecun"]()
    return VarianceScaling(activation=activation)


def suits(scheme: Scheme, activation: str) -> str | None:
    """A warning if the scheme's scale is wrong for a hidden layer under this activation, None if it suits.

    Only schemes that follow the fan are judged: who fixes a std has chosen it.

    Raises:
        SchemeError: unknown activation.

    Example:
        >>> suits(SCHEMES["he"](), "relu") is None
        True
        >>> print(suits(SCHEMES["xavier"](), "relu"))
        A gain of 1.00 under relu shrinks the signal by a factor of 0.71 at every such layer. Use he (gain 1.41).
    """
    if activation not in ACTIVATIONS:
        raise unknown_name("activation", activation, ACTIVATIONS, SchemeError)
    if not isinstance(scheme, VarianceScaling) or scheme.std is not None:
        return None
    found = scheme.effective_gain
    if activation in ("tanh", "sigmoid"):
        if found > 1.2 and not (scheme.activation == activation and scheme.gain is None):
            return f"A gain of {found:.2f} under {activation} drives it into saturation. Use xavier (gain 1.00)."
        return None
    wanted = gain(activation, scheme.slope if activation == scheme.activation == "leaky_relu" else None)
    if activation == "selu" and abs(found - 1.0) > 0.05:
        return f"A gain of {found:.2f} under selu gives up its self-normalising fixed point. Use lecun (gain 1.00)."
    if abs(found / wanted - 1.0) <= 0.2:
        return None
    verb = "shrinks" if found < wanted else "grows"
    remedy = "he" if activation in ("relu", "leaky_relu") else f"he with activation={activation}"
    remedy = "lecun" if activation in ("linear", "identity") else remedy
    return (
        f"A gain of {found:.2f} under {activation} {verb} the signal by a factor of {found / wanted:.2f} at every such "
        f"layer. Use {remedy} (gain {wanted:.2f})."
    )
