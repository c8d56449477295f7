"""Who may import whom (DESIGN §2), read from the source with ast; and what `import qat` loads."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(path for package in ("edgeqat", "qat", "export") for path in ROOT.glob(f"{package}/**/*.py"))

# Layer of qat -> the layers of qat it may import.
LAYERS = {
    "quantizers": {"quantizers", "words"},
    "surgery": {"quantizers", "surgery", "words"},
    "objectives": {"quantizers", "surgery", "objectives", "words"},
    "domains": {"quantizers", "surgery", "domains", "words"},
    "runs": {"quantizers", "surgery", "objectives", "runs", "words"},
    "train": {"quantizers", "surgery", "objectives", "domains", "runs", "train", "settle", "words"},
    "analysis": {"quantizers", "surgery", "objectives", "domains", "runs", "train", "analysis", "settle", "words"},
    "sweep": {"domains", "runs", "analysis", "sweep", "words"},
}
DOORS = {
    "timm": {"qat/surgery/backbones.py"},
    "brevitas": {"qat/surgery/brevitas_bridge.py"},
    "accelerate": {"qat/train/loop.py", "qat/train/processes.py"},
    "onnxruntime": {"export/session.py", "export/bundled/check.py"},  # the latter runs alone, on a device
    "openvino": {"export/openvino_session.py"},
    "torch.onnx": {"export/lower.py"},
    "huggingface_hub": {"qat/hub.py"},
}
TORCH_IN_EXPORT = {
    "export/lower.py", "export/reference.py", "export/certificate.py", "export/stress.py", "export/agreement.py",
    "export/bundle.py", "export/across.py", "export/fidelity.py",
}  # fmt: skip
# What `edgeqat`, below both packages, may import beside itself.
ON_THE_GROUND = sys.stdlib_module_names | {"numpy", "PIL"}
EXPORT_FROM_QAT = {"qat/deploy.py", "qat/cli.py", "qat/settle.py", "qat/own_model.py", "qat/proof.py", "qat/hub.py"}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(module, whether at module level and at run time) of every import."""
    tree = ast.parse(path.read_text())
    top = {id(n) for n in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or "", id(node) in top


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_imports_only_what_is_below_it(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    package, *rest = name.split("/")
    for module, at_top in imports(path):
        parts = module.split(".")
        for library, doors in DOORS.items():
            if module == library or module.startswith(f"{library}."):
                assert name in doors, f"{name} imports {module}; its one door is {', '.join(doors)}"
        if package == "qat" and parts[0] == "export":
            assert name in EXPORT_FROM_QAT and not at_top, f"{name} imports {module}"
        if package == "qat" and parts[0] == "qat" and len(parts) > 1 and len(rest) > 1:
            assert parts[1] in LAYERS[rest[0]], f"{name} imports {module}"
        if package == "edgeqat":
            assert parts[0] in ON_THE_GROUND | {"edgeqat"}, f"{name} imports {module}"
        if package == "export" and parts[0] == "qat":
            assert name == "export/lower.py", f"{name} imports {module}"
        if package == "export" and parts[0] == "torch":
            assert name in TORCH_IN_EXPORT, f"{name} imports {module}"


def test_the_rules_see_something() -> None:
    assert len(FILES) > 25
    assert any(m == "timm" for m, _ in imports(ROOT / "qat/surgery/backbones.py"))


def test_import_qat_loads_none_of_the_heavy_libraries() -> None:
    heavy = "'torch', 'timm', 'brevitas', 'onnx', 'onnxruntime'"
    code = f"import sys, qat; print([m for m in ({heavy}) if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "[]"


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("qat.surgery.swap, qat.quantizers.lsq, qat.domains.folders", ("timm", "brevitas", "onnx", "onnxruntime")),
        pytest.param(
            "qat.train.loop, qat.analysis.report",
            ("brevitas", "onnx", "onnxscript", "onnxruntime"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_training_loads_neither_onnx_nor_the_runtime(modules: str, absent: tuple[str, ...]) -> None:
    code = f"import sys, {modules}; print([m for m in {absent} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "[]"


@pytest.mark.parametrize("module", ["export.predict", "export.verify", "export.session", "export.bundled.check"])
def test_what_a_device_runs_loads_neither_torch_nor_qat(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'torchvision', 'timm', 'qat') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "[]"
