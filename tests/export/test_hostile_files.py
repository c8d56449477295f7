"""ONNX files that a stranger wrote: each is refused with one line that names it, before a runtime sees it."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from export import session
from export.graph_limits import check_limits
from export.lowered import ExportError
from export.metadata import KEY
from export.onnx_file import read
from export.predict import predict
from export.verify import verify_file
from tools.fuzz_files import Arena, Findings, mutated, write_base_files

TARGETS = ("ort-int8", "ort-packed", "ort-packed-int4", "ort-native", "qdq")
Change = Callable[[onnx.ModelProto], None]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of a small net for each of TARGETS."""
    folder = tmp_path_factory.mktemp("files")
    write_base_files(folder, TARGETS)
    return folder


def image_in(folder: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    return folder / "image.png"


@pytest.mark.parametrize("target", TARGETS)
def test_honest_files_pass(target: str, files: Path, tmp_path: Path) -> None:
    file = files / f"{target}.onnx"
    read(file)
    assert 0 < predict(file, [image_in(tmp_path)])[0].probability <= 1
    assert verify_file(file).passed


# Changes of the metadata.


def said(proto: onnx.ModelProto) -> dict[str, Any]:
    return dict(json.loads(next(p.value for p in proto.metadata_props if p.key == KEY)))


def says(**changes: Any) -> Change:
    """Change entries; of `input` by their own names."""

    def change(proto: onnx.ModelProto) -> None:
        value = said(proto)
        for name, new in changes.items():
            (value["input"] if name in value["input"] else value)[name] = new
        others = {p.key: p.value for p in proto.metadata_props if p.key != KEY}
        helper.set_model_props(proto, others | {KEY: json.dumps(value)})

    return change


def first_layer(**changes: Any) -> Change:
    def change(proto: onnx.ModelProto) -> None:
        layers = said(proto)["layers"]
        layers[0] |= changes
        says(layers=layers)(proto)

    return change


def raw_metadata(text: str) -> Change:
    return lambda proto: helper.set_model_props(proto, {KEY: text})


METADATA: dict[str, tuple[Change, str]] = {
    "huge images": (says(size=200_000), "input.size"),
    "no pixels": (says(size=0), "input.size"),
    "size of text": (says(size="32"), "size"),
    "size is true": (says(size=True), "size"),
    "std 0": (says(std=[0.0, 1.0, 1.0]), "std"),
    "std nan": (says(std=[float("nan"), 1.0, 1.0]), "NaN|std"),
    "two means": (says(mean=[0.0, 0.0]), "mean"),
    "mean of text": (says(mean=["a", "b", "c"]), "mean"),
    "no classes": (says(classes=[]), "classes"),
    "classes of numbers": (says(classes=[1, 2]), "classes"),
    "a class that clears the screen": (says(classes=["\x1b[2J", "b", "c", "d", "e"]), "class"),
    "fewer classes than outputs": (says(classes=["a"]), "class"),
    "layers are text": (says(layers="all"), "layers"),
    "a layer of 9 bits": (first_layer(bits=9), "bits"),
    "a layer of carry 0": (first_layer(carry=0), "carry"),
    "a layer of no shape": (first_layer(shape=[-1]), "shape"),
    "a layer without a name": (first_layer(name=7), "name"),
    "no digest": (first_layer(sha256="zz"), "sha256"),
    "target is a list": (says(target=["ort-int8"]), "target"),
    "unknown target": (says(target="warp"), "target"),
    "format of text": (says(format="3"), "format"),
    "a later format": (says(format=99), "format 99 is newer"),
    "options of a stranger": (says(session_options={"session.x": "1"}), "session"),
    "options are text": (says(session_options="all"), "session_options"),
    "not JSON": (raw_metadata("{"), "not JSON"),
    "a list": (raw_metadata("[]"), "named entries"),
    "nested without end": (raw_metadata("[" * 100_000), "not JSON"),
    "nothing of what is needed": (raw_metadata("{}"), "format"),
}

# Changes of the graph.


def tensor_named(proto: onnx.ModelProto, end: str) -> TensorProto:
    return next(tensor for tensor in proto.graph.initializer if tensor.name.endswith(end))


def retyped(end: str, kind: Any) -> Change:
    """The same numbers, as another type."""

    def change(proto: onnx.ModelProto) -> None:
        tensor = tensor_named(proto, end)
        values = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(values.astype(kind), tensor.name))

    return change


