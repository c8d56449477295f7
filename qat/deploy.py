"""From a finished run to a file, its certificate, its latency and its report: what `qat` and the recipes call.

`export` is imported inside the functions: training needs neither onnx nor onnxruntime.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from edgeqat.files import make_folder, write_atomically, write_json, write_text
from qat.own_model import PRODUCER, onnx_of, require_valid
from qat.proof import recorded
from qat.runs.build import Built, load_run
from qat.runs.parts import RecipeError
from qat.runs.recipe import Recipe, from_json
from qat.runs.records import classes_of, results_of
from qat.runs.run_folder import RunFolder

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray

    from export.agreement import Agreement
    from export.bench import BenchTable
    from export.certificate import Certificate
    from export.ensemble import JoinedCheck
    from export.latency import Latency
    from export.lowered import LoweredModel
    from export.metadata import Preprocessing
    from export.profile import Profile
    from qat.analysis.compare import Comparison, Measured


def export_run(run: Path, target: str = "ort-int8", out: Path | None = None) -> Path:
    """Write the ONNX file of `run` for `target`; returns its path. An export that fails leaves no file."""
    import onnx

    proto = exported(run, target)
    require_valid(proto)
    path = out or RunFolder.open(run) / "model.onnx"
    write_atomically(path, lambda p: onnx.save(proto, str(p)))
    return path


def exported(run: Path, target: str) -> onnx.ModelProto:
    """The ONNX model of `run` for `target`: "fp32", or one of export/targets.py, signed and with its preprocessing."""
    from export.metadata_entries import FLOAT_TARGETS
    from export.targets import target_named

    folder, recipe, built = load_run(run)
    if target not in FLOAT_TARGETS:
        target_named(target)  # an unknown one is named as such, whatever the run
    if built.table is None and target not in ("fp32", "fp16"):
        raise RecipeError(
            f"{run}: is a full-precision run; --target {target} needs a quantized one (or use --target fp32)"
        )
    example = torch.zeros(1, 3, recipe.model.image_size, recipe.model.image_size)
    return onnx_of(
        built.model, target, example, preprocessing_of(folder, recipe, built)
    )


def preprocessing_of(folder: RunFolder, recipe: Recipe, built: Built) -> Preprocessing:
    """From an image file to the net's input, and its classes."""
    from export.metadata import Preprocessing

    return Preprocessing(
        recipe.model.image_size, built.mean, built.std, classes_of(folder)
    )


def certify_run(
    run: Path,
    model: Path,
    images: int | None = None,
    data_root: Path | None = None,
    on: str = "",
) -> Certificate | Agreement:
    """Check `model` against the run it came from, on the run's real images; also writes certificate.json into the run, and
    into the file where it was proven. The computed codes of a plain QDQ file are not proven but compared
    (export/agreement.py), and written to agreement.json.

    images: take so many test images from the run's data instead, spread evenly; data_root: where that is now. on: platforms
    to prove it on besides this machine, comma-separated.
    """
    from export.certificate import Certificate

    certificate = certificate_of(run, model, images, data_root, on)
    if not isinstance(certificate, Certificate):
        write_json(RunFolder.open(run) / "agreement.json", certificate.to_json())
        return certificate
    certificate = recorded(certificate, model)
    write_json(RunFolder.open(run) / "certificate.json", certificate.to_json())
    return certificate


def bundle_run(run: Path, model: Path, out: Path, images: int = 16) -> Path:
    """Write the bundle of `model`, a file of `run`, into the new folder `out`: what `python check.py` proves on a device.

    images: how many of the run's images it holds. Raises ExportError when `out` exists or the file is not the run's.
    """
    from tempfile import TemporaryDirectory

    from export.bundle import write_bundle
    from export.certificate import compare_stored
    from export.lowered import ExportError
    from export.metadata import read_metadata
    from export.onnx_file import read
    from export.targets import target_named

    if out.exists():
        raise ExportError(f"{out}: exists; name a new folder for the bundle")
    proto = read(model)
    target = target_named(read_metadata(proto, str(model))["target"])
    if target.qdq:
        raise ExportError(
            f"{model}: a file of target {target.name} has no one arithmetic that a bundle could prove"
        )
    lowered = lowered_for(run, model)
    if different := compare_stored(lowered, proto):
        layer, what = next(iter(different.items()))
        raise ExportError(f"{model}: is not a file of {run}: layer {layer!r}: {what}")
    samples = RunFolder.open(run).samples()
    make_folder(out.parent)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as place:
        folder = Path(place) / "bundle"
        folder.mkdir()
        write_bundle(folder, lowered, proto, model.name, samples.images[:images])
        folder.rename(out)
    return out


