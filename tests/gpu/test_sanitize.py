"""tools.sanitize: its problems run, and what compute-sanitizer says is understood (a stand-in says it here)."""

from __future__ import annotations

import json
import sys

import pytest
import torch

import jmlr_kernels
from tools import sanitize

STAND_IN = """#!{python}
import sys
tool = sys.argv[sys.argv.index("--tool") + 1]
print("========= COMPUTE-SANITIZER")
said, code = {said}[tool]
print(said)
sys.exit(code)
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    def install(**said):
        program = tmp_path / "compute-sanitizer"
        program.write_text(STAND_IN.format(python=sys.executable, said=said), encoding="utf-8")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(jmlr_kernels, "backend_info", lambda: {"cuda": "available"})
        return ["--tools", ",".join(said), "--out", str(tmp_path / "out.json")]

    return install


def test_problems_run_on_a_cpu(capsys):
    assert sanitize.main(["--dry-run"]) == 0
    assert "problems ran" in capsys.readouterr().out


def test_verdicts(stand_in, tmp_path, capsys):
    clean, race = "========= ERROR SUMMARY: 0 errors", "========= RACECHECK SUMMARY: 2 hazards displayed"
    assert sanitize.main(stand_in(memcheck=(clean, 0))) == 0
    assert sanitize.main(stand_in(memcheck=(clean, 0), racecheck=(race, 9))) == 1
    assert capsys.readouterr().out.rstrip().endswith("memcheck clean; racecheck errors")
    assert json.loads((tmp_path / "out.json").read_text())["racecheck"] == ["errors", race.split("= ", 1)[1]]
    assert sanitize.main(stand_in(memcheck=("========= Error: Device not supported", 1))) == 2


def test_what_is_missing_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sanitize.main([]) == 2
    assert "no compute-sanitizer" in capsys.readouterr().out
