"""Gradient accumulation for tf_keras models, as a declarative transform.

>>> import ga_transform as ga
>>> ga.Chain(ga.Accumulate(steps=8), ga.ClipByAGC(clip_factor=0.02))
Chain(Accumulate(steps=8) -> ClipByAGC(clip_factor=0.02))

Importing this package does not import TensorFlow: what needs it is loaded when it is used,
and saved models are made loadable at the moment tf_keras is imported, before or after.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ga_transform import _registration
from ga_transform.chain import Chain
from ga_transform.errors import InexactWarning
from ga_transform.specs import (
    Accumulate,
    BatchNorm,
    ClipByAGC,
    ClipByGlobalNorm,
    ClipByNorm,
    ClipByValue,
    Precision,
    Scale,
    Split,
    Transform,
)

if TYPE_CHECKING:
    from ga_transform.callbacks import AccumulationLog as AccumulationLog
    from ga_transform.callbacks import per_update as per_update
    from ga_transform.conversion import accumulating as accumulating
    from ga_transform.conversion import make_accumulating as make_accumulating
    from ga_transform.conversion import strip_accumulating as strip_accumulating
    from ga_transform.plotting import plot_log as plot_log
    from ga_transform.report import explain as explain
    from ga_transform.report import verify_equivalence as verify_equivalence
    from ga_transform.stages import register_transform as register_transform

__version__ = "0.1.0"

__all__ = [
    "Accumulate",
    "AccumulationLog",
    "BatchNorm",
    "Chain",
    "ClipByAGC",
    "ClipByGlobalNorm",
    "ClipByNorm",
    "ClipByValue",
    "InexactWarning",
    "Precision",
    "Scale",
    "Split",
    "Transform",
    "accumulating",
    "explain",
    "make_accumulating",
    "per_update",
    "plot_log",
    "register_transform",
    "strip_accumulating",
    "verify_equivalence",
]

_LAZY = {
    "AccumulationLog": "ga_transform.callbacks",
    "accumulating": "ga_transform.conversion",
    "explain": "ga_transform.report",
    "make_accumulating": "ga_transform.conversion",
    "strip_accumulating": "ga_transform.conversion",
    "per_update": "ga_transform.callbacks",
    "plot_log": "ga_transform.plotting",
    "register_transform": "ga_transform.stages",
    "verify_equivalence": "ga_transform.report",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'ga_transform' has no attribute {name!r}")
    if _LAZY[name] != "ga_transform.plotting":
        # Its import registers our classes, of which none may be half made by then.
        importlib.import_module("tf_keras")
    value = globals()[name] = getattr(importlib.import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])


_registration.register_with_tf_keras()
