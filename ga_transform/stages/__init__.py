"""Stages: gradients -> gradients. One room each; the built-in ones register as a user's own do."""

from ga_transform.stages import agc, clip, scale  # noqa: F401
from ga_transform.stages.registry import (
    apply_stages,
    check_stages,
    counter_of,
    register_transform,
)

__all__ = [
    "apply_stages",
    "check_stages",
    "counter_of",
    "register_transform",
]
