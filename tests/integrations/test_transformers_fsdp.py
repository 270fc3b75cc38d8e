"""accelerate's FSDP2 on two real processes: losses and weights of training in one process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")

import fsdp_worker  # noqa: E402


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def on_two_processes(what, checkpointing, directory):
    here = Path(__file__).parent
    shared = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    processes = []
    for rank in range(2):
        arguments = [sys.executable, str(here / "fsdp_worker.py"), what, str(checkpointing), str(directory / f"{rank}")]
        processes.append(
            subprocess.Popen(
                arguments,
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        printed = [process.communicate(timeout=180)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(printed)[-6000:]
    return [torch.load(directory / f"{rank}") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "checkpointing"), [("mask", False), ("position_ids", False), ("mask", True), ("adapters", True)]
)
def test_two_sharded_processes_train_as_one(what, checkpointing, tmp_path):
    if what == "adapters":
        pytest.importorskip("peft")
    losses, weights = fsdp_worker.train_alone(what)
    start = fsdp_worker.model_of(what)
    untrained, frozen = start.state_dict(), {name for name, p in start.named_parameters() if not p.requires_grad}
    assert bool(frozen) == (what == "adapters")
    for sharded_losses, sharded_weights in on_two_processes(what, checkpointing, tmp_path):
        torch.testing.assert_close(sharded_losses, losses, rtol=1.3e-6, atol=1e-5)
        names = {name.replace("_checkpoint_wrapped_module.", ""): value for name, value in sharded_weights.items()}
        assert names.keys() == weights.keys()
        for name, value in weights.items():
            torch.testing.assert_close(names[name], value)
            assert torch.equal(value, untrained[name]) == (name in frozen), name
