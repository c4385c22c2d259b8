"""Callbacks that count with the updates, and that log what accumulation does."""

from ga_transform.callbacks.counting import per_update
from ga_transform.callbacks.log import AccumulationLog

__all__ = ["AccumulationLog", "per_update"]
