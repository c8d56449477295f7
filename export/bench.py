"""Speed, memory and size of files against FP32 and ONNX Runtime's own static INT8, interleaved in one process."""

import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
from numpy.typing import NDArray

from edgeqat.terminal import printable
from export import latency, session

FP32, STATIC = "fp32", "ort static int8"
LOADS = 3

# Peak memory is a process's own: one process a file, its high-water mark before loading subtracted. (getrusage would
# report the parent's mark; the kernel's VmHWM starts anew with the program. Linux only.)
MEMORY_PROBE = """
import pathlib, re, sys, numpy
from export import session
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
images = numpy.load(sys.argv[2])
before = peak()
loaded = session.load(sys.argv[1], threads=int(sys.argv[3]))
for _ in range(3): loaded.run(images)
print((peak() - before) / 1024)
"""


@dataclass(frozen=True)
class BenchRow:
    """One file: bytes, milliseconds, megabytes of peak memory over an idle process, and speed-ups."""

    name: str
    size: int
    load_ms: float
    median_ms: float
    p95_ms: float
    peak_mb: float
    over_fp32: float
    over_static: float
    layer_bytes: dict[str, int]


@dataclass(frozen=True)
class BenchTable:
    """All files of one bench, and how they were run."""

    rows: tuple[BenchRow, ...]
    threads: int
    batch: int
    rounds: int
    runtime: str

    def to_json(self) -> dict[str, object]:
        """The same as plain data, for a JSON file."""
        return asdict(self)

    def __str__(self) -> str:
        names = [printable(row.name) for row in self.rows]
        width = max(map(len, names))
        lines = [
            f"{'file':<{width}}  size MB  of fp32  load ms  median ms   p95 ms  peak MB  x fp32  x static int8"
        ]
        for name, row in zip(names, self.rows, strict=True):
            share = row.size / self.rows[0].size
            lines.append(
                f"{name:<{width}} {row.size / 1e6:>8.2f} {share:>8.3f} {row.load_ms:>8.1f} {row.median_ms:>10.2f} "
                f"{row.p95_ms:>8.2f} {row.peak_mb:>8.1f} {row.over_fp32:>7.2f} {row.over_static:>14.2f}"
            )
        lines.append(
            f"ONNX Runtime {self.runtime}, {self.threads} thread(s), batch {self.batch}, {self.rounds} rounds, interleaved; "
            "ratios count, milliseconds are this machine's"
        )
        return "\n".join(lines)


def bench(
    fp32: onnx.ModelProto,
    files: Mapping[str, onnx.ModelProto],
    images: NDArray[np.float32],
    *,
    threads: int = 1,
    batch: int = 1,
    rounds: int = 50,
    calibration: str = "MinMax",
) -> BenchTable:
    """Measure `files` against `fp32` and against static INT8 made from it, calibrated on `images`.

    calibration: "MinMax" or "Entropy", of the static INT8 file.
    """
    static = session.static_int8(fp32, images, calibration)
    models = {FP32: fp32, STATIC: static, **files}
    static_first = {STATIC: static, **models}
    feed = np.ascontiguousarray(images[:batch])
    # Both compare every file with the first
    over_fp32 = _latencies(models, feed, threads, rounds)
    over_static = _latencies(static_first, feed, threads, rounds)
    rows = []
    for name, proto in models.items():
        measured = over_fp32[name]
        row = BenchRow(
            name=name,
            size=proto.ByteSize(),
            load_ms=_load_ms(proto),
            median_ms=measured.median_ms,
            p95_ms=measured.p95_ms,
            peak_mb=peak_memory(proto, feed, threads),
            over_fp32=measured.speedup,
            over_static=over_static[name].speedup,
            layer_bytes=layer_bytes(proto),
        )
        rows.append(row)
    return BenchTable(tuple(rows), threads, batch, rounds, session.version())


def _latencies(
    models: Mapping[str, onnx.ModelProto],
    feed: NDArray[np.float32],
    threads: int,
    rounds: int,
) -> dict[str, latency.Latency]:
    """By name, the speed-up over the first of `models`."""
    by_name = {}
    for measured in latency.compare(models, feed, threads=threads, rounds=rounds):
        by_name[measured.name] = measured
    return by_name


def layer_bytes(proto: onnx.ModelProto) -> dict[str, int]:
    """Bytes of the initialisers of each layer (tables, activation scales and constants that layers share under "shared")."""
    sizes: dict[str, int] = {}
    for tensor in proto.graph.initializer:
        layer = "shared"
        if "." in tensor.name:
            parameter, _, _ = tensor.name.partition("/")
            layer = parameter.rsplit(".", 1)[0]
        sizes[layer] = sizes.get(layer, 0) + len(tensor.raw_data)
    return sizes


def peak_memory(
    proto: onnx.ModelProto, images: NDArray[np.float32], threads: int
) -> float:
    """Megabytes that loading and running the file adds to a process's peak."""
    with TemporaryDirectory() as folder:
        model = Path(folder) / "model.onnx"
        feed = Path(folder) / "images.npy"
        onnx.save(proto, str(model))
        np.save(feed, images)
        command = [
            sys.executable,
            "-c",
            MEMORY_PROBE,
            str(model),
            str(feed),
            str(threads),
        ]
        root = str(Path(__file__).parent.parent)
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=root
        )
        return float(done.stdout)


def _load_ms(proto: onnx.ModelProto) -> float:
    times = []
    for _ in range(LOADS):
        began = time.perf_counter()
        session.load(proto)
        times.append((time.perf_counter() - began) * 1e3)
    return min(times)
