"""Every error that headinit raises on purpose.

Each message says what was asked, what was found and what to do. The scripts print it without a traceback and exit
with code 2; a library user catches `HeadInitError` or one of its kinds.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HeadInitError(Exception):
    """Base of all errors raised on purpose by headinit."""


class ConfigError(HeadInitError):
    """A setting is unknown, out of range, or contradicts another one."""


class DataError(HeadInitError):
    """The examples cannot be read, or do not fit the task."""


class WeightsError(HeadInitError):
    """Pretrained weights are missing, damaged, or do not fit the architecture."""


class HeadError(HeadInitError):
    """The head of a model cannot be found, replaced or saved."""


class SchemeError(HeadInitError):
    """An initialisation scheme cannot be applied to this head or this data."""


class TrainingError(HeadInitError):
    """Training cannot go on: the loss is not finite, nothing is trainable, ..."""


class CheckpointError(HeadInitError):
    """A checkpoint or saved model is damaged, incompatible or not trustworthy."""


class RequirementError(HeadInitError):
    """Weights or data that a published baseline needs are not there."""


def unknown_name(
    kind: str, name: object, known: Iterable[str], error: type[HeadInitError] = ConfigError
) -> HeadInitError:
    """The error for a name that is not known: it lists the near ones, or all when none is near.

    Example:
        >>> print(unknown_name("init", "hee", ["he", "xavier"]))
        Unknown init 'hee'. Did you mean 'he'? Known: he, xavier.
    """
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    shown = names if len(names) <= 40 else [*names[:40], f"... ({len(names)} in all)"]
    return error(f"Unknown {kind} {str(name)!r}.{hint} Known: {', '.join(shown)}.")
