"""Every call that the benchmark makes to another library, run in Triton's interpreter: a signature that changed fails
here and not on a GPU. Their wheels are looked for among the installed packages and in `.whl`."""

from __future__ import annotations

import importlib.util
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import maxsim, peers
from benchmarks.candidate import FORWARD, STEP
from benchmarks.maxsim_cases import MaxSimCase
from benchmarks.prepare import compare, results_of, steps_of
from jmlr_kernels.maxsim import config

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
MODULES = ("late_interaction_kernels", "flash_maxsim")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the timings themselves run them on a GPU")


def _run_first_choice(self: Any, *args: Any, grid: Any, **kwargs: Any) -> Any:
    """Triton's tuner without measuring, for which there is no device: the first configuration."""
    kwargs.pop("warmup", None)
    return self.fn[grid](*args, **kwargs, **self.configs[0].kwargs)


@pytest.fixture
def libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the peers that can be imported, made to run on CPU tensors."""
    if not config.interpreted():
        pytest.skip("Triton was imported without its interpreter")
    if any(importlib.util.find_spec(module) is None for module in MODULES):
        peers.unpack_wheels(ROOT / ".whl", tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
    found = {module for module in MODULES if importlib.util.find_spec(module) is not None}
    if not found:
        pytest.skip("no peer is installed, and .whl holds no wheel of one")
    from triton.runtime.autotuner import Autotuner

    monkeypatch.setattr(Autotuner, "run", _run_first_choice)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True), raising=False)  # what they check
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: types.SimpleNamespace(name="none"))
    return found


@pytest.mark.parametrize("queries", [2, 1])
@pytest.mark.parametrize("layout", ["in-batch", "candidates", "packed"])
def test_every_call_runs_and_is_right(layout: str, queries: int, libraries: set[str]) -> None:
    case = MaxSimCase(queries, 3, 16, 20, backward=True, dim=32, layout=layout, shortest=5)
    *tensors, grad = case.inputs(CPU, torch.float32)
    exact = maxsim.exact(case, tensors, grad)
    candidates = peers.maxsim(case, CPU, made_for="cuda")
    prefixes = {module.replace("_", "-") for module in libraries}
    assert {next(prefix for prefix in prefixes if name.startswith(prefix)) for name in candidates} == prefixes
    for candidate in candidates.values():
        own = [tensors[0], case.padded(tensors[1])] if candidate.padded else tensors
        steps = steps_of(candidate.make(), own, grad)
        for direction in {*candidate.directions} & {FORWARD, STEP}:
            results = results_of(steps[direction], case, candidate)
            assert len(results) == (3 if direction == STEP else 1)
            # They round to float16 on the way, whatever the input: bfloat16's bound holds.
            compare(results, exact, candidate, torch.bfloat16, direction)


def test_flash_maxsims_switch_is_set_for_each_backward(libraries: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if "flash_maxsim" not in libraries:
        pytest.skip("flash-maxsim is not there")
    import os

    from benchmarks.peers import flash_maxsim

    case = MaxSimCase(2, 3, 16, 20, backward=True, dim=32)
    *tensors, grad = case.inputs(CPU, torch.float32)
    for name, wanted in ((flash_maxsim.NAME, "auto"), (f"{flash_maxsim.NAME}-invgrid", "invgrid")):
        steps_of(flash_maxsim.candidates(case, CPU)[name].make(), tensors, grad)[STEP]()
        assert os.environ[flash_maxsim.SWITCH] == wanted
    monkeypatch.delenv(flash_maxsim.SWITCH)


@pytest.mark.parametrize("queries", [2, 1])
@pytest.mark.parametrize("layout", ["in-batch", "candidates", "packed"])
def test_maxsim_cpu_is_right(layout: str, queries: int) -> None:
    pytest.importorskip("maxsim_cpu")
    case = MaxSimCase(queries, 3, 16, 20, backward=False, dim=32, layout=layout, shortest=5)
    *tensors, grad = case.inputs(CPU, torch.float32)
    ((name, candidate),) = peers.maxsim(case, CPU).items()
    assert name == "maxsim-cpu" and candidate.directions == (FORWARD,)
    results = results_of(steps_of(candidate.make(), tensors, grad)[FORWARD], case, candidate)
    compare(results, maxsim.exact(case, tensors, grad), candidate, torch.float32, FORWARD)
    with pytest.raises(TypeError, match="float32 alone"):
        candidate.make()(tensors[0].detach().bfloat16(), tensors[1].detach().bfloat16())
