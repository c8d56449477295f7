"""Reading a run's metrics.jsonl."""

import json
import logging
from pathlib import Path
from typing import Any

from edgeqat.files import FileError, read_text, require_entries
from qat.runs import earlier

log = logging.getLogger(__name__)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The entries of a metrics.jsonl, oldest first. A half-written last line, of a run that was killed, is left out with a
    note on the log. Raises FileError naming any other line that is not an entry."""
    lines = read_text(path).splitlines()
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            entry = require_entries(
                json.loads(line), {"step": int}, f"{path}: line {number}"
            )
            entries.append(earlier.log_entry(entry))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise FileError(
                    f"{path}: line {number} is not JSON ({error})"
                ) from error
            log.warning(
                "%s: its last line, %d, was half-written and is left out", path, number
            )
    return entries
