"""headinit: the head you add to a pretrained backbone, started right.

Names are imported when they are first used, so that ``import headinit`` stays cheap.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "attach_head": "headinit.attach",
    "init_head": "headinit.attach",
    "describe": "headinit.attach",
    "save": "headinit.attach",
    "load": "headinit.attach",
    "find_head": "headinit.heads.locate",
    "freeze": "headinit.training.freezing",
    "param_groups": "headinit.training.param_groups",
    "extract_features": "headinit.features.extract",
    "compare": "headinit.comparison",
    "Comparison": "headinit.comparison",
    "HeadInitError": "headinit.errors",
}

__all__ = ["__version__", "schemes", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name == "schemes":
        return importlib.import_module("headinit.schemes")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'headinit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
