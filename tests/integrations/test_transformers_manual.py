"""docs/transformers.md: every example runs, on its own after the one that makes the model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from pages import DOCS, code_blocks, sections

MANUAL = sections("transformers.md")
EXAMPLES = {title: code_blocks(text) for title, text in MANUAL.items() if code_blocks(text)}
SCRIPT = "FSDP2"
SLOW = ("torch.compile", SCRIPT)
# accelerate turns FSDP on for accelerators alone; what it then runs is the same on a CPU. There, torch's gloo threads
# may still hold tensors when the interpreter is torn down, and abort it (pytorch/pytorch#179291): the last thing that
# a process does is to leave without the teardown.
FSDP_ON_A_CPU = """
import atexit
import os
import sys

failures = []
report = sys.excepthook


def remember(*error):
    failures.append(error)
    report(*error)


def leave():
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if failures else 0)


if "RANK" in os.environ:
    sys.excepthook = remember
    atexit.register(leave)

os.environ["ACCELERATE_USE_CPU"] = "true"
from accelerate import state
from accelerate.utils import DistributedType

initialize = state.AcceleratorState.__init__


def initialize_with_fsdp(self, *arguments, fsdp_plugin=None, **options):
    initialize(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
    self.distributed_type = DistributedType.FSDP
    if fsdp_plugin is not None:
        self.fsdp_plugin = fsdp_plugin


state.AcceleratorState.__init__ = initialize_with_fsdp
"""


def run(*titles):
    names = {}
    for title in titles:
        for number, (language, code) in enumerate(EXAMPLES[title]):
            assert language == "python"
            exec(compile(code, f"transformers.md, {title}, example {number + 1}", "exec"), names)
    return names


def test_no_example_is_left_out():
    total = (DOCS / "transformers.md").read_text(encoding="utf-8").count("```")
    assert total == 2 * sum(len(blocks) for blocks in EXAMPLES.values()) >= 2 * 9


@pytest.mark.parametrize(
    "title", [pytest.param(title, marks=[pytest.mark.slow] * (title in SLOW)) for title in EXAMPLES if title != SCRIPT]
)
def test_example(title, tmp_path, monkeypatch):
    if title.startswith("LoRA"):
        pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = run(*dict.fromkeys(("Start", title)))
    for name, parameter in names["model"].named_parameters():
        assert parameter.isfinite().all(), name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


@pytest.mark.slow
def test_fsdp2_example(tmp_path):
    pytest.importorskip("accelerate")
    from test_transformers_fsdp import free_port

    (language, script), (shell, launch) = EXAMPLES[SCRIPT]
    assert (language, shell) == ("python", "sh")
    (tmp_path / "train.py").write_text(script, encoding="utf-8")
    (tmp_path / "sitecustomize.py").write_text(FSDP_ON_A_CPU, encoding="utf-8")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(DOCS.parent)]),
    }
    done = subprocess.run(
        ["bash", "-ec", launch.replace("launch", f"launch --main_process_port {free_port()}", 1)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sharded")
    assert saved.config.s2_group_size == 16
    torch.manual_seed(0)
    untrained = transformers.AutoModelForCausalLM.from_config(saved.config)
    for (name, weight), start in zip(saved.named_parameters(), untrained.parameters(), strict=True):
        assert weight.isfinite().all() and not torch.equal(weight, start), name
