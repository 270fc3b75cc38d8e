"""Races, tables and the way a run survives what its candidates do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import attention, maxsim, run, warm
from benchmarks.baselines import einsum
from benchmarks.candidate import FORWARD, STEP, Candidate
from benchmarks.maxsim_cases import GPU_CASES, MaxSimCase
from benchmarks.prepare import ContextLost
from benchmarks.timing import EAGER_ROUNDS, FEWEST_ROUNDS, _summary, race, race_eagerly
from tools import gpu_table

CPU = torch.device("cpu")


def test_candidates_are_interleaved() -> None:
    order: list[str] = []
    steps = {name: (lambda name=name: order.append(name)) for name in "abc"}
    result = race(steps, CPU, seconds=0.0)
    assert [timing.rounds for timing in result.timings.values()] == [FEWEST_ROUNDS - 1] * 3
    assert order[:9] == list("abcbcacab") and not result.failures


def test_one_that_fails_while_it_is_timed_drops_out() -> None:
    calls = {"sound": 0, "broken": 0}

    def step(name: str) -> None:
        calls[name] += 1
        if name == "broken" and calls[name] == 3:
            raise MemoryError("no more")

    result = race({name: (lambda name=name: step(name)) for name in calls}, CPU, seconds=0.0)
    assert set(result.timings) == {"sound"} and result.failures == {"broken": "MemoryError: no more"}
    assert calls == {"sound": FEWEST_ROUNDS, "broken": 3}


def test_quartiles() -> None:
    timing = _summary([1.0, 2.0, 3.0, 4.0, 5.0], [10.0, 30.0], "graph")
    assert (timing.median, timing.first_quartile, timing.third_quartile) == (3.0, 2.0, 4.0)
    assert (timing.warm, timing.warm_first_quartile, timing.warm_third_quartile) == (20.0, 15.0, 25.0)
    assert _summary([1.0, 2.0], [], "events").warm is None


def test_eager_times_are_interleaved_too() -> None:
    order: list[str] = []
    race_eagerly({name: (lambda name=name: order.append(name)) for name in "ab"}, CPU)
    assert order == list("ab") * EAGER_ROUNDS


def _options(path: Path, *more: str) -> list[str]:
    return ["maxsim", "--dry-run", "--out", str(path), *more]


def test_a_case_whose_oracle_fails_leaves_the_others_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = maxsim.exact

    def exact(case: MaxSimCase, *rest: Any) -> Any:
        if case.layout == "packed":
            raise MemoryError("too large")
        return real(case, *rest)

    monkeypatch.setattr(maxsim, "exact", exact)
    code = run.main(_options(tmp_path / "x.json"))
    cases = json.loads((tmp_path / "x.json").read_text())["cases"]
    problems = {case["case"]: case["candidates"]["jmlr"].get("problem") for case in cases}
    assert code == 1 and len(cases) == 4
    assert [problem for problem in problems.values() if problem] == ["MemoryError: too large"]
    assert "MemoryError" in gpu_table.operation_table(json.loads((tmp_path / "x.json").read_text()))


def test_a_run_starts_over_behind_a_lost_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The killer is left out of its case; when that does not help, the case is left out."""
    out, commands = tmp_path / "x.json", []
    real = run.run_case

    def run_case(suite: Any, case: MaxSimCase, *rest: Any) -> Any:
        excluded = rest[-1]
        if case.layout == "candidates" and "gemm" not in excluded:
            raise ContextLost(case.name, "gemm")
        if case.layout == "packed":
            raise ContextLost(case.name, None)
        return real(suite, case, *rest)

    def execute(_: str, command: list[str]) -> None:
        commands.append(command)
        raise SystemExit(run.main([*command[3:], "--dry-run"]))

    monkeypatch.setattr(run, "run_case", run_case)
    monkeypatch.setattr(run.os, "execv", execute)
    with pytest.raises(SystemExit) as left:
        run.main(_options(out, "--commit", "abc"))
    report = json.loads(out.read_text())
    by_name = {case["case"]: case["candidates"] for case in report["cases"]}
    assert left.value.code == 1 and len(by_name) == len(report["cases"]) == 4 and len(commands) == 2
    assert "--resume" in commands[0] and commands[0][-2:] == ["--commit", "abc"]
    own = next(candidates for name, candidates in by_name.items() if "own" in name)
    assert "CUDA context" in own["gemm"]["problem"] and "problem" not in own["jmlr"] and "forward" in own["einsum"]
    lost = next(candidates for name, candidates in by_name.items() if "2-7" in name)
    assert set(lost) == {"jmlr"} and "lost" in lost["jmlr"]["problem"]


