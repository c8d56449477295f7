"""Do the tests notice? Plants thirty small faults, one at a time, and runs the tests that should see each.

    uv run tools/planted_faults.py                    # all: minutes on a free core
    uv run tools/planted_faults.py --only packing     # those of one kind; or of a number, such as 7

Every fault is an edit of the sources in a temporary copy of the repository; the working tree is left alone. The tests are run
there first as they are, which must pass. Prints a table and exits 1 when fewer than --least of the faults are caught. A
fault whose text is no longer in its file ends the run: give it the text that is there now.
"""

import argparse
import importlib
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
LEFT_OUT = shutil.ignore_patterns(
    ".*", "__pycache__", "runs", "shared", "data", "dist", "build", "site", "node_modules", "uv.lock"
)
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Fault:
    """kind: of the table. file: edited; before: its text, which is there once; after: what is put there. tests: files that
    should notice."""

    kind: str
    what: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]


LSQ_TESTS = ("tests/quantizers/test_lsq.py",)
BIPER_TESTS = ("tests/quantizers/test_biper.py",)
SHARPNESS_TESTS = ("tests/objectives/test_sharpness.py",)
FREEZE_TESTS = ("tests/objectives/test_scale_freeze.py",)
AVERAGING_TESTS = ("tests/objectives/test_averaging.py",)
PACKING_TESTS = ("tests/export/test_packing.py",)
PASSES_TESTS = ("tests/export/test_passes.py",)
CERTIFICATE_TESTS = ("tests/export/test_certificate.py",)

