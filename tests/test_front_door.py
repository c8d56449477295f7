"""A user's model in the user's loop: the public names, and what they make."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import qat
from export.lowered import ExportError
from export.predict import predict
from export.verify import verify_file
from qat.surgery.swap import quantizers
from tests.quick import slow_but
from tests.surgery.nets import TinyNet, with_random_norms

ROOT = Path(__file__).parent.parent
X = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(3))
Y = torch.arange(8) % 5
PUBLIC = {
    "FLOAT", "LSQ", "LSQPlus", "LayerSpec", "QuantSpec", "QuantizationTable", "Quantizer", "begin", "binary_rules",
    "calibrate", "certify", "export_onnx", "parameter_groups", "pause", "quantize_", "restore_norm_statistics",
    "set_norm_mode", "settle_", "uniform_rules",
}  # fmt: skip


def test_the_public_names_are_these_and_all_are_there() -> None:
    assert set(qat.__all__) == PUBLIC
    assert all(hasattr(qat, name) for name in PUBLIC) and set(dir(qat)) >= PUBLIC
    with pytest.raises(AttributeError, match="has no attribute 'quantise_'"):
        _ = qat.quantise_


@pytest.mark.parametrize("package", ["qat", "export", "edgeqat"])
def test_types_are_published(package: str) -> None:
    assert (ROOT / package / "py.typed").exists()


def own(target: str = "ort-int8", folder: Path | None = None, **said: Any) -> tuple[nn.Module, Path]:
    """A small net, trained two steps in a plain loop."""
    model = with_random_norms(TinyNet())
    qat.quantize_(model, qat.uniform_rules(4), X)
    qat.calibrate(model, DataLoader(TensorDataset(X, Y), batch_size=4))
    optimizer = torch.optim.AdamW(qat.parameter_groups(model, weight_decay=1e-4), lr=1e-3)
    model.train()
    for _ in range(2):
        loss = F.cross_entropy(model(X), Y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    qat.settle_(model)
    path = (folder or Path()) / "model.onnx"
    return model, qat.export_onnx(model, path, target, **said)


@pytest.mark.parametrize("target", ["ort-int8", "ort-packed", "ort-native"])
def test_a_model_of_ones_own_is_certified_without_a_run_folder(target: str, tmp_path: Path) -> None:
    model, file = own(target, tmp_path)
    certificate = qat.certify(model, file, X, Y)
    assert certificate.passed and certificate.accuracy["trained net"] == certificate.accuracy["ONNX Runtime"], str(
        certificate
    )
    assert verify_file(file).passed and verify_file(file).proven  # the proof is in the file
    if target == "ort-native":
        return
    session = ort.InferenceSession(file)
    assert [i.name for i in session.get_inputs()] == ["x"] and session.get_inputs()[0].shape[1:] == [3, 16, 16]
    for batch in (1, 3):  # the batch is open
        (found,) = session.run(None, {"x": X[:batch].numpy()})
        with torch.no_grad():
            expected = model(X[:batch]).numpy()
        assert (
            np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
        )  # a settled net: no code differs, sums are float32


def test_a_certificate_sees_another_model(tmp_path: Path) -> None:
    model, file = own(folder=tmp_path)
    with torch.no_grad():
        model.stem.weight.mul_(-1)
    certificate = qat.certify(model, file, X)
    assert not certificate.passed and "stem" in certificate.stored


def test_what_the_file_says_of_images_decides_whether_it_classifies_them(tmp_path: Path) -> None:
    from PIL import Image

    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(tmp_path / "image.png")
    _, silent = own(folder=tmp_path)
    with pytest.raises(ExportError, match=r"takes tensors \(x float32 .*export it with classes=, mean= and std="):
        predict(silent, [tmp_path / "image.png"])
    said: dict[str, Any] = {"classes": list("abcde"), "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}
    model, file = own(folder=tmp_path, **said)
    pixels = torch.full((1, 3, 16, 16), (0 - 0.5) / 0.2)
    assert predict(file, [tmp_path / "image.png"])[0].label == "abcde"[int(model(pixels).argmax())]
    assert qat.certify(model, file, X).passed
    with pytest.raises(ValueError, match="std missing"):
        own(folder=tmp_path, classes=list("abcde"), mean=(0.5, 0.5, 0.5))


class Depth(nn.Module):
    """Two inputs, a flag, two outputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.rgb, self.depth = nn.Conv2d(3, 8, 3), nn.Conv2d(1, 8, 3)
        self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 2)

    def forward(self, image: Tensor, depth: Tensor, with_b: bool = True) -> dict[str, Tensor]:
        features = (F.relu(self.rgb(image)) + F.relu(self.depth(depth))).mean((2, 3))
        return {"a": self.a(features)} | ({"b": self.b(features)} if with_b else {})


