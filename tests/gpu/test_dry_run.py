"""`make gpu` walked through on the CPU, so that the first machine with a GPU does not find its code broken."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.attention import AttentionCase
from benchmarks.maxsim import MaxSimCase
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
        assert len(report["cases"]) == (3 if operation == "attention" else 4)
        for case in report["cases"]:
            assert len(case["summary"]) == 3 if operation == "attention" else len(case["summary"]) <= 2
            for direction in case["summary"]:
                ours = case["candidates"]["jmlr"][direction]
                assert 0 < ours["first_quartile"] <= ours["median"] <= ours["third_quartile"]
                assert case["summary"][direction]["ratio_to_best"] > 0
                assert case["summary"][direction]["roofline_share"] > 0
            assert not [record["problem"] for record in case["candidates"].values() if "problem" in record]
            assert case["case"] in run.stdout
    assert run.stdout.strip().splitlines()[-1].startswith("training")  # the short table comes last


def test_a_wrong_candidate_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import maxsim, run

    monkeypatch.setattr(
        maxsim, "ours", lambda case, backend="auto", device=None: _wrong if backend == "auto" else _right
    )
    monkeypatch.setattr(maxsim, "DRY_CASES", maxsim.DRY_CASES[:1])
    code = run.main(["maxsim", "--dry-run", "--out", str(tmp_path / "maxsim.json")])
    (case,) = json.loads((tmp_path / "maxsim.json").read_text())["cases"]
    assert code == 1 and "is off by" in case["candidates"]["jmlr"]["problem"]
    assert "forward" not in case["candidates"]["jmlr"] and "forward" in case["candidates"]["gemm"]
    assert "jmlr is not timed" in gpu_table.operation_table(json.loads((tmp_path / "maxsim.json").read_text()))


def _right(queries, documents):  # type: ignore[no-untyped-def]
    from benchmarks.baselines import einsum

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


@pytest.mark.parametrize("fault", ["endless", "wrong", None])
def test_kernels_that_fail_the_first_look_are_kept_from_later_phases(
    fault: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real processes in place of tools.hopper_smoke: one that agrees, one that never ends, one that differs."""
    programs = {None: "print('agrees')", "endless": "import time; time.sleep(60)", "wrong": "print('differs'); exit(1)"}
    run = gpu_check.Context.run

    def in_its_place(self: gpu_check.Context, command: list[str], seconds: float) -> tuple[int | None, str]:
        faulty = command[-1] == "maxsim-forward"
        return run(self, [sys.executable, "-c", programs[fault if faulty else None]], min(seconds, 3.0))

    monkeypatch.setattr(gpu_check.Context, "run", in_its_place)
    with (tmp_path / "log.txt").open("w") as log:
        context = gpu_check.Context(tmp_path, tmp_path, log, dict(os.environ), False, None)
        phase = gpu_check.hopper(context, 40.0)
    said = {"endless": "maxsim-forward does not end", "wrong": "maxsim-forward fails: differs", None: "agree"}[fault]
    assert phase.outcome == ("passed" if fault is None else "failed") and said in phase.detail
    assert context.environment.get("JMLR_CUDA_KERNELS") == (None if fault is None else "sm80")


def test_requests_that_make_no_sense(capsys: pytest.CaptureFixture[str]) -> None:
    run = _check("--phases", "sing")
    assert run.returncode == 2 and "choose from" in run.stderr and "Traceback" not in run.stderr
    for limit in ("sing=3", "maxsim", "maxsim=soon"):
        assert gpu_check.main(["--dry-run", "--seconds", limit]) == 2
        assert "PHASE=N" in capsys.readouterr().err


def test_limits_of_phases_can_be_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []

    def phase(context: gpu_check.Context, limit: float) -> gpu_check.Phase:
        given.append(limit)
        return gpu_check.Phase("maxsim", "passed", 0.0, "nothing to do")

    monkeypatch.setattr(gpu_check, "PHASES", {"maxsim": phase})
    code = gpu_check.main(["--dry-run", "--phases", "maxsim", "--seconds", "maxsim=321", "--out", str(tmp_path)])
    assert code == 0 and given == [321.0]


def test_what_a_tool_needs_and_lacks_is_no_failure(tmp_path: Path) -> None:
    """The real tools, which find no GPU."""
    environment = dict(os.environ, PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES="")
    with (tmp_path / "log.txt").open("w") as log:
        context = gpu_check.Context(tmp_path, tmp_path, log, environment, False, None)
        for name in ("profile", "tune", "tune_hopper", "hopper"):
            phase = gpu_check.PHASES[name](context, 100.0)
            assert phase.outcome == "skipped", phase
            assert re.search("no CUDA device|no GPU of compute capability 9.0", phase.detail), phase


@pytest.mark.slow
def test_kernels_are_compiled_ahead(tmp_path: Path) -> None:
    run = _check("--dry-run", "--phases", "warm", "--out", str(tmp_path))
    assert run.returncode == 0 and "1 of 1 compiled ahead, 0 failed" in run.stdout, run.stdout + run.stderr


def test_phases_fit_into_nine_minutes() -> None:
    assert sum(gpu_check.PHASE_SECONDS.values()) <= gpu_check.TOTAL_SECONDS <= 9 * 60 - 10
    asked_for = gpu_check.ON_REQUEST_SECONDS
    assert {*gpu_check.PHASE_SECONDS, *asked_for} == set(gpu_check.PHASES) and not {*asked_for} & {
        *gpu_check.PHASE_SECONDS
    }


def test_work_is_counted_exactly() -> None:
    """Against a count by hand: S = 4, G = 2, two heads; the plain one has groups 2 + 2, the shifted one 1 + 2 + 1."""

    case = AttentionCase(4, 2, heads=2, kv_heads=1, dim=8, batch=3)
    assert case.pairs() == 3 * ((3 + 3) + (1 + 3 + 1))
    assert case.forward_flops() == 4 * 8 * case.pairs() and case.backward_flops() == 10 * 8 * case.pairs()
    assert MaxSimCase(2, 3, 5, 7, backward=True, dim=4).forward_flops() == 2 * 4 * (2 * 5) * (3 * 7)


def test_a_library_built_elsewhere_is_used_where_the_tree_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels, tree = tmp_path / "wheels", tmp_path / "tree"
    monkeypatch.setattr(gpu_check, "ROOT", tree)
    monkeypatch.delenv("JMLR_LIBRARY", raising=False)
    assert "JMLR_LIBRARY" not in gpu_check._environment(wheels, tmp_path)
    for folder in (wheels, tree):
        (folder / "jmlr_kernels").mkdir(parents=True)
    carried, own = wheels / "jmlr_kernels" / "_C.so", tree / "jmlr_kernels" / "_C.so"
    carried.touch()
    assert gpu_check._environment(wheels, tmp_path)["JMLR_LIBRARY"] == str(carried)
    monkeypatch.setenv("JMLR_LIBRARY", "another")
    assert gpu_check._environment(wheels, tmp_path)["JMLR_LIBRARY"] == "another"
    monkeypatch.delenv("JMLR_LIBRARY")
    own.touch()
    assert "JMLR_LIBRARY" not in gpu_check._environment(wheels, tmp_path)