FAULTS = (
    Fault(
        "quantizer",
        "codes are cut off instead of rounded",
        "qat/quantizers/uniform.py",
        "return (_capped(widened(x), grid) / scale).clamp_(grid.qmin, grid.qmax).round_()",
        "return (_capped(widened(x), grid) / scale).clamp_(grid.qmin, grid.qmax).floor_()",
        LSQ_TESTS,
    ),
    Fault(
        "quantizer",
        "the upper edge of a grid counts as inside",
        "qat/quantizers/uniform.py",
        "inside = (v > grid.qmin) & (v < grid.qmax)",
        "inside = (v > grid.qmin) & (v <= grid.qmax)",
        ("tests/quantizers/test_fused.py",),
    ),
    Fault(
        "quantizer",
        "an activation's gradient scale depends on the batch",
        "qat/quantizers/lsq.py",
        "count = shared if self.is_weight else shared // max(x.shape[0], 1)",
        "count = shared",
        LSQ_TESTS,
    ),
    Fault(
        "quantizer",
        "LSQ's first scale lacks a square root",
        "qat/quantizers/lsq.py",
        "2 * magnitude / spec.qmax**0.5",
        "2 * magnitude / spec.qmax",
        LSQ_TESTS,
    ),
    Fault(
        "quantizer",
        "symmetric weights keep the code -128",
        "qat/quantizers/spec.py",
        "return -(1 << (self.bits - 1)) + self.symmetric",
        "return -(1 << (self.bits - 1))",
        LSQ_TESTS,
    ),
    Fault(
        "quantizer",
        "a negative raw scale does not turn its gradient",
        "qat/quantizers/uniform.py",
        "        raw_scale < 0, -1.0, 1.0\n",
        "        raw_scale < 0, 1.0, 1.0\n",
        (*LSQ_TESTS, "tests/quantizers/test_fused.py"),
    ),
    Fault(
        "quantizer",
        "the sign of zero is -1",
        "qat/quantizers/contract.py",
        "return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)",
        "return torch.where(x > 0, 1.0, -1.0).to(x.dtype)",
        BIPER_TESTS,
    ),
    Fault(
        "quantizer",
        "BiPer's stages are exchanged",
        "qat/quantizers/biper.py",
        "return u if self.stage == 1 else super().relaxed(u)",
        "return u if self.stage == 2 else super().relaxed(u)",
        BIPER_TESTS,
    ),
    Fault(
        "quantizer",
        "LSQ+ rounds its zero point down",
        "qat/quantizers/lsq_plus.py",
        "return torch.round(-offset / positive_scale(raw_scale)).clamp(0, top)",
        "return torch.floor(-offset / positive_scale(raw_scale)).clamp(0, top)",
        ("tests/quantizers/test_lsq_plus.py",),
    ),
    Fault(
        "objective",
        "SAGM forgets the perturbed gradient",
        "qat/objectives/sharpness.py",
        "        (0.5, 0.5),\n",
        "        (1.0, 0.0),\n",
        SHARPNESS_TESTS,
    ),
    Fault(
        "objective",
        "parameters stay perturbed",
        "qat/objectives/sharpness.py",
        "                parameter.copy_(copy)\n",
        "                parameter.add_(0 * copy)\n",
        SHARPNESS_TESTS,
    ),
    Fault(
        "objective",
        "ASAM's step is in units of T instead of its square",
        "qat/objectives/sharpness.py",
        "moves.append(unit * scaled_gradient * factor)",
        "moves.append(scaled_gradient * factor)",
        SHARPNESS_TESTS,
    ),
    Fault(
        "objective",
        "GSAM climbs along the perturbed gradient",
        "qat/objectives/sharpness.py",
        "return mixed(seen, parameters, (-alpha, 1 + alpha * along))",
        "return mixed(seen, parameters, (-alpha, 1 - alpha * along))",
        SHARPNESS_TESTS,
    ),
    Fault(
        "objective",
        "a zero gradient counts as a flip",
        "qat/objectives/scale_freeze.py",
        "self.flips += (sign * self.last) < 0",
        "self.flips += (sign * self.last) <= 0",
        FREEZE_TESTS,
    ),
    Fault(
        "objective",
        "a zero gradient forgets the sign before it",
        "qat/objectives/scale_freeze.py",
        "sign = torch.where(task == 0, self.last, task.sign())",
        "sign = task.sign()",
        FREEZE_TESTS,
    ),
    Fault(
        "objective",
        "the significance against coin flips is twice as wide",
        "qat/objectives/scale_freeze.py",
        "significant = 0.5 - rule.z * 0.5 / comparisons.sqrt()",
        "significant = 0.5 - rule.z / comparisons.sqrt()",
        FREEZE_TESTS,
    ),
    Fault(
        "objective",
        "an average takes raw scales, whatever their sign",
        "qat/objectives/averaging.py",
        "values[name] = positive_scale(value) if is_scale else value",
        "values[name] = value",
        AVERAGING_TESTS,
    ),
    Fault(
        "objective",
        "an EMA clings to its first value",
        "qat/objectives/averaging.py",
        "else max(1 - self.decay, 1 / self.count)",
        "else 1 - self.decay",
        AVERAGING_TESTS,
    ),
    Fault(
        "packing",
        "a byte's codes are read in the opposite order",
        "export/packing.py",
        "shifts = width * np.arange(8 // width)\n",
        "shifts = width * np.arange(8 // width)[::-1]\n",
        PACKING_TESTS,
    ),
    Fault(
        "packing",
        "the highest bit counts positively",
        "export/packing.py",
        "parts = parts - ((parts >> (width - 1)) << width)",
        "parts = parts + 0",
        PACKING_TESTS,
    ),
    Fault(
        "packing",
        "a code one too large is taken",
        "export/packing.py",
        "flat.min() < -limit or flat.max() >= limit",
        "flat.min() < -limit or flat.max() > limit",
        PACKING_TESTS,
    ),
    Fault(
        "packing",
        "a byte too many is written",
        "export/packing.py",
        "whole_bytes = -(-len(values) // per_byte)",
        "whole_bytes = len(values) // per_byte + 1",
        PACKING_TESTS,
    ),
    Fault(
        "lowering",
        "integer biases are rounded down",
        "export/passes/biases.py",
        "codes = np.rint(layer.folded_bias / unit)",
        "codes = np.floor(layer.folded_bias / unit)",
        ("tests/export/test_lowering.py",),
    ),
    Fault(
        "lowering",
        "a folded batch norm forgets epsilon",
        "export/passes/batch_norms.py",
        "a = gamma / np.sqrt(variance + epsilon)",
        "a = gamma / np.sqrt(variance + 0 * epsilon)",
        PASSES_TESTS,
    ),
    Fault(
        "lowering",
        "a folded batch norm scales its mean wrongly",
        "export/passes/batch_norms.py",
        "bias=(layer.folded_bias - mean) * a + beta,",
        "bias=layer.folded_bias * a - mean + beta,",
        PASSES_TESTS,
    ),
    Fault(
        "lowering",
        "a clip above the grid is lost",
        "export/lowered.py",
        "high = min(high, self._stored(highest))",
        "high = max(high, self._stored(highest))",
        PASSES_TESTS,
    ),
    Fault(
        "certificate",
        "codes that are too large in the file are not counted",
        "export/certificate.py",
        "wrong = int((codes != layer.codes).sum())",
        "wrong = int((codes < layer.codes).sum())",
        CERTIFICATE_TESTS,
    ),
    Fault(
        "certificate",
        "a bias of the right shape is the right one",
        "export/certificate.py",
        "if not np.array_equal(bias, lowered):",
        "if bias.shape != lowered.shape:",
        CERTIFICATE_TESTS,
    ),
    Fault(
        "certificate",
        "a scale next to the trained one is the trained one",
        "export/certificate.py",
        "if not np.array_equal(scale, layer.stored_scale):",
        "if scale.shape != layer.stored_scale.shape or not np.allclose(scale, layer.stored_scale, rtol=1e-3):",
        CERTIFICATE_TESTS,
    ),
    Fault(
        "certificate",
        "one level that passes is enough",
        "export/certificate.py",
        "return all(result.passed for result in measured)",
        "return any(result.passed for result in measured)",
        CERTIFICATE_TESTS,
    ),
)


