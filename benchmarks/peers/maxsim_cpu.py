"""maxsim-cpu (Mixedbread, Apache-2.0): MaxSim in Rust over libxsmm, float32, forward only, one query a call.

``maxsim_scores`` takes documents of one length, ``maxsim_scores_variable`` a list. It reads numpy arrays, which share
memory with torch's tensors; the loop over queries is its users' own.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from benchmarks.candidate import FORWARD, Candidate, Function

if TYPE_CHECKING:
    from benchmarks.maxsim_cases import MaxSimCase

NAME = "maxsim-cpu"


def candidates(case: MaxSimCase, device: torch.device) -> dict[str, Candidate]:
    """One way to call it; float32 tensors on the CPU alone."""
    return {NAME: Candidate(partial(_load, case), directions=(FORWARD,), peer=True)}


def _load(case: MaxSimCase) -> Function:
    import maxsim_cpu

    lengths = case.lengths()

    def scores(queries: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
        if queries.dtype != torch.float32:
            raise TypeError("maxsim-cpu takes float32 alone")
        rows = []
        for position, query in enumerate(queries):
            if case.layout == "packed":
                texts = [text.numpy() for text in documents.split(lengths)]
                found = maxsim_cpu.maxsim_scores_variable(query.numpy(), texts)
            else:
                own = documents[position] if case.layout == "candidates" else documents
                found = maxsim_cpu.maxsim_scores(query.numpy(), own.numpy())
            rows.append(torch.from_numpy(found))
        return torch.stack(rows)

    return scores
