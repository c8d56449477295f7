"""What OpenVINO computes from exported files, beside ONNX Runtime, the trained net and the integer definition, on this CPU.

python tools/check_openvino.py RUN                    exports and checks FP32 and every plain QDQ file that the run can have
python tools/check_openvino.py RUN qdq.onnx ...       checks files that were exported from that run
python tools/check_openvino.py qdq.onnx ...           without the run: OpenVINO against ONNX Runtime, on noise

OpenVINO shows no integer tensors. Codes are computed from the floats after DequantizeLinear, which a copy of the file
returns as well; returning them can keep OpenVINO from fusing across them. So the logits are those of the file as it
ships, and where they disagree with the copy's, the first quantizer at which the file as it ships leaves the definition is
looked for by returning the floats of one quantizer at a time.
"""

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from export import session
from export.agreement import QuantizerResult, agree, from_reals, with_real_outputs
from export.lower import lower_to_integers, trained_codes
from export.lowered import ExportError, LoweredModel
from export.metadata import read_metadata
from export.onnx_file import read
from export.openvino_session import FLOAT32, OpenvinoSession, openvino_runtime, version
from export.reference import IntegerReference
from export.targets import TARGETS, target_named
from qat.deploy import exported
from qat.runs.build import Built, load_run

# OpenVINO as it comes, which takes bfloat16 for what is not quantized where the processor has it; and in float32.
SETTINGS: dict[str, dict[str, str]] = {"OpenVINO": {}, "OpenVINO f32": FLOAT32}
BATCH = 32
PROBE_IMAGES = 8
FLOAT_TIES = 1e-4  # of the codes that one image batch has in one quantizer

Images = NDArray[np.float32]


def logits_of(run: session.Session | OpenvinoSession, images: Images) -> Images:
    parts = []
    for start in range(0, len(images), BATCH):
        (value,) = run.run(images[start : start + BATCH]).values()
        parts.append(np.asarray(value, np.float32))
    return np.concatenate(parts)


def same_answer(first: Images, second: Images) -> float:
    return float((first.argmax(1) == second.argmax(1)).mean())


def check_float(proto: onnx.ModelProto, images: Images, labels: NDArray[np.int64]) -> None:
    """The FP32 file (of a quantized run: its weights, with all quantizers off): OpenVINO against ONNX Runtime."""
    expected = logits_of(session.load(proto), images)
    print(f"fp32: accuracy in ONNX Runtime {(expected.argmax(1) == labels).mean():.2%}")
    for name, options in SETTINGS.items():
        found = logits_of(OpenvinoSession(proto, options), images)
        difference = np.abs(found - expected).max() / np.abs(expected).max()
        accuracy = (found.argmax(1) == labels).mean()
        print(
            f"  {name}: accuracy {accuracy:.2%}; top-1 as ONNX Runtime {same_answer(found, expected):.2%}; "
            f"logits differ by {difference:.1e}"
        )


def check_quantized(file: Path, built: Built, side: int, images: Images, labels: NDArray[np.int64]) -> None:
    """One plain QDQ file against the run it was exported from."""
    proto = read(file)
    target = target_named(read_metadata(proto, str(file))["target"])
    model = lower_to_integers(built.model, torch.zeros(1, 3, side, side), target)
    runtimes = [openvino_runtime(proto, model.quantizers, name, options) for name, options in SETTINGS.items()]
    result = agree(model, file, target.name, images, labels, lambda x: trained_codes(built.model, x), runtimes)
    print(result)
    for name, options in SETTINGS.items():
        found = first_departure(proto, model, options, images[:PROBE_IMAGES])
        if found is None:
            print(
                f"  {name}, as it ships: the codes of every quantizer, returned alone, are the defined ones but for ties"
            )
        else:
            share = found.different / found.codes
            print(
                f"  {name}, as it ships: leaves the definition at {found.quantizer!r}, where {share:.1%} of the codes "
                f"differ, by {found.largest} at most"
            )


def first_departure(
    proto: onnx.ModelProto, model: LoweredModel, options: Mapping[str, str], images: Images
) -> QuantizerResult | None:
    """The first quantizer in the order of the graph whose codes differ by more than ties when it alone is returned."""
    expected, _ = IntegerReference(model, session.FloatOperators()).run(torch.from_numpy(images))
    for name, codes in expected.items():
        instrumented, outputs = with_real_outputs(proto, {name: None})
        reals = OpenvinoSession(instrumented, options).run(images)[outputs[name]]
        distance = np.abs(codes.astype(np.int16) - from_reals(reals, model.quantizers[name]))
        different = int(np.count_nonzero(distance))
        if different > FLOAT_TIES * codes.size:
            return QuantizerResult(name, codes.size, different, int(distance.max()))
    return None


def check_alone(file: Path) -> None:
    """A file without its run: OpenVINO against ONNX Runtime without optimisation, on noise."""
    proto = read(file)
    sizes = [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim][1:]
    images = np.random.default_rng(0).normal(size=(BATCH, *sizes)).astype(np.float32)
    expected = logits_of(session.load(proto, level="DISABLE"), images)
    for name, options in SETTINGS.items():
        found = logits_of(OpenvinoSession(proto, options), images)
        difference = np.abs(found - expected).max() / np.abs(expected).max()
        print(f"{file.name} in {name}: top-1 {same_answer(found, expected):.2%}; logits differ by {difference:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", type=Path, nargs="+", help="[RUN] [file.onnx ...]")
    parser.add_argument("--images", type=int, default=None, help="so many of the images that the run keeps")
    flags = parser.parse_args()
    print(f"OpenVINO {version()}, ONNX Runtime {session.version()}")
    run, files = (flags.paths[0], flags.paths[1:]) if flags.paths[0].is_dir() else (None, flags.paths)
    if run is None:
        for file in files:
            check_alone(file)
        return
    folder, recipe, built = load_run(run)
    samples = folder.samples()
    images, labels = samples.images[: flags.images], samples.labels[: flags.images]
    if files:
        for file in files:
            check_quantized(file, built, recipe.model.image_size, images, labels)
        return
    check_float(exported(run, "fp32"), images, labels)
    if built.table is None:  # a full-precision run
        return
    with tempfile.TemporaryDirectory() as scratch:
        for name in (target.name for target in TARGETS.values() if target.qdq):
            file = Path(scratch) / f"{name}.onnx"
            try:
                onnx.save(exported(run, name), str(file))
            except ExportError as error:
                print(f"{name}: {error}")
                continue
            print(f"{name}: {file.stat().st_size:,} bytes")
            check_quantized(file, built, recipe.model.image_size, images, labels)


if __name__ == "__main__":
    main()