def lowered_for(run: Path, model: Path) -> LoweredModel:
    """The net of `run` as it is written for the target of its file `model`.

    Raises ExportError for a file of an earlier format, which is not written so any more.
    """
    from export.lower import lower
    from export.lowered import ExportError
    from export.metadata import FORMAT, read_metadata
    from export.metadata_entries import FLOAT_TARGETS
    from export.onnx_file import read
    from export.passes import to_integers
    from export.targets import target_named

    _, recipe, built = load_run(run)
    if built.table is None:
        raise RecipeError(
            f"{run}: is a full-precision run, there are no codes to certify"
        )
    metadata = read_metadata(read(model), str(model))
    if metadata["target"] in FLOAT_TARGETS:
        raise ExportError(
            f"{model}: is a float file (target {metadata['target']}), it has no codes to certify"
        )
    if metadata["format"] < FORMAT:
        producer = metadata.get("producer", "another program")
        raise ExportError(
            f"{model}: was written by {producer} in format {metadata['format']}, which this version does not write any "
            f"more; export it again: qat export {run}"
        )
    target = target_named(metadata["target"])
    return to_integers(
        lower(
            built.model,
            torch.zeros(1, 3, recipe.model.image_size, recipe.model.image_size),
        ),
        target,
    )


def certificate_of(
    run: Path,
    model: Path,
    images: int | None = None,
    data_root: Path | None = None,
    on: str = "",
) -> Certificate | Agreement:
    """The certificate alone."""
    from export.agreement import agree
    from export.certificate import certify
    from export.elsewhere import machines_of
    from export.lower import trained_codes
    from export.metadata import describe, read_metadata
    from export.onnx_file import read
    from export.targets import target_named
    from qat.train.data import split_of
    from qat.train.loaders import samples_of_test

    machines = machines_of(on)
    lowered = lowered_for(run, model)
    folder, recipe, built = load_run(run)
    samples = (
        folder.samples()
        if images is None
        else samples_of_test(split_of(recipe, data_root), recipe, built, images)
    )

    def trained(
        images: NDArray[np.float32],
    ) -> tuple[dict[str, NDArray[np.uint8]], dict[str, NDArray[np.float32]]]:
        return trained_codes(built.model, images)

    target = target_named(read_metadata(read(model), str(model))["target"])
    if target.qdq and machines:
        raise RecipeError(
            f"--on: a file of target {target.name} has no one arithmetic to prove elsewhere"
        )
    if target.qdq:
        return agree(
            lowered, model, target.name, samples.images, samples.labels, trained
        )
    described = describe(
        lowered, target, preprocessing_of(folder, recipe, built), PRODUCER
    )
    return certify(
        lowered, model, samples.images, samples.labels, trained, machines, described
    )


def export_ensemble(
    runs: Sequence[Path],
    target: str,
    out: Path,
    average: Literal["probabilities", "logits"] = "probabilities",
) -> Path:
    """Write one file that holds `runs` side by side and averages their answers; returns its path."""
    import onnx

    from export.ensemble import merge_members

    if target in ("fp32", "fp16"):
        raise RecipeError(
            f"qat ensemble: --target {target} has no codes; name an integer target, such as ort-packed"
        )
    proto = merge_members(
        [exported(run, target) for run in runs], [run.name for run in runs], average
    )
    require_valid(proto)
    write_atomically(out, lambda p: onnx.save(proto, str(p)))
    return out


