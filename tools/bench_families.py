"""Which families of nets gain: the smallest model of every timm model file, or models by name, against FP32 and static INT8.

    uv run tools/bench_families.py --out families.jsonl                 # every family; run again to go on where it stopped
    uv run tools/bench_families.py --models efficientnet_b0 torchvision/googlenet --rounds 20
    uv run tools/bench_families.py --out families.jsonl --picture docs/families.svg --models      # only draw what is known
    uv run tools/bench_families.py --files families --make-only  # an hour, beside other work
    uv run tools/bench_families.py --files families --out families.jsonl              # then minutes, on quiet cores

The files of one model (FP32, the runtime's static INT8, our stock file, our native file) take turns in one process, and each
model has a process, a time limit and a memory limit of its own. Weights are random, the norms' statistics those of noise:
speed does not depend on training. A row is written as soon as it is known.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TORCHVISION = "torchvision/"
CLASSES = 1000
NEEDED = 1.3  # times FP32, that a family shall gain
KINDS_OF_FILE = ("fp32", "int8", "stock", "native")
VNNI = ("avx512", "avxvnni")  # kernels of processors that multiply bytes without saturating


@dataclass
class Row:
    """One model on one processor. Ratios: how many times faster than the other file; 0 where `reason` says why not.

    on_codes, layout, converting, in_float: shares of the native file's time, by what its nodes do (export/profile.py).
    """

    family: str
    model: str
    processor: str
    kernels: str = ""
    image_size: int = 0
    threads: int = 1
    rounds: int = 0
    fp32_ms: float = 0.0
    native_over_fp32: float = 0.0
    native_over_int8: float = 0.0
    stock_over_fp32: float = 0.0
    stock_over_int8: float = 0.0
    on_codes: float = 0.0
    layout: float = 0.0
    converting: float = 0.0
    in_float: float = 0.0
    reason: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        name = f"{self.family:<22} {self.model:<32} {self.image_size:>4} px"
        if self.reason:
            return f"{name}  {self.reason}"
        return (
            f"{name}  native x {self.native_over_fp32:.2f} FP32, x {self.native_over_int8:.2f} INT8;  "
            f"stock x {self.stock_over_fp32:.2f}, x {self.stock_over_int8:.2f};  on codes {self.on_codes:.0%}, "
            f"layout {self.layout:.0%}, converting {self.converting:.0%}, float {self.in_float:.0%}"
        )


def measure(family: str, name: str, options: argparse.Namespace) -> Row:
    """Bench one model, here; an exception ends in its row."""
    import torch
    from bench_kernels import _isa
    from processor import processor

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    row = Row(family, name, processor(), threads=options.threads, rounds=options.rounds)
    began = time.perf_counter()
    try:
        row.kernels = _isa()
        files = _known_files(row, options)
        if not options.make_only:
            _measure(row, files, options)
    except Exception as error:
        row.reason = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    row.seconds = round(time.perf_counter() - began, 1)
    return row


def _measure(row: Row, files: dict[str, Any], options: argparse.Namespace) -> None:
    import numpy as np

    from export import latency
    from export.profile import CODES, CONVERT, FLOAT, LAYOUT, profile

    row.image_size = files["fp32"].graph.input[0].type.tensor_type.shape.dim[-1].dim_value
    shape = (1, 3, row.image_size, row.image_size)
    feed = np.random.default_rng(0).standard_normal(shape, np.float32)
    times = latency.interleaved(files, feed, threads=options.threads, rounds=options.rounds)
    row.fp32_ms = float(np.median(times["fp32"]))
    row.native_over_fp32 = latency.speedup(times, "native", "fp32")
    row.native_over_int8 = latency.speedup(times, "native", "int8")
    row.stock_over_fp32 = latency.speedup(times, "stock", "fp32")
    row.stock_over_int8 = latency.speedup(times, "stock", "int8")
    (found,) = profile({"native": files["native"]}, feed, threads=options.threads, rounds=5)
    row.on_codes = found.share(CODES)
    row.layout = found.share(LAYOUT)
    row.converting = found.share(CONVERT)
    row.in_float = found.share(FLOAT)


def _known_files(row: Row, options: argparse.Namespace) -> dict[str, Any]:
    """The model's four files: those that `--files` holds, or made here and kept there."""
    import onnx
    import torch

    folder = None
    if options.files is not None:
        folder = options.files / row.model.replace("/", "_")
    if folder is not None and folder.is_dir():
        return {name: onnx.load(folder / f"{name}.onnx") for name in KINDS_OF_FILE}
    model, size = _model(row.model, options.image_size)
    files = _files(model, torch.randn(2, 3, size, size), options.bits, row.kernels)
    if folder is not None:
        unfinished = folder.with_suffix(".unfinished")
        unfinished.mkdir(parents=True, exist_ok=True)
        for name, file in files.items():
            onnx.save(file, unfinished / f"{name}.onnx")
        unfinished.rename(folder)
    return files


def _model(name: str, size: int) -> tuple[Any, int]:
    """A model with random weights, and the side of its images: `size` where it takes such."""
    from timm_coverage import _create, _with_logits

    from qat.surgery.backbones import create_backbone

    if not name.startswith(TORCHVISION):
        return _with_logits(*_create(create_backbone, name, size))
    from torchvision.models import get_model

    settings = {"init_weights": True} if name.endswith(("googlenet", "inception_v3")) else {}
    return get_model(name.removeprefix(TORCHVISION), weights=None, num_classes=CLASSES, **settings).eval(), size