def shortened(end: str) -> Change:
    """Fewer numbers, and a shape that says so."""

    def change(proto: onnx.ModelProto) -> None:
        tensor = tensor_named(proto, end)
        values = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values[:1]), tensor.name))

    return change


def claims(end: str, dims: list[int]) -> Change:
    def change(proto: onnx.ModelProto) -> None:
        tensor = tensor_named(proto, end)
        del tensor.dims[:]
        tensor.dims.extend(dims)

    return change


def elsewhere(proto: onnx.ModelProto) -> None:
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")


def node(kind: str, **attributes: Any) -> Change:
    """Set attributes of the first node of a kind."""

    def change(proto: onnx.ModelProto) -> None:
        found = next(n for n in proto.graph.node if n.op_type == kind)
        kept = [a for a in found.attribute if a.name not in attributes]
        del found.attribute[:]
        found.attribute.extend(kept)
        found.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())

    return change


def repeated(kind: str, name: str, value: Any) -> Change:
    """A second attribute of this name, on the first node of a kind."""

    def change(proto: onnx.ModelProto) -> None:
        found = next(n for n in proto.graph.node if n.op_type == kind)
        assert any(attribute.name == name for attribute in found.attribute)
        found.attribute.append(helper.make_attribute(name, value))

    return change


def codes_named_again(proto: onnx.ModelProto) -> None:
    """The second convolution says that its codes are those of the first, where they would be looked for."""
    first, second, *_ = (n for n in proto.graph.node if n.op_type == "QConv")
    labels = next(a.strings for a in first.attribute if a.name == "codes")
    assert any(labels)
    kept = [a for a in second.attribute if a.name != "codes"]
    del second.attribute[:]
    second.attribute.extend(kept)
    second.attribute.append(helper.make_attribute("codes", [bytes(label) for label in labels]))


def with_node(kind: str, domain: str = "", inputs: tuple[str, ...] = (), **attributes: Any) -> Change:
    def change(proto: onnx.ModelProto) -> None:
        names = inputs or (proto.graph.input[0].name,)
        proto.graph.node.append(helper.make_node(kind, list(names), ["more"], domain=domain, **attributes))

    return change


def with_operators(domain: str) -> Change:
    def change(proto: onnx.ModelProto) -> None:
        proto.opset_import.append(helper.make_opsetid(domain, 1))

    return change


def huge_constant(proto: onnx.ModelProto) -> None:
    proto.graph.initializer.append(numpy_helper.from_array(np.array([1 << 20, 1 << 20], np.int64), "much"))
    with_node("ConstantOfShape", inputs=("much",))(proto)


def recurrent(rows: int = 12, width: int = 2, bias: int = 24, inputs: int = 4, **attributes: Any) -> Change:
    """A GRU of 2 features and 4 hidden, over three steps of the images' first numbers."""

    def change(proto: onnx.ModelProto) -> None:
        shapes = {"steps": (3, 1, 2), "w": (1, rows, width), "r": (1, rows, 4), "b": (1, bias), "lengths": (1,)}
        for name, shape in shapes.items():
            kind = np.int32 if name == "lengths" else np.float32
            proto.graph.initializer.append(numpy_helper.from_array(np.ones(shape, kind), name))
        with_node("GRU", inputs=tuple(shapes)[:inputs], **{"hidden_size": 4, **attributes})(proto)

    return change


def circle(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].input[0] = proto.graph.node[-1].output[0]


def twice(proto: onnx.ModelProto) -> None:
    proto.graph.initializer.append(proto.graph.initializer[0])


def loop_for_ever(proto: onnx.ModelProto) -> None:
    body = helper.make_graph([helper.make_node("Identity", ["go"], ["on"])], "body", [
        helper.make_tensor_value_info("i", TensorProto.INT64, []), helper.make_tensor_value_info("go", TensorProto.BOOL, []),
    ], [helper.make_tensor_value_info("on", TensorProto.BOOL, [])])  # fmt: skip
    proto.graph.node.append(helper.make_node("Loop", ["", ""], ["more"], body=body))


