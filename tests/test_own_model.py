"""What a user of the front door can get wrong is refused by name, before work begins; what he may do works."""

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qat
from export.lowered import ExportError
from qat.surgery.swap import quantizers
from tests.quick import slow_but
from tests.surgery.nets import TinyNet, with_random_norms

ROOT = Path(__file__).parent.parent
X = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(3))
Y = torch.arange(8) % 5


def ready(model: nn.Module, example: Any = X) -> nn.Module:
    """The model quantized, calibrated and settled."""
    qat.quantize_(model, qat.uniform_rules(4), example)
    qat.calibrate(model, [example])
    model.eval()
    qat.settle_(model)
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    model = ready(with_random_norms(TinyNet()))
    return model, qat.export_onnx(model, tmp_path_factory.mktemp("own") / "model.onnx")


class Siamese(nn.Module):
    """Two inputs of one shape, of which the second counts three times: a file that swaps them answers otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        joined = F.relu(self.conv(left)) + 3 * F.relu(self.conv(right))
        features: Tensor = self.head(joined.mean((2, 3)))
        return features


class SiameseOfDict(Siamese):
    def forward(self, pair: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(pair["left"], pair["right"])


@pytest.mark.parametrize("kind", [Siamese, SiameseOfDict])
@pytest.mark.parametrize("order", list(itertools.permutations(["left", "right"])), ids="-".join)
def test_inputs_go_by_name_whatever_the_order_of_the_example(
    kind: type[nn.Module], order: tuple[str, ...], tmp_path: Path
) -> None:
    sides = {"left": X, "right": X.flip(0) * 2}
    model = ready(kind(), {name: sides[name] for name in order})
    file = qat.export_onnx(model, tmp_path / "model.onnx")
    (found,) = ort.InferenceSession(file).run(None, {name: value.numpy() for name, value in sides.items()})
    with torch.no_grad():
        expected = (model(sides) if kind is SiameseOfDict else model(**sides)).numpy()
        swapped = {"left": sides["right"], "right": sides["left"]}
        wrong = (model(swapped) if kind is SiameseOfDict else model(**swapped)).numpy()
    assert np.abs(found - expected).max() < 0.1 * np.abs(wrong - expected).max()
    if order[0] == "right":  # a certificate takes seconds
        assert qat.certify(model, file, sides).passed


class Named(nn.Module):
    """A net whose answer has the given name."""

    def __init__(self, answer: str) -> None:
        super().__init__()
        self.answer, self.conv, self.head = answer, nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {self.answer: self.head(F.relu(self.conv(x)).mean((2, 3)))}


@pytest.mark.parametrize("name", ["x", "conv.input"])
def test_a_name_that_the_file_has_already_is_refused(name: str, tmp_path: Path) -> None:
    model = ready(Named(name))
    with pytest.raises(ExportError, match=f"two tensors of the file would have the name '{name}'"):
        qat.export_onnx(model, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


class Unpooled(nn.Module):
    """PyTorch's exporter writes its graph in an order that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        pooled, places = F.max_pool2d(F.relu(self.conv(x)), 2, return_indices=True)
        return self.head(self.last(F.max_unpool2d(pooled, places, (2, 2))).mean((2, 3)))


def test_a_graph_that_the_exporter_writes_wrong_is_one_error(tmp_path: Path) -> None:
    model = ready(Unpooled())
    for target in ("ort-int8", "ort-native"):
        with pytest.raises(
            ExportError, match=r"not a valid ONNX file|none that an edgeqat file may have|operands do not fit"
        ):
            qat.certify(model, qat.export_onnx(model, tmp_path / "model.onnx", target), X)


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "data parallel": nn.DataParallel,
    "both": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
}


