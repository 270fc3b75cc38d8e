"""Which backend runs, and what is said where one cannot: with a library that is pretended, on any machine."""

from __future__ import annotations

import json
import types
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import jmlr_kernels
from jmlr_kernels import native, ops

GPU, CPU = torch.device("cuda"), torch.device("cpu")
FAMILIES = ("shifted_attention_forward", "maxsim_forward")


def clear() -> None:
    for cached in (ops._fastest, ops._same_or_fastest, ops._warn_once):
        cached.cache_clear()


@pytest.fixture(autouse=True)
def fresh_choices() -> Iterator[None]:
    clear()
    yield
    clear()


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library with every kernel, and a GPU that can run it."""
    found = native.Library(cuda_version="13.0", cuda_targets=("80", "90a", "80+PTX"))
    monkeypatch.setattr(native, "loaded", lambda: found)
    monkeypatch.setattr(native, "has", lambda operation, device: True)
    monkeypatch.setattr(native, "_gpu_problem", lambda found, device: None)


def pretend(monkeypatch: pytest.MonkeyPatch, found: native.Library) -> None:
    monkeypatch.setattr(native, "loaded", lambda: found)
    monkeypatch.setattr(native, "has", lambda operation, device: found.problem is None)


def choose(device: torch.device, operation: str, dtype: torch.dtype = torch.float32, backend: str = "auto") -> str:
    return ops._resolve(backend, device, dtype, operation)


@pytest.mark.parametrize("dtype", native.DTYPES)
def test_native_kernels_come_first(everything: None, dtype: torch.dtype) -> None:
    assert [choose(GPU, family, dtype) for family in FAMILIES] == ["cuda", "cuda"]
    assert [choose(CPU, family, dtype) for family in FAMILIES] == ["torch", "cpu"]


def test_every_operation_has_native_kernels(everything: None) -> None:
    others = [name for name in ops._ROWS if name not in FAMILIES]
    assert {choose(GPU, name) for name in others} == {"cuda"}
    assert {choose(CPU, name) for name in others if name.startswith("maxsim")} == {"cpu"}
    with pytest.raises(RuntimeError, match="shifted_attention has no native cpu kernel; use backend='cuda'"):
        choose(CPU, "shifted_attention_forward", backend="cpu")


def test_a_library_without_an_operation_leaves_it_to_the_next(
    monkeypatch: pytest.MonkeyPatch, everything: None
) -> None:
    monkeypatch.setattr(native, "has", lambda operation, device: "smooth" not in operation)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(GPU, "maxsim_smooth_forward") == "triton" and choose(GPU, "maxsim_forward") == "cuda"
        assert choose(CPU, "maxsim_smooth_forward") == "torch" and choose(CPU, "maxsim_forward") == "cpu"
    with pytest.raises(RuntimeError, match="the native library has no cuda kernel of maxsim_smooth_forward"):
        choose(GPU, "maxsim_smooth_forward", backend="cuda")


def test_float64_takes_torch(everything: None) -> None:
    with pytest.warns(RuntimeWarning, match="falls back to plain torch"):
        assert choose(GPU, "maxsim_forward", torch.float64) == "torch"
    assert choose(CPU, "maxsim_forward", torch.float64) == "torch"
    with pytest.raises(RuntimeError, match="not torch.float64"):
        choose(CPU, "maxsim_forward", torch.float64, "cpu")


def test_the_wrong_device_is_named(everything: None) -> None:
    with pytest.raises(RuntimeError, match="run on cuda tensors, and these are on 'cpu'"):
        choose(CPU, "maxsim_forward", backend="cuda")
    with pytest.raises(RuntimeError, match="run on cpu tensors, and these are on 'cuda'"):
        choose(GPU, "maxsim_forward", backend="cpu")


def test_a_gpu_that_the_library_does_not_fit_takes_triton(everything: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_gpu_problem", lambda found, device: "this GPU is sm_75")
    assert [choose(GPU, family) for family in FAMILIES] == ["triton", "triton"]
    with pytest.raises(RuntimeError, match="sm_75"):
        choose(GPU, "maxsim_forward", backend="cuda")


def test_a_backward_that_is_missing_keeps_its_forward_back(monkeypatch: pytest.MonkeyPatch, everything: None) -> None:
    monkeypatch.setattr(native, "has", lambda operation, device: not operation.endswith("_backward"))
    assert choose(CPU, "maxsim_forward") == "torch" and choose(GPU, "maxsim_forward") == "triton"
    with pytest.raises(RuntimeError, match="no cpu kernel of maxsim_backward"):
        choose(CPU, "maxsim_forward", backend="cpu")


def test_loss_rows_go_with_their_scores(everything: None, monkeypatch: pytest.MonkeyPatch) -> None:
    row = torch.zeros(1)
    assert [ops.companion_backend(name, row, "maxsim_loss_rows") for name in ("cpu", "torch")] == ["cpu", "torch"]
    monkeypatch.setattr(native, "has", lambda operation, device: operation != "maxsim_loss_rows")
    ops._same_or_fastest.cache_clear()
    assert ops.companion_backend("cpu", row, "maxsim_loss_rows") == "torch"


def test_no_library_warns_once_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, native.Library("no C++ compiler was found (g++)"))
    with pytest.warns(RuntimeWarning, match=r"plain torch on the CPU: .*no C\+\+ compiler") as caught:
        assert [choose(CPU, family) for family in FAMILIES] == ["torch", "torch"]
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(CPU, "maxsim_forward", torch.float16) == "torch"
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler"):
        jmlr_kernels.maxsim(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4), backend="cpu")


def test_a_library_left_out_on_purpose_warns_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, native.Library("JMLR_NATIVE=0 is set", chosen=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(CPU, "maxsim_forward") == "torch"


def test_backend_info_says_why_there_is_no_cuda_part(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, native.Library(cuda_problem="no nvcc was found when it was built"))
    told = jmlr_kernels.backend_info()
    assert set(told) == {"cuda", "triton", "cpu", "torch"} and told["torch"] == told["cpu"] == "available"
    assert "no nvcc was found when it was built" in told["cuda"]


def test_backend_info_tells_families_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, native.Library(cuda_version="13.0", cuda_targets=("80",)))
    monkeypatch.setattr(native, "has", lambda operation, device: operation.startswith("maxsim"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(native, "_gpu_problem", lambda found, device: None)
    told = jmlr_kernels.backend_info()["cuda"]
    assert "maxsim: available" in told and "no cuda kernel of shifted_attention_forward" in told


@pytest.mark.parametrize(
    ("target", "capability", "runs"),
    [
        ("80", (8, 0), True), ("80", (8, 9), True), ("80", (9, 0), False), ("86", (8, 0), False),
        ("90a", (9, 0), True), ("90a", (10, 0), False), ("80+PTX", (12, 1), True), ("80+PTX", (7, 5), False),
        ("120", (12, 1), True), ("100f", (10, 3), True),
    ],
)  # fmt: skip
def test_which_chips_run_what(target: str, capability: tuple[int, int], runs: bool) -> None:
    assert native.runs_on(target, capability) is runs


@pytest.mark.parametrize(
    ("driver", "capability", "kilobytes", "problem"),
    [
        (13000, (9, 0), 227, None), (12080, (9, 0), 227, "CUDA 12.8"), (13000, (7, 5), 163, "sm_75"),
        (13020, (10, 0), 227, None), (13000, (8, 0), 163, None), (13000, (8, 9), 99, None),
        (13000, (12, 0), 99, None), (13000, (7, 5), 64, "this GPU has 64"),
    ],
)  # fmt: skip
def test_driver_and_chip_are_looked_at(
    monkeypatch: pytest.MonkeyPatch, driver: int, capability: tuple[int, int], kilobytes: int, problem: str | None
) -> None:
    chip = types.SimpleNamespace(shared_memory_per_block_optin=kilobytes * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: chip)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = native.Library(cuda_version="13.0", cuda_targets=("80", "90a", "80+PTX"))
    told = native._gpu_problem(found, GPU)
    assert told is None if problem is None else problem in (told or "")


# --------------------------------------------------------------------------- loading


def load() -> native.Library:
    return native.loaded.__wrapped__()  # as at the first call


def test_an_old_torch_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "_C.so").write_bytes(b"")
    monkeypatch.setenv("JMLR_LIBRARY", str(tmp_path / "_C.so"))
    monkeypatch.delenv("JMLR_NATIVE", raising=False)
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    assert "torch 2.10 or newer" in (load().problem or "")


def test_a_file_that_is_no_library_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JMLR_LIBRARY", str(tmp_path / "_C.so"))
    monkeypatch.delenv("JMLR_NATIVE", raising=False)
    assert "does not exist" in (load().problem or "")
    (tmp_path / "_C.so").write_bytes(b"no library")
    assert "cannot be loaded" in (load().problem or "")
    monkeypatch.setenv("JMLR_NATIVE", "0")
    assert load() == native.Library("JMLR_NATIVE=0 is set", chosen=True)


def test_the_reason_of_the_installation_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("JMLR_LIBRARY", raising=False)
    monkeypatch.delenv("JMLR_NATIVE", raising=False)
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    assert "build_library.py" in (load().problem or "")
    for reason, chosen in (("no C++ compiler was found (g++)", False), ("it was installed with JMLR_NATIVE=0", True)):
        (tmp_path / "_build.json").write_text(json.dumps({"problem": reason}))
        assert load() == native.Library(reason, chosen=chosen)


# --------------------------------------------------------------------------- the direct call


def test_whoever_watches_sees_the_operation() -> None:
    tensors = torch.randn(2, 3, 8), torch.randn(2, 4, 8)
    with FlopCounterMode(display=False) as counter:
        jmlr_kernels.maxsim(*tensors)
    assert counter.get_total_flops() > 0
    with torch.profiler.profile() as profile:
        jmlr_kernels.maxsim(*tensors)
    assert "jmlr_kernels::maxsim_forward" in {event.key for event in profile.key_averages()}


class Subclass(torch.Tensor):
    pass


def test_what_is_not_plain_goes_through_the_dispatcher() -> None:
    plain = torch.zeros(2)
    assert not ops._watched((plain, torch.nn.Parameter(plain), None, 1, True, 1.0, "torch"))
    assert not ops._watched(([plain], plain, "torch"))
    for other in (plain.as_subclass(Subclass), torch.zeros(2, device="meta")):
        assert ops._watched((other, plain, "torch")) and ops._watched(([other], plain, "torch"))
    assert ops._watched((plain, plain.as_subclass(Subclass)))
    with torch._subclasses.FakeTensorMode() as mode:
        fake = mode.from_tensor(plain)
    assert ops._watched((fake, "torch"))


def test_without_the_shortcuts_all_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def step() -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        queries, documents = (torch.randn(2, n, 8, generator=generator).requires_grad_() for n in (3, 4))
        scores = jmlr_kernels.maxsim(queries, documents)
        return scores, *torch.autograd.grad(scores.sum(), (queries, documents))

    expected = step()
    monkeypatch.setattr(ops, "_shortcuts", False)
    monkeypatch.setattr(ops, "_modes", None)  # not to be called
    assert all(torch.equal(one, other) for one, other in zip(step(), expected, strict=True))
