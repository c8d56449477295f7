"""Check a file without its run: the signature over its codes, the kernels that run it, and that the runtime computes the
same codes whatever the level, the number of threads and the batch.
"""

from dataclasses import dataclass
from pathlib import Path

from edgeqat.terminal import in_lines
from export.metadata import (
    broken_signatures,
    missing_options,
    proof_of,
    random_inputs,
    read_metadata,
    unsigned_parts,
)
from export.onnx_file import read
from export.runtime_checks import INTEGER_KERNELS, layer_kernels, settings_that_differ
from export.targets import TARGETS

IMAGES = 8


@dataclass(frozen=True)
class FileCheck:
    """Verdict on a file alone.

    signed:    layers and parts that are not as they were signed, and how.
    integer:   layers that read codes, so that an integer kernel must run them.
    different: settings under which some code differs from the default's, with the count.
    is_plain:  a plain QDQ file, whose arithmetic the runtime chooses, so that its signature alone decides.
    """

    file: str
    target: str
    layers: int
    signed: dict[str, str]
    integer: int
    kernels: int
    different: dict[str, int]
    warnings: tuple[str, ...]
    proven: tuple[str, ...] = ()
    is_plain: bool = False

    @property
    def passed(self) -> bool:
        """Whether the file is as it was signed and, where it has integers, runs on integer kernels."""
        if self.is_plain:
            return not self.signed
        return not self.signed and not self.different and self.kernels == self.integer

    def __str__(self) -> str:
        lines = [
            f"{self.file}: {'verified' if self.passed else 'NOT VERIFIED'} (target {self.target}, without its run)"
        ]
        broken = f"{len(self.signed)} DIFFER" if self.signed else "as signed"
        lines.append(
            f"  signature  codes, scales and biases of {self.layers} layers, and the graph: {broken}"
        )
        for name, what in self.signed.items():
            lines.append(f"             {name}: {what}")
        lines.append(
            f"  kernels    {self.kernels} of {self.integer} layers that read codes run integer kernels"
        )
        if self.is_plain:
            lines[-1] += "; plain QDQ: that is the runtime's choice"
        settings = "" if self.different else ": the same codes"
        for name, count in self.different.items():
            settings += f"; {name}: {count} codes differ"
        lines.append(f"  settings   EXTENDED, 2 threads, batches of 1{settings}")
        lines.append(
            f"  proven     {'; '.join(self.proven) or 'nowhere that the file knows of'}"
        )
        lines.append(
            "  unknown    whether these are the trained codes and classes: whoever can change a file can sign it anew; "
            "`qat certify RUN FILE` knows"
        )
        for warning in self.warnings:
            lines.append(f"  warning    {warning}")
        return in_lines(lines)


def verify_file(file: Path) -> FileCheck:
    """Raises ExportError for a file that is damaged or was not written by this toolkit."""
    proto = read(file)
    name = str(file)
    metadata = read_metadata(proto, name)
    on_codes = []
    for entry in metadata["layers"]:
        if entry.get("reads") != "float":
            on_codes.append(entry["name"])
    kernels = list(layer_kernels(on_codes, proto, name).values())
    on_integers = [kernel for kernel in kernels if kernel in INTEGER_KERNELS]
    images = random_inputs(metadata, IMAGES)
    proofs = []
    for proof in proof_of(proto, name):
        proofs.append(
            f"{proof['machine']} ({proof['runtime']}, {proof['images']} images)"
        )
    return FileCheck(
        file=file.name,
        target=metadata["target"],
        layers=len(metadata["layers"]),
        signed=broken_signatures(proto, metadata),
        integer=len(on_codes),
        kernels=len(on_integers),
        different=settings_that_differ(proto, images, name),
        warnings=(*missing_options(proto), *unsigned_parts(metadata)),
        proven=tuple(proofs),
        is_plain=is_plain(metadata["target"]),
    )


def is_plain(target: str) -> bool:
    """Whether files of the target named so are plain QDQ files."""
    return target in TARGETS and bool(TARGETS[target].qdq)
