"""Target ort-native: every code is the defined one and the stock twin's, on every instruction set."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from edgeqat.cpp import compiler
from export import session
from export.certificate import certify, compare_stored
from export.kernels import library as kernels_library
from export.kernels.build import HERE
from export.lower import lower_to_integers, trained_codes
from export.lowered import ExportError, LoweredModel, LoweredQuantizer
from export.native_file import is_native, quantizer_names
from export.native_graph import emit, requantizing_table
from export.reference import Codes, IntegerReference, quantize
from export.runtime_checks import layer_kernels
from export.targets import TARGETS
from qat.surgery.calibrate import calibrate
from qat.surgery.swap import quantize_, uniform_rules
from tests.export.conftest import build_tiny
from tests.surgery.nets import with_random_norms

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler to build the kernels with")
IMAGES = torch.randn(3, 3, 33, 29, generator=torch.Generator().manual_seed(9))
ISAS = ("portable", "avx2", "avxvnni", "avx512")


class Wide(nn.Module):
    """What TinyNet has not: channels enough for Winograd, a second summand computed later, one sum read by three."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 20, 3, padding=1)
        self.conv1, self.bn1 = nn.Conv2d(20, 70, 3, padding=1, bias=False), nn.BatchNorm2d(70)
        self.conv2, self.bn2 = nn.Conv2d(70, 35, 3, stride=2, padding=1, groups=5, bias=False), nn.BatchNorm2d(35)
        self.short = nn.Conv2d(20, 35, 1, stride=2)
        self.conv3 = nn.Conv2d(35, 35, 3, padding=2, dilation=2)
        self.gate = nn.Conv2d(35, 35, 1)
        self.head = nn.Linear(35, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y = torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + self.short(x))
        y = y + self.conv3(y)
        y = y * torch.sigmoid(self.gate(y))
        return self.head(y.mean((2, 3)))


def lowered(model: nn.Module, target: str) -> LoweredModel:
    return lower_to_integers(model, IMAGES, TARGETS[target])


def build_wide(bits: int) -> nn.Module:
    torch.manual_seed(bits)
    model = with_random_norms(Wide()).eval()
    quantize_(model, uniform_rules(bits, bits, ("stem", "head")), IMAGES[:1], weight_init="mse")
    calibrate(model, [IMAGES])
    return model


@pytest.mark.parametrize(("net", "bits"), [("tiny", 4), ("tiny", 8), ("wide", 2), ("wide", 3), ("wide", 6)])
def test_native_files_are_certified(net: str, bits: int, tmp_path: Path) -> None:
    model = build_tiny(bits, IMAGES) if net == "tiny" else build_wide(bits)
    canonical = lowered(model, "ort-native")
    proto, file = emit(canonical, TARGETS["ort-native"]), tmp_path / "native.onnx"
    onnx.save(proto, str(file))
    result = certify(canonical, file, IMAGES.numpy(), np.zeros(3, np.int64), lambda x: trained_codes(model, x))
    assert result.passed, str(result)
    assert result.integer_kernels == result.layers
    assert set(layer_kernels(canonical.layer_names, proto).values()) <= {"QConv", "QGemmFloat"}


