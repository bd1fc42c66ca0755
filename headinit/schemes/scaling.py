"""What goes on top of any scheme: class shares, a target for the scale, a temperature, folded normalisation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from headinit.errors import SchemeError, unknown_name
from headinit.features.extract import FeatureSet
from headinit.features.moments import Moments
from headinit.schemes.calibration import (
    calibrate,
    class_features_for,
    features_for,
    folds_of,
    log_losses,
    moments_for,
    scorable,
    task_of,
)
from headinit.schemes.scheme import HeadShape, HeadWeights, Scheme, check_positive, constant_bias

TARGETS = ("logit_std", "initial_loss", "energy", "feature_gradient")
PRIOR_KINDS = ("auto", "softmax", "sigmoid", "regression")


@dataclass(frozen=True)
class LSUV(Scheme):
    """Layer-sequential unit variance: orthogonal rows, then W /= std(W x) over a batch (Mishkin and Matas 2016).

    The method of Kraehenbuehl et al. (2016) and Mishkin, for the new layer alone: pretrained layers are not touched.
    The std is over all logits of all examples and comes from the moments, so any number of examples costs the same.

    Attributes:
        std: the std that the logits get.

    Example:
        >>> x = torch.randn(500, 8, generator=torch.Generator().manual_seed(0)) * 7
        >>> data = FeatureSet(x, torch.zeros(500, dtype=torch.int64), 3)
        >>> head = LSUV()(HeadShape(8, 3), torch.Generator().manual_seed(0), data)
        >>> round((x @ head.weight.T).std(correction=0).item(), 4)
        1.0
    """

    needs_data: ClassVar[bool] = True
    std: float = 1.0

    def __post_init__(self) -> None:
        check_positive("std", self.std)

    def __call__(
        self, shape: HeadShape, generator: torch.Generator, data: FeatureSet | Moments | None = None
    ) -> HeadWeights:
        """Orthogonal rows with logits of the given std.

        Raises:
            SchemeError: no data, data that do not fit, or features that are all zero.
        """
        moments = moments_for("lsuv", data, shape, kind=None)
        rows, columns = shape.out_features, shape.fan_in
        gaussian = torch.randn(max(rows, columns), min(rows, columns), generator=generator, dtype=torch.float64)
        q, r = torch.linalg.qr(gaussian)
        q = q * torch.where(r.diagonal() < 0, -1.0, 1.0)
        weight = q if rows > columns else q.T
        found = logit_std(weight, torch.zeros(rows, dtype=torch.float64), moments)
        if not found > 0:
            raise SchemeError("init=lsuv: all logits are equal on this data (features all zero?). Use init=orthogonal.")
        weight = weight * (self.std / found)
        bias = constant_bias(shape, 0.0)
        std = float(weight.square().mean().sqrt())
        return HeadWeights(weight.float(), bias, std=std, notes={"scale": self.std / found, "logit_std": self.std})


class Wrapper(Scheme):
    """A scheme on top of another one, its field `scheme`; it needs what that one needs."""

    scheme: Scheme

    @property
    def fits_prior(self) -> bool:
        """Whether the inner scheme's bias holds the class shares already."""
        return getattr(self.scheme, "fits_prior", False)


