"""The processor that something ran on: figures of one say little of another."""

import platform
from pathlib import Path

FACTS = Path("/proc/cpuinfo")


def processor() -> str:
    """Its model's name, as Linux has it; elsewhere what Python knows of it."""
    lines = []
    if FACTS.exists():
        lines = FACTS.read_text().splitlines()
    for line in lines:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