def function(proto: onnx.ModelProto) -> None:
    proto.functions.append(
        helper.make_function("edgeqat", "F", ["x"], ["y"], [helper.make_node("Relu", ["x"], ["y"])],
                             [helper.make_opsetid("", 20)])
    )  # fmt: skip


STOCK: dict[str, tuple[Change, str]] = {
    "a tensor in another file": (elsewhere, "lies in another file"),
    "a bias of another length": (claims("head.bias", [1 << 40]), "its shape needs"),
    "a shape below zero": (claims("head.bias", [-5]), "is impossible"),
    "a pool of 2^40 pixels": (node("MaxPool", kernel_shape=[1 << 40, 1 << 40]), "kernel_shape"),
    "a pool of no stride": (node("MaxPool", strides=[0, 0]), "strides"),
    "a convolution of no group": (node("Conv", group=0), "group"),
    "padding without end": (node("Conv", pads=[1 << 40] * 4), "pads"),
    "a constant of 2^40 numbers": (huge_constant, "too large"),
    "a loop": (loop_for_ever, "Loop"),
    "a function": (function, "functions"),
    "a circle": (circle, "not a valid ONNX file"),
    "a tensor twice": (twice, "not a valid ONNX file|twice"),
    "an operator of a stranger": (with_node("Run", "com.stranger"), "Run"),
    "a runtime's own operator": (with_node("EPContext", "com.microsoft", ep_cache_context="/etc/passwd"), "EPContext"),
    "operators of a stranger": (with_operators("com.stranger"), "needs operators of"),
    "weights of more gates": (recurrent(rows=16), "do not fit its input"),
    "weights of fewer features": (recurrent(width=1), "do not fit its input"),
    "a short bias of a recurrent layer": (recurrent(bias=23), "do not fit its input"),
    "a hidden size of 2^40": (recurrent(hidden_size=1 << 40), "do not fit its input"),
    "a hidden size below zero": (recurrent(hidden_size=-4), "do not fit its input"),
    "a recurrent layer without weights": (recurrent(inputs=1), "do not fit its input|operands|not a valid"),
    "lengths of sequences": (recurrent(inputs=5), "do not fit its input"),
    "a recurrent layer's own activations": (recurrent(activations=["Relu", "Tanh"]), "activations"),
    "random numbers": (with_node("RandomNormalLike"), "RandomNormalLike"),
    "an attribute twice": (repeated("MaxPool", "strides", [1, 1]), "MaxPool .*attribute strides twice"),
    "no outputs": (lambda proto: proto.graph.ClearField("output"), "no graph"),
}
NATIVE: dict[str, tuple[Change, str]] = {
    "an int8 bias": (retyped("head.bias", np.int8), "bias"),
    "an int8 scale": (retyped("head.weight/s", np.int8), "scale"),
    "a float bias": (retyped("head.bias", np.float32), "bias"),
    "a double scale": (retyped("head.weight/s", np.float64), "scale"),
    "one bias for all channels": (shortened("head.bias"), "bias"),
    "one scale for all channels": (shortened("head.weight/s"), "scale"),
    "weights of one channel": (shortened("wide.weight/p0"), "weight"),
    "more channels than weights": (node("QConv", channels_out=17), "channels_out|weight|17"),
    "no channels": (node("QConv", channels_in=0), "channels_in"),
    "9 bits": (node("QConv", bits=9), "bits"),
    "no carry": (node("QConv", carry=0), "carry"),
    "no stride": (node("QConv", stride_h=0), "stride_h"),
    "a window of 2^40": (node("QConv", kernel_h=1 << 40), "kernel_h"),
    "no groups": (node("QConv", groups=0), "groups"),
    "a code of 300": (node("QConv", y_high=300), "y_high"),
    "names of codes twice": (repeated("QConv", "codes", ["head.input"]), "QConv .*attribute codes twice"),
    "names of codes that are one text": (node("QConv", codes="head.input"), "attribute codes is not a list of texts"),
    "codes of one quantizer twice": (codes_named_again, "QConv .*names codes of .*, as another output does"),
}
CASES = [
    *((f"metadata: {name}", "ort-packed", *case) for name, case in METADATA.items()),
    *((f"stock: {name}", "ort-int8", *case) for name, case in STOCK.items()),
    *((f"native: {name}", "ort-native", *case) for name, case in NATIVE.items()),
]