@dataclass(frozen=True)
class PriorBias(Wrapper):
    """A bias that gives the class shares before anything is learned.

    Softmax: b = log pi (Karpathy's recipe; half an example for a class without any); sigmoid: b = log(p / (1 - p))
        from
    the label counts, or from one given p, such as RetinaNet's .01 (Lin et al. 2017); regression: b = mean(y). It is
    added to the scheme's own bias; ridge, lda and the probes, whose intercept is fitted, stay as they are.

    Attributes:
        scheme: what gives the weights.
        kind: ``"softmax"``, ``"sigmoid"``, ``"regression"``, or ``"auto"``, by the labels.
        probability: p for every logit of a sigmoid head, in (0, 1): no data is needed then.

    Example:
        >>> from headinit.schemes.fixed import Zeros
        >>> data = FeatureSet(torch.zeros(4, 2), torch.tensor([0, 0, 0, 1]), 2)
        >>> PriorBias(Zeros())(HeadShape(2, 2), torch.Generator(), data).bias.exp().tolist()
        [0.75, 0.25]
    """

    scheme: Scheme
    kind: str = "auto"
    probability: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in PRIOR_KINDS:
            raise unknown_name("prior bias", self.kind, PRIOR_KINDS, SchemeError)
        if self.probability is not None and not 0.0 < self.probability < 1.0:
            raise SchemeError(f"prior_bias={self.probability} must be a probability between 0 and 1, or True.")

    @property
    def needs_data(self) -> bool:  # type: ignore[override]
        """Whether counts are needed."""
        return self.probability is None or self.scheme.needs_data

    def __call__(
        self, shape: HeadShape, generator: torch.Generator, data: FeatureSet | Moments | None = None
    ) -> HeadWeights:
        """The scheme's head with the shares in its bias.

        Raises:
            SchemeError: a head without bias, or no data to count.
        """
        if not shape.bias:
            raise SchemeError("prior_bias needs a head with a bias, and this one has none.")
        head = self.scheme(shape, generator, data)
        if self.fits_prior:
            return replace(head, notes={**head.notes, "prior_bias": "in the fitted intercept"})
        if self.probability is not None:
            value = math.log(self.probability / (1 - self.probability))
            prior, kind = torch.full((shape.out_features,), value, dtype=torch.float64), "sigmoid"
        else:
            moments = moments_for("prior_bias", data, shape, kind=None)
            kind = _prior_kind(moments) if self.kind == "auto" else self.kind
            prior = prior_of(moments, kind)
        assert head.bias is not None
        return replace(head, bias=(head.bias + prior).float(), bias_std=None, notes={**head.notes, "prior_bias": kind})


def _prior_kind(moments: Moments) -> str:
    return {"single_label": "softmax", "multi_label": "sigmoid", "regression": "regression"}[task_of(moments)]


def prior_of(moments: Moments, kind: str) -> Tensor:
    """The bias that gives the shares in `moments`: `(K,)` float64; kind softmax, sigmoid or regression."""
    size = len(moments)
    if kind == "regression":
        return moments.counts / size
    if kind == "sigmoid":
        share = moments.counts.clamp(0.5, max(size - 0.5, 0.5)) / size
        return torch.log(share / (1 - share).clamp(min=1e-12))
    counts = moments.counts.clamp(min=0.5)
    return torch.log(counts / counts.sum())


@dataclass(frozen=True)
class TargetScale(Wrapper):
    """(W, b) times the one factor at which a quantity at the start meets a target.

    The quantities, over the examples: ``logit_std``, the std of all logits (moments suffice); ``initial_loss``, the
    mean of -log p_y in nats; ``energy``, E ||e_y - p|| (Ren et al. 2023); ``feature_gradient``, E ||W'(p - e_y)||,
    the mean norm of the gradient that reaches an example's features, to which their first update is proportional
    (Tomihari and Sato 2024). The smallest factor that meets the target is found by a scan and Brent's method; a
    target that no factor meets gives the factor that comes nearest, with a warning in the notes.

    Attributes:
        scheme: what gives the weights.
        quantity: one of the four names.
        target: its value.

    Example:
        >>> x = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
        >>> data = FeatureSet(x, (x[:, 0] > 0).long(), 2)
        >>> from headinit.schemes.fixed import Orthogonal
        >>> head = TargetScale(Orthogonal(), "logit_std", 0.5)(HeadShape(4, 2), torch.Generator().manual_seed(0), data)
        >>> round((x @ head.weight.T + head.bias).std(correction=0).item(), 4)
        0.5
    """

    needs_data: ClassVar[bool] = True
    scheme: Scheme
    quantity: str = "logit_std"
    target: float = 1.0

    def __post_init__(self) -> None:
        if self.quantity not in TARGETS:
            raise unknown_name("target", self.quantity, TARGETS, SchemeError)
        check_positive(self.quantity, self.target)

    def __call__(
        self, shape: HeadShape, generator: torch.Generator, data: FeatureSet | Moments | None = None
    ) -> HeadWeights:
        """The scheme's head at the scale that meets the target.

        Raises:
            SchemeError: no data, data that do not fit, or logits that are all equal, which no factor changes.
        """
        head = self.scheme(shape, generator, data)
        weight = head.weight.double()
        bias = torch.zeros(len(weight), dtype=torch.float64) if head.bias is None else head.bias.double()
        if self.quantity == "logit_std":
            found = logit_std(weight, bias, moments_for(self.quantity, data, shape, kind=None))
            _check_moving(found, self.quantity)
            return scaled(head, self.target / found, {"logit_std": self.target})
        examples = class_features_for(self.quantity, data, shape)
        logits = examples.features.double() @ weight.T + bias
        _check_moving(float((logits - logits.mean(dim=1, keepdim=True)).square().mean().sqrt()), self.quantity)
        measure = _measurement(self.quantity, logits, examples.labels, weight)
        scale, reached = reach(measure, self.target, 1.0 / float(logits.std(correction=0)))
        notes: dict[str, Any] = {self.quantity: reached}
        if abs(reached - self.target) > 1e-3 * self.target:
            warning = f"No scale of this head gives {self.quantity} {self.target:g}: {reached:.4g} is the nearest."
            notes["warnings"] = [*head.notes.get("warnings", []), warning]
        return scaled(head, scale, notes)


