"""The processor that a benchmark ran on: ratios of one processor say little of another."""

import platform
from pathlib import Path

FACTS = Path("/proc/cpuinfo")


def processor() -> str:
    """Its model's name, as Linux has it; elsewhere what Python knows of it."""
    lines = FACTS.read_text().splitlines() if FACTS.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