def _files(model: Any, images: Any, bits: int, kernels: str) -> dict[str, Any]:
    """FP32, static INT8, and our stock and native files; the stock one is what docs/targets.md names for the processor."""
    from timm_coverage import _as_if_trained

    from export import session
    from export.lower import lower_float, lower_to_integers
    from export.native_graph import emit
    from export.targets import target_named
    from qat.surgery.backbones import first_and_last
    from qat.surgery.calibrate import calibrate
    from qat.surgery.swap import quantize_, uniform_rules

    _as_if_trained(model, images)
    model.eval()
    fp32 = lower_float(model, images)
    files = {"fp32": fp32, "int8": session.static_int8(fp32, images.numpy())}
    quantize_(model, uniform_rules(bits, bits, first_and_last(model)), images[:1], weight_init="mse")
    calibrate(model, [images])
    stock = "ort-packed-vnni" if kernels in VNNI else "ort-packed"
    for kind, name in (("stock", stock), ("native", "ort-native")):
        target = target_named(name)
        files[kind] = emit(lower_to_integers(model, images, target), target)
    return files


def in_a_process(family: str, name: str, options: argparse.Namespace) -> Row:
    """The row of one model, measured in a bounded process of its own."""
    from processor import processor

    settings = []
    for flag in ("bits", "image_size", "rounds", "threads", "memory"):
        settings += [f"--{flag.replace('_', '-')}", str(getattr(options, flag))]
    command = [sys.executable, __file__, "--one", name, "--family", family, *settings]
    if options.files is not None:
        command += ["--files", str(options.files)]
    if options.make_only:
        command.append("--make-only")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.timeout)
    except subprocess.TimeoutExpired:
        return Row(family, name, processor(), reason=f"took longer than {options.timeout:.0f} s")
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return Row(family, name, processor(), reason=f"its process ended with code {done.returncode}")
    return Row(**json.loads(lines[-1]))


def summary(rows: Iterable[Row]) -> str:
    """What the project promises of families, counted."""
    measured = [row for row in rows if not row.reason]
    if not measured:
        return "nothing measured"
    count = len(measured)
    gaining = sum(row.native_over_fp32 >= NEEDED for row in measured)
    slower = [row.model for row in measured if row.native_over_fp32 < 1]
    behind = [row.model for row in measured if row.native_over_int8 < 1]
    stock_behind = [row.model for row in measured if row.stock_over_int8 < 0.97]
    lines = [
        f"{gaining} of {count} families x {NEEDED} FP32 or more ({gaining / count:.0%})",
        f"slower than FP32: {len(slower)} {' '.join(slower)}",
        f"native slower than static INT8: {len(behind)} {' '.join(behind)}",
        f"stock slower than static INT8 by more than 3 %: {len(stock_behind)} {' '.join(stock_behind)}",
    ]
    for one in sorted({(row.processor, row.kernels) for row in measured}):
        lines.append("measured on {}, kernels {}".format(*one))
    return "\n".join(lines)


def draw(rows: Iterable[Row], path: Path) -> None:
    """Families by gain, native and stock beside each other, each against FP32."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    measured = sorted((row for row in rows if not row.reason), key=lambda row: row.native_over_fp32)
    places = range(len(measured))
    figure, axes = pyplot.subplots(figsize=(7, 1.2 + 0.16 * len(measured)))
    axes.barh(places, [row.native_over_fp32 for row in measured], color="#4477aa", label="native")
    axes.plot([row.stock_over_fp32 for row in measured], places, "o", ms=3, color="#ee6677", label="stock runtime")
    axes.axvline(1, color="black", lw=0.8)
    axes.set_yticks(places, [row.family or row.model for row in measured], fontsize=6)
    axes.set_xlabel(f"times faster than FP32, one thread ({measured[0].processor if measured else ''})")
    axes.margins(y=0.01)
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _read(path: Path) -> list[Row]:
    if not path.is_file():
        return []
    return [Row(**json.loads(line)) for line in path.read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="*", help="timm names, or torchvision/NAME; default: the smallest of every family"
    )
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--image-size", type=int, default=224, help="where the model takes images of that size")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=900, help="seconds a model may take")
    parser.add_argument("--memory", type=float, default=12, help="GiB a model may take")
    parser.add_argument("--out", type=Path, default=Path("runs/families.jsonl"), help="rows; known ones are kept")
    parser.add_argument(
        "--files", type=Path, help="folder that keeps the models' files; those it has are not made again"
    )
    parser.add_argument(
        "--make-only", action="store_true", help="make the files of --files; measure and record nothing"
    )
    parser.add_argument("--retry", action="store_true", help="run the models again that could not be measured")
    parser.add_argument("--picture", type=Path, help="also draw the families by gain into this SVG")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--family", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make_only and options.files is None:
        parser.error("--make-only: name the folder with --files")
    if options.one:
        resource.setrlimit(resource.RLIMIT_DATA, (int(options.memory * 2**30),) * 2)
        print(json.dumps(asdict(measure(options.family, options.one, options))))
        return
    rows = _measured_families(options)
    print(summary(rows))
    if options.picture is not None:
        draw(rows, options.picture)


def _measured_families(options: argparse.Namespace) -> list[Row]:
    """The rows of `--out`, with those that were missing."""
    from timm_coverage import smallest_models

    options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.models is None:
        smallest = smallest_models(options.out.with_suffix(".models.json"))
        models = {name: family for family, name in smallest.items()}
    else:
        models = dict.fromkeys(options.models, "")
    rows = [row for row in _read(options.out) if not (options.retry and row.reason)]
    options.out.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    known = {row.model for row in rows}
    for name, family in models.items():
        if name in known:
            continue
        row = in_a_process(family, name, options)
        if options.make_only:
            print(f"{name}: {row.reason or 'made'} in {row.seconds:.0f} s", flush=True)
            continue
        rows.append(row)
        with options.out.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")
        print(row, flush=True)
    return rows


if __name__ == "__main__":
    main()