def _check_moving(spread: float, quantity: str) -> None:
    if not spread > 0:
        raise SchemeError(
            f"{quantity} cannot be met by scaling: all logits of this head are equal on this data, whatever the "
            "factor. Use an init that is not all zeros."
        )


def _measurement(quantity: str, logits: Tensor, labels: Tensor, weight: Tensor) -> Callable[[float], float]:
    """The quantity as a function of the scale."""
    gram = weight @ weight.T

    def measure(scale: float) -> float:
        scaled_logits = logits * scale
        if quantity == "initial_loss":
            return float(log_losses(scaled_logits, labels).mean())
        errors = torch.softmax(scaled_logits, dim=1)
        errors[torch.arange(len(labels)), labels] -= 1.0
        if quantity == "energy":
            return float(errors.norm(dim=1).mean())
        return scale * float(((errors @ gram) * errors).sum(dim=1).clamp(min=0).sqrt().mean())

    return measure


def reach(measure: Callable[[float], float], target: float, unit: float) -> tuple[float, float]:
    """The smallest scale at which `measure` is `target`, and the value there; the nearest one if there is none.

    Args:
        measure: a continuous function of a scale above 0.
        target: the value to find.
        unit: a scale of the right order; 10^-5 to 10^4 times it are scanned, eight points a decade.

    Example:
        >>> [round(v, 6) for v in reach(lambda s: s * s, 4.0, 1.0)]
        [2.0, 4.0]
    """
    from scipy.optimize import brentq, minimize_scalar

    grid = [unit * 10 ** (k / 8) for k in range(-40, 33)]
    values = [measure(scale) for scale in grid]
    for k in range(len(grid) - 1):
        if (values[k] - target) * (values[k + 1] - target) <= 0:
            root = brentq(lambda s: measure(s) - target, grid[k], grid[k + 1], xtol=1e-12 * unit, rtol=1e-12)
            return root, measure(root)
    nearest = min(range(len(grid)), key=lambda k: abs(values[k] - target))
    low, high = grid[max(nearest - 1, 0)], grid[min(nearest + 1, len(grid) - 1)]
    found = minimize_scalar(lambda s: abs(measure(s) - target), bounds=(low, high), method="bounded")
    scale = min(float(found.x), grid[nearest], key=lambda s: abs(measure(s) - target))
    return scale, measure(scale)


