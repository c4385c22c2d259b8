"""What the figures belong to: versions of the software, and the machine."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

__all__ = ["machine", "resident_bytes", "versions"]


def versions() -> dict[str, str]:
    """The versions that a figure depends on, without an import of TensorFlow."""
    packages = {"TensorFlow": "tensorflow", "tf_keras": "tf-keras", "ga_transform": "ga-transform"}
    found = {name: metadata.version(package) for name, package in packages.items()}
    return {**found, "Python": platform.python_version()}


def machine() -> dict[str, str]:
    """The processor, its cores, the memory and the system."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "memory": f"{memory_bytes / 2**30:.0f} GiB",
        "system": platform.platform(),
    }


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def resident_bytes(field: str) -> int:
    """The resident memory of this process, of which Linux keeps the books.

    Args:
        field: "VmRSS" for that of now, "VmHWM" for the highest since the program started.
            (`resource.getrusage` would not do: its peak outlives `exec`, so that a process would
            begin with its parent's.)
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == field:
            return int(rest.split()[0]) * 1024
    raise RuntimeError(f"/proc/self/status has no line {field}. Measure memory on Linux.")