def certify_ensemble(
    runs: Sequence[Path], model: Path
) -> tuple[list[Certificate | Agreement], JoinedCheck]:
    """The whole certificate of each member of the ensemble `model` against its run, on the member's part of the file; and
    whether the parts compute together what they compute alone. Nothing is written."""
    from tempfile import TemporaryDirectory

    import onnx

    from export.ensemble import check_joined, split_members
    from export.onnx_file import read

    proto = read(model)
    members = split_members(proto, str(model))
    if len(members) != len(runs):
        raise RecipeError(
            f"{model}: holds {len(members)} members, {len(runs)} runs were named; name them in its order"
        )
    certificates = []
    with TemporaryDirectory() as folder:
        for index, (run, member) in enumerate(zip(runs, members, strict=True)):
            part = Path(folder) / f"{model.name}:m{index}"
            onnx.save(member, str(part))
            certificates.append(certificate_of(run, part))
    return certificates, check_joined(
        proto, members, RunFolder.open(runs[0]).samples().images
    )


def compare_file(
    baseline: Path,
    model: Path,
    max_drop: float,
    alpha: float = 0.05,
    data_root: Path | None = None,
) -> Comparison:
    """Compare the file that ships with a full-precision run, or a stored baseline file, image by image.

    The file classifies every image that the baseline was measured on, in ONNX Runtime and with the preprocessing that the
    file states. data_root: where the images are, if no longer where the baseline's run found them.
    Raises RecipeError when the baseline does not say which images they were, or when classes were renamed.
    """
    from qat.analysis.compare import compare_measured, load_measured

    first = load_measured(baseline)
    if first.recipe is None:
        raise RecipeError(
            f"{baseline}: does not say which images it was measured on; store it again: "
            f"qat compare {baseline} RUN --update-baseline"
        )
    recipe = from_json(first.recipe, baseline)
    return compare_measured(
        first,
        measure_file(model, recipe, data_root),
        max_drop,
        alpha,
        (str(baseline), str(model)),
    )


