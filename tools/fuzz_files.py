"""Mutated ONNX files through `qat predict` and `qat certify FILE`: no crash, hang, traceback or write elsewhere.

    uv run tools/fuzz_files.py --count 5000
    uv run tools/fuzz_files.py --count 500 --sanitize     # ort-native alone, its kernels built with AddressSanitizer

Files of a small net are exported for several targets and changed: metadata, tensors' types, shapes and bytes, attributes,
operators, edges, imports, bits of the file. Each runs in a child of its own, in a scratch folder beside a canary file. What
fails is kept in --keep, to become a test. Exit status 1 where anything failed.
"""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import tyro
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from torch import Tensor, nn

from edgeqat import cpp
from edgeqat.cpp import machine
from export.kernels.build import LIBRARY_FLAGS, compile_all, sources
from export.kernels.library import library
from export.lower import lower_to_integers
from export.metadata import KEY, Preprocessing, sign
from export.native_graph import emit
from export.predict import predict
from export.targets import TARGETS
from export.verify import verify_file
from qat.surgery.calibrate import calibrate
from qat.surgery.swap import quantize_, uniform_rules

SIDE = 32
CLASSES = ("ant", "bee", "cat", "dog", "elk")
MOST_SECONDS = 10
MEMORY = 8 << 30  # bytes of address space of a child
CANARY = "nobody writes here\n"
SANITIZERS = ("-fsanitize=address", "-fno-omit-frame-pointer", "-g", "-O1")


@dataclass(frozen=True)
class Flags:
    count: int = 5000
    """Mutated files."""
    targets: tuple[str, ...] = ("ort-int8", "ort-packed", "ort-packed-int4", "ort-native", "qdq")
    """Whose files are mutated, in turn."""
    seed: int = 0
    """Of the mutations."""
    sanitize: bool = False
    """Run ort-native alone, on kernels built with AddressSanitizer."""
    keep: Path = Path("fuzz-failures")
    """Folder for files that failed, each with what it showed."""
    base: Path | None = None
    """Folder with the files to mutate, TARGET.onnx; by default they are exported now."""


