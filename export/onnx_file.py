"""The one way in for an ONNX file that a user names: read once, checked whole, before any runtime sees it.

Nothing that a file says is believed: a runtime takes a malformed graph as an order to read where it points, and its parsers
follow names of other files. What passes here has all its tensors inside, knows no control flow, and asks for a bounded amount
of memory and work (`export/graph_limits.py`).
"""

from pathlib import Path

import onnx

from edgeqat.files import FileError, reason_of, require_readable
from export.graph_checks import check_graph
from export.lowered import ExportError
from export.metadata import KEY, PROOF_KEY, proof_of, read_metadata

MOST_BYTES = (1 << 31) - 1  # of one protobuf message


def read(file: Path) -> onnx.ModelProto:
    """Parse and check an ONNX file, with or without edgeqat's metadata.

    Raises ExportError naming it when it is missing, damaged, needs other files or asks for what no edgeqat file does.
    """
    proto = parse(file)
    check(proto, str(file))
    return proto


def check(proto: onnx.ModelProto, name: str) -> None:
    """Raises ExportError naming the file `name` where it needs other files or asks for what no edgeqat file does."""
    keys = {p.key for p in proto.metadata_props}
    size = None
    if KEY in keys:
        metadata = read_metadata(proto, name)
        size = metadata["input"].get("size", metadata["input"].get("tensors"))
        if metadata["target"] == "qonnx":
            raise ExportError(
                f"{name}: is a QONNX file, for FINN; ONNX Runtime cannot run it: export for an ort target"
            )
    if PROOF_KEY in keys:
        proof_of(proto, name)
    check_graph(proto, name, size)


def parse(file: Path) -> onnx.ModelProto:
    """The model in a regular file. Raises ExportError naming the file."""
    try:
        require_readable(file)
        if file.stat().st_size > MOST_BYTES:
            raise ExportError(f"{file}: is larger than 2 GiB, which no ONNX file is")
        content = file.read_bytes()
    except FileNotFoundError as error:
        raise ExportError(f"{file}: no such file") from error
    except FileError as error:
        if not file.exists():
            raise ExportError(f"{file}: no such file") from error
        raise ExportError(str(error)) from error
    except OSError as error:
        raise ExportError(f"{file}: {reason_of(error)}") from error
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(content)
    except Exception as error:
        raise ExportError(
            f"{file}: not a valid ONNX file (it cannot be parsed)"
        ) from error
    return proto
