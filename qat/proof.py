"""Write into a file where its codes were proven."""

import hashlib
from pathlib import Path

from edgeqat.files import write_atomically


def write_proof(model: Path, proven: list[dict[str, object]]) -> str:
    """Record in the file `model` where its codes were proven; returns the SHA-256 of the new file."""
    import onnx

    from export.metadata import record_proof
    from export.onnx_file import read

    proto = read(model)
    record_proof(proto, proven)
    write_atomically(model, lambda path: onnx.save(proto, str(path)))
    return hashlib.sha256(model.read_bytes()).hexdigest()
