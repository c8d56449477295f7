"""The CUDA kernels: in Triton's interpreter against the plain formula, through its compiler, on a GPU where there is one."""

import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qat.quantizers import fused
from tests.quantizers.interpreted import cases

ROOT = Path(__file__).parents[2]


# Marked slow so that `.ci/run` can give them a pytest of one process: a worker of pytest-xdist dies, without a word and not
# every time, when it comes to them.
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="this PyTorch comes without Triton")


def in_its_own_process(module: str, **variables: str) -> str:
    """What a module prints. Triton is never imported here: its crash must be one failed test, not the end of the suite."""
    done = subprocess.run(
        [sys.executable, "-m", module],
        cwd=ROOT,
        env=os.environ | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        start_new_session=True,
    )
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr}"
    return done.stdout


@pytest.mark.slow
@needs_triton
def test_kernels_agree_with_the_plain_formula_in_the_interpreter() -> None:
    printed = in_its_own_process("tests.quantizers.interpreted", TRITON_INTERPRET="1")
    assert int(printed.split()[0]) == len(cases()) > 50


@pytest.fixture(scope="module")
def machine_code() -> dict[str, str]:
    return dict(json.loads(in_its_own_process("tests.quantizers.compiled")))


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("element", ["*fp32", "*bf16"])
@pytest.mark.parametrize("inner", [1, None])
@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_kernels_compile_for_a_gpu_that_is_not_here(
    element: str, inner: int | None, pass_: str, machine_code: dict[str, str]
) -> None:
    """The interpreter takes what the compiler rejects. Division and rounding in the result are IEEE's, denormals are kept."""
    code = machine_code[f"{pass_} {inner} {element}"]
    assert "div.rn.f32" in code and "div.full" not in code and ".ftz" not in code and "fma." not in code


def test_without_triton_there_is_one_note_and_the_plain_formula(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "qat.quantizers.lsq_triton", None)
    with caplog.at_level(logging.WARNING, logger="edgeqat"):
        assert fused._gpu_kernels.__wrapped__(torch.device("cpu")) is None
    assert "Triton kernels cannot be used" in caplog.text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_kernels_agree_with_the_plain_formula_on_a_gpu() -> None:
    from tests.quantizers.interpreted import run

    x = torch.randn(fused.SMALLEST_ON_GPU, device="cuda")
    assert fused.available(x, torch.tensor(0.1, device="cuda"))
    assert not fused.available(x[1:], torch.tensor(0.1, device="cuda"))
    assert run("cuda") == len(cases())
