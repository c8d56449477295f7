"""The one door of the packages to ONNX Runtime; `export/bundled` has scripts of its own, which run alone on a device."""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from edgeqat.files import reason_of
from export.feeds import Feeds, named
from export.kernels.library import library
from export.lowered import ExportError
from export.metadata import wanted_options
from export.native_file import is_native, reveal
from export.onnx_file import parse

LEVELS = {
    "DISABLE": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "BASIC": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "EXTENDED": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "ALL": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


# How the runtime's profile calls the run of a node's kernel, after the node's name
NODE_EVENT = "_kernel_time"


class Session:
    """A loaded file: `run(images)` gives its outputs by name."""

    def __init__(self, session: ort.InferenceSession, name: str) -> None:
        self.session = session
        self.name = name
        self.input_names = [i.name for i in session.get_inputs()]
        self.output_names = [o.name for o in session.get_outputs()]

    def run(
        self, images: NDArray[np.generic] | Feeds
    ) -> dict[str, NDArray[np.generic]]:
        """Raises ExportError when ONNX Runtime cannot compute them."""
        try:
            found = self.session.run(None, named(images, self.input_names))
        except Exception as error:
            raise ExportError(
                f"ONNX Runtime {ort.__version__} cannot run {self.name}: {reason_of(error)}"
            ) from error
        return dict(zip(self.output_names, found, strict=True))

    def end_profiling(self) -> Path:
        """Write the times of all nodes so far, of a session that was loaded with `profile`; returns the file's path."""
        return Path(self.session.end_profiling())


def load(
    model: str | Path | onnx.ModelProto,
    *,
    level: str = "ALL",
    threads: int = 1,
    dump: Path | None = None,
    without: Sequence[str] = (),
    name: str = "",
    profile: Path | None = None,
) -> Session:
    """Load a file or a model on the CPU provider. Raises ExportError when ONNX Runtime refuses it.

    model: taken as it is. A file that a user named goes through `read` (`export/onnx_file.py`) first, which gives a model.
    level: one of LEVELS; "ALL" is the runtime's default. dump: where to write the optimised graph. without: names of
    optimisers to switch off. name: what messages call a model in memory. profile: how the path begins of the file that
    `Session.end_profiling` writes every node's times into. Session options that the file's metadata asks for are applied,
    and edgeqat's kernels are registered for a file that needs them.
    """
    options = ort.SessionOptions()
    options.graph_optimization_level = LEVELS[level]
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Between runs the threads of several sessions in one process would keep each other from the cores by waiting actively.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    if dump is not None:
        options.optimized_model_filepath = str(dump)
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    source: bytes | str
    if isinstance(model, onnx.ModelProto):
        proto = model
        source = model.SerializeToString()
        name = name or "the model"
    else:
        proto = parse(Path(model))
        source = str(model)
        name = name or str(model)
    for key, value in wanted_options(proto, name).items():
        options.add_session_config_entry(key, value)
    if is_native(proto):
        _register_kernels(options)
    try:
        session = ort.InferenceSession(
            source,
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=set(without),
        )
    except Exception as error:
        raise ExportError(
            f"ONNX Runtime {ort.__version__} cannot load {name}: {reason_of(error)}"
        ) from error
    return Session(session, name)


def _register_kernels(options: ort.SessionOptions) -> None:
    path = library()
    try:
        options.register_custom_ops_library(str(path))
    except Exception as error:
        raise ExportError(
            f"ONNX Runtime {ort.__version__} refused {path}: {error}"
        ) from error


def fp16(fp32: onnx.ModelProto) -> onnx.ModelProto:
    """`fp32` in half precision, float32 at its input and output."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    half = ir.from_proto(convert_float_to_float16(fp32, keep_io_types=True))
    half.graph.sort()  # the converter appends its casts after their readers
    return ir.to_proto(half)


def optimized(
    model: str | Path | onnx.ModelProto, level: str = "ALL", name: str = ""
) -> onnx.ModelProto:
    """The graph ONNX Runtime runs for `model`, which messages call `name`, at `level`."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        load(model, level=level, dump=path, name=name)
        return onnx.load(str(path))


@dataclass(frozen=True)
class Timed:
    """One run of one node of the graph that the runtime made of a file: the node's name, its operator, microseconds, and the
    element types of the tensors that it read and wrote, as "uint8"."""

    node: str
    operator: str
    microseconds: int
    reads: tuple[str, ...]
    writes: tuple[str, ...]


def timed(
    model: onnx.ModelProto, images: NDArray[np.generic], threads: int, rounds: int
) -> list[list[Timed]]:
    """The nodes that the runtime ran for `model`, in its order, for each of `rounds` runs after a first one.

    images: one batch. Raises ExportError when ONNX Runtime cannot run it.
    """
    with TemporaryDirectory() as folder:
        prefix = Path(folder) / "profile"
        loaded = load(model, threads=threads, profile=prefix)
        for _ in range(rounds + 1):
            loaded.run(images)
        events = json.loads(loaded.end_profiling().read_text())
    runs: list[list[Timed]] = [[]]
    for event in events:
        if event["name"] == "model_run":  # comes after its nodes
            runs.append([])
        elif event["cat"] == "Node" and event["name"].endswith(NODE_EVENT):
            runs[-1].append(_timed(event))
    return runs[1:-1]


def _timed(event: dict[str, Any]) -> Timed:
    facts = event["args"]
    return Timed(
        event["name"].removesuffix(NODE_EVENT),
        facts["op_name"],
        int(event["dur"]),
        _types(facts["input_type_shape"]),
        _types(facts["output_type_shape"]),
    )


def _types(tensors: list[dict[str, list[int]]]) -> tuple[str, ...]:
    found = []
    for tensor in tensors:
        found += list(tensor)
    return tuple(found)


class FloatOperators:
    """Evaluates single ONNX nodes with the runtime's own floating-point kernels; sessions are kept per node.

    What stays in floating point between integer kernels (softmax, LayerNorm, GELU) has no integer definition: its
    reference is the runtime's operator on the reference's own inputs.
    """

    def __init__(self, opset: int = 20) -> None:
        self.opset = opset
        self.sessions: dict[str, ort.InferenceSession] = {}

    def __call__(
        self, node: ir.Node, operands: list[NDArray[np.generic] | None]
    ) -> list[NDArray[np.generic]]:
        """All results of `node`. int64 operands but the first (shapes, axes, indices) are constants of its session, as in the
        file: the runtime may need them when it loads."""
        feeds: dict[str, NDArray[np.generic]] = {}
        fixed: dict[str, NDArray[np.generic]] = {}
        names = []
        for index, operand in enumerate(operands):
            name = "" if operand is None else f"i{index}"
            names.append(name)
            if operand is None:
                continue
            is_first = not feeds and not fixed
            is_constant = operand.dtype == np.int64 and not is_first
            (fixed if is_constant else feeds)[name] = operand
        constants = [operand.tolist() for operand in fixed.values()]
        key = f"{node.outputs[0].name} {constants}"
        if key not in self.sessions:
            self.sessions[key] = self._session(node, names, feeds, fixed)
        return self.sessions[key].run(None, feeds)

    def _session(
        self,
        node: ir.Node,
        names: list[str],
        feeds: dict[str, NDArray[np.generic]],
        fixed: dict[str, NDArray[np.generic]],
    ) -> ort.InferenceSession:
        """A session of `node` alone. names: of its operands, empty for absent ones; `fixed` are its constants."""
        helper = onnx.helper
        inputs = []
        for name, operand in feeds.items():
            element = helper.np_dtype_to_tensor_dtype(operand.dtype)
            any_shape = [None] * operand.ndim
            inputs.append(helper.make_tensor_value_info(name, element, any_shape))
        outputs = []
        for index, value in enumerate(node.outputs):
            dtype = ir.DataType.FLOAT if value.dtype is None else value.dtype
            name = f"y{index}"
            outputs.append(helper.make_tensor_value_info(name, int(dtype), None))
        constants = []
        for name, operand in fixed.items():
            constants.append(onnx.numpy_helper.from_array(operand, name))
        results = [output.name for output in outputs]
        copy = helper.make_node(node.op_type, names, results, domain=node.domain)
        for attribute in node.attributes.values():
            copy.attribute.append(ir.to_proto(attribute))
        graph = helper.make_graph([copy], "operator", inputs, outputs, constants)
        opset = helper.make_opsetid("", self.opset)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=10)
        return load(model).session


