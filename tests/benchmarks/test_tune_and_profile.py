"""The tile search and the reading of Nsight Compute's output, without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from benchmarks.candidate import BACKWARD, FORWARD
from benchmarks.maxsim_cases import MaxSimCase
from jmlr_kernels.maxsim import config as real_config
from jmlr_kernels.shifted_attention import config as attention_config
from tools import profile, tune

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
CASES = (MaxSimCase(2, 3, 4, 5, backward=False, dim=16), MaxSimCase(3, 2, 4, 6, backward=False, dim=16))


@dataclass(frozen=True)
class Tiles:
    rows: int
    warps: int


@pytest.fixture
def scores_by_tiles(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A config whose tiles decide what becomes of a call: 1 row is right, 2 slow, 3 wrong, 4 random, 5 fails."""
    from benchmarks import maxsim

    config = SimpleNamespace(tiles=lambda *_: Tiles(1, 4))

    def ours(case: MaxSimCase, backend: str, device: torch.device) -> Any:
        def call(queries: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
            rows = config.tiles(90).rows
            scores = torch.einsum("qld,nmd->qnlm", queries, documents).amax(-1).sum(-1)
            if rows == 2:
                time.sleep(0.003)
            if rows == 5:
                raise RuntimeError("out of resource: shared memory")
            return scores * {3: 1.1}.get(rows, 1.0) + (torch.rand(()) * 1e-6 if rows == 4 else 0.0)

        return call

    monkeypatch.setattr(maxsim, "ours", ours)
    monkeypatch.setattr(tune, "SECONDS_PER_RACE", 0.0)
    return config


def _search(*rows: int) -> tune.Search:
    return tune.Search("key", "tiles", tuple(Tiles(count, 4) for count in rows), CASES)


def test_the_fastest_that_is_right_wins(scores_by_tiles: SimpleNamespace) -> None:
    entry = tune.search_one(_search(2, 3, 4, 5, 1), scores_by_tiles, CPU, torch.float32, float("inf"))
    assert entry is not None and entry["tiles"] == {"rows": 1, "warps": 4} and entry["gain_over_guess"] > 2
    assert set(entry["milliseconds"]) == {"rows=2 warps=4", "rows=1 warps=4"}
    assert all(set(times) == {case.name for case in CASES} for times in entry["milliseconds"].values())
    problems = {name.split()[0]: problem for name, problem in entry["problems"].items()}
    assert "off by" in problems["rows=3"] and "two runs differ" in problems["rows=4"]
    assert "shared memory" in problems["rows=5"]
    assert scores_by_tiles.tiles(90) == Tiles(1, 4)  # nothing stays forced


def test_no_time_and_nothing_that_runs(scores_by_tiles: SimpleNamespace) -> None:
    assert tune.search_one(_search(1, 2), scores_by_tiles, CPU, torch.float32, 0.0) is None
    entry = tune.search_one(_search(3, 5), scores_by_tiles, CPU, torch.float32, float("inf"))
    assert entry is not None and entry["tiles"] is None and len(entry["problems"]) == 2


def test_the_guess_stays_within_the_noise() -> None:
    times = {"guess": {"a": 1.0, "b": 4.0}, "other": {"a": 1.2, "b": 3.3}}
    assert tune.winner(times, "guess") == (
        "guess",
        {"guess": pytest.approx(2.0), "other": pytest.approx(1.98997, 1e-4)},
    )
    times["other"]["b"] = 3.0
    best, _ = tune.winner(times, "guess") or ("", {})
    assert best == "other" and tune.winner({}, "guess") is None


def test_the_table_keeps_what_was_there() -> None:
    table: dict[str, Any] = {"tiles": {"old": {"rows": 1}}, "measured": {"old": {}}}
    where = {"gpu": "NVIDIA H200", "triton": "3.7.1", "torch": "2.13.0", "commit": "abc", "date": "today", "cpu": "x"}
    tune.merge(table, "new", {"tiles": {"rows": 2}, "milliseconds": {"a": {}}, "problems": {}}, where)
    assert table["tiles"] == {"old": {"rows": 1}, "new": {"rows": 2}}
    assert table["measured"]["new"]["gpu"] == "NVIDIA H200" and "cpu" not in table["measured"]["new"]
    tune.merge(table, "new", {"tiles": None, "problems": {"a": "b"}}, where)
    assert table["tiles"]["new"] == {"rows": 2} and table["measured"]["new"]["problems"] == {"a": "b"}


def test_searches_cover_every_class_that_has_a_choice() -> None:
    config = SimpleNamespace(
        forward_candidates=lambda capability, size, dim, rows: [Tiles(rows, 4), Tiles(rows, 8)][
            : 2 if dim < 200 else 1
        ],
        document_gradient_candidates=lambda capability, size, dim: [Tiles(1, 1), Tiles(2, 2)],
        query_gradient_candidates=lambda capability, size, dim: [Tiles(1, 1)],
        tuning_key=lambda kernel, *facts: "-".join(map(str, (kernel, *facts))),
    )
    found = tune.searches(config, 90, 2)
    keys = [search.key for search in found]
    assert keys[:4] == [
        "forward-90-2-128-128",
        "forward-90-2-128-32",
        "forward-90-2-128-64",
        "document_gradient-90-2-128",
    ]
    assert not any("256" in key and "forward" in key for key in keys) and not any("query" in key for key in keys)
    for search in found:
        for case in search.cases:
            assert (search.direction == "forward+backward") == case.backward == ("gradient" in search.key)
            sharing = case.query_length * (1 if case.layout == "candidates" else case.queries)
            if "forward-" in search.key:  # the shapes really are of the class that the key names
                assert min(128, max(32, 1 << (sharing - 1).bit_length())) == int(search.key.rsplit("-", 1)[1])


def test_forced_tiles_reach_the_kernel() -> None:
    """Were they bound by name at import, the search would time the same kernel again and again."""
    if not real_config.interpreted():
        pytest.skip("Triton was imported without its interpreter")
    import jmlr_kernels

    class Asked(Exception):
        pass

    def answer(*_: Any) -> Any:
        raise Asked

    queries, documents = torch.randn(2, 3, 16, requires_grad=True), torch.randn(2, 3, 16, requires_grad=True)
    for function in ("forward_tiles", "query_gradient_tiles", "document_gradient_tiles"):
        usual = getattr(real_config, function)
        with tune.forced(real_config, function, None):
            assert getattr(real_config, function)(90, 4, 16) is None
            setattr(real_config, function, answer)
            with pytest.raises(Asked):
                jmlr_kernels.maxsim(queries, documents, backend="triton").sum().backward()  # type: ignore[union-attr]
        assert getattr(real_config, function) is usual


@pytest.mark.parametrize(("capability", "suffix"), [(90, "_tma"), (100, "_tma"), (80, "")])
def test_attention_searches_are_of_the_kernels_that_run(
    capability: int, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a second candidate for every kernel, each kernel and head dimension is searched, once."""
    config: Any = attention_config
    first = attention_config.candidates
    monkeypatch.setattr(
        attention_config, "candidates", lambda *facts: (*first(*facts)[:1], attention_config.Tiles(16, 16, 4, 1))
    )
    found = tune.attention_searches(config, capability, torch.bfloat16)
    assert [(search.kernel, search.cases[0].dim) for search in found] == [
        (kernel + suffix, dim) for dim in (128, 64) for kernel in attention_config.KERNELS
    ]
    assert {case.group_size for case in found[0].cases} == {512, 1024, 2048}
    for search in found:
        kernel = search.kernel or ""
        assert search.direction == (FORWARD if kernel.startswith("forward") else BACKWARD)
        assert search.key == attention_config.tuning_key(kernel, torch.bfloat16, search.cases[0].dim, capability)
    monkeypatch.setattr(attention_config, "candidates", lambda *facts: first(*facts)[:1])
    assert tune.attention_searches(config, capability, torch.bfloat16) == []


@pytest.mark.parametrize("kernel", attention_config.TMA_KERNELS)
def test_attention_tiles_are_searched(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the real kernels in the interpreter: the forced tiles reach the one kernel, and no other."""
    if not real_config.interpreted():
        pytest.skip("Triton was imported without its interpreter")
    module, usual = attention_config, attention_config.tiles
    launched: set[tuple[str, int]] = set()

    def launch(function: Any, programs: int, arguments: Any, constants: Any, options: Any) -> None:
        launched.add((function.fn.__name__.removesuffix("_kernel"), constants[2]))
        real_launch(function, programs, arguments, constants, options)

    from jmlr_kernels.launch import launch as real_launch
    from jmlr_kernels.shifted_attention import triton_backward_tma, triton_forward_tma

    for holder in (triton_forward_tma, triton_backward_tma):
        monkeypatch.setattr(holder, "launch", launch)
    monkeypatch.setattr(tune, "SECONDS_PER_RACE", 0.0)
    (search,) = [
        one
        for one in tune.attention_searches(cast(Any, module), 90, torch.bfloat16, dry_run=True)
        if one.kernel == kernel
    ]
    monkeypatch.setattr("benchmarks.timing.FEWEST_ROUNDS", 3)
    choices = (module.Tiles(16, 32, 4, 1), module.Tiles(64, 32, 4, 1))
    smaller = replace(search, tiles=choices, cases=(replace(search.cases[0], length=70, group_size=64),))
    entry = tune.search_one(smaller, module, CPU, torch.float32, float("inf"))
    assert entry is not None and not entry["problems"] and entry["tiles"]["block_m"] in (16, 64)
    assert {rows for name, rows in launched if name == kernel} == {16, 64}
    others = {name: rows for name, rows in launched if name != kernel}
    assert all(rows == usual(name, torch.float32, 16, module.INTERPRETER).block_m for name, rows in others.items())
    assert module.tiles is usual


def test_each_operation_has_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And attention's config.py reads what the tuner writes; a class of which nothing runs keeps what it had."""
    assert tune._table("maxsim", None, False) == tune.TABLES["maxsim"] and tune._table("maxsim", None, True) is None
    assert tune._table("attention", None, False) == ROOT / "jmlr_kernels" / "shifted_attention" / "tuned.json"
    assert tune._table("attention", tmp_path / "tune.json", True) == tmp_path / "tune-attention.json"
    where = {"gpu": "NVIDIA H200", "triton": "3.7.1", "torch": "2.13.0", "commit": "abc", "date": "today"}
    tune._keep(_search(1), {"tiles": {"rows": 2}, "problems": {}}, where, tmp_path / "tune.json")
    assert json.loads((tmp_path / "tune.json").read_text())["tiles"] == {"key": {"rows": 2}}

    key = attention_config.tuning_key("forward_tma", torch.bfloat16, 128, 90)
    best = attention_config.Tiles(64, 128, 4, 3, None, 2)
    search = tune.Search(key, "tiles", (best,), CASES, "attention", "forward_tma")
    for tiles in (tune.fields_of(best), None):
        tune._keep(search, {"tiles": tiles, "problems": {}}, where, tmp_path / "tuned.json")
    monkeypatch.setattr(attention_config, "__file__", str(tmp_path / "config.py"))
    attention_config._tuned.cache_clear()
    assert attention_config.tiles("forward_tma", torch.bfloat16, 128, 90) == best
    monkeypatch.undo()
    attention_config._tuned.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("tool", [tune, profile])
def test_without_a_gpu_one_sentence(tool: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main([]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "no CUDA device" in printed


SAMPLE = """==PROF== Connected to process 4242 (/usr/bin/python3.11)
==PROF== Profiling "maxsim_forward_kernel" - 0: 0%....50%....100% - 9 passes
{name},{metrics}
"","","","","","byte","byte","%","%","%","nsecond","inst"
"0","4242","python3.11","127.0.0.1","maxsim_forward_kernel","{first}"
"1","4242","python3.11","127.0.0.1","_maxsim_fwd_kernel","{second}"
==PROF== Disconnected from process 4242
"""


def _sample() -> str:
    columns = (
        profile.MEMORY_BYTES,
        profile.L2_BYTES,
        profile.L2_SHARE,
        profile.MATRIX_SHARES[0],
        profile.MEMORY_SHARE,
        profile.TIME,
        profile.STALL.format("long_scoreboard"),
    )
    return SAMPLE.format(
        name='"ID","Process ID","Process Name","Host Name","Kernel Name"',
        metrics=",".join(f'"{column}"' for column in columns),
        first='","'.join(["11,000,000", "1,400,000,000", "31.5", "68.25", "5.5", "70,000", "1.25"]),
        second='","'.join(["11,000,000", "1,300,000,000", "83.0", "n/a", "2.1", "213,000", "4.5"]),
    )


def test_ncu_output_is_read_and_judged() -> None:
    launches = profile.parse(_sample())
    assert [launch["kernel"] for launch in launches] == ["maxsim_forward_kernel", "_maxsim_fwd_kernel"]
    assert launches[0][profile.L2_BYTES] == 1.4e9 and profile.MATRIX_SHARES[0] not in launches[1]
    ours, peers = (profile.judge(launch) for launch in launches)
    assert ours["verdict"] == "matrix units" and ours["microseconds"] == pytest.approx(70.0)
    assert ours["l2_bytes_per_second"] == pytest.approx(2e13) and peers["verdict"] == "L2"
    assert peers["matrix_percent"] is None and peers["stalls"] == {"long_scoreboard": 4.5}
    text = profile.table({"jmlr": [ours], "peer": [peers]})
    assert "matrix units" in text and "long_scoreboard" in text and len(text.splitlines()) == 3
    assert profile.judge({"kernel": "idle", profile.TIME: 1000.0, profile.L2_SHARE: 12.0})["verdict"] == "latency"
    assert profile.judge({"kernel": "bare"})["verdict"] == "unknown"


def test_every_step_to_profile_runs_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert profile.main(["--dry-run"]) == 0 and "4 steps" in capsys.readouterr().out
    assert profile.main(["--dry-run", "attention"]) == 0 and "2 steps" in capsys.readouterr().out
    for tool in (profile, tune):
        assert tool.main(["sing"]) == 2
        printed = capsys.readouterr().err
        assert printed.count("\n") == 1 and "no operation 'sing'" in printed


def test_ncu_output_without_a_table() -> None:
    assert profile.parse("==ERROR== nothing was profiled\n") == [] and profile.parse("") == []


def test_counters_that_the_chip_lacks_are_not_asked_for(tmp_path: Path) -> None:
    fake = tmp_path / "ncu"
    fake.write_text("#!/bin/sh\necho 'lts__t_bytes  Counter  byte  # of bytes'\necho 'gpu__time_duration Counter ns'\n")
    fake.chmod(0o755)
    assert profile.available(str(fake), profile.METRICS) == [profile.TIME, profile.L2_BYTES]
    fake.write_text("#!/bin/sh\nexit 1\n")
    assert profile.available(str(fake), profile.METRICS) == list(profile.METRICS)


def test_a_run_under_ncu(tmp_path: Path) -> None:
    """ncu replaced by a script: its output is handed on, a missing right becomes one sentence."""
    fake = tmp_path / "ncu"
    (tmp_path / "sample.csv").write_text(_sample())
    fake.write_text(f"#!/bin/sh\ncat {tmp_path / 'sample.csv'}\n")
    fake.chmod(0o755)
    text, problem = profile.profile(str(fake), [profile.TIME], ("maxsim", "jmlr", "forward"), 20.0)
    assert len(profile.parse(text)) == 2 and problem == ""
    fake.write_text("#!/bin/sh\necho '==ERROR== ERR_NVGPUCTRPERM - no permission'\nexit 1\n")
    assert "no right" in profile.profile(str(fake), [profile.TIME], ("maxsim", "jmlr", "forward"), 20.0)[1]
    fake.write_text("#!/bin/sh\necho '==ERROR== unknown metric'\nexit 1\n")
    assert "unknown metric" in profile.profile(str(fake), [profile.TIME], ("maxsim", "jmlr", "forward"), 20.0)[1]


def test_overhead_is_measured_or_refused_in_one_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.overhead", "--out", str(tmp_path / "host.json")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    if (ROOT / "jmlr_kernels" / "launch.py").is_file():
        assert run.returncode == 0, run.stderr
        report = json.loads((tmp_path / "host.json").read_text())
        host, dispatch = report["host"], report["dispatch"]
        assert len(dispatch) == 7 and all(row["us"] > 0 for row in dispatch.values())
        assert host["forward"]["us"] > 0 and host["forward+backward"]["launches"] >= 2
    else:
        assert run.returncode == 2 and run.stderr.count("\n") == 1
