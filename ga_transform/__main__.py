"""``python -m ga_transform`` is ``ga-transform``."""

from __future__ import annotations

import sys

from ga_transform.cli import main

if __name__ == "__main__":
    sys.exit(main())
