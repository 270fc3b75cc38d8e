"""Inputs, definitions and comparisons that the MaxSim tests share."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from jmlr_kernels import maxsim, maxsim_candidates, native
from jmlr_kernels.maxsim.reference import maxsim_reference

# The backends that take CPU tensors here, or CUDA tensors where there is a GPU. Without the native library there are
# two; tests/native says why it is missing.
_HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def native_backends(*operations: str) -> list[str]:
    """Those of the native library that run all of these operations here."""
    return [name for name in ("cpu", "cuda") if native.why_not(operations, name, _HERE, torch.float32) is None]


BACKENDS = ["torch", "triton", *native_backends("maxsim_forward", "maxsim_backward")]


@dataclass
class Case:
    """Arguments of one call; `run` makes it, `exact` computes the same in float64 by the definition."""

    queries: Tensor
    documents: Tensor
    grad_scores: Tensor
    candidates: bool = False
    query_weights: Tensor | None = None
    options: dict[str, Tensor | None | bool] = field(default_factory=dict)

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Case:
        """Inputs in another dtype, weights in float32 unless that is float64."""
        weights = self.query_weights
        if weights is not None:
            weights = weights.to(device, torch.promote_types(dtype, torch.float32))
        options = {
            name: value.to(device) if isinstance(value, Tensor) else value for name, value in self.options.items()
        }
        return replace(
            self,
            queries=self.queries.to(device, dtype),
            documents=self.documents.to(device, dtype),
            grad_scores=self.grad_scores.to(device, torch.promote_types(dtype, torch.float32)),
            query_weights=weights,
            options=options,
        )

    def leaves(self) -> tuple[Tensor, Tensor, Tensor | None]:
        weights = None if self.query_weights is None else self.query_weights.detach().clone().requires_grad_()
        return (
            self.queries.detach().clone().requires_grad_(),
            self.documents.detach().clone().requires_grad_(),
            weights,
        )

    def run(self, backend: str) -> dict[str, Tensor]:
        queries, documents, weights = self.leaves()
        function = maxsim_candidates if self.candidates else maxsim
        scores, winners = function(
            queries, documents, query_weights=weights, return_alignment=True, backend=backend, **self.options
        )
        return self._with_gradients(scores, winners, queries, documents, weights)

    def exact(self) -> dict[str, Tensor]:
        case = self.to(torch.float64)
        queries, documents, weights = case.leaves()
        scores, winners = maxsim_reference(
            queries, documents, query_weights=weights, candidates=self.candidates, **case.options
        )
        return case._with_gradients(scores, winners, queries, documents, weights)

    def plain(self, winners: Tensor) -> dict[str, Tensor]:
        """Plain PyTorch in the inputs' own dtype with given winners: the error that the precision itself brings."""
        queries, documents, weights = self.leaves()
        units = queries, documents
        if self.options.get("normalize"):
            wide = torch.promote_types(queries.dtype, torch.float32)  # float16 cannot hold the floor of the norm
            units = tuple(torch.nn.functional.normalize(side.to(wide), dim=-1).to(side.dtype) for side in units)
        # One row more: a document without tokens may start behind the last one.
        flat = torch.nn.functional.pad(units[1].reshape(-1, documents.shape[-1]), (0, 0, 0, 1))
        count = winners.shape[1]
        offsets = self.options.get("cu_seqlens")
        if offsets is None:
            starts = torch.arange(documents.shape[:-2].numel()) * documents.shape[-2]
        else:
            starts = offsets[:-1].long().cpu()
        starts = starts.view(-1, count) if self.candidates else starts.expand(winners.shape[0], -1)
        tokens = (starts[:, :, None] + winners.clamp_min(0)).to(flat.device)
        best = torch.einsum("isd,ijsd->ijs", units[0], flat[tokens]).masked_fill((winners < 0).to(flat.device), 0)
        if weights is not None:
            best = best * weights[:, None, :].to(best.dtype)
        return self._with_gradients(best.sum(-1), winners, queries, documents, weights)

    def _with_gradients(
        self, scores: Tensor, winners: Tensor, queries: Tensor, documents: Tensor, weights: Tensor | None
    ) -> dict[str, Tensor]:
        scores.backward(self.grad_scores.to(scores.dtype))
        found = {
            "scores": scores.detach(),
            "winners": winners,
            "grad_queries": queries.grad,
            "grad_documents": documents.grad,
        }
        if weights is not None:
            found["grad_weights"] = weights.grad
        return found


def make_case(
    *,
    query_count: int = 3,
    documents: int = 4,
    query_length: int = 5,
    document_length: int = 23,
    dimension: int = 20,
    candidates: bool = False,
    packed: bool = False,
    masked: bool = False,
    weighted: bool = False,
    normalize: bool = False,
    seed: int = 0,
) -> Case:
    """A float64 case; with `masked`, both masks have holes and one document is empty; packed lengths vary from 0 up."""
    draw = torch.Generator().manual_seed(seed)
    total = documents * (query_count if candidates else 1)
    queries = torch.randn(query_count, query_length, dimension, generator=draw, dtype=torch.float64)
    options: dict[str, Tensor | None | bool] = {"normalize": True} if normalize else {}
    if packed:
        lengths = torch.randint(0, document_length + 1, (total,), generator=draw)
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        options["cu_seqlens"] = offsets
        shape: tuple[int, ...] = (int(offsets[-1]),)
    else:
        shape = (query_count, documents, document_length) if candidates else (documents, document_length)
    text = torch.randn(*shape, dimension, generator=draw, dtype=torch.float64)
    if masked:
        mask = torch.rand(shape, generator=draw) > 0.4
        if not packed:
            mask.view(total, document_length)[total // 2] = False
        options["document_mask"] = mask
        options["query_mask"] = torch.rand(query_count, query_length, generator=draw) > 0.3
    weights = torch.randn(query_count, query_length, generator=draw, dtype=torch.float64) if weighted else None
    grad = torch.randn(query_count, documents, generator=draw, dtype=torch.float64)
    return Case(queries, text, grad, candidates, weights, options)