@dataclass(frozen=True)
class Temperature(Wrapper):
    """(W, b) over one temperature: given, or fitted to scores that the head has not been computed from.

    A scheme that draws its weights without data is scored on all examples; one that is computed from data is computed
    again without each of some folds, whose scores it then gives. Fitting it on the scores of the very examples that
    the head was solved on makes the head far too large: a norm of 88, which fine-tuning then destroys.

    Attributes:
        scheme: what gives the weights.
        temperature: the temperature; None fits it.
        folds: number of folds.

    Example:
        >>> x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
        >>> from headinit.schemes.fixed import Orthogonal
        >>> head = Temperature(Orthogonal(), 4.0)(HeadShape(3, 2), torch.Generator().manual_seed(0))
        >>> round(head.weight[0].norm().item(), 4)
        0.25
    """

    scheme: Scheme
    temperature: float | None = None
    folds: int = 3

    def __post_init__(self) -> None:
        check_positive("temperature", self.temperature)
        if self.folds < 2:
            raise SchemeError(f"The temperature needs at least 2 folds, not {self.folds}.")

    @property
    def needs_data(self) -> bool:  # type: ignore[override]
        """Whether scores are needed."""
        return self.temperature is None or self.scheme.needs_data

    def __call__(
        self, shape: HeadShape, generator: torch.Generator, data: FeatureSet | Moments | None = None
    ) -> HeadWeights:
        """The scheme's head over the temperature.

        Raises:
            SchemeError: the temperature is to be fitted and there are no features with classes.
        """
        head = self.scheme(shape, generator, data)
        if self.temperature is not None:
            return scaled(head, 1.0 / self.temperature, {"temperature": self.temperature})
        examples = class_features_for("temperature", data, shape)
        usable = scorable(examples.labels, examples.num_classes)
        if not bool(usable.any()):
            raise SchemeError(
                "The temperature cannot be fitted: no class has two examples, so nothing can be held out. Give a "
                "number."
            )
        if not self.scheme.needs_data:
            scores, labels = _logits(head, examples.features), examples.labels
        else:
            parts = []
            for kept, held in folds_of(examples.labels, self.folds):
                part = replace(examples, features=examples.features[kept], labels=examples.labels[kept])
                held = held[usable[held]]
                parts.append(
                    (_logits(self.scheme(shape, generator, part), examples.features[held]), examples.labels[held])
                )
            scores, labels = torch.cat([s for s, _ in parts]), torch.cat([y for _, y in parts])
        fit = calibrate(scores, labels)
        notes = {"temperature": 1.0 / fit.scale, "held_out_loss": fit.loss, "held_out_accuracy": fit.accuracy}
        return scaled(head, fit.scale, notes)


def _logits(head: HeadWeights, features: Tensor) -> Tensor:
    logits = features.double() @ head.weight.double().T
    return logits if head.bias is None else logits + head.bias.double()


@dataclass(frozen=True)
class Standardise(Wrapper):
    """The scheme on standardised features, (x - mean) / std, with mean and std folded back into (W, b).

    W = W' / std, b = b' - W mean: the head then acts on raw features as W' does on standardised ones, as the
    BatchNorm without affine before MAE's linear probe does. Constant features get weight 0. A head without bias is
    only divided by the std. A std counts as a hundredth of the largest at least (see `Moments.inverse_std`).

    Attributes:
        scheme: what gives the weights.

    Example:
        >>> x, y = torch.tensor([[10.0], [14.0]]), torch.tensor([0, 1])
        >>> from headinit.schemes.fixed import Orthogonal
        >>> head = Standardise(Orthogonal())(HeadShape(1, 2), torch.Generator(), FeatureSet(x, y, 2))
        >>> (x @ head.weight.T + head.bias).mean(0).abs().max().item() < 1e-5
        True
    """

    needs_data: ClassVar[bool] = True
    scheme: Scheme

    def __call__(
        self, shape: HeadShape, generator: torch.Generator, data: FeatureSet | Moments | None = None
    ) -> HeadWeights:
        """The head for raw features.

        Raises:
            SchemeError: no data, or data that do not fit.
        """
        moments = moments_for("standardise", data, shape, kind=None)
        scale = moments.inverse_std
        offset = moments.mean if shape.bias else torch.zeros_like(scale)
        inner: FeatureSet | Moments = moments.affine(offset, scale)
        if isinstance(data, FeatureSet):
            examples = features_for("standardise", data, shape)
            # Subtracted in float64: a mean of 1e4 would eat half of float32's digits.
            inner = replace(examples, features=((examples.features.double() - offset) * scale).float())
        head = self.scheme(shape, generator, inner)
        weight = head.weight.double() * scale
        bias = None if head.bias is None else (head.bias.double() - weight @ offset).float()
        return replace(
            head, weight=weight.float(), bias=bias, std=None, bias_std=None, notes={**head.notes, "standardised": True}
        )


