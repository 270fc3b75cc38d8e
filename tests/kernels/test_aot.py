"""The ahead-of-time check fails on each seeded fault and passes the sound kernel (`make aot`: on the package)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.machine_code import innermost_product_loop

ROOT = Path(__file__).resolve().parents[2]
SEEDED = "tests.kernels.aot_seeded"


def _aot(*arguments: str) -> subprocess.CompletedProcess[str]:
    # A process of its own: these tests run under Triton's interpreter, which has no compiler.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tools.aot", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)


def test_each_seeded_fault_is_named(tmp_path: Path) -> None:
    run = _aot("--module", SEEDED, "--capability", "90", "--json", str(tmp_path / "aot.json"))
    assert run.returncode == 1, run.stdout + run.stderr
    rows = {row["name"]: row for row in json.loads((tmp_path / "aot.json").read_text())["configurations"]}
    assert rows["sound"]["problems"] == [] and rows["sound"]["wgmma"] and rows["sound"]["registers"] > 0
    assert any("stack" in problem for problem in rows["spills"]["problems"])
    assert any("shared memory" in problem for problem in rows["too-large"]["problems"])
    assert ["wgmma" in problem for problem in rows["no-wgmma"]["problems"]] == [True]
    assert any("no code" in problem for problem in rows["vanished"]["problems"])
    assert "5 compiled ahead of time" in run.stdout and "4 of them failing" in run.stdout


def test_the_product_loop_is_counted() -> None:
    """Nested loops and a loop without a product: the innermost with one counts, forward branches do not."""
    lines = [".L_x_0:", "IADD3 R1", ".L_x_1:", "HGMMA R2", "FMNMX R3", "@P0 BRA `(.L_x_1)", "@P1 BRA `(.L_x_0)"]
    lines += [".L_x_2:", "IADD3 R4", "BRA `(.L_x_2)", "HMMA R5", "BRA `(.L_x_9)", ".L_x_9:"]
    listing = "\n".join(line if line.startswith(".") else f"        /*0010*/   {line} ;" for line in lines)
    assert innermost_product_loop(listing) == 3
    assert innermost_product_loop(listing.replace("HGMMA", "FFMA")) is None
    run = _aot("--module", SEEDED, "--match", "sound", "--capability", "90", "--loops")
    assert "instructions in the loop of sound on sm_90" in run.stdout, run.stdout + run.stderr


def test_a_sound_kernel_passes_even_where_the_interpreter_is_switched_on() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tools.aot", "--module", SEEDED, "--match", "sound", "--capability", "80"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [(("--module", SEEDED, "--match", "nothing"), "in its name"), (("--module", "no.such.module"), "imported")],
)
def test_a_senseless_request_is_refused(arguments: tuple[str, ...], sentence: str) -> None:
    run = _aot(*arguments)
    assert run.returncode == 2 and sentence in run.stderr and "Traceback" not in run.stderr


@pytest.mark.parametrize("capability", ["90", "100"])
def test_compiled_maxsim_keeps_nan_and_orders_its_notes(capability: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compiled_code", capability]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0 and run.stdout.strip() == "sound", run.stderr