@pytest.mark.parametrize(("name", "target", "change", "words"), CASES, ids=[case[0] for case in CASES])
def test_a_changed_file_is_refused_by_name(
    name: str, target: str, change: Change, words: str, files: Path, tmp_path: Path
) -> None:
    proto = onnx.load(str(files / f"{target}.onnx"))
    change(proto)
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ExportError, match=rf"model\.onnx: .*({words})"):
        predict(path, [image_in(tmp_path)])
    if name != "metadata: fewer classes than outputs":  # classes decide nothing that is verified
        with pytest.raises(ExportError, match=rf"model\.onnx: .*({words})"):
            verify_file(path)


@pytest.mark.parametrize(
    "options",
    [
        {"session.collect_node_memory_stats_to_file": "CANARY"},
        {"session.x64quantprecision": "2"},
        {"session.optimized_model_external_initializers_file_name": "CANARY"},
    ],
)
def test_a_file_chooses_no_session_option(options: dict[str, str], files: Path, tmp_path: Path) -> None:
    """The first overwrote any file with the runtime's notes while the answer came as ever."""
    canary = tmp_path / "canary.txt"
    canary.write_text("precious")
    proto = onnx.load(str(files / "ort-native.onnx"))
    chosen = {key: str(canary) if value == "CANARY" else value for key, value in options.items()}
    says(session_options=said(proto)["session_options"] | chosen)(proto)
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    for use in (lambda: predict(path, [image_in(tmp_path)]), lambda: verify_file(path), lambda: session.load(path)):
        with pytest.raises(ExportError, match=r"model\.onnx: .*session"):
            use()
    assert canary.read_text() == "precious" and sorted(p.name for p in tmp_path.iterdir()) == [
        "canary.txt", "image.png", "model.onnx",
    ]  # fmt: skip


def test_a_pipe_or_a_folder_for_a_file_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.onnx")
    with pytest.raises(ExportError, match=r"model\.onnx: is not a regular file"):
        verify_file(tmp_path / "model.onnx")
    with pytest.raises(ExportError, match="is not a regular file"):
        predict(tmp_path, [])


@pytest.mark.parametrize("target", TARGETS)
def test_files_changed_at_random_neither_crash_nor_write(target: str, files: Path, tmp_path: Path) -> None:
    """Each in a child of its own; `tools/fuzz_files.py` tries thousands."""
    content = (files / f"{target}.onnx").read_bytes()
    arena = Arena(tmp_path)
    for seed in range(8):
        changed, what = mutated(content, random.Random(f"test/{seed}"))
        outcome, shown, _ = arena.run(changed)
        assert outcome not in Findings.FAILURES, f"{what}: {outcome}: {shown}"


def dequantized(copies: int, rows: int = 1 << 17) -> onnx.ModelProto:
    """A file whose int8 weights [rows][256] become floats `copies` times over, for images of 16 pixels a side."""
    weights = numpy_helper.from_array(np.zeros((rows, 256), np.int8), "w")
    scale = numpy_helper.from_array(np.array(1, np.float32), "s")
    nodes = [helper.make_node("DequantizeLinear", ["w", "s"], [f"w{i}"]) for i in range(copies)]
    nodes.append(helper.make_node("Concat", [f"w{i}" for i in range(copies)], ["y"], axis=0))
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 16, 16])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [image], [result], [weights, scale])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def test_large_weights_may_become_floats() -> None:
    """VGG's classifier needs 400 MB, on images of any size; what a small file makes of nothing it may not have."""
    check_limits(dequantized(copies=3), "model.onnx", 16)
    with pytest.raises(ExportError, match=r"model\.onnx: node 18 .*MiB per image"):
        check_limits(dequantized(copies=40), "model.onnx", 16)
