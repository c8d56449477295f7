"""The CUDA kernels: in Triton's interpreter against the plain formula, through its compiler, on a GPU where there is one."""

import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from qat.quantizers import fused

ROOT = Path(__file__).parents[2]


def test_kernels_agree_with_the_plain_formula_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="this PyTorch comes without Triton")
    done = subprocess.run(
        [sys.executable, "-m", "tests.quantizers.interpreted"],
        cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) == 99


@pytest.mark.parametrize("element", ["*fp32", "*bf16"])
@pytest.mark.parametrize("inner", [1, None])
@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_kernels_compile_for_a_gpu_that_is_not_here(element: str, inner: int | None, pass_: str) -> None:
    """The interpreter takes what the compiler rejects. Division and rounding in the result are IEEE's, denormals are kept."""
    triton = pytest.importorskip("triton", reason="this PyTorch comes without Triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from qat.quantizers import lsq_triton

    kernel = getattr(lsq_triton, f"_{pass_}")
    types = dict.fromkeys(kernel.arg_names, element) | {"raw_steps": "*fp32", "partial": "*fp32", "inner": "i32"}
    types |= dict.fromkeys(("positions", "channels"), "i32") | dict.fromkeys(("low", "high", "ceiling"), "fp32")
    fixed = {"C": 32, "R": 32} | ({} if inner is None else {"inner": inner})
    signature = {name: "constexpr" if name in fixed else types[name] for name in kernel.arg_names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Triton's own
        made = triton.compile(
            ASTSource(fn=kernel, signature=signature, constexprs=fixed), target=GPUTarget("cuda", 80, 32),
            options=lsq_triton.OPTIONS,
        )  # fmt: skip
    code = made.asm["ptx"]
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
    assert run("cuda") == 99