@dataclass(frozen=True)
class Found:
    """What the tests said of one fault: those that failed, and after how many seconds."""

    fault: Fault
    failed: tuple[str, ...]
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", help="a kind, or the number of a fault")
    parser.add_argument("--least", type=int, default=28, help="faults that must be caught, of all")
    parser.add_argument(
        "--without-baseline", action="store_true", help="do not run the tests on faultless sources first"
    )
    arguments = parser.parse_args()
    chosen = []
    for number, fault in enumerate(FAULTS, start=1):
        require_text(ROOT, fault)
        if arguments.only in (None, fault.kind, str(number)):
            chosen.append((number, fault))
    if not chosen:
        sys.exit(f"--only {arguments.only}: no such fault; kinds are {', '.join(sorted({f.kind for f in FAULTS}))}")
    with tempfile.TemporaryDirectory(prefix="edgeqat-faults-") as scratch:
        copy = Path(scratch) / "repository"
        shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
        load_libraries()
        if not arguments.without_baseline:
            require_sound(copy, sorted({test for _, fault in chosen for test in fault.tests}))
        found = []
        print("| | kind | fault | caught by | seconds |\n|---:|---|---|---|---:|", flush=True)
        for number, fault in chosen:
            one = plant(copy, fault)
            found.append(one)
            print(row(number, one), flush=True)
    caught = sum(bool(one.failed) for one in found)
    print(f"\n{caught} of {len(found)} caught")
    least = arguments.least if arguments.only is None else len(found)
    sys.exit(0 if caught >= least else 1)


def require_text(root: Path, fault: Fault) -> None:
    """Exits unless the text that the fault replaces is in its file, once."""
    path = root / fault.file
    count = path.read_text().count(fault.before) if path.exists() else 0
    if count != 1:
        sys.exit(
            f"{fault.file}: the text of the fault {fault.what!r} is there {count} times, not once: {fault.before.strip()!r}; "
            "give the fault in tools/planted_faults.py the text that is there now"
        )


def require_sound(copy: Path, tests: Iterable[str]) -> None:
    """Exits when the tests fail without any fault."""
    failed, output = run_tests(copy, tests)
    if failed:
        sys.exit(f"without a fault these fail, so that they prove nothing: {', '.join(failed)}\n{output}")


def plant(copy: Path, fault: Fault) -> Found:
    """Edit the copy, run the fault's tests until one fails, and undo the edit."""
    path = copy / fault.file
    sound = path.read_text()
    path.write_text(sound.replace(fault.before, fault.after))
    start = time.perf_counter()
    try:
        failed, _ = run_tests(copy, fault.tests)
    finally:
        path.write_text(sound)
    return Found(fault, failed, time.perf_counter() - start)


def run_tests(copy: Path, tests: Iterable[str]) -> tuple[tuple[str, ...], str]:
    """The tests that fail in the copy, up to the first, and what pytest prints. Exits when pytest itself cannot run.

    A fork of this process runs them, which has all libraries loaded and nothing of the copy.
    """
    words = ["-n", "0", "-x", "--tb=no", "-rfE", "--randomly-dont-reorganize", "-p", "no:cacheprovider", *tests]
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            os._exit(pytest_within(copy, words, output.fileno()))
        _, status = os.waitpid(child, 0)
        output.seek(0)
        printed = output.read()
    code = os.waitstatus_to_exitcode(status)
    failed = tuple(FAILED.findall(printed))
    if code == 0 or failed:  # what keeps tests from being collected is noticed, too
        return failed, printed
    sys.exit(f"pytest {' '.join(words)} ended with {code}:\n{printed}")


def pytest_within(copy: Path, words: list[str], output: int) -> int:
    """pytest's exit code in the folder `copy`; what it prints goes to the file descriptor `output`."""
    import pytest

    os.chdir(copy)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.path.remove(str(Path(__file__).parent))
    # Bytecode is taken by the time of its source in seconds, and an edit takes less
    sys.dont_write_bytecode = True
    try:
        code = int(pytest.main(words))
        sys.stdout.flush()
        return code
    except BaseException:
        traceback.print_exc()
        return 3


def load_libraries() -> None:
    """Load once what every test's process would load for seconds."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for library in (
        "torch",
        "torch.onnx",
        "torch._dynamo",
        "onnx",
        "onnx_ir",
        "onnxruntime",
        "onnxscript",
    ):
        importlib.import_module(library)


def row(number: int, found: Found) -> str:
    fault = found.fault
    caught_by = found.failed[0].removeprefix("tests/") if found.failed else "**not caught**"
    caught_by = caught_by.replace("|", "\\|")
    return f"| {number} | {fault.kind} | {fault.what} | {caught_by} | {found.seconds:.0f} |"


if __name__ == "__main__":
    main()
