"""MaxSim: every way to compute a case, ours and others'.

* ``jmlr``: the package; ``jmlr-triton``: its Triton kernels, where ``jmlr`` is something else; ``jmlr-sm80``: its
  compiled kernels for compute capability 8.0 and later, where ``jmlr`` are those for 9.0; ``torch``: its plain-torch
  backend.
* ``einsum``, ``einsum-input-dtype``, ``gemm``: stored similarities (benchmarks/baselines.py); ``recompute``: blocks of
  documents under activation checkpointing.
* ``einsum-compiled``, ``gemm-compiled``: under ``torch.compile``; ``-tuned``: in its mode
  ``max-autotune-no-cudagraphs``, the strongest.
* ``late-interaction-kernels``, ``flash-maxsim``: other libraries, where they can be imported, in every choice of
  backward that they offer; on a CPU ``maxsim-cpu``.

On packed documents, whoever cannot take them gets padded ones with a mask or lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import jmlr_kernels
from benchmarks import baselines, oracle, peers
from benchmarks.candidate import Candidate, Function
from benchmarks.maxsim_cases import CPU_CASES, DRY_CASES, GPU_CASES, MaxSimCase
from jmlr_kernels import native

__all__ = [
    "CPU_CASES",
    "DRY_CASES",
    "GPU_CASES",
    "GRADIENT_PARITY",
    "MaxSimCase",
    "candidates",
    "exact",
    "is_baseline",
    "ours",
    "similarity_bytes",
]

TUNED = "max-autotune-no-cudagraphs"
# A near tie of a few 1e-7 moves one winner in tens of thousands in float32, whoever computes it, and with the winner as
# many ten-thousandths of the gradient's norm.
GRADIENT_PARITY = {torch.float32: 1e-2}
# A baseline that stores more similarities than this is not made twice over by every compiler mode.
MOST_COMPILED_BYTES = 8 * 2**30


def ours(case: MaxSimCase, backend: str = "auto", device: torch.device | None = None) -> Function:
    """The package's own operation on a case's layout."""
    if case.layout == "packed":
        call: Callable[..., Any] = partial(jmlr_kernels.maxsim, cu_seqlens=case.offsets(device or torch.device("cpu")))
    else:
        call = jmlr_kernels.maxsim_candidates if case.layout == "candidates" else jmlr_kernels.maxsim

    def scores(queries: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
        result = call(queries, documents, backend=backend)
        assert isinstance(result, torch.Tensor)  # no alignment was asked for
        return result

    return scores


def exact(case: MaxSimCase, tensors: list[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
    """Scores and both gradients in float64."""
    queries, documents = tensors
    return oracle.maxsim(queries, documents, grad, case.lengths(), case.layout)


def similarity_bytes(case: MaxSimCase) -> int:
    """Bytes of all similarities in bfloat16, padding included."""
    shared = case.queries if case.layout != "candidates" else 1
    return 2 * shared * case.query_length * case.document_count * case.document_length


def candidates(case: MaxSimCase, device: torch.device, compiled: int) -> dict[str, Candidate]:
    """Ours first. `compiled`: 0 leaves out torch.compile, 1 takes its default mode, 2 its tuned mode too."""
    packed = case.layout == "packed"

    def plain(function: Function) -> Callable[[], Function]:
        return lambda: partial(function, mask=case.mask(device)) if packed else function

    found = {
        "jmlr": Candidate(lambda: ours(case, device=device)),
        "torch": Candidate(lambda: ours(case, "torch", device)),
    }
    if jmlr_kernels.backend_info().get("cuda") == "available":
        found["jmlr-triton"] = Candidate(lambda: ours(case, "triton", device))
    if native.has_hopper_kernels(device):
        found["jmlr-sm80"] = Candidate(lambda: ours(case, "cuda", device), under=partial(native.cuda_kernels, "sm80"))
    found |= peers.maxsim(case, device)
    forms = {
        "gemm": baselines.gemm,
        "einsum": baselines.einsum,
        "einsum-input-dtype": baselines.einsum_input_dtype,
        "recompute": baselines.recompute,
    }
    for name, function in forms.items():
        found[name] = Candidate(plain(function), padded=packed, rounds=True)
    modes = {"-compiled": None, "-compiled-tuned": TUNED}
    for suffix, mode in list(modes.items())[:compiled]:
        for name in ("gemm", "einsum"):
            if similarity_bytes(case) <= MOST_COMPILED_BYTES:
                make = partial(_compiled, plain(forms[name]), mode)
                found[name + suffix] = Candidate(make, padded=packed, rounds=True, compiled_with=name + suffix)
    return found


def _compiled(make: Callable[[], Function], mode: str | None) -> Function:
    return torch.compile(make(), dynamic=False, mode=mode)


def is_baseline(name: str) -> bool:
    """Whether a candidate counts for the ratio: all but ours."""
    return not name.startswith("jmlr")
