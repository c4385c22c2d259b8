"""What a chain does to this very model: told by `explain`, tried by `verify_equivalence`."""

from ga_transform.report.differences import VariableDifference
from ga_transform.report.equivalence import Equivalence, verify_equivalence
from ga_transform.report.explanation import Explanation, LayerPrecision, explain
from ga_transform.report.finding import Finding

__all__ = [
    "Equivalence",
    "Explanation",
    "Finding",
    "LayerPrecision",
    "VariableDifference",
    "explain",
    "verify_equivalence",
]
