"""`make gpu` walked through on the CPU, so that the first machine with a GPU does not find its code broken."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.attention import AttentionCase
from benchmarks.maxsim import MaxSimCase
from benchmarks.timing import FEWEST_ROUNDS, race
from tools import gpu_check, gpu_table

ROOT = Path(__file__).resolve().parents[2]


def _check(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.gpu_check", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)


def test_both_operations_are_timed_and_reported(tmp_path: Path) -> None:
    run = _check("--dry-run", "--phases", "attention,maxsim,training", "--out", str(tmp_path), "--commit", "abc")
    assert run.returncode == 0, run.stdout + run.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [phase["outcome"] for phase in summary["phases"]] == ["passed", "passed", "skipped"]
    for operation in ("attention", "maxsim"):
        report = json.loads((tmp_path / f"{operation}.json").read_text())
        assert report["environment"]["commit"] == "abc" and report["environment"]["torch"]
        (case,) = report["cases"]
        for direction in ("forward", "forward+backward"):
            ours = case["candidates"]["jmlr"][direction]
            assert 0 < ours["first_quartile"] <= ours["median"] <= ours["third_quartile"]
            assert case["summary"][direction]["ratio_to_best"] > 0
        assert not [record["problem"] for record in case["candidates"].values() if "problem" in record]
        assert case["case"] in run.stdout
    assert run.stdout.strip().splitlines()[-1].startswith("training")  # the short table comes last


def test_a_wrong_candidate_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import maxsim, run

    monkeypatch.setattr(maxsim, "ours", lambda backend="auto": _wrong if backend == "auto" else _right)
    code = run.main(["maxsim", "--dry-run", "--out", str(tmp_path / "maxsim.json")])
    (case,) = json.loads((tmp_path / "maxsim.json").read_text())["cases"]
    assert code == 1 and "is off by" in case["candidates"]["jmlr"]["problem"]
    assert "forward" not in case["candidates"]["jmlr"] and "forward" in case["candidates"]["gemm"]
    assert "jmlr is not timed" in gpu_table.operation_table(json.loads((tmp_path / "maxsim.json").read_text()))


def _right(queries, documents):  # type: ignore[no-untyped-def]
    from benchmarks.maxsim import einsum

    return einsum(queries, documents).to(queries.dtype)


def _wrong(queries, documents):  # type: ignore[no-untyped-def]
    return _right(queries, documents) * 1.01


def test_a_failing_phase_leaves_the_others_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(context: gpu_check.Context, limit: float) -> gpu_check.Phase:
        raise OSError("no such thing")

    def endless(context: gpu_check.Context, limit: float) -> gpu_check.Phase:
        code, output = context.run([sys.executable, "-c", "import time; print('begun'); time.sleep(60)"], 2.0)
        return gpu_check._verdict("endless", code, 2.0, 2.0, gpu_check._last_line(output))

    def sound(context: gpu_check.Context, limit: float) -> gpu_check.Phase:
        return gpu_check.Phase("sound", "passed", 0.0, "nothing to do")

    monkeypatch.setattr(gpu_check, "PHASES", {"broken": broken, "endless": endless, "sound": sound})
    monkeypatch.setattr(gpu_check, "PHASE_SECONDS", dict.fromkeys(("broken", "endless", "sound"), 30.0))
    code = gpu_check.main(["--dry-run", "--phases", "broken,endless,sound", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert code == 1 and "OSError: no such thing" in printed and "stopped after its 2 s; begun" in printed
    outcomes = {
        phase["name"]: phase["outcome"] for phase in json.loads((tmp_path / "summary.json").read_text())["phases"]
    }
    assert outcomes == {"broken": "failed", "endless": "failed", "sound": "passed"}


def test_requests_that_make_no_sense() -> None:
    run = _check("--phases", "sing")
    assert run.returncode == 2 and "choose from" in run.stderr and "Traceback" not in run.stderr


def test_phases_fit_into_nine_minutes() -> None:
    assert sum(gpu_check.PHASE_SECONDS.values()) <= gpu_check.TOTAL_SECONDS <= 9 * 60 - 10


def test_work_is_counted_exactly() -> None:
    """Against a count by hand: S = 4, G = 2, two heads; the plain one has groups 2 + 2, the shifted one 1 + 2 + 1."""

    class Tiny(AttentionCase):
        group_size = 2  # type: ignore[assignment]

    case = Tiny(4, heads=2, kv_heads=1, dim=8, batch=3)
    assert case.pairs() == 3 * ((3 + 3) + (1 + 3 + 1))
    assert case.forward_flops() == 4 * 8 * case.pairs() and case.backward_flops() == 10 * 8 * case.pairs()
    assert MaxSimCase(2, 3, 5, 7, backward=True, dim=4).forward_flops() == 2 * 4 * (2 * 5) * (3 * 7)


def test_candidates_are_interleaved() -> None:
    import torch

    order: list[str] = []
    steps = {name: (lambda name=name: order.append(name)) for name in "abc"}
    timings = race(steps, torch.device("cpu"), seconds=0.0)
    assert [timing.rounds for timing in timings.values()] == [FEWEST_ROUNDS - 1] * 3
    assert order[:9] == list("abcbcacab")