@pytest.mark.parametrize("kind", slow_but(["data parallel"], WRAPPERS))
def test_a_wrapped_model_is_calibrated_settled_exported_and_certified_as_itself(kind: str, tmp_path: Path) -> None:
    files: list[Path] = []
    scales: list[list[float]] = []
    for wrap in (lambda model: model, WRAPPERS[kind]):
        torch.manual_seed(0)
        model = with_random_norms(TinyNet())
        qat.quantize_(model, qat.uniform_rules(4), X)
        outer = wrap(model)
        qat.calibrate(outer, [X])
        outer.eval()
        qat.settle_(outer)
        scales.append([float(quantizer.scale.mean()) for quantizer in quantizers(model).values()])
        files.append(qat.export_onnx(outer, tmp_path / f"{len(files)}.onnx"))
    assert files[0].read_bytes() == files[1].read_bytes() and scales[0] == scales[1]
    if kind == "both":  # a certificate takes seconds
        assert qat.certify(outer, files[1], X).passed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_what_is_not_float32_is_refused_as_it_is(dtype: torch.dtype, exported: tuple[nn.Module, Path]) -> None:
    import copy

    model = copy.deepcopy(exported[0]).to(dtype)
    before = {name: value.clone() for name, value in model.named_parameters()}
    calls = [lambda: qat.settle_(model), lambda: qat.export_onnx(model, "nowhere.onnx")]
    for call in (*calls, lambda: qat.certify(model, exported[1], X)):
        with pytest.raises(ValueError, match=r"parameter '.*' is (bfloat16|float64), files compute in float32"):
            call()
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert not Path("nowhere.onnx").exists()


WRONG_IMAGES: dict[str, tuple[Any, str]] = {
    "none": (X[:0], "images for 'x' are none"),
    "of another size": (torch.randn(4, 3, 20, 20), r"have shape \[4, 3, 20, 20\], the file takes \['N', 3, 16, 16\]"),
    "of other channels": (X[:, :1], r"have shape \[8, 1, 16, 16\]"),
    "without a batch": (X[0], "holds a float32 tensor of 3 axes where forward takes a float32 tensor of 4 axes"),
    "bytes": (X.to(torch.uint8), "holds a uint8 tensor of 4 axes"),
    "float64": (X.double(), "holds a float64 tensor of 4 axes"),
    "not finite": (X / 0, "hold NaN or infinity"),
    "a loader": (iter([X]), "is a list_iterator"),
}


@pytest.mark.parametrize("kind", WRONG_IMAGES)
def test_images_that_the_file_does_not_take_are_named(kind: str, exported: tuple[nn.Module, Path]) -> None:
    images, words = WRONG_IMAGES[kind]
    with pytest.raises(ValueError, match=f"certify: .*{words}"):
        qat.certify(*exported, images)


@pytest.mark.parametrize("labels", [Y[:3], F.one_hot(Y), Y / 1.0], ids=["too few", "one-hot", "floats"])
def test_labels_that_do_not_go_with_the_images_are_named(labels: Tensor, exported: tuple[nn.Module, Path]) -> None:
    with pytest.raises(ValueError, match=r"labels are .*; 8 images need 8 class numbers"):
        qat.certify(*exported, X, labels)


def test_certify_takes_a_batch_of_the_loader_and_arrays(exported: tuple[nn.Module, Path]) -> None:
    model, _ = exported
    with torch.no_grad():
        accuracy = float((model(X).argmax(1) == Y).float().mean())
    certificate = qat.certify(*exported, (X, Y), Y.tolist())
    assert certificate.passed and certificate.images == 8
    assert certificate.accuracy == {"trained net": accuracy, "ONNX Runtime": accuracy}
    assert "as in the run" not in str(certificate)  # there is none
    assert "classes and preprocessing was compared with nothing" in str(certificate)
    of_arrays = qat.certify(*exported, X[:4].numpy())
    assert of_arrays.passed and of_arrays.images == 4 and not of_arrays.accuracy


WRONG_CLASSES: dict[str, tuple[dict[str, Any], str]] = {
    "too few": ({"classes": ["a"]}, "classes has 1 names, and the first output, 'logits'"),
    "a text": ({"classes": "abcde"}, "classes is the text 'abcde'"),
    "mean": ({"mean": (0.5, 0.5)}, "mean is .0.5, 0.5.; it needs three numbers"),
    "std": ({"std": (1.0, 1.0, 0.0)}, "it needs numbers above 0"),
}


