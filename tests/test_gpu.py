"""The command that proves xsam on a GPU: parts that fail or hang, and (slow) the whole rehearsal.

pytest tests/test_gpu.py
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import compare  # noqa: E402
import gpu  # noqa: E402
from measure import Report, exponent, resident_peak  # noqa: E402

WRITE = """
import json, sys, time
out, name, *does = sys.argv[1:]
with open(f"{out}/{name}.jsonl", "w") as file:
    print(json.dumps({"name": f"{name} 1", "ms": 1.5}), file=file, flush=True)
    print(f"{name} has begun", flush=True)
    if "hangs" in does:
        time.sleep(60)
    if "fails" in does:
        raise ValueError("no such kernel")
    print(json.dumps({"name": f"{name} 2", "passed": "wrong" not in does}), file=file)
sys.exit("wrong" in does)
"""


def run(out: Path, seconds: float = 60, is_rehearsal: bool = False, **does: str) -> dict:
    """gpu.json after running parts that fail, hang or work."""
    out.mkdir()
    command = [sys.executable, "-c", WRITE, str(out)]
    limits = {"hangs": 2.0}
    parts = [
        gpu.Part(name, [*command, name, what], limits.get(what, 60)) for name, what in does.items()
    ]
    options = argparse.Namespace(out=out, seconds=seconds, rehearse=is_rehearsal)
    gpu.run_parts(parts, options, {"card": "none"})
    return json.loads((out / "gpu.json").read_text())


def test_no_part_costs_the_others(tmp_path, capsys):
    """One that raises, one that hangs and one whose check does not hold: all records are kept."""
    results = run(tmp_path / "gpu", first="fails", second="hangs", third="wrong", fourth="works")
    statuses = {name: part["status"] for name, part in results["parts"].items()}
    assert statuses == {
        "first": "FAILED",
        "second": "timed out",
        "third": "FAILED",
        "fourth": "passed",
    }
    assert [len(part["records"]) for part in results["parts"].values()] == [1, 1, 2, 2]
    assert results["machine"] == {"card": "none"} and results["parts"]["second"]["seconds"] < 10
    printed = capsys.readouterr().out
    assert "ValueError: no such kernel" in printed and "second 1: ms 1.5" in printed


def test_all_parts_end_when_the_time_of_all_is_up(tmp_path):
    started = time.monotonic()
    results = run(tmp_path / "gpu", seconds=2, first="hangs", second="works")
    assert time.monotonic() - started < 5
    assert results["parts"]["first"]["status"] == "timed out"
    assert results["parts"]["second"] == {"status": "not started", "seconds": 0.0, "records": []}


def test_the_plan_runs_beside_the_others_and_a_rehearsal_has_two_at_a_time(tmp_path):
    for name in ("plan", "other"):
        started = time.monotonic()
        run(tmp_path / name, is_rehearsal=name == "other", **{name: "hangs", "next": "hangs"})
        assert time.monotonic() - started < 3.9  # each is ended after two seconds


def test_a_report_survives_what_it_measures(tmp_path, capsys):
    report = Report(tmp_path / "part.jsonl")
    report.add("first", ms=2.0)
    with report.guard("second"):
        raise RuntimeError("CUDA error: out of memory")
    report.add("third", True, difference=0.0)
    lines = list(map(json.loads, (tmp_path / "part.jsonl").read_text().splitlines()))
    assert [line.get("passed") for line in lines] == [None, False, True]
    assert lines[1]["error"] == "RuntimeError: CUDA error: out of memory"
    assert report.num_failed == 1 and "FAILED: second" in capsys.readouterr().out


def test_what_is_missing_is_said_with_the_way_to_bring_it(monkeypatch):
    find = gpu.importlib.util.find_spec
    monkeypatch.setattr(
        gpu.importlib.util, "find_spec", lambda name: None if name == "pycocotools" else find(name)
    )
    with pytest.raises(SystemExit, match=r"(?s)missing: pycocotools\..*pip download .*--no-index"):
        gpu.check_packages()


def test_goals_are_met_by_figures_alone(capsys):
    records = {
        "stage 3, generic, usual text": {"of_published_peak": 0.42},
        "losses, forward and backward": {"times_faster": 3.9},
    }
    gpu.print_goals(records, "NVIDIA H100 80GB HBM3")
    lines = capsys.readouterr().out.splitlines()
    assert "| stage 3, generic, usual text: of_published_peak | 0.4 to 1.0 | 0.42 | yes |" in lines
    assert "| losses, forward and backward: times_faster | at least 4.0 | 3.9 | no |" in lines
    assert sum("not measured" in line for line in lines) == len(gpu.GOALS) - 2
    gpu.print_goals(records, "NVIDIA A100-SXM4-80GB")
    assert "| 0.45 to 1.0 | 0.42 | no |" in capsys.readouterr().out


def test_parity_with_transformers_in_both_types(tmp_path):
    """A part of the rehearsal, on the CPU."""
    report = Report(tmp_path / "parity.jsonl")
    compare.parity(
        report, compare.Bench(compare.small(), torch.device("cpu")), compare.ROWS.__contains__
    )
    records = list(map(json.loads, (tmp_path / "parity.jsonl").read_text().splitlines()))
    assert len(records) == 6 and all(record["passed"] for record in records), records


def test_a_table_of_both_sides_and_one_of_growth(tmp_path, monkeypatch, capsys):
    flags = ["--small", "--device", "cpu", "--rounds", "1", "--parts", "SAM", "--out", tmp_path]
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, flags)])
    assert compare.main() == 0
    text = (tmp_path / "compare.md").read_text()
    assert text in capsys.readouterr().out
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| SAM")]
    assert [len(row) for row in rows] == [8, 8] and "–" not in text
    assert text.count("- passed: SAM encoder") == 2 and "FAILED" not in text
    records = json.loads((tmp_path / "compare.json").read_text())
    assert 0 < records[-1]["floor_share"] < 1 and records[-1]["ours_peak_gb"] > 0

    flags = ["growth", "--device", "cpu", "--rounds", "1", "--parts", "language", "--out", tmp_path]
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, flags)])
    assert compare.main() == 0
    records = json.loads((tmp_path / "growth.json").read_text())
    assert [record["name"].split(": ")[1] for record in records] == ["12", "25", "50", "100"]
    assert all("ours_ms_exponent" in record for record in records[1:])
    assert (tmp_path / "growth.md").read_text().startswith("| part | ms | MB | exponent of ms |")


@pytest.mark.skipif(resident_peak(lambda: None) is None, reason="needs Linux and glibc")
def test_the_peak_of_a_call_is_what_it_holds_at_once():
    """Also what was freed before, and what is no tensor."""
    for _ in range(2):
        peak = resident_peak(lambda: [bytes(2**22) and torch.ones(2**20) for _ in range(10)])
        assert peak == pytest.approx(10 * 2**22, rel=0.2)
    assert resident_peak(lambda: None) < 2**20
    assert exponent((10, 20), (3.0, 12.0)) == pytest.approx(2)


@pytest.mark.slow
def test_the_whole_rehearsal(tmp_path):
    """Every part: four minutes on two cores."""
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--rehearse", "--out", tmp_path / "gpu"]
    result = subprocess.run([*command, "--seconds", "900"], capture_output=True, text=True)
    print(result.stdout)
    assert result.returncode == 0, result.stdout[-3000:]
