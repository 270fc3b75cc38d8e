"""Smooth MaxSim: every way to compute a case. `jmlr`: the package; `torch`: its plain-torch backend; `einsum`: the
definition in one line, similarities stored. The shapes and the data are those of maxsim_cases.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import jmlr_kernels
from benchmarks.candidate import Candidate, Function
from benchmarks.maxsim_cases import MaxSimCase


@dataclass(frozen=True)
class MaxSimSmoothCase(MaxSimCase):
    """A shape of MaxSim and a temperature, in the unit of the similarities."""

    temperature: float = 0.05

    @property
    def name(self) -> str:
        return f"smooth {super().name}"

    def backward_flops(self) -> int:
        """The similarities once more, and their shares times either side."""
        return 3 * self.forward_flops()


CPU_CASES = (
    MaxSimSmoothCase(32, 32, 32, 180, backward=True),
    MaxSimSmoothCase(8, 16, 32, 180, backward=True, layout="candidates"),
    MaxSimSmoothCase(32, 32, 32, 180, backward=True, layout="packed"),
)


def ours(case: MaxSimSmoothCase, backend: str = "auto", device: torch.device | None = None) -> Function:
    """The package's own operation on a case's layout."""
    offsets = case.offsets(device or torch.device("cpu")) if case.layout == "packed" else None
    return partial(
        jmlr_kernels.maxsim_smooth,
        temperature=case.temperature,
        cu_seqlens=offsets,
        candidates=case.layout == "candidates",
        backend=backend,
    )


def einsum(queries: Tensor, documents: Tensor, mask: Tensor | None = None, *, temperature: float) -> Tensor:
    """Over a stored [Nq, N, Lq, Ld] tensor; `mask` bool [Nd, Ld] for padded documents of different lengths."""
    pattern = "qld,qkmd->qklm" if documents.dim() == 4 else "qld,nmd->qnlm"
    similarities = torch.einsum(pattern, queries, documents)
    if mask is not None:
        similarities = similarities.masked_fill(~mask[None, :, None, :], float("-inf"))
    return temperature * torch.logsumexp(similarities / temperature, -1).sum(-1, dtype=torch.float32)


def exact(case: MaxSimSmoothCase, tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Scores and both gradients in float64, a document at a time, apart from the package."""
    queries, documents = (tensor.detach().double().requires_grad_() for tensor in tensors)
    texts = documents.split(case.lengths()) if case.layout == "packed" else documents.unbind(-3)
    scores = []
    for text in texts:  # [Ld, D] for all queries, or with candidates [Nq, Ld, D]
        similarities = queries @ text.transpose(-1, -2) / case.temperature
        scores.append(case.temperature * similarities.logsumexp(-1).sum(-1))
    result = torch.stack(scores, dim=1)
    return [result.detach(), *torch.autograd.grad(result, (queries, documents), grad.double())]


def candidates(case: MaxSimSmoothCase, device: torch.device, compiled: int) -> dict[str, Candidate]:
    """Ours first. Nothing is compiled here: `compiled` is what other suites take."""
    packed = case.layout == "packed"
    stored = partial(einsum, mask=case.mask(device) if packed else None, temperature=case.temperature)
    return {
        "jmlr": Candidate(lambda: ours(case, device=device)),
        "torch": Candidate(lambda: ours(case, "torch", device)),
        "einsum": Candidate(lambda: stored, padded=packed, rounds=True),
    }
