"""MaxSim, every query against every document: cases, baselines and their exact work.

The baselines compute the same scores on documents without padding:

* ``torch``: the package's plain-torch backend.
* ``einsum``: the definition in one line, maximum and sum over a stored [Nq, Nd, Lq, Ld] tensor.
* ``gemm``: one matrix product over all tokens, then the maximum: the strongest eager form.
* ``einsum-compiled``, ``gemm-compiled``: both under ``torch.compile``.
* ``late-interaction-kernels``, ``flash-maxsim``: other libraries, where they can be imported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

import jmlr_kernels
from benchmarks import peers

MaxSim = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class MaxSimCase:
    """One shape: queries [queries, query_length, dim], documents [documents, document_length, dim], unit vectors.

    `bar` is the time in milliseconds that an H200 must not exceed in bf16; it counts forward and backward when
    `backward` is set.
    """

    queries: int
    documents: int
    query_length: int
    document_length: int
    backward: bool
    dim: int = 128
    bar: float | None = None

    @property
    def name(self) -> str:
        return f"{self.queries} x {self.documents}, Lq={self.query_length} Ld={self.document_length} D={self.dim}"

    def _token_pairs(self) -> int:
        return self.queries * self.documents * self.query_length * self.document_length

    def forward_flops(self) -> int:
        return 2 * self.dim * self._token_pairs()

    def backward_flops(self) -> int:
        """A winner gives one row to each gradient: two multiply-adds of length D for a (query token, document)."""
        return 2 * 2 * self.dim * self.queries * self.documents * self.query_length

    def inputs(self, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """Queries and documents that ask for gradients, and a random, non-uniform gradient of the scores."""
        generator = torch.Generator(device=device).manual_seed(0)

        def unit(count: int, length: int) -> torch.Tensor:
            tokens = torch.randn((count, length, self.dim), generator=generator, device=device, dtype=torch.float32)
            return torch.nn.functional.normalize(tokens, dim=-1).to(dtype).requires_grad_()

        queries = unit(self.queries, self.query_length)
        documents = unit(self.documents, self.document_length)
        grad = torch.randn((self.queries, self.documents), generator=generator, device=device, dtype=torch.float32)
        return queries, documents, grad


GPU_CASES = (
    MaxSimCase(128, 128, 32, 300, backward=False, bar=0.09),
    MaxSimCase(256, 256, 32, 300, backward=True, bar=0.8),
    MaxSimCase(512, 512, 32, 180, backward=True, bar=2.2),
    MaxSimCase(128, 128, 32, 1030, backward=True, bar=0.5),
    MaxSimCase(128, 128, 1024, 1024, backward=True, bar=13.0),
    MaxSimCase(32, 32, 32, 80, backward=True, bar=0.06),
    MaxSimCase(64, 64, 32, 128, backward=True, bar=0.08),
    MaxSimCase(1, 10_000, 32, 300, backward=False, bar=0.20),
    MaxSimCase(1, 1000, 32, 300, backward=False, bar=0.03),
)
CPU_CASES = (
    MaxSimCase(1, 1000, 32, 300, backward=False),
    MaxSimCase(32, 32, 32, 180, backward=True),
)
DRY_CASES = (MaxSimCase(3, 4, 5, 7, backward=True, dim=32),)


def ours(backend: str = "auto") -> MaxSim:
    """The package's own operation."""

    def scores(queries: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
        result = jmlr_kernels.maxsim(queries, documents, backend=backend)
        assert isinstance(result, torch.Tensor)  # no alignment was asked for
        return result

    return scores


def einsum(queries: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    """The definition in one line; the sum over query tokens in float32, as ours is."""
    return torch.einsum("qld,nmd->qnlm", queries, documents).amax(-1).sum(-1, dtype=torch.float32)


def gemm(queries: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    """One matrix product over all tokens, then the maximum over each document's."""
    similarities = queries.flatten(0, 1) @ documents.flatten(0, 1).T
    shape = (*queries.shape[:2], *documents.shape[:2])
    return similarities.view(shape).amax(-1).sum(1, dtype=torch.float32)


def candidates(case: MaxSimCase, device: torch.device, compiled: bool) -> dict[str, Callable[[], MaxSim]]:
    """Every way to compute this case, ours first: name -> a maker that may raise where it cannot run."""
    makers: dict[str, Callable[[], MaxSim]] = {
        "jmlr": lambda: ours(),
        "torch": lambda: ours("torch"),
        "einsum": lambda: einsum,
        "gemm": lambda: gemm,
    }
    if device.type == "cuda":
        makers |= peers.maxsim()
    if compiled:
        makers["gemm-compiled"] = lambda: torch.compile(gemm, dynamic=False)
        makers["einsum-compiled"] = lambda: torch.compile(einsum, dynamic=False)
    return makers


def is_baseline(name: str) -> bool:
    """Whether a candidate counts for the ratio: all but ours."""
    return name != "jmlr"
