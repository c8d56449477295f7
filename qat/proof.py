"""Write into a file where its codes were proven."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from edgeqat.files import FileError, write_atomically

if TYPE_CHECKING:
    from export.certificate import Certificate


def recorded(certificate: Certificate, file: Path) -> Certificate:
    """Write a passed `certificate` into its `file`; returns it with the SHA-256 of the new file, or with a note where the
    file cannot be written. One that did not pass comes back as it is."""
    if not certificate.passed:
        return certificate
    try:
        return dataclasses.replace(
            certificate, sha256=write_proof(file, certificate.proven())
        )
    except FileError as error:
        note = f"the file could not be written, so it does not say where it was proven ({error})"
        return dataclasses.replace(certificate, notes=(*certificate.notes, note))


def write_proof(file: Path, proven: list[dict[str, object]]) -> str:
    """Record in `file` where its codes were proven; returns the SHA-256 of the new file."""
    import onnx

    from export.metadata import record_proof
    from export.onnx_file import read

    proto = read(file)
    record_proof(proto, proven)
    write_atomically(file, lambda path: onnx.save(proto, str(path)))
    return hashlib.sha256(file.read_bytes()).hexdigest()