class SmallNet(nn.Module):
    """A convolution, a depthwise one, a sum, two pools and a linear layer: every kind of node that exporters write."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.wide = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + torch.relu(self.depthwise(x))
        x = nn.functional.max_pool2d(torch.relu(self.wide(x)), 3, 2, 1)
        x = nn.functional.avg_pool2d(x, 2)
        return self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


def write_base_files(folder: Path, targets: tuple[str, ...]) -> None:
    """TARGET.onnx of the small net for every target."""
    torch.manual_seed(0)
    images = torch.randn(4, 3, SIDE, SIDE)
    model = SmallNet().eval()
    quantize_(model, uniform_rules(4, 4, ("stem", "head")), images[:1], weight_init="mse")
    calibrate(model, [images])
    preprocessing = Preprocessing(SIDE, (0.5, 0.4, 0.3), (0.2, 0.3, 0.25), CLASSES)
    for name in targets:
        target = TARGETS[name]
        lowered = lower_to_integers(model, images, target)
        signed = sign(emit(lowered, target), lowered, target, preprocessing, "edgeqat")
        (folder / f"{name}.onnx").write_bytes(signed.SerializeToString())


INTEGERS = (
    0, 1, 2, 3, 4, 7, 8, -1, -2, 127, 128, 255, 256, 4096, 65535, 1 << 20, (1 << 31) - 1, 1 << 31, -(1 << 31), 1 << 40,
    (1 << 63) - 1, -(1 << 63),
)  # fmt: skip
REALS = (0.0, -0.0, 1.0, -1.0, 1e-45, 1e-30, 1e30, 3e38, float("nan"), float("inf"), float("-inf"))
TYPES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 16, 17, 21, 22, 0, 99)
NUMPY_TYPES = (np.int8, np.uint8, np.int16, np.int32, np.int64, np.float16, np.float32, np.float64, np.bool_)
OPERATORS = (
    "Add", "Mul", "Div", "Mod", "Conv", "ConvTranspose", "MatMul", "Gemm", "Reshape", "Expand", "Tile", "Pad", "Range",
    "Resize", "ConstantOfShape", "Concat", "Gather", "GatherElements", "GatherND", "ScatterND", "Slice", "Split", "Squeeze",
    "Unsqueeze", "Transpose", "MaxPool", "AveragePool", "GlobalAveragePool", "LRN", "Einsum", "TopK", "CumSum", "NonZero",
    "Loop", "If", "Scan", "QLinearConv", "QuantizeLinear", "DequantizeLinear", "Cast", "Clip", "Identity", "Shape",
    "ReduceSum", "Softmax", "Flatten",
    "QConv", "QGemm", "QConvFloat", "QGemmFloat", "QMaxPool", "QAveragePool", "QGlobalPool", "QAdd", "QMul",
    "QScale", "QLayerNorm", "QSoftmax", "QTables", "QImage", "QTranspose",
    "RandomNormal", "DepthToSpace", "SpaceToDepth", "Trilu", "BatchNormalization", "LayerNormalization", "ConvInteger",
)  # fmt: skip
ENTRIES: tuple[Any, ...] = (
    *INTEGERS, *REALS[:6], None, True, False, "", "x", "\x1b[31m", "\u2028", "a" * 5000, [], {}, [[]], [1, 2, 3], ["x"],
    {"a": 1}, 1 << 200, "../canary.txt", {"session.collect_node_memory_stats_to_file": "../canary.txt"},
    {"session.disable_prepacking": "1"}, {"ep.context_enable": "1", "ep.context_file_path": "../canary.txt"},
)  # fmt: skip

ATTRIBUTES = (
    "axis", "pads", "strides", "dilations", "group", "kernel_shape", "block_size", "perm", "auto_pad", "size", "ceil_mode",
    "to", "axes", "allowzero", "blocksize", "keepdims", "count_include_pad",
)  # fmt: skip

Mutation = Callable[[onnx.ModelProto, random.Random], None]


def any_tensor(proto: onnx.ModelProto, dice: random.Random) -> onnx.TensorProto:
    return dice.choice(proto.graph.initializer)


def any_node(proto: onnx.ModelProto, dice: random.Random) -> onnx.NodeProto:
    return dice.choice(proto.graph.node)


def any_name(proto: onnx.ModelProto, dice: random.Random) -> str:
    names = [t.name for t in proto.graph.initializer] + [o for node in proto.graph.node for o in node.output]
    return dice.choice([*names, "", "nowhere", proto.graph.input[0].name])


def change_type(proto: onnx.ModelProto, dice: random.Random) -> None:
    any_tensor(proto, dice).data_type = dice.choice(TYPES)


def change_shape(proto: onnx.ModelProto, dice: random.Random) -> None:
    dims = any_tensor(proto, dice).dims
    if not dims or dice.random() < 0.2:
        dims.append(dice.choice(INTEGERS))
    elif dice.random() < 0.2:
        dims.pop()
    else:
        dims[dice.randrange(len(dims))] = dice.choice(INTEGERS)


def change_bytes(proto: onnx.ModelProto, dice: random.Random) -> None:
    tensor = any_tensor(proto, dice)
    data = bytearray(tensor.raw_data or b"\0")
    data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    cut = dice.choice((len(data), len(data), len(data) // 2, len(data) - 1))
    tensor.raw_data = bytes(data[:cut]) + b"\xff" * dice.choice((0, 0, 1, 64))


def replace_tensor(proto: onnx.ModelProto, dice: random.Random) -> None:
    """Another type or shape, with as many bytes as it needs."""
    tensor = any_tensor(proto, dice)
    if tensor.data_type in (TensorProto.INT4, TensorProto.UINT4):
        return
    values = np.asarray(numpy_helper.to_array(tensor))
    kind = dice.randrange(4)
    if kind == 0:
        with np.errstate(all="ignore"):
            values = values.astype(dice.choice(NUMPY_TYPES))
    elif kind == 1:
        values = np.resize(values, [dice.choice((0, 1, 2, 3, 5, 16, 255, 257)) for _ in range(dice.randrange(4))])
    elif kind == 2:
        values = values.ravel()[: dice.randrange(values.size + 1)]
    else:
        values = values.reshape(dice.choice(((-1,), (1, -1), (-1, 1), (1, 1, -1)))) if values.size else values
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), tensor.name))


def change_value(proto: onnx.ModelProto, dice: random.Random) -> None:
    """One number of a tensor, or all of them."""
    tensor = any_tensor(proto, dice)
    if tensor.data_type in (TensorProto.INT4, TensorProto.UINT4):
        return
    values = np.array(numpy_helper.to_array(tensor))
    if not values.size:
        return
    number = dice.choice(REALS) if values.dtype.kind == "f" else dice.choice(INTEGERS)
    where = slice(None) if dice.random() < 0.3 else dice.randrange(values.size)
    flat = values.reshape(-1)
    with np.errstate(all="ignore"):
        flat[where] = np.array([number]).astype(values.dtype)[0]
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def go_external(proto: onnx.ModelProto, dice: random.Random) -> None:
    tensor = any_tensor(proto, dice)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=dice.choice(("../canary.txt", "canary.txt", "/etc/passwd", "")))
    if dice.random() < 0.5:
        tensor.ClearField("raw_data")


def change_attribute(proto: onnx.ModelProto, dice: random.Random) -> None:
    nodes = [node for node in proto.graph.node if node.attribute]
    attribute = dice.choice(dice.choice(nodes).attribute)
    if attribute.ints and dice.random() < 0.8:
        attribute.ints[dice.randrange(len(attribute.ints))] = dice.choice(INTEGERS)
    elif attribute.ints:
        attribute.ints.append(dice.choice(INTEGERS))
    elif attribute.type == onnx.AttributeProto.INT:
        attribute.i = dice.choice(INTEGERS)
    elif attribute.type == onnx.AttributeProto.FLOAT:
        attribute.f = dice.choice(REALS)
    elif attribute.strings:
        attribute.strings[0] = dice.choice((b"", b"\xff\xfe", b"x" * 5000, b"logits", b"@x"))
    else:
        attribute.s = dice.choice((b"", b"\xff\xfe", b"reflect", b"x" * 5000))


def break_attribute(proto: onnx.ModelProto, dice: random.Random) -> None:
    nodes = [node for node in proto.graph.node if node.attribute]
    node = dice.choice(nodes)
    place = dice.randrange(len(node.attribute))
    attribute = node.attribute[place]
    kind = dice.randrange(5)
    if kind == 0:
        del node.attribute[place]
    elif kind == 1:
        node.attribute.add().CopyFrom(attribute)
    elif kind == 2:
        attribute.type = dice.randrange(15)
    elif kind == 3:
        attribute.name = dice.choice(("axis", "pads", "strides", "group", "kernel_shape", "", "bits"))
    else:
        attribute.CopyFrom(helper.make_attribute(attribute.name, proto.graph))


def add_attribute(proto: onnx.ModelProto, dice: random.Random) -> None:
    name = dice.choice(ATTRIBUTES)
    value: Any = dice.choice(INTEGERS)
    if name in ("pads", "strides", "dilations", "kernel_shape", "perm", "axes"):
        value = [dice.choice(INTEGERS) for _ in range(dice.choice((1, 2, 2, 4)))]
    elif name == "auto_pad":
        value = dice.choice(("SAME_UPPER", "SAME_LOWER", "VALID", "x"))
    any_node(proto, dice).attribute.append(helper.make_attribute(name, value))


def change_operator(proto: onnx.ModelProto, dice: random.Random) -> None:
    node = any_node(proto, dice)
    node.op_type = dice.choice(OPERATORS)
    if dice.random() < 0.7:
        node.domain = "edgeqat" if node.op_type.startswith("Q") and node.op_type[1].isupper() else ""
    if dice.random() < 0.1:
        node.domain = dice.choice(("com.microsoft", "ai.onnx.ml", "edgeqat", "evil"))


def change_edge(proto: onnx.ModelProto, dice: random.Random) -> None:
    node = any_node(proto, dice)
    kind = dice.randrange(6)
    if kind <= 2 and node.input:
        node.input[dice.randrange(len(node.input))] = any_name(proto, dice)
    elif kind == 3:
        node.input.append(any_name(proto, dice))
    elif kind == 4 and node.input:
        node.input.pop()
    elif node.output:
        node.output[dice.randrange(len(node.output))] = any_name(proto, dice)


def change_nodes(proto: onnx.ModelProto, dice: random.Random) -> None:
    nodes = proto.graph.node
    kind = dice.randrange(4)
    if kind == 0:
        del nodes[dice.randrange(len(nodes))]
    elif kind == 1:
        nodes.add().CopyFrom(dice.choice(nodes))
    elif kind == 2:
        order = list(nodes)
        dice.shuffle(order)
        copies = [node.SerializeToString() for node in order]
        del nodes[:]
        for copy in copies:
            nodes.add().ParseFromString(copy)
    else:
        any_node(proto, dice).output.append(any_name(proto, dice))


def change_imports(proto: onnx.ModelProto, dice: random.Random) -> None:
    kind = dice.randrange(3)
    if kind == 0:
        dice.choice(proto.opset_import).version = dice.choice((*INTEGERS[:8], 10, 13, 17, 21, 25, 99, 1 << 40))
    elif kind == 1:
        dice.choice(proto.opset_import).domain = dice.choice(("", "edgeqat", "com.microsoft", "evil", "ai.onnx.ml"))
    else:
        proto.ir_version = dice.choice((0, 1, 3, 7, 8, 10, 13, 99, (1 << 63) - 1))


def change_interface(proto: onnx.ModelProto, dice: random.Random) -> None:
    value = dice.choice([proto.graph.input[0], proto.graph.output[0]])
    dims = value.type.tensor_type.shape.dim
    kind = dice.randrange(5)
    if kind == 0 and dims:
        dice.choice(dims).dim_value = dice.choice(INTEGERS)
    elif kind == 1:
        value.type.tensor_type.elem_type = dice.choice(TYPES)
    elif kind == 2:
        value.type.tensor_type.ClearField("shape")
    elif kind == 3:
        value.name = any_name(proto, dice)
    elif dims:
        dims.pop()


def add_part(proto: onnx.ModelProto, dice: random.Random) -> None:
    kind = dice.randrange(5)
    if kind == 0:
        function = proto.functions.add(name="Relu", domain=dice.choice(("", "edgeqat", "evil")))
        function.output.append("y")
    elif kind == 1:
        proto.graph.sparse_initializer.add()
    elif kind == 2:
        proto.graph.input.add().CopyFrom(proto.graph.input[0])
    elif kind == 3:
        proto.graph.output.add().name = any_name(proto, dice)
    else:
        proto.graph.initializer.add().CopyFrom(any_tensor(proto, dice))


def change_metadata(proto: onnx.ModelProto, dice: random.Random) -> None:
    (entry,) = (p for p in proto.metadata_props if p.key == KEY)
    if dice.random() < 0.1:
        entry.value = dice.choice(("", "{", "[" * 100_000, "null", "[]", "NaN", '{"format": 3}', "9" * 6000, "{}" * 3))
        return
    value = json.loads(entry.value)
    holder: Any = value
    if dice.random() < 0.15:
        value["session_options"] = {dice.choice(("session.collect_node_memory_stats_to_file", "session.x64quantprecision",
                                                 "session.debug_layout_transformation")): "../canary.txt"}  # fmt: skip
    for _ in range(dice.randrange(4)):
        inner = [
            part
            for part in (holder.values() if isinstance(holder, dict) else holder)
            if part and isinstance(part, dict | list)
        ]
        if not inner:
            break
        holder = dice.choice(inner)
    place = dice.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    if dice.random() < 0.15:
        del holder[place]
    else:
        holder[place] = dice.choice(ENTRIES)
    entry.value = json.dumps(value)


MUTATIONS: tuple[Mutation, ...] = (
    change_type, change_shape, change_bytes, replace_tensor, replace_tensor, change_value, change_value, go_external,
    change_attribute, change_attribute, change_attribute, break_attribute, add_attribute, change_operator, change_operator,
    change_edge, change_edge, change_nodes, change_imports, change_interface, add_part, change_metadata, change_metadata,
    change_metadata,
)  # fmt: skip


def mutated(content: bytes, dice: random.Random) -> tuple[bytes, str]:
    """A changed copy of an ONNX file, and what was changed."""
    if dice.random() < 0.1:
        return torn(content, dice), "bits"
    proto = onnx.ModelProto.FromString(content)
    done = []
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        change = dice.choice(MUTATIONS)
        try:
            change(proto, dice)
        except Exception:  # the change cannot be made here: an earlier one, or protobuf, is in its way
            continue
        done.append(change.__name__)
    return proto.SerializeToString(), "+".join(done) or "nothing"


def torn(content: bytes, dice: random.Random) -> bytes:
    """Bits flipped, bytes cut off or put in."""
    data = bytearray(content)
    for _ in range(dice.choice((1, 1, 4, 64))):
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    kind = dice.randrange(4)
    place = dice.randrange(len(data))
    if kind == 0:
        return bytes(data[:place])
    if kind == 1:
        return bytes(data[:place] + dice.randbytes(dice.choice((1, 8, 200))) + data[place:])
    return bytes(data)


@dataclass
class Findings:
    """Counts of what files did, and the failures by kind."""

    outcomes: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0

    FAILURES = ("crash", "hang", "traceback", "unnamed error", "wrote elsewhere")

    @property
    def failed(self) -> int:
        return sum(self.outcomes[kind] for kind in self.FAILURES)

    def __str__(self) -> str:
        total = sum(self.outcomes.values())
        rows = [f"{'files':<20} {total:>7}"]
        rows += [f"{kind:<20} {self.outcomes[kind]:>7}" for kind in ("refused", "ran", *self.FAILURES)]
        rows.append(f"{'slowest':<20} {self.slowest:>6.1f}s")
        return "\n".join(rows)


class Arena:
    """A scratch folder with one file to try, an image, and a canary that nobody may touch."""

    def __init__(self, place: Path, memory: int | None = MEMORY) -> None:
        self.place, self.memory = place, memory
        self.work, self.temporary = place / "work", place / "tmp"
        for folder in (self.work, self.temporary):
            folder.mkdir()
        self.file, self.canary, self.report = self.work / "model.onnx", place / "canary.txt", place / "report"
        self.canary.write_text(CANARY)
        pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(self.work / "image.png")

    def run(self, content: bytes) -> tuple[str, str, float]:
        """(outcome, what it showed, seconds) of one file."""
        self.file.write_bytes(content)
        self.report.write_text("")
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            self._behave()
        outcome = self._wait(child)
        seconds = time.monotonic() - began
        shown = self.report.read_text(errors="replace")
        if not outcome:
            outcome = shown.split("\n", 1)[0] or "crash"
        if self._touched(content, outcome):
            outcome = "wrote elsewhere"
        return outcome, shown, seconds

    def _wait(self, child: int) -> str:
        deadline = time.monotonic() + MOST_SECONDS
        while time.monotonic() < deadline:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return "crash" if os.WIFSIGNALED(status) or os.WEXITSTATUS(status) else ""
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return "hang"

    def _behave(self) -> None:
        """In the child: both commands on the file, its outcome in the report; never returns."""
        with self.report.open("w") as report:
            os.dup2(report.fileno(), 1)
            os.dup2(report.fileno(), 2)
            os.chdir(self.work)
            tempfile.tempdir = str(self.temporary)
            if self.memory is not None:
                resource.setrlimit(resource.RLIMIT_AS, (self.memory, self.memory))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            outcomes = [
                tried(lambda: predict(self.file, [self.work / "image.png"])),
                tried(lambda: str(verify_file(self.file))),
            ]
            worst = max(outcomes, key=lambda found: SEVERITY.index(found[0]))
            sys.stdout.flush()
            report.seek(0)
            report.write(f"{worst[0]}\n{worst[1]}\n")
            report.flush()
            os._exit(0)

    def _touched(self, content: bytes, outcome: str) -> bool:
        """Whether anything but the report is not as it was; mends it."""
        left = list(self.temporary.iterdir())
        for path in left:
            shutil.rmtree(path, ignore_errors=True)
        was_killed = outcome in ("hang", "crash")  # its temporary folder stays behind
        there = sorted(path.name for path in self.work.iterdir())
        beside = sorted(path.name for path in self.place.iterdir())
        changed = self.canary.read_text() != CANARY or self.file.read_bytes() != content
        changed |= there != ["image.png", "model.onnx"] or beside != ["canary.txt", "report", "tmp", "work"]
        self.canary.write_text(CANARY)
        return changed or (bool(left) and not was_killed)


SEVERITY = ("ran", "refused", "unnamed error", "traceback")


def tried(command: Callable[[], object]) -> tuple[str, str]:
    """What a command does with the file: it runs, refuses it with an error that names it, or worse."""
    try:
        command()
    except ValueError as error:
        named = "model.onnx" in str(error)
        return ("refused", str(error)) if named else ("unnamed error", traceback.format_exc())
    except BaseException:
        return "traceback", traceback.format_exc()
    return "ran", ""


def fuzz(base: Path, arena: Arena, flags: Flags) -> Findings:
    files = {path.stem: path.read_bytes() for path in sorted(base.glob("*.onnx")) if path.stem in flags.targets}
    for name, content in files.items():
        outcome, shown, _ = arena.run(content)
        if outcome != "ran":
            sys.exit(f"the unchanged file of {name} does not run: {shown}")
    findings = Findings()
    began = time.monotonic()
    for index in range(flags.count):
        dice = random.Random(f"{flags.seed}/{index}")
        target = list(files)[index % len(files)]
        content, what = mutated(files[target], dice)
        outcome, shown, seconds = arena.run(content)
        findings.outcomes[outcome] += 1
        findings.slowest = max(findings.slowest, seconds)
        if outcome in Findings.FAILURES:
            findings.kinds[f"{outcome}: {what}"] += 1
            flags.keep.mkdir(parents=True, exist_ok=True)
            name = f"{outcome.replace(' ', '-')}-{target}-{flags.seed}-{index}"
            (flags.keep / f"{name}.onnx").write_bytes(content)
            (flags.keep / f"{name}.txt").write_text(f"{what}\n{shown}")
            print(f"{name}: {what}: {shown.strip().splitlines()[-1] if shown.strip() else ''}"[:300], flush=True)
        if index % 500 == 499:
            print(f"{index + 1} files, {time.monotonic() - began:.0f} s, {findings.failed} failed", flush=True)
    return findings


def build_sanitized(folder: Path) -> Path:
    """The kernels with AddressSanitizer, in `folder`."""
    command = cpp.required_compiler()
    objects = compile_all(command, sources(), folder, machine(), (*LIBRARY_FLAGS, *SANITIZERS))
    library = folder / "kernels.so"
    cpp.run([*command, "-shared", *SANITIZERS, *map(str, objects), "-o", str(library)])
    return library


def restart_sanitized(flags: Flags, place: Path) -> int:
    """This program again, in a process whose first library is AddressSanitizer's."""
    library = build_sanitized(place)
    base = place / "base"
    base.mkdir()
    write_base_files(base, ("ort-native",))
    command = cpp.required_compiler()
    # Without the C++ library beside it AddressSanitizer does not find how exceptions are thrown.
    preloaded = [cpp.run([*command, f"-print-file-name={name}"]).strip() for name in ("libasan.so", "libstdc++.so")]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(str(Path(path).resolve()) for path in preloaded), "EDGEQAT_KERNELS": str(library),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=4096",
    }  # fmt: skip
    line = [sys.executable, __file__, "--count", str(flags.count), "--seed", str(flags.seed), "--keep", str(flags.keep),
            "--targets", "ort-native", "--base", str(base)]  # fmt: skip
    return subprocess.run(line, env=environment).returncode


def main(flags: Flags) -> int:
    torch.set_num_threads(1)  # children are forked, and no thread but the first survives that
    library()  # compiled now rather than in a child
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        if flags.sanitize:
            return restart_sanitized(flags, place)
        base = flags.base
        if base is None:
            base = place / "base"
            base.mkdir()
            write_base_files(base, flags.targets)
        arena_place = place / "arena"
        arena_place.mkdir()
        is_sanitized = "libasan" in os.environ.get("LD_PRELOAD", "")  # it reserves terabytes of addresses
        findings = fuzz(base, Arena(arena_place, None if is_sanitized else MEMORY), flags)
        print(findings)
        for kind, count in findings.kinds.most_common():
            print(f"  {count:>5} {kind}")
        return 1 if findings.failed else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Flags, description=__doc__)))