def static_int8(
    fp32: onnx.ModelProto, images: NDArray[np.float32], method: str = "MinMax"
) -> onnx.ModelProto:
    """ONNX Runtime's own static quantization of `fp32`: QDQ, u8 activations, s8 weights per channel, calibrated on `images`.

    method: "MinMax" or "Entropy".
    """
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    name = fp32.graph.input[0].name

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(images[:, None])

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            for batch in self.batches:
                return {name: batch}
            return None

    with TemporaryDirectory() as folder, _quiet():
        source = f"{folder}/fp32.onnx"
        prepared = f"{folder}/prepared.onnx"
        target = f"{folder}/int8.onnx"
        onnx.save(fp32, source)
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        quantization.quantize_static(
            prepared,
            target,
            Reader(),
            per_channel=True,
            quant_format=quantization.QuantFormat.QDQ,
            calibrate_method=quantization.CalibrationMethod[method],
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
        return onnx.load(target)


@contextmanager
def _quiet() -> Iterator[None]:
    """The quantizer logs advice to the root logger."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def with_outputs(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """A copy of `model` that also returns the tensors of codes `names`, N_C_H_W; the runtime finds their type."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    reveal(copy, names)
    for name in names:
        copy.graph.output.append(onnx.ValueInfoProto(name=name))
    return copy


def version() -> str:
    """ONNX Runtime's version."""
    return str(ort.__version__)
