"""Shifted sparse attention: every way to compute a case, ours and others'.

* ``jmlr``: the package; ``jmlr-triton``: its Triton kernels, where ``jmlr`` is something else; ``jmlr-sm80``: its
  compiled kernels for compute capability 8.0 and later, where ``jmlr`` are those for 9.0; ``torch``: its plain-torch
  backend.
* ``varlen...``, ``flash-attn...``, ``fla``: two calls of a variable-length attention on views of the head halves
  (benchmarks/peers/varlen.py). The strongest general form, and the one to beat.
* ``flex``: compiled FlexAttention with the definition as its block mask; ``flex-tuned``: in the compiler's mode
  ``max-autotune-no-cudagraphs``; ``flex-flash``: on FlashAttention 4, where it can be imported.
* ``sdpa-groups``: groups as batch rows, cuDNN forced on a GPU; the half groups at the ends apart.
* ``longlora-copies``: the data movement of LongLoRA's flash path around one varlen call. Weak by nature.
* ``definition``: the readable reference, which stores all scores (short sequences only).
* ``sdpa-dense-cudnn``, ``sdpa-dense-flash``: dense causal attention; **another function**, the yardstick of what a
  user saves.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend

import jmlr_kernels
from benchmarks import attention_baselines as baselines
from benchmarks import oracle, peers
from benchmarks.attention_cases import CPU_CASES, DRY_CASES, GPU_CASES, AttentionCase
from benchmarks.candidate import BACKWARD, FORWARD, STEP, Candidate, Function
from benchmarks.peers import varlen
from jmlr_kernels import native

__all__ = [
    "CPU_CASES",
    "DRY_CASES",
    "GPU_CASES",
    "AttentionCase",
    "candidates",
    "exact",
    "executed_flops",
    "is_baseline",
    "ours",
]

TUNED = "max-autotune-no-cudagraphs"
DEFINITION_LIMIT = 2048  # longer sequences would store gigabytes of scores


def ours(case: AttentionCase, backend: str = "auto", device: torch.device | None = None) -> Function:
    """The package's own operation on a case's layout."""
    arguments: dict[str, Any] = case.arguments(device or torch.device("cpu"))

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return jmlr_kernels.shifted_sparse_attention(q, k, v, case.group_size, backend=backend, **arguments)

    return attention


def exact(case: AttentionCase, tensors: list[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients in float64."""
    q, k, v = tensors
    return oracle.attention(q, k, v, grad, case.documents(), case.group_size)


def executed_flops(case: AttentionCase, device: torch.device, dtype: torch.dtype) -> dict[str, int] | None:
    """FLOPs that our CUDA or Triton kernels execute, by direction; None where plain torch runs."""
    from jmlr_kernels.ops import resolve_backend

    backend = resolve_backend("auto", torch.empty(0, dtype=dtype, device=device), "shifted_attention_forward")
    if backend == "cuda":
        found = _library_flops(case, device, dtype)
    elif backend == "triton":
        found = _triton_flops(case, device, dtype)
    else:
        return None
    forward, backward = found["forward"], found["backward_dq"] + found["backward_dkdv"]
    return {FORWARD: forward, BACKWARD: backward, STEP: forward + backward}


def _library_flops(case: AttentionCase, device: torch.device, dtype: torch.dtype) -> dict[str, int]:
    from jmlr_kernels.shifted_attention import executed

    shared_bytes, hopper = native.shared_memory(device), native.has_hopper_kernels(device)
    return executed.library_flops(
        case.lengths(), case.group_size, case.heads, case.dim, dtype, shared_bytes, hopper=hopper
    )


def _triton_flops(case: AttentionCase, device: torch.device, dtype: torch.dtype) -> dict[str, int]:
    from jmlr_kernels.shifted_attention import config, executed, triton_common

    capability = triton_common.capability_of(torch.empty(0, device=device))

    def launch(kernel: str) -> int:
        by_copies = config.tma_kernel(kernel, dtype, case.dim, capability, case.group_size, False, case.dim**-0.5)
        name = by_copies or kernel  # a case's tensors are ones that bulk copies can address
        tiles, dim = config.tiles(name, dtype, case.dim, capability), config.block_d(case.dim)
        return executed.executed_flops(
            name, case.lengths(), case.group_size, case.heads, dim, tiles.block_m, tiles.block_n
        )

    return {kernel: launch(kernel) for kernel in ("forward", "backward_dq", "backward_dkdv")}


def candidates(case: AttentionCase, device: torch.device, compiled: int) -> dict[str, Candidate]:
    """Ours first, then the strongest. `compiled`: 0 leaves out torch.compile, 1 takes its default mode, 2 the tuned
    mode too."""
    on_gpu, dense = device.type == "cuda", case.layout == "dense"
    # Whole groups, and heads that can be cut in the middle without serving a kv head twice.
    regular = dense and case.length % case.group_size == 0 and case.group_size % 2 == 0
    found = {"jmlr": Candidate(lambda: ours(case, device=device))}
    if jmlr_kernels.backend_info().get("cuda") == "available":
        found["jmlr-triton"] = Candidate(lambda: ours(case, "triton", device))
    if native.has_hopper_kernels(device):
        found["jmlr-sm80"] = Candidate(lambda: ours(case, "cuda", device), under=partial(native.cuda_kernels, "sm80"))
    if on_gpu:
        found |= peers.attention(case, device)
        if compiled:
            found["flex"] = Candidate(lambda: baselines.flex(case, device), peer=True, compiled_with="flex")
        if compiled > 1:
            tuned = partial(baselines.flex, case, device, TUNED)
            found["flex-tuned"] = Candidate(tuned, peer=True, compiled_with="flex-tuned")
        if compiled and varlen.present("flash_attn.cute"):
            flash = partial(baselines.flex, case, device, options={"BACKEND": "FLASH"})
            found["flex-flash"] = Candidate(flash, peer=True, compiled_with="flex-flash")
    if regular and case.kv_heads % 2 == 0:
        found["sdpa-groups"] = Candidate(lambda: baselines.sdpa_groups(case, device), peer=on_gpu)
    if dense:
        yardsticks: dict[str, SDPBackend | None] = {"": None}
        if on_gpu:
            yardsticks = {"-cudnn": SDPBackend.CUDNN_ATTENTION, "-flash": SDPBackend.FLASH_ATTENTION}
        for suffix, backend in yardsticks.items():
            make: Callable[[], Function] = partial(partial, baselines.sdpa, backend)
            found[f"sdpa-dense{suffix}"] = Candidate(make, comparable=False)
    if on_gpu and regular and case.heads % 2 == 0:
        found["longlora-copies"] = Candidate(lambda: baselines.longlora_copies(case, device, varlen.torch_call()))
    found["torch"] = Candidate(lambda: ours(case, "torch", device))
    if case.length <= DEFINITION_LIMIT:
        found["definition"] = Candidate(lambda: baselines.definition(case, device))
    return found


def is_baseline(name: str) -> bool:
    """Whether a candidate computes the same function and is not ours: only those count for the ratio."""
    return not name.startswith(("jmlr", "sdpa-dense"))
