"""What a file says about itself, what is checked without its run, and prediction from the file alone."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import nn

from export import session
from export.bench import bench, layer_bytes
from export.graph import emit_qdq
from export.lower import lower_float, lower_to_integers
from export.lowered import ExportError
from export.metadata import Preprocessing, broken_signatures, read_metadata, sign
from export.predict import predict, preprocess
from export.runtime_checks import settings_that_differ
from export.stress import OPTIMIZERS, adversarial, culprit
from export.targets import TARGETS
from export.verify import verify_file
from tests.export.conftest import Exported, build_tiny

INPUT = Preprocessing(32, (0.5, 0.4, 0.3), (0.2, 0.3, 0.25), ("ant", "bee", "cat", "dog", "elk"))
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=["ort-int8", "ort-packed"])
def signed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = TARGETS[request.param]
    lowered = lower_to_integers(build_tiny(4, IMAGES), IMAGES, target)
    file = tmp_path_factory.mktemp("file") / "model.onnx"
    onnx.save(sign(emit_qdq(lowered, target), lowered, target, INPUT, "test"), str(file))
    return file


def test_a_signed_file_is_verified_without_its_run(signed: Path) -> None:
    check = verify_file(signed)
    assert check.passed and check.kernels == check.layers == 6, str(check)
    metadata = read_metadata(onnx.load(str(signed)), "model")
    parts = ("sha256", "scale_sha256", "bias_sha256")
    joined = "".join(entry[part] for entry in metadata["layers"] for part in parts)
    assert metadata["sha256"] == hashlib.sha256(joined.encode()).hexdigest()
    assert metadata["input"]["classes"] == list(INPUT.classes) and metadata["runtime"]["onnxruntime"] == ">=1.18"


def test_a_changed_code_breaks_the_signature(signed: Path, tmp_path: Path) -> None:
    proto = onnx.load(str(signed))
    tensor = next(t for t in proto.graph.initializer if t.name.startswith("left.weight") and len(t.raw_data) >= 24)
    tensor.raw_data = bytes([tensor.raw_data[0] ^ 0x10]) + tensor.raw_data[1:]
    assert broken_signatures(proto, read_metadata(proto, "x")) == {"left": "its codes do not match their SHA-256"}
    changed = tmp_path / "changed.onnx"
    onnx.save(proto, str(changed))
    assert not verify_file(changed).passed and "left" in str(verify_file(changed))


def test_a_file_without_or_with_newer_metadata_is_refused(tiny: Exported, signed: Path) -> None:
    with pytest.raises(ExportError, match="carries no edgeqat metadata"):
        read_metadata(tiny.proto, "tiny.onnx")
    proto = onnx.load(str(signed))
    onnx.helper.set_model_props(proto, {"edgeqat": json.dumps({"format": 99})})
    with pytest.raises(ExportError, match="format 99 is newer"):
        read_metadata(proto, "tiny.onnx")


def test_predictions_match_a_computation_by_hand_and_the_example(signed: Path, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(picture)
    x = (pixels.astype(np.float32) / 255 - np.array(INPUT.mean, np.float32)) / np.array(INPUT.std, np.float32)
    assert np.allclose(
        preprocess(picture, read_metadata(onnx.load(str(signed)), "m")["input"])[0], x.transpose(2, 0, 1), atol=1e-6
    )
    logits = session.load(signed).run(np.ascontiguousarray(x.transpose(2, 0, 1)[None]))["logits"][0].astype(np.float64)
    (found,) = predict(signed, [picture])
    assert found.label == INPUT.classes[int(logits.argmax())]
    assert found.probability == pytest.approx(1 / np.exp(logits - logits.max()).sum())
    example = Path(__file__).parents[2] / "examples/predict.py"
    printed = subprocess.check_output([sys.executable, str(example), str(signed), str(picture)], text=True)
    assert printed.strip() == f"{picture}: {found.label}"
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    with pytest.raises(ExportError, match=r"broken\.png: not a readable image"):
        predict(signed, [broken])


def test_adversarial_codes_find_a_wrong_layer(tiny: Exported) -> None:
    assert adversarial(tiny.lowered, tiny.proto) == {}
    proto = onnx.ModelProto()
    proto.CopyFrom(tiny.proto)
    tensor = next(t for t in proto.graph.initializer if t.name == "block.conv1.weight")
    tensor.raw_data = bytes([tensor.raw_data[0] ^ 0x40]) + tensor.raw_data[1:]
    found = adversarial(tiny.lowered, proto)
    assert list(found) == ["block.conv1"] and "all-max" in found["block.conv1"]


def test_settings_are_compared_code_by_code(tiny: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings_that_differ(tiny.proto, tiny.images) == {}
    plain = session.load

    def unsteady(model: onnx.ModelProto, *, threads: int = 1, **options: object) -> session.Session:
        loaded = plain(model, threads=threads, **options)  # type: ignore[arg-type]
        if threads == 2:
            run = loaded.run
            loaded.run = lambda images: {  # type: ignore[method-assign]
                n: v + np.uint8(1) if v.dtype == np.uint8 else v for n, v in run(images).items()
            }
        return loaded

    monkeypatch.setattr(session, "load", unsteady)
    assert list(settings_that_differ(tiny.proto, tiny.images)) == ["2 threads"]


def test_bisection_finds_the_one_optimizer_or_says_there_is_none() -> None:
    asked: list[tuple[str, ...]] = []

    def differs(without: tuple[str, ...]) -> bool:
        asked.append(without)
        return "NhwcTransformer" not in without

    assert culprit(differs) == ("NhwcTransformer",)
    assert len(asked) <= 2 * len(OPTIMIZERS).bit_length() + 1
    assert culprit(lambda without: True) == ()


def test_the_runtime_really_has_a_named_optimizer_that_changes_codes() -> None:
    """Two 8-bit quantizers in a row: DoubleQDQPairsRemover drops one of them, which bisection must find."""
    make = onnx.helper.make_node
    scales = {"s1": np.float32(0.1), "s2": np.float32(0.07), "z": np.uint8(0)}
    nodes = [
        make("QuantizeLinear", ["x", "s1", "z"], ["a"]), make("DequantizeLinear", ["a", "s1", "z"], ["b"]),
        make("QuantizeLinear", ["b", "s2", "z"], ["c"]), make("DequantizeLinear", ["c", "s2", "z"], ["y"]),
    ]  # fmt: skip
    infos = [onnx.helper.make_tensor_value_info(n, 1, [1, 999]) for n in "xy"]
    graph = onnx.helper.make_graph(
        nodes, "g", infos[:1], infos[1:], [onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in scales.items()]
    )
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    x = np.linspace(0, 10, 999, dtype=np.float32)[None]
    expected = session.load(proto, level="DISABLE").run(x)["y"]
    assert culprit(lambda without: not np.array_equal(session.load(proto, without=without).run(x)["y"], expected)) == (
        "DoubleQDQPairsRemover",
    )


def test_bench_rows_and_bytes_per_layer(tiny: Exported) -> None:
    table = bench(lower_float(tiny.model, torch.from_numpy(tiny.images)), {"w4": tiny.proto}, tiny.images, rounds=3)
    assert [row.name for row in table.rows] == ["fp32", "ort static int8", "w4"]
    assert all(row.median_ms > 0 and row.peak_mb >= 0 for row in table.rows) and table.rows[0].over_fp32 == 1.0
    sizes = layer_bytes(tiny.proto)
    assert sizes["block.conv1"] == 8 * 8 * 9 + 2 * 8 * 4  # codes, scale, bias
    assert "x fp32" in str(table)


class MaskedAttention(nn.Module):
    """Fused attention with a learned mask whose axes lie in another order, as timm makes it of relative positions."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(48, 144)
        self.mask = nn.Parameter(torch.randn(16, 16, 3))
        self.out = nn.Linear(48, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[0]
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).reshape(n, 16, 3, 3, 16).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.mask.permute(2, 0, 1).unsqueeze(0))
        return self.out(mixed.transpose(1, 2).reshape(n, 16, 48).mean(1))


def test_masked_attention_has_a_file_in_full_precision() -> None:
    torch.manual_seed(0)
    model = MaskedAttention().eval()
    images = torch.randn(3, 48, 4, 4)
    found = session.load(lower_float(model, images)).run(images.numpy())["logits"]
    with torch.no_grad():
        expected = model(images).numpy()
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max() + 1e-6


def test_half_precision_baseline_runs(tiny: Exported) -> None:
    fp32 = lower_float(tiny.model, torch.from_numpy(tiny.images))
    half = session.fp16(fp32)
    onnx.checker.check_model(half, full_check=True)
    weights = [sum(len(t.raw_data) for t in p.graph.initializer) for p in (fp32, half)]
    assert weights[1] < 0.55 * weights[0]
    a, b = (session.load(p).run(tiny.images)["logits"] for p in (fp32, half))
    assert np.abs(a - b).max() < 0.01 * np.abs(a).max()  # float16 has 11 bits
