"""Tables and paragraphs for the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

__all__ = ["paragraph", "table"]

_WIDTH = 100


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with aligned columns.

    >>> table([("layer", "now"), ("a", "float32")])
    ['layer  now', 'a      float32']
    """
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows
    ]


def paragraph(text: str, margin: str) -> list[str]:
    """Lines of a text behind a margin: what stands there in the first, blanks in the others.

    >>> paragraph("two words", "mend  ")
    ['mend  two words']
    """
    return textwrap.wrap(
        text, _WIDTH, initial_indent=margin, subsequent_indent=" " * len(margin)
    ) or [margin.rstrip()]
