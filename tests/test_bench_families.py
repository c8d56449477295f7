"""`tools/bench_families.py`: rows are kept and not measured again, and what is counted is what rows say."""

import importlib.util
import json
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).parent.parent / "tools"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TOOLS))
    spec = importlib.util.spec_from_file_location("bench_families", TOOLS / "bench_families.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_families", module)
    spec.loader.exec_module(module)
    return module


def test_a_summary_counts_the_promises(tool: ModuleType) -> None:
    rows = [
        tool.Row("a", "quick", "P", "avx2", native_over_fp32=2.0, native_over_int8=1.1, stock_over_int8=0.98),
        tool.Row("b", "slow", "P", "avx2", native_over_fp32=0.9, native_over_int8=0.8, stock_over_int8=0.9),
        tool.Row("c", "even", "P", "avx2", native_over_fp32=1.3, native_over_int8=1.0, stock_over_int8=0.97),
        tool.Row("d", "broken", "P", reason="refused"),
    ]
    assert tool.summary(rows).splitlines() == [
        "2 of 3 families x 1.3 FP32 or more (67%)",
        "slower than FP32: 1 slow",
        "native slower than static INT8: 1 slow",
        "stock slower than static INT8 by more than 3 %: 1 slow",
        "measured on P, kernels avx2",
    ]


def test_known_rows_are_kept_and_only_the_rest_is_measured(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, picture = tmp_path / "rows.jsonl", tmp_path / "families.svg"
    kept = tool.Row("", "known", "P", native_over_fp32=1.5)
    failed = tool.Row("", "failed", "P", reason="took longer than 1 s")
    out.write_text("".join(json.dumps(asdict(row)) + "\n" for row in (kept, failed)))
    measured = []

    def stand_in(family: str, name: str, options: object) -> object:
        measured.append(name)
        return tool.Row(family, name, "P", native_over_fp32=2.5)

    monkeypatch.setattr(tool, "in_a_process", stand_in)
    names = ["known", "failed", "new"]
    monkeypatch.setattr(sys, "argv", ["bench_families.py", "--out", str(out), "--models", *names])
    tool.main()
    assert measured == ["new"]
    sys.argv += ["--retry", "--picture", str(picture)]
    tool.main()
    assert measured == ["new", "failed"]
    found = {row["model"]: row["native_over_fp32"] for row in map(json.loads, out.read_text().splitlines())}
    assert found == {"known": 1.5, "new": 2.5, "failed": 2.5}
    assert picture.read_text().count("known") >= 1
    assert "3 of 3 families" in capsys.readouterr().out
