"""What a run was made with: when, by which code, with which libraries, on which processor."""

import importlib.metadata
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgeqat.processor import processor
from qat import __version__

LIBRARIES = ("torch", "torchvision", "timm", "accelerate", "numpy")
SOURCES = Path(__file__).parents[2]


def provenance() -> dict[str, Any]:
    """date: UTC, of now. commit: of the clone that the code is in, with a + where its files were changed; None without one.
    versions: by library, edgeqat and Python first. processor: its name."""
    versions = {"edgeqat": __version__, "python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit(SOURCES),
        "versions": versions,
        "processor": processor(),
    }


def commit(clone: Path) -> str | None:
    """The short name of the commit that `clone` is at, "+" after it where tracked files differ; None for another folder."""
    if not (clone / ".git").exists():
        return None
    name = _git(clone, "rev-parse", "--short=10", "HEAD")
    if name is None or name.returncode != 0:
        return None
    changed = _git(clone, "diff", "--quiet", "HEAD")
    mark = "+" if changed is not None and changed.returncode == 1 else ""
    return name.stdout.strip() + mark


def _git(clone: Path, *words: str) -> "subprocess.CompletedProcess[str] | None":
    """What git says of `clone`; None where there is no git, or it takes too long."""
    command = ["git", "-C", str(clone), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