def measure_file(
    model: Path, recipe: Recipe, data_root: Path | None = None
) -> Measured:
    """Predictions of a file on the held-out images of `recipe`'s data: every source domain's, and the whole target."""
    from export import session
    from export.metadata import image_input, read_metadata
    from export.onnx_file import read
    from export.predict import logits_of
    from qat.analysis.compare import Measured
    from qat.train.data import split_of
    from qat.train.evaluate import predictions
    from qat.train.loaders import seen_batches

    split = split_of(recipe, data_root)
    proto = read(model)
    expected = image_input(read_metadata(proto, str(model)), str(model))
    loaded = session.load(proto, name=str(model))

    def predict(images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(
            logits_of(loaded, images.numpy(), len(expected["classes"]))
        )

    mean, std = (tuple(expected[key]) for key in ("mean", "std"))
    found: dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
    for subset in (*split.validation, split.target_in):
        predicted, labels = predictions(
            predict, seen_batches(subset, expected["size"], mean, std)
        )
        found[subset.name] = (predicted.numpy(), labels.numpy())
    return Measured(found, split.target_in.name, tuple(expected["classes"]), None)


def target_accuracy(
    run: Path, model: Path, data_root: Path | None = None
) -> dict[str, float]:
    """Accuracy of a file through ONNX Runtime on every test image of the run's target domain, and the trained net's.

    data_root: where the images are now, if no longer where the run found them.
    """
    folder = RunFolder.open(run)
    measured = measure_file(model, folder.recipe(), data_root)
    predicted, labels = measured.predictions[measured.target]
    return {
        "trained net": results_of(folder)["target"],
        "ONNX Runtime": float((predicted == labels).mean()),
    }


def measure_run(run: Path, model: Path) -> list[Latency]:
    """Latency and size of `model` against its own net in full precision; also writes latency.json into the run."""
    from export.latency import compare
    from export.lower import lower_float
    from export.onnx_file import read

    folder, recipe, built = load_run(run)
    images = folder.samples().images[:1]
    fp32 = lower_float(
        built.model, torch.zeros(1, 3, recipe.model.image_size, recipe.model.image_size)
    )
    latencies = compare({"fp32": fp32, "quantized": read(model)}, images)
    write_json(
        folder / "latency.json", [dataclasses.asdict(entry) for entry in latencies]
    )
    return latencies


def write_report(
    run: Path, baseline: Path | None = None, beside: Sequence[Path] = ()
) -> Path:
    """Write `report.html` into the run folder, from what the folder holds; returns its path.

    beside: more runs to show side by side. Raises RecipeError when they or the baseline were tested on another domain.
    """
    from qat.analysis.report import render

    folder = RunFolder.open(run)
    recipe = folder.recipe()
    if baseline is None:
        baseline = recipe.init_from
    path = folder / "report.html"
    html = render(
        folder,
        RunFolder.open(baseline) if baseline else None,
        [RunFolder.open(other) for other in beside],
    )
    write_text(path, html)
    return path


def explain(run: Path, name: str) -> str:
    """Why a layer, an operation or a quantizer of `run` is as it is (`qat/surgery/explain.py`)."""
    _, _, built = load_run(run)
    if built.table is None:
        raise RecipeError(f"{run}: is a full-precision run, nothing in it is quantized")
    return built.table.explain(name)


def bench_runs(
    runs: Sequence[Path],
    target: str,
    *,
    threads: int,
    batch: int,
    rounds: int,
    calibration: str = "MinMax",
    out: Path | None = None,
) -> BenchTable:
    """Bench exported `runs` against FP32 and static INT8; also writes bench.json and bench.svg into `out`."""
    from export.bench import bench
    from qat.analysis.figures import size_accuracy_latency

    if not runs:
        raise RecipeError("qat bench: name at least one run folder")
    files = {run.name: exported(run, target) for run in runs}
    where = out or runs[0]
    make_folder(where)  # before minutes of measuring
    images = RunFolder.open(runs[0]).samples().images
    settings = {"threads": threads, "batch": batch, "rounds": rounds}
    table = bench(
        exported(runs[0], "fp32"), files, images, **settings, calibration=calibration
    )
    accuracy = {
        run.name: 100 * results_of(RunFolder.open(run))["target"] for run in runs
    }
    operations = {run.name: bit_operations(run) for run in runs}
    write_json(
        where / "bench.json",
        table.to_json() | {"target_accuracy": accuracy, "operations": operations},
    )
    write_text(
        where / "bench.svg",
        size_accuracy_latency(
            [vars(row) for row in table.rows if row.name in accuracy], accuracy
        ),
    )
    return table


def profile_runs(
    runs: Sequence[Path],
    target: str,
    *,
    threads: int,
    batch: int,
    rounds: int,
    calibration: str = "MinMax",
    out: Path | None = None,
) -> list[Profile]:
    """Where the time of exported `runs`, of FP32 and of static INT8 goes; also writes profile.json into `out`."""
    from export.bench import FP32, STATIC
    from export.profile import profile
    from export.session import static_int8

    if not runs:
        raise RecipeError("qat bench: name at least one run folder")
    where = out or runs[0]
    make_folder(where)
    fp32 = exported(runs[0], "fp32")
    images = RunFolder.open(runs[0]).samples().images
    files = {FP32: fp32, STATIC: static_int8(fp32, images, calibration)}
    for run in runs:
        files[run.name] = exported(run, target)
    found = profile(files, images[:batch], threads=threads, rounds=rounds)
    written = {"profiles": [one.to_json() for one in found]}
    write_json(where / "profile.json", written)
    return found


def bit_operations(run: Path) -> dict[str, int]:
    """Multiply-accumulates per image, and bit operations: each MAC counts weight bits times input bits (float: 32)."""
    table = load_run(run)[2].table
    rows = table.rows if table is not None else ()
    macs = sum(row.macs for row in rows)
    bits = sum(
        row.macs
        * (row.weight.bits if row.weight else 32)
        * (row.input.bits if row.input else 32)
        for row in rows
    )
    return {"macs": macs, "bit_operations": bits}