@pytest.mark.parametrize("bits", [3, 4])
def test_the_stock_twin_computes_the_same_codes_and_weighs_the_same(bits: int) -> None:
    model = build_wide(bits)
    native, packed = (emit(lowered(model, t), TARGETS[t]) for t in ("ort-native", "ort-packed"))
    names = sorted(quantizer_names(native))
    first, second = (session.load(session.with_outputs(p, names)).run(IMAGES.numpy()) for p in (native, packed))
    assert is_native(native) and not is_native(packed)
    assert {n: int((first[n] != second[n]).sum()) for n in names} == dict.fromkeys(names, 0)
    assert np.array_equal(first["logits"], second["logits"])
    sizes = {t.name: numpy_helper.to_array(t).nbytes for t in native.graph.initializer}
    assert sum(sizes[f"conv1.weight/p{i}"] for i in range(1 if bits == 4 else 2)) == -(-70 * 20 * 9 * bits // 8)


def test_residual_sums_and_requantizers_are_part_of_their_layer() -> None:
    proto = emit(lowered(build_wide(4), "ort-native"), TARGETS["ort-native"])
    sums = [node for node in proto.graph.node if node.op_type == "QConv" and len(node.input) > 6 and node.input[6]]
    assert [node.name for node in sums] == ["short", "conv3"]
    assert not [node for node in proto.graph.node if node.op_type in ("QAdd", "QTables")]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_computes_the_defined_codes(isa: str, threads: int, tmp_path: Path) -> None:
    """In a process of its own: the choice is made once, when the library is registered."""
    canonical = lowered(build_wide(4), "ort-native")
    proto, names = emit(canonical, TARGETS["ort-native"]), list(canonical.quantizers)
    file, found = tmp_path / "native.onnx", tmp_path / "codes.npz"
    onnx.save(session.with_outputs(proto, names), str(file))
    np.save(tmp_path / "images.npy", IMAGES.numpy())
    code = (
        "import sys, numpy as np\nfrom export import session\nfrom export.lowered import ExportError\n"
        "try: loaded = session.load(sys.argv[1], threads=int(sys.argv[4]))\n"
        "except ExportError as error: sys.exit(7 if 'cannot run it' in str(error) else str(error))\n"
        "np.savez(sys.argv[3], **loaded.run(np.load(sys.argv[2])))"
    )
    command = [sys.executable, "-c", code, str(file), str(tmp_path / "images.npy"), str(found), str(threads)]
    done = subprocess.run(command, env=os.environ | {"EDGEQAT_ISA": isa}, capture_output=True, text=True)
    if done.returncode == 7:
        pytest.skip(f"this processor has no {isa}")
    assert done.returncode == 0, done.stderr
    outputs = dict(np.load(found))
    expected, defined = IntegerReference(canonical, session.FloatOperators()).run(IMAGES, given=outputs)
    assert {n: int((expected[n] != outputs[n]).sum()) for n in names} == dict.fromkeys(names, 0)
    assert np.array_equal(defined["logits"], outputs["logits"])


def test_a_table_holds_the_defined_code_of_every_code() -> None:
    generator = np.random.default_rng(0)
    for _ in range(30):
        bits = generator.integers(2, 9, 2)
        signed = generator.integers(0, 2, 2)
        scales = generator.uniform(0.01, 1.0, 2)
        source, target = (
            LoweredQuantizer.in_storage("q", s, int(b), bool(n)) for s, b, n in zip(scales, bits, signed, strict=True)
        )
        stored = torch.arange(256).float().view(1, 1, 16, 16)
        expected = quantize(Codes(stored, source), target).numpy().ravel()
        assert np.array_equal(requantizing_table(source, target), expected)


def test_a_flipped_bit_in_a_native_file_is_found_and_its_layer_named() -> None:
    canonical = lowered(build_wide(4), "ort-native")
    proto = emit(canonical, TARGETS["ort-native"])
    assert compare_stored(canonical, proto) == {}
    plane = next(t for t in proto.graph.initializer if t.name == "conv3.weight/p0")
    plane.raw_data = bytes([plane.raw_data[0] ^ 0x10]) + plane.raw_data[1:]
    assert compare_stored(canonical, proto) == {"conv3": f"1 of {35 * 35 * 9} weight codes differ"}
    outputs = session.load(session.with_outputs(proto, list(canonical.quantizers))).run(IMAGES.numpy())
    expected, _ = IntegerReference(canonical, session.FloatOperators()).run(IMAGES, given=outputs)
    wrong = [n for n in canonical.quantizers if (expected[n] != outputs[n]).any()]
    assert len(wrong) == 1 and wrong[0].startswith("conv3#")


def test_without_a_library_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    proto = emit(lowered(build_tiny(4, IMAGES), "ort-native"), TARGETS["ort-native"])
    kernels_library.library.cache_clear()
    monkeypatch.setattr(kernels_library, "library_name", lambda: "absent.so")
    monkeypatch.setattr("edgeqat.cpp.compiler", lambda architecture=None: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(
        ExportError, match=r"no C\+\+ compiler found .* Install a C\+\+ compiler and load the file again"
    ):
        session.load(proto)
    monkeypatch.setenv("EDGEQAT_KERNELS", str(tmp_path / "gone.so"))
    with pytest.raises(ExportError, match=r"EDGEQAT_KERNELS=.*gone\.so: no such file"):
        session.load(proto)
    monkeypatch.setenv("EDGEQAT_KERNELS", str(tmp_path))
    with pytest.raises(ExportError, match=r"EDGEQAT_KERNELS=.*: is not a regular file"):
        session.load(proto)
    kernels_library.library.cache_clear()


def test_a_damaged_native_file_is_refused_with_its_layer() -> None:
    proto = emit(lowered(build_wide(4), "ort-native"), TARGETS["ort-native"])
    plane = next(t for t in proto.graph.initializer if t.name == "conv1.weight/p0")
    plane.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(plane)[:-3], plane.name))
    with pytest.raises(ExportError, match=r"layer conv1: has a weight plane of wrong size"):
        session.load(proto)


def test_the_sources_include_nothing_of_the_runtime() -> None:
    for path in [*HERE.glob("*.hpp"), *HERE.glob("*.cpp")]:
        assert "onnxruntime" not in path.read_text(), f"{path.name} mentions the runtime's headers"
