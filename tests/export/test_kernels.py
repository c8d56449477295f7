"""The C++ kernels alone, random layers and extreme codes against loops that spell the definition out."""

import subprocess
import sys
from pathlib import Path

import pytest

from export.kernels.build import compiler, machine

ROOT = Path(__file__).parent.parent.parent
ISAS = {"x86_64": ("portable", "avx2", "avx512"), "aarch64": ("portable", "neon", "neon-dotprod")}
UNKNOWN = 2  # the sweep's exit status for an instruction set that is not there

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler to build the kernels with")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        from sweep_kernels import build_sweep
    finally:
        sys.path.pop(0)
    return build_sweep(tmp_path_factory.mktemp("sweep"), compiler() or "", machine())


@pytest.mark.parametrize("isa", ISAS.get(machine(), ("portable",)))
def test_random_layers_compute_the_defined_codes(sweep: Path, isa: str) -> None:
    done = subprocess.run([str(sweep), "300", isa, "1"], capture_output=True, text=True)
    if done.returncode == UNKNOWN:
        pytest.skip(f"this processor has no {isa}")
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_thousands_of_layers_under_sanitizers() -> None:
    command = [sys.executable, str(ROOT / "tools" / "sweep_kernels.py"), "--count", "2000", "--sanitize"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
