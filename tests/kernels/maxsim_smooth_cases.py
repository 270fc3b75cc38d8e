"""Calls of smooth MaxSim that its tests share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from maxsim_cases import Case, make_case, native_backends
from torch import Tensor

from jmlr_kernels import maxsim_smooth
from jmlr_kernels.maxsim.smooth_reference import maxsim_smooth_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["torch", "triton", *native_backends("maxsim_smooth_forward", "maxsim_smooth_backward")]


@dataclass
class Smooth:
    """One call with a temperature; `run` makes it, `exact` and `plain` compute the same by the definition."""

    case: Case
    temperature: float

    def run(self, backend: str) -> dict[str, Tensor]:
        return self._call(self.case, maxsim_smooth, backend=backend)

    def exact(self) -> dict[str, Tensor]:
        return self._call(self.case.to(torch.float64), maxsim_smooth_reference)

    def plain(self) -> dict[str, Tensor]:
        """The definition in the inputs' own dtype: the error that the precision itself brings."""
        return self._call(self.case, maxsim_smooth_reference)

    def _call(self, case: Case, function, **options: object) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
        queries, documents, weights = case.leaves()
        scores = function(
            queries,
            documents,
            temperature=self.temperature,
            query_weights=weights,
            candidates=case.candidates,
            **case.options,
            **options,
        )
        scores.backward(case.grad_scores.to(scores.dtype))
        found = {"scores": scores.detach(), "grad_queries": queries.grad, "grad_documents": documents.grad}
        return found if weights is None else {**found, "grad_weights": weights.grad}


def smooth(temperature: float = 0.7, **sizes: object) -> Smooth:
    return Smooth(make_case(**sizes), temperature)