@pytest.mark.parametrize("kind", WRONG_CLASSES)
def test_a_file_that_nobody_could_read_is_not_written(
    kind: str, exported: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    wrong, words = WRONG_CLASSES[kind]
    said = {"classes": list("abcde"), "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)} | wrong
    with pytest.raises(ValueError, match=words):
        qat.export_onnx(exported[0], tmp_path / "model.onnx", **said)
    assert not (tmp_path / "model.onnx").exists()


def test_calibrate_runs_the_first_batches_and_reads_no_more() -> None:
    data = torch.randn(40, 4, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    read: list[int] = []

    def loader() -> Iterator[Tensor]:
        for index, batch in enumerate(data):
            read.append(index)
            yield batch

    def scales(given: Any, **options: Any) -> list[float]:
        torch.manual_seed(0)
        model = with_random_norms(TinyNet())
        qat.quantize_(model, qat.uniform_rules(4), X)
        qat.calibrate(model, given, **options)
        return [float(quantizer.scale.mean()) for quantizer in quantizers(model).values()]

    for options, count in (({"batches": 2}, 2), ({}, 32), ({"batches": None}, 40)):
        read.clear()
        assert scales(loader(), **options) == scales(list(data[:count]), batches=None)
        assert len(read) == count
    with pytest.raises(ValueError, match="batches=0; one batch at least"):
        scales([X], batches=0)


WRONG_BATCHES: dict[str, tuple[Any, str]] = {
    "labels first": (
        [(Y, X)],
        "batch 0: holds a int64 tensor of 1 axes where forward takes a float32 tensor of 4 axes",
    ),
    "bytes": ([X.to(torch.uint8)], "batch 0: holds a uint8 tensor"),
    "float64": ([X, X.double()], "batch 1: holds a float64 tensor"),
    "a tensor for a loader": (X, "batch 0: holds a float32 tensor of 3 axes"),
    "arrays": ([X.numpy()], "batch 0: is a ndarray"),
}


@pytest.mark.parametrize("kind", WRONG_BATCHES)
def test_a_batch_that_forward_does_not_take_is_named(kind: str) -> None:
    batches, words = WRONG_BATCHES[kind]
    model = with_random_norms(TinyNet())
    qat.quantize_(model, qat.uniform_rules(4), X)
    with pytest.raises(ValueError, match=words):
        qat.calibrate(model, batches)
    assert not any(q.initialized for q in quantizers(model).values() if not q.is_weight)


class OfOneList(Siamese):
    def forward(self, sides: list[Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(*sides)


@pytest.mark.parametrize("batch", [[X, X * 2], ([X, X * 2], Y)], ids=["the list", "the list and labels"])
def test_a_model_of_one_list_gets_the_whole_list(batch: Any) -> None:
    scales = []
    for model, example, given in ((Siamese(), (X, X), (X, X * 2)), (OfOneList(), ([X, X],), batch)):
        torch.manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        qat.quantize_(model, qat.uniform_rules(4), example)
        qat.calibrate(model, [given])
        scales.append([float(quantizer.scale.mean()) for quantizer in quantizers(model).values()])
    assert scales[0] == scales[1]


OWN_LOOP = """
import torch, qat
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
x = torch.randn(4, 3, 8, 8)
print(qat.quantize_(model, qat.uniform_rules(4), x))
qat.calibrate(model, [(x, None)])
optimizer = torch.optim.AdamW(qat.parameter_groups(model, weight_decay=1e-4), lr=1e-3)
model(x).sum().backward()
optimizer.step()
model.eval()
"""
OF_OTHER_EXTRAS = (
    "accelerate", "brevitas", "jinja2", "matplotlib", "rich", "safetensors", "tensorboard", "timm", "torchmetrics",
    "torchvision",
)  # fmt: skip


@pytest.mark.parametrize(
    ("blocked", "then"),
    [
        ((*OF_OTHER_EXTRAS, "onnx", "onnx_ir", "onnxruntime", "onnxscript"), ""),
        pytest.param(
            OF_OTHER_EXTRAS,
            "qat.settle_(model)\nassert qat.certify(model, qat.export_onnx(model, 'model.onnx'), x).passed",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["torch alone", "torch and export"],
)
def test_a_loop_of_ones_own_needs_no_other_extra(blocked: tuple[str, ...], then: str, tmp_path: Path) -> None:
    code = f"import sys\nfor name in {blocked}: sys.modules[name] = None\n{OWN_LOOP}{then}\nprint('done')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}
    )
    assert done.stdout.endswith("done\n"), done.stderr[-2000:]


def test_settling_without_the_export_extra_names_it() -> None:
    code = f"import sys\nsys.modules['onnxscript'] = None\n{OWN_LOOP}qat.settle_(model)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert 'onnxscript is not installed; add it with: pip install "edgeqat[export]"' in done.stderr
