"""Which of the library's CUDA kernels run: jmlr_native::cuda_kernels, JMLR_CUDA_KERNELS. No GPU is needed to ask."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from jmlr_kernels import native

HAS_CUDA = native.loaded().problem is None and native.loaded().cuda_problem is None


def choice() -> str:
    return torch.ops.jmlr_native.cuda_kernels("")


def test_a_library_without_cuda_has_nothing_to_choose() -> None:
    if HAS_CUDA:
        pytest.skip("this one has a CUDA part")
    with pytest.raises(RuntimeError, match="no CUDA part"), native.cuda_kernels("sm80"):
        pass


@pytest.mark.skipif(not HAS_CUDA, reason="needs a library with a CUDA part")
def test_choices_nest_and_end() -> None:
    before = choice()
    with native.cuda_kernels("sm80"):
        assert choice() == "sm80"
        with native.cuda_kernels("sm90"):
            assert choice() == "sm90"
        assert choice() == "sm80"
    assert choice() == before
    with pytest.raises(ZeroDivisionError), native.cuda_kernels("sm80"):
        raise ZeroDivisionError
    assert choice() == before


@pytest.mark.skipif(not HAS_CUDA, reason="needs a library with a CUDA part")
def test_a_wrong_choice_changes_nothing() -> None:
    before = choice()
    with pytest.raises(RuntimeError, match="is 'sm70': give auto, sm80 or sm90"), native.cuda_kernels("sm70"):
        pass
    assert choice() == before


@pytest.mark.skipif(not HAS_CUDA, reason="needs a library with a CUDA part")
@pytest.mark.parametrize(("wanted", "said"), [("sm80", "sm80"), ("", "auto"), ("hopper", "give auto, sm80 or sm90")])
def test_the_environment_chooses(wanted: str, said: str) -> None:
    code = "import jmlr_kernels, torch; print(torch.ops.jmlr_native.cuda_kernels(''))"
    environment = {**os.environ, "JMLR_CUDA_KERNELS": wanted}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert said in run.stdout + run.stderr and (run.returncode != 0) == (wanted == "hopper")


def test_only_a_gpu_has_kernels_of_its_own() -> None:
    assert not native.has_hopper_kernels(torch.device("cpu"))
