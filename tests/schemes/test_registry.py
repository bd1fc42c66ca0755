from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from headinit import schemes
from headinit.errors import SchemeError
from headinit.schemes import fixed, variance_scaling
from headinit.schemes.scheme import HeadShape

CONF = Path(__file__).resolve().parents[2] / "conf" / "init"
ANALYTIC = (*variance_scaling.SCHEMES, *fixed.SCHEMES)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_every_analytic_scheme_is_registered() -> None:
    named = {"he", "xavier", "lecun", "torch", "normal", "bert", "trunc_normal", "scaled_down", "uniform"}
    assert named | {"orthogonal", "zeros", "etf", "library"} == set(ANALYTIC)
    assert set(ANALYTIC) <= set(schemes.available())
    assert list(schemes.available()) == sorted(schemes.available())


@pytest.mark.parametrize("name", ANALYTIC)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_contract(name: str, bias: bool, dtype: torch.dtype) -> None:
    shape = HeadShape(12, 5, bias=bias)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        head = schemes.build(name)(shape, generator())
    finally:
        torch.set_default_dtype(before)
    assert head.weight.shape == (5, 12)
    assert head.weight.dtype == torch.float32
    assert head.weight.is_contiguous()
    assert not head.weight.requires_grad
    assert head.weight.isfinite().all()
    assert (head.bias is not None) == bias
    assert head.bias is None or (head.bias.shape == (5,) and head.bias.dtype == torch.float32)
    assert head.std is not None
    assert not schemes.needs_data(name)


@pytest.mark.parametrize("name", ANALYTIC)
def test_the_generator_alone_decides(name: str) -> None:
    shape, scheme = HeadShape(64, 8), schemes.build(name)
    first = scheme(shape, generator(3))
    torch.manual_seed(99)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    second = scheme(shape, generator(3))
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.bias, second.bias)
    if name != "zeros":
        assert not torch.equal(first.weight, scheme(shape, generator(4)).weight)


@pytest.mark.parametrize("name", ANALYTIC)
def test_frozen_comparable_hashable(name: str) -> None:
    scheme = schemes.build(name)
    assert scheme == schemes.build(name)
    assert hash(scheme) == hash(schemes.build(name))
    with pytest.raises(dataclasses.FrozenInstanceError):
        scheme.bias = 1.0


@pytest.mark.parametrize("name", schemes.available())
def test_configuration_file_holds_the_options_and_their_defaults(name: str) -> None:
    written = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    assert written.pop("name") == name
    assert list(written) == list(schemes.defaults(name))
    for option, default in schemes.defaults(name).items():
        value = tuple(written[option]) if isinstance(default, tuple) else written[option]
        assert value == default, option
        assert type(value) is type(default), option
    assert schemes.build(name, **written) == schemes.build(name)


def test_no_configuration_file_without_a_scheme() -> None:
    assert {path.stem for path in CONF.glob("*.yaml")} == set(schemes.available())


def test_unknown_names_list_the_near_ones() -> None:
    with pytest.raises(SchemeError, match=r"Unknown init 'xavir'. Did you mean 'xavier'"):
        schemes.build("xavir")
    with pytest.raises(SchemeError, match=r"Unknown option of init=bert 'sdt'. Did you mean 'std'"):
        schemes.build("bert", sdt=0.1)
    with pytest.raises(SchemeError, match=r"Known: .*prior_bias"):
        schemes.build("zeros", nonsense=1)
    with pytest.raises(SchemeError, match="Unknown init"):
        schemes.needs_data("hee")


@pytest.mark.parametrize(
    ("name", "options", "wanted"),
    [
        ("he", {"std": "0.1"}, r"float | None"),
        ("he", {"random_bias": 1}, "bool"),
        ("bert", {"std": True}, "float"),
        ("bert", {"std": None}, "float"),
        ("he", {"mode": 3}, "str"),
        ("uniform", {"a": [1.0]}, "float"),
    ],
)
def test_wrong_types_are_refused(name: str, options: dict, wanted: str) -> None:
    with pytest.raises(SchemeError) as caught:
        schemes.build(name, **options)
    assert f"must be {wanted}" in str(caught.value)


def test_a_number_may_be_whole() -> None:
    assert schemes.build("uniform", a=2)(HeadShape(4, 2), generator()).std == pytest.approx(2 / 3**0.5)


def test_as_scheme() -> None:
    he = schemes.build("he")
    assert schemes.as_scheme(he) is he
    assert schemes.as_scheme("he") == he
    assert schemes.as_scheme({"name": "he", "mode": "fan_out"}) == schemes.build("he", mode="fan_out")
    for wrong in ({"mode": "fan_out"}, None, 3):
        with pytest.raises(SchemeError, match="Cannot read init="):
            schemes.as_scheme(wrong)


def test_modifiers_wrap_in_their_own_order(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass(frozen=True)
    class Wrapped(schemes.Scheme):
        inner: schemes.Scheme
        value: float

    tables = {
        "SCHEMES": variance_scaling.SCHEMES,
        "MODIFIERS": {"first": lambda s, v: Wrapped(s, v), "second": lambda s, v: Wrapped(s, v)},
    }
    monkeypatch.setattr(schemes, "_merged", tables.__getitem__)
    built = schemes.build("he", second=2.0, first=1.0, mode="fan_out")
    assert built == Wrapped(Wrapped(schemes.build("he", mode="fan_out"), 1.0), 2.0)
    assert schemes.build("he", first=None, second=False) == schemes.build("he")
    with pytest.raises(SchemeError, match="Did you mean 'second'"):
        schemes.build("he", secnd=2.0)
