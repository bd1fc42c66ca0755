from __future__ import annotations

import math

import pytest
import torch
from scipy import integrate, stats

from headinit import schemes
from headinit.errors import SchemeError
from headinit.schemes.scheme import HeadShape
from headinit.schemes.variance_scaling import (
    ACTIVATIONS,
    FixedStd,
    VarianceScaling,
    draw,
    for_activation,
    gain,
    suits,
    variance_scaling,
)

# 64 classes on 4,096 features: the two fans differ 64-fold, so a scheme that swaps them is 8 times off.
WIDE = HeadShape(4096, 64)
TALL = HeadShape(64, 4096)

# Computed by hand for WIDE: name -> (distribution, std or bound).
EXPECTED = {
    "he": stats.norm(0, math.sqrt(2 / 4096)),
    "xavier": stats.uniform(-math.sqrt(6 / 4160), 2 * math.sqrt(6 / 4160)),
    "lecun": stats.norm(0, 1 / 64),
    "torch": stats.uniform(-1 / 64, 2 / 64),
    "normal": stats.norm(0, 0.01),
    "bert": stats.norm(0, 0.02),
    "trunc_normal": stats.truncnorm(-2, 2, scale=0.02 / stats.truncnorm(-2, 2).std()),
    "scaled_down": stats.truncnorm(-2, 2, scale=2e-5 / stats.truncnorm(-2, 2).std()),
    "uniform": stats.uniform(-1, 2),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", EXPECTED)
def test_entries_follow_the_published_distribution(name: str) -> None:
    head = schemes.build(name)(WIDE, generator())
    entries = head.weight.double().flatten().numpy()
    assert head.weight.shape == (64, 4096)
    assert head.weight.dtype == torch.float32
    assert stats.kstest(entries, EXPECTED[name].cdf).pvalue > 1e-3
    assert entries.std() == pytest.approx(EXPECTED[name].std(), rel=5e-3)
    assert head.std == pytest.approx(EXPECTED[name].std(), rel=1e-12)


@pytest.mark.parametrize("name", ["he", "lecun", "torch"])
def test_swapped_fans_are_told_apart(name: str) -> None:
    swapped = schemes.build(name, mode="fan_out")(WIDE, generator())
    assert stats.kstest(swapped.weight.flatten().numpy(), EXPECTED[name].cdf).pvalue < 1e-12
    right = schemes.build(name, mode="fan_out")(TALL, generator()).weight.flatten().numpy()
    assert stats.kstest(right, EXPECTED[name].cdf).pvalue > 1e-3


@pytest.mark.parametrize("distribution", ["normal", "truncated_normal", "uniform"])
@pytest.mark.parametrize(("mode", "fan"), [("fan_in", 4096), ("fan_out", 64), ("fan_average", 2080)])
def test_std_is_gain_over_root_of_fan(mode: str, fan: int, distribution: str) -> None:
    weight = variance_scaling(WIDE, generator(), gain=1.5, fan=mode, distribution=distribution)
    assert weight.double().std().item() == pytest.approx(1.5 / math.sqrt(fan), rel=5e-3)
    assert abs(weight.double().mean().item()) < 4 * 1.5 / math.sqrt(fan) / math.sqrt(weight.numel())


@pytest.mark.parametrize("distribution", ["normal", "truncated_normal", "uniform"])
def test_excess_kurtosis_tells_the_distributions_apart(distribution: str) -> None:
    oracle = {"normal": stats.norm(), "truncated_normal": stats.truncnorm(-2, 2), "uniform": stats.uniform()}
    entries = draw((64, 4096), 1.0, distribution, generator()).double().flatten().numpy()
    assert stats.kurtosis(entries) == pytest.approx(float(oracle[distribution].stats("k")), abs=0.05)


def test_truncation_is_at_two_std_of_the_parent_and_corrected() -> None:
    entries = draw((1000, 1000), 0.02, "truncated_normal", generator()).double()
    assert entries.std().item() == pytest.approx(0.02, rel=2e-3)
    assert entries.abs().max().item() == pytest.approx(0.02 * 2 / 0.8796, rel=1e-3)


def test_torch_matches_a_fresh_linear_layer() -> None:
    layer = torch.nn.Linear(4096, 64)
    head = schemes.build("torch")(WIDE, generator())
    assert stats.ks_2samp(head.weight.flatten().numpy(), layer.weight.detach().flatten().numpy()).pvalue > 1e-3
    biases = torch.cat([schemes.build("torch")(WIDE, generator(s)).bias for s in range(50)])
    assert stats.kstest(biases.numpy(), EXPECTED["torch"].cdf).pvalue > 1e-3
    assert head.bias_std == pytest.approx(1 / math.sqrt(3 * 4096))


@pytest.mark.parametrize(
    ("name", "peer"),
    [("he", torch.nn.init.kaiming_normal_), ("xavier", torch.nn.init.xavier_uniform_)],
)
def test_agrees_with_torch_init(name: str, peer) -> None:
    ours = schemes.build(name)(WIDE, generator()).weight.flatten().numpy()
    theirs = peer(torch.empty(64, 4096)).flatten().numpy()
    assert stats.ks_2samp(ours, theirs).pvalue > 1e-3


@pytest.mark.parametrize("name", [n for n in EXPECTED if n != "torch"])
def test_bias_is_a_constant(name: str) -> None:
    head = schemes.build(name, bias=0.5)(WIDE, generator())
    expected = 0.5e-3 if name == "scaled_down" else 0.5
    torch.testing.assert_close(head.bias, torch.full((64,), expected))
    assert head.bias_std == 0.0
    assert schemes.build(name)(HeadShape(8, 3, bias=False), generator()).bias is None


def test_kernel_counts_in_the_fan() -> None:
    head = schemes.build("he")(HeadShape(16, 4, kernel_size=9), generator())
    assert head.weight.shape == (4, 144)
    assert head.std == pytest.approx(math.sqrt(2 / 144))


def test_std_decides_then_gain_then_activation() -> None:
    assert VarianceScaling(activation="relu", gain=3.0)(WIDE, generator()).std == pytest.approx(3 / 64)
    overridden = VarianceScaling(activation="relu", gain=3.0, std=0.5)(WIDE, generator())
    assert overridden.std == 0.5
    assert overridden.weight.std().item() == pytest.approx(0.5, rel=1e-2)


def moment(f) -> float:
    return integrate.quad(lambda z: f(z) ** 2 * stats.norm.pdf(z), -14, 14, points=[0.0], epsabs=1e-13)[0]


@pytest.mark.parametrize(
    ("activation", "f"),
    [
        ("relu", lambda z: max(z, 0.0)),
        ("leaky_relu", lambda z: z if z > 0 else 0.01 * z),
        ("gelu", lambda z: z * stats.norm.cdf(z)),
        ("silu", lambda z: z / (1 + math.exp(-z))),
        ("elu", lambda z: z if z > 0 else math.expm1(z)),
        ("linear", lambda z: z),
    ],
)
def test_gain_keeps_the_second_moment(activation: str, f) -> None:
    assert gain(activation) == pytest.approx(1 / math.sqrt(moment(f)), rel=1e-7)


@pytest.mark.parametrize("activation", ["linear", "relu", "tanh", "sigmoid", "leaky_relu"])
def test_gain_agrees_with_torch(activation: str) -> None:
    assert gain(activation) == pytest.approx(torch.nn.init.calculate_gain(activation))


def test_selu_keeps_unit_variance_at_gain_one() -> None:
    z = torch.randn(4_000_000, generator=generator())
    assert torch.selu(z * gain("selu")).var().item() == pytest.approx(1.0, rel=2e-3)


def test_gain_reads_its_parameter() -> None:
    assert gain("leaky_relu", 0.2) == pytest.approx(torch.nn.init.calculate_gain("leaky_relu", 0.2))
    assert gain("elu", 0.5) == pytest.approx(1 / math.sqrt(moment(lambda z: z if z > 0 else 0.5 * math.expm1(z))))
    with pytest.raises(SchemeError, match="Did you mean 'gelu'"):
        gain("gelu_")


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "gelu", "silu", "elu", "selu", "linear"])
def test_for_activation_keeps_the_signal_through_four_layers(activation: str) -> None:
    act = {"linear": lambda x: x}.get(activation) or getattr(torch.nn.functional, activation)
    signal = torch.randn(256, 1024, generator=generator())  # what reaches the first activation
    for layer in range(4):
        signal = act(signal) @ for_activation(activation)(HeadShape(1024, 1024), generator(100 + layer)).weight.T
    assert signal.square().mean().item() == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_recommended_suits(activation: str) -> None:
    assert suits(for_activation(activation), activation) is None