@dataclass(frozen=True)
class Normalise(Wrapper):
    """The scheme on l2-normalised features, r x / |x| with r their mean length, for a head that reads them raw.

    With b = 0 the raw head orders the classes exactly as the normalised one, since a length only scales all logits of
    an example; with a bias it does so for examples of mean length. r is folded in by keeping the features at that
    length.

    Attributes:
        scheme: what gives the weights.

    Example:
        >>> from headinit.schemes.prototypes import Imprint
        >>> x, y = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
        >>> Normalise(Imprint(scale=1.0))(HeadShape(2, 2), torch.Generator(), FeatureSet(x, y, 2)).notes["length"]
        2.0
    """

    needs_data: ClassVar[bool] = True
    scheme: Scheme

    def __call__(
        self, shape: HeadShape, generator: torch.Generator, data: FeatureSet | Moments | None = None
    ) -> HeadWeights:
        """The head for raw features.

        Raises:
            SchemeError: no features (lengths are no moments), or features that do not fit.
        """
        examples = features_for("normalise", data, shape, why="needs the length of every example's features")
        x = examples.features.double()
        lengths = x.norm(dim=1, keepdim=True)
        mean_length = float(lengths.mean())
        inner = replace(examples, features=(x * (mean_length / lengths.clamp(min=1e-300))).float())
        head = self.scheme(shape, generator, inner)
        return replace(head, notes={**head.notes, "normalised": True, "length": mean_length})


def logit_std(weight: Tensor, bias: Tensor, moments: Moments) -> float:
    """Std of all logits of all examples: the mean over k of w_k' Sigma w_k, plus the variance of their means.

    Example:
        >>> moments = Moments.zeros(1, 2).update(torch.tensor([[1.0], [3.0]]), torch.tensor([0, 1]))
        >>> logit_std(torch.tensor([[1.0], [1.0]]).double(), torch.zeros(2).double(), moments)
        1.0
    """
    within = ((weight @ moments.scatter) * weight).sum(dim=1).clamp(min=0).mean() / len(moments)
    means = weight @ moments.mean + bias
    return math.sqrt(float(within + means.var(correction=0)))


def scaled(head: HeadWeights, factor: float, notes: dict[str, Any]) -> HeadWeights:
    """The head with weight, bias and intended std times a factor, and more notes."""
    return HeadWeights(
        weight=(head.weight.double() * factor).float(),
        bias=None if head.bias is None else (head.bias.double() * factor).float(),
        std=None if head.std is None else head.std * factor,
        bias_std=None if head.bias_std is None else head.bias_std * factor,
        notes={**head.notes, "factor": factor, **notes},
    )


def _prior_bias(scheme: Scheme, value: Any) -> Scheme:
    if isinstance(value, str):
        return PriorBias(scheme, kind=value)
    return PriorBias(scheme) if value is True else PriorBias(scheme, probability=_number("prior_bias", value))


def _temperature(scheme: Scheme, value: Any) -> Scheme:
    if value is True or value == "held_out":
        return Temperature(scheme)
    return Temperature(scheme, _number("temperature", value))


def _number(option: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SchemeError(f"Option {option}={value!r} must be a number.")
    return float(value)


def _target(quantity: str) -> Callable[[Scheme, Any], Scheme]:
    return lambda scheme, value: TargetScale(scheme, quantity, _number(quantity, value))


def _switch(option: str, wrapper: Callable[[Scheme], Scheme]) -> Callable[[Scheme, Any], Scheme]:
    def apply(scheme: Scheme, value: Any) -> Scheme:
        if value is not True:
            raise SchemeError(f"Option {option}={value!r} must be true or false.")
        return wrapper(scheme)

    return apply


def _optional(modifier: Callable[[Scheme, Any], Scheme]) -> Callable[[Scheme, Any], Scheme]:
    """None and False leave the scheme as it is."""
    return lambda scheme, value: scheme if value is None or value is False else modifier(scheme, value)


SCHEMES: dict[str, Callable[..., Scheme]] = {"lsuv": LSUV}

# In the order in which they are applied, whatever the order in which they were given: features first, the prior last.
MODIFIERS: dict[str, Callable[[Scheme, Any], Scheme]] = {
    "normalise": _optional(_switch("normalise", Normalise)),
    "standardise": _optional(_switch("standardise", Standardise)),
    "temperature": _optional(_temperature),
    **{quantity: _optional(_target(quantity)) for quantity in TARGETS},
    "prior_bias": _optional(_prior_bias),
}
