"""Schemes: how a head starts. A scheme is a frozen dataclass called with shape, generator and data.

>>> import torch
>>> from headinit import schemes
>>> he = schemes.build("he", distribution="uniform")
>>> he(schemes.HeadShape(512, 10), torch.Generator().manual_seed(0)).weight.shape
torch.Size([10, 512])
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

import torch

from headinit.errors import SchemeError, unknown_name
from headinit.schemes.scheme import HeadShape, HeadWeights, Scheme

__all__ = [
    "HeadShape",
    "HeadWeights",
    "Scheme",
    "as_scheme",
    "available",
    "build",
    "defaults",
    "description_of",
    "modifiers",
    "needs_data",
]

# Each file names its schemes in `SCHEMES` and its modifiers, if any, in `MODIFIERS`; they know nothing of each other.
_FILES = (
    "variance_scaling",
    "fixed",
    "scaling",
    "prototypes",
    "least_squares",
    "linear_probe",
    "automatic",
    "reinitialise",
)


@functools.cache
def _merged(table: str) -> Mapping[str, Callable[..., Scheme]]:
    merged: dict[str, Callable[..., Scheme]] = {}
    for file in _FILES:
        entries = getattr(importlib.import_module(f"{__name__}.{file}"), table, {})
        twice = merged.keys() & entries.keys()
        if twice:
            raise RuntimeError(f"{table} names {sorted(twice)} twice")
        merged.update(entries)
    return types.MappingProxyType(merged)


def available() -> tuple[str, ...]:
    """The names that `build` knows, sorted.

    Example:
        >>> {"he", "zeros", "library"} <= set(available())
        True
    """
    return tuple(sorted(_merged("SCHEMES")))


def modifiers() -> tuple[str, ...]:
    """The options that every scheme takes beside its own, in the order in which they are applied.

    Example:
        >>> "prior_bias" in modifiers()
        True
    """
    return tuple(_merged("MODIFIERS"))


def build(name: str, **options: Any) -> Scheme:
    """The scheme of this name with these options.

    Args:
        name: one of `available()`.
        **options: fields of the scheme's dataclass, and modifiers (`modifiers()`), which wrap it; a modifier given as
            None or False is left out.

    Raises:
        SchemeError: unknown name or option (the near ones are listed), wrong type, or a value out of range.

    Example:
        >>> build("trunc_normal", std=2e-5).std
        2e-05
        >>> build("he", mod="fan_out")
        Traceback (most recent call last):
        ...
        headinit.errors.SchemeError: Unknown option of init=he 'mod'. Did you mean 'mode'? ...
    """
    factory = _factory_of(name)
    fields = defaults(name)
    for option in options:
        if option not in fields and option not in _merged("MODIFIERS"):
            raise unknown_name(f"option of init={name}", option, [*fields, *modifiers()], SchemeError)
    own = {option: value for option, value in options.items() if option in fields}
    _check_types(name, type(factory()), own)
    try:
        scheme = factory(**own)
    except SchemeError as error:
        raise SchemeError(f"Cannot build init={name}: {error}") from None
    for option, wrap in _merged("MODIFIERS").items():
        value = options.get(option)
        if option not in own and value is not None and value is not False:
            scheme = wrap(scheme, value)
    return scheme


def as_scheme(init: str | Scheme | Mapping[str, Any]) -> Scheme:
    """A scheme from what users write: a name, a mapping with ``"name"`` and options, or a scheme itself.

    Raises:
        SchemeError: as `build`; or something else was given.

    Example:
        >>> as_scheme({"name": "he", "mode": "fan_out"}) == build("he", mode="fan_out")
        True
    """
    if isinstance(init, Scheme):
        return init
    if isinstance(init, str):
        return build(init)
    if isinstance(init, Mapping) and "name" in init:
        return build(**{str(key): value for key, value in init.items()})
    raise SchemeError(
        f"Cannot read init={init!r}: give a name ({', '.join(available())}), a mapping with 'name' and options, "
        "or a Scheme."
    )


def description_of(scheme: Scheme) -> dict[str, Any]:
    """Name and options of a scheme as JSON can hold them; of tensors, such as the rows of a classifier, the shape.

    Example:
        >>> description_of(build("he"))["mode"]
        'fan_in'
    """
    found: dict[str, Any] = {"name": type(scheme).__name__}
    for field in dataclasses.fields(scheme):
        if field.compare:
            value = getattr(scheme, field.name)
            tensor = isinstance(value, torch.Tensor)
            found[field.name] = (
                description_of(value)
                if isinstance(value, Scheme)
                else f"tensor {tuple(value.shape)}"
                if tensor
                else value
            )
    return found


def needs_data(name: str, **options: Any) -> bool:
    """Whether this scheme, with these options, reads features of the user's data.

    Raises:
        SchemeError: as `build`.

    Example:
        >>> needs_data("he")
        False
    """
    return build(name, **options).needs_data


def defaults(name: str) -> dict[str, Any]:
    """The options of a scheme with their defaults, in order.

    Raises:
        SchemeError: unknown name.

    Example:
        >>> defaults("bert")
        {'std': 0.02, 'distribution': 'normal', 'bias': 0.0, 'scale': 1.0}
    """
    scheme = _factory_of(name)()
    return {field.name: getattr(scheme, field.name) for field in dataclasses.fields(scheme) if field.init}


def _factory_of(name: str) -> Callable[..., Scheme]:
    known = _merged("SCHEMES")
    if name not in known:
        raise unknown_name("init", name, known, SchemeError)
    return known[name]


def _check_types(name: str, scheme: type[Scheme], options: Mapping[str, Any]) -> None:
    hints = typing.get_type_hints(scheme)
    for option, value in options.items():
        if not _fits(value, hints[option]):
            wanted = hints[option].__name__ if isinstance(hints[option], type) else str(hints[option])
            raise SchemeError(
                f"Option {option} of init={name} must be {wanted}, not {value!r} ({type(value).__name__})."
            )


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value may stand for a plain annotation; annotations of other kinds are the scheme's own business."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return any(_fits(value, part) for part in typing.get_args(hint))
    if hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str):
        return isinstance(value, hint)
    return True