@pytest.mark.parametrize(
    ("name", "activation", "remedy"),
    [
        ("xavier", "relu", "Use he"),
        ("lecun", "gelu", "Use he with activation=gelu"),
        ("torch", "relu", "Use he"),
        ("he", "tanh", "Use xavier"),
        ("he", "sigmoid", "Use xavier"),
        ("he", "selu", "Use lecun"),
        ("he", "linear", "Use lecun"),
    ],
)
def test_a_scheme_that_does_not_suit_warns(name: str, activation: str, remedy: str) -> None:
    assert remedy in (suits(schemes.build(name), activation) or "")


def test_suits_leaves_a_chosen_std_alone() -> None:
    assert suits(FixedStd(std=0.5), "relu") is None
    assert suits(schemes.build("xavier", std=0.1), "relu") is None
    assert suits(schemes.build("he", activation="tanh"), "tanh") is None
    with pytest.raises(SchemeError, match="Unknown activation"):
        suits(FixedStd(), "rleu")


@pytest.mark.parametrize(
    "options",
    [{"std": -1.0}, {"std": math.nan}, {"gain": math.inf}, {"gain": -2}, {"bias": math.nan}, {"slope": math.inf}],
)
def test_numbers_out_of_range_are_refused(options: dict) -> None:
    with pytest.raises(SchemeError, match=f"init=he: Option {next(iter(options))}="):
        schemes.build("he", **options)


@pytest.mark.parametrize(
    ("options", "hint"),
    [({"mode": "fan_inn"}, "fan_in"), ({"distribution": "uniforn"}, "uniform"), ({"activation": "rellu"}, "relu")],
)
def test_unknown_choices_list_the_near_ones(options: dict, hint: str) -> None:
    with pytest.raises(SchemeError, match=f"Did you mean '{hint}'"):
        schemes.build("he", **options)


def test_the_primitive_refuses_unknown_names() -> None:
    with pytest.raises(SchemeError, match="Unknown mode"):
        variance_scaling(WIDE, generator(), fan="fan")
    with pytest.raises(SchemeError, match="Unknown distribution"):
        variance_scaling(WIDE, generator(), distribution="gauss")