def _report(**summary: Any) -> dict[str, Any]:
    keys = ("jmlr_ms", "best_baseline", "best_baseline_ms", "ratio_to_best", "jmlr_warm_ms", "best_warm_ms")
    keys += ("jmlr_eager_ms", "best_eager_ms", "jmlr_peak_bytes", "least_peak_bytes")
    whole = dict.fromkeys(keys) | summary
    records = {
        "jmlr": {"useful_tflops": {}},
        "slow": {"problem": "TypeError: no"},
        "slower": {"problem": "TypeError: no"},
    }
    cases = [
        {"case": name, "compiled_modes": modes, "candidates": records, "summary": {STEP: whole, FORWARD: whole}}
        for name, modes in (("one", ["default"]), ("two", ["default", maxsim.TUNED]))
    ]
    ceilings = {"measured": {"flops": 7.9e14, "bandwidth": 4.3e12, "source": "here"}, "published": None}
    return {"operation": "maxsim", "dtype": "bfloat16", "cases": cases, "left_out": ["three"], "ceilings": ceilings}


def test_the_table_puts_bars_beside_figures_and_names_what_is_missing() -> None:
    text = gpu_table.operation_table(
        _report(
            jmlr_ms=0.4,
            best_baseline="peer",
            best_baseline_ms=1.0,
            ratio_to_best=2.5,
            roofline_share=0.512,
            jmlr_warm_ms=0.3,
            best_warm_ms=0.9,
            bar_ms=0.8,
            least_ratio=2.0,
            jmlr_peak_bytes=30 * 2**20,
            bar_bytes=20 * 2**20,
            least_peak_bytes=200 * 2**20,
        )
    )
    row = next(line for line in text.splitlines() if line.startswith("one"))
    assert row.split() == ("one fwd+bwd 0.400 (0.8) 1.000 2.50 (2) 51 0.300 0.900 - - 30.0 (20.0) 200 peer".split())
    assert "790 TFLOP/s, 4.30 TB/s (here)" in text and "default in 2, max-autotune-no-cudagraphs in 1" in text
    assert "slow is not timed in 2 (one...): TypeError: no" in text and "no time left for: three" in text
    assert max(map(len, text.splitlines())) <= 160


def test_the_table_of_a_run_that_measured_nothing() -> None:
    assert "one" in gpu_table.operation_table(_report())


class _Everywhere:
    """A peer as the adapters describe theirs: two backward passes over one forward."""

    @staticmethod
    def candidates(case: MaxSimCase, device: torch.device) -> dict[str, Candidate]:
        plain = Candidate(lambda: einsum, peer=True, compiled_with="peer")
        return {"peer": plain, "peer-other": replace(plain, directions=(STEP,))}


def test_each_kernel_is_compiled_ahead_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maxsim.peers, "maxsim", _Everywhere.candidates)
    jobs = [(GPU_CASES[position], group) for position, group in warm.jobs(GPU_CASES, torch.device("cuda"))]
    peer = [(case.layout, case.query_length, case.backward) for case, group in jobs if group == "peer"]
    assert len(peer) == len(set(peer)) == 5  # in-batch forward, both, 1024 tokens; candidates; packed
    compiled = [case for case, group in jobs if group == "gemm-compiled"]
    assert len({replace(case, data="") for case in compiled}) == len(compiled) == 12
    assert not any(case.query_length == 1024 for case in compiled)  # too large for many at once
    assert {group for _, group in jobs} == {"peer", "gemm-compiled", "einsum-compiled"}


def test_flex_is_compiled_ahead_for_each_attention_case_and_operations_take_turns() -> None:
    found = warm.jobs(attention.GPU_CASES, torch.device("cuda"), attention)
    assert found == [(position, "flex") for position in range(len(attention.GPU_CASES))]
    both = warm.merged({"attention": found[:3], "maxsim": [(0, "peer")]})
    assert both == [("attention", 0, "flex"), ("maxsim", 0, "peer"), ("attention", 1, "flex"), ("attention", 2, "flex")]


def test_tuning_results_are_forgotten_and_kernels_kept(tmp_path: Path) -> None:
    for name in ("a/kernel.cubin", "a/kernel.autotune.json", "b/c.autotune.json"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    assert warm.forget_tuning(tmp_path) == 2 and warm.forget_tuning(tmp_path / "absent") == 0
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["kernel.cubin"]


def test_a_worker_runs_its_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maxsim, "candidates", lambda case, device, compiled: _Everywhere.candidates(case, device))
    assert warm.one(maxsim.DRY_CASES[0], "peer", CPU) == 2 and warm.one(maxsim.DRY_CASES[0], "absent", CPU) == 0
    assert warm.run_all([], [], 2, 1.0) == (0, 0)