class OfOneDict(Depth):
    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:  # type: ignore[override]
        return super().forward(batch["image"], batch["depth"])


D = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(4))
EXAMPLES: dict[str, tuple[type[nn.Module], Any, set[str]]] = {
    "a tuple": (Depth, (X, D), {"a", "b"}),
    "a tuple with a flag": (Depth, (X, D, False), {"a"}),
    "a dict of arguments": (Depth, {"image": X, "depth": D}, {"a", "b"}),
    "a dict of arguments and a flag": (Depth, {"depth": D, "image": X, "with_b": False}, {"a"}),
    "one dict": (OfOneDict, {"image": X, "depth": D}, {"a", "b"}),
}


@pytest.mark.parametrize("kind", slow_but(["a tuple", "a dict of arguments and a flag", "one dict"], EXAMPLES))
def test_several_inputs_and_outputs_keep_their_names(kind: str, tmp_path: Path) -> None:
    make, example, outputs = EXAMPLES[kind]
    model = make()
    qat.quantize_(model, qat.uniform_rules(4), example)
    batch = {"image": X, "depth": D, "label": Y} if isinstance(example, dict) else (X, D, Y)
    qat.calibrate(model, [batch])
    model.eval()
    qat.settle_(model)
    file = qat.export_onnx(model, tmp_path / "two.onnx", target="ort-packed")
    graph = onnx.load(file).graph
    assert {value.name for value in graph.input} == {"image", "depth"}
    assert {value.name for value in graph.output} == outputs
    certificate = qat.certify(model, file, example)
    assert certificate.passed, str(certificate)
    assert verify_file(file).passed


BATCHES: dict[str, Any] = {
    "images": X, "pairs": (X, Y), "lists": [X, Y], "dicts": {"image": X, "label": Y}, "nested": ({"image": X}, Y),
}  # fmt: skip


@pytest.mark.parametrize("kind", BATCHES)
def test_calibrate_takes_batches_as_loaders_give_them(kind: str) -> None:
    scales = []
    for batch in (X, BATCHES[kind]):
        torch.manual_seed(0)
        model = with_random_norms(TinyNet())
        qat.quantize_(model, qat.uniform_rules(4), X)
        qat.calibrate(model, [batch])
        scales.append([float(quantizer.scale.mean()) for quantizer in quantizers(model).values()])
    assert scales[0] == scales[1]


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ("text", "batch 0: is a str"),
        ({"left": X, "right": X}, "is a dict of left, right, and forward takes a float32 tensor of 4 axes"),
        ((1, 2), "begins with a int"),
    ],
)
def test_a_batch_that_cannot_be_understood_is_named(batch: Any, words: str) -> None:
    model = with_random_norms(TinyNet())
    qat.quantize_(model, qat.uniform_rules(4), X)
    with pytest.raises(ValueError, match=words):
        qat.calibrate(model, [batch])


def test_what_is_not_quantized_is_not_exported() -> None:
    with pytest.raises(ValueError, match="the model is not quantized: call quantize_"):
        qat.export_onnx(nn.Linear(3, 3), "nowhere.onnx")
    assert not Path("nowhere.onnx").exists()


@pytest.mark.parametrize(
    ("library", "code", "extra"),
    [
        ("torch", "import qat; qat.quantize_", "torch"),
        ("onnxruntime", "import qat; qat.export_onnx(None, 'x.onnx')", "export"),
        ("onnx", "from pathlib import Path; from qat import cli; sys.exit(cli.guarded(lambda: cli.execute("
                 "cli.Predict(Path('x.onnx'), (Path('x.png'),)))))", "export"),
    ],
)  # fmt: skip
def test_a_missing_extra_is_named_with_its_command(library: str, code: str, extra: str) -> None:
    blocked = f"import sys; sys.modules[{library!r}] = None; {code}"
    done = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode != 0
    assert f'{library} is not installed; add it with: pip install "edgeqat[{extra}]"' in done.stderr


def test_every_extra_is_in_the_project_file() -> None:
    import tomllib

    from edgeqat.extras import EXTRAS

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for library, extra in EXTRAS.items():
        names = [re.split(r"[<>=\[]", entry)[0].replace("-", "_") for entry in project[extra]]
        assert library in names, f"{library} is not in extra {extra}"
    assert {"train", "report", "brevitas", "export", "all"} <= project.keys()
