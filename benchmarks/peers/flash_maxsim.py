"""flash-maxsim (IBM Research, Apache-2.0): Triton MaxSim; the training form adds gradients up in a float32 buffer.

Its backward is chosen by the environment variable FLASH_BWD_PATH, read at each backward: ``auto`` uses atomics,
``invgrid`` sorts the winners (for shared documents alone). It takes lengths, no masks, and its packed form has one
query and no gradient: packed documents are padded for it.
"""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING

import torch

from benchmarks.candidate import STEP, Candidate, Function

if TYPE_CHECKING:
    from benchmarks.maxsim_cases import MaxSimCase

NAME = "flash-maxsim"
SWITCH = "FLASH_BWD_PATH"


def candidates(case: MaxSimCase, device: torch.device) -> dict[str, Candidate]:
    """Its training form where a gradient is asked for, its faster forward-only form elsewhere."""
    padded = case.layout == "packed"
    found = {NAME: Candidate(partial(_load, case, device, "auto"), padded=padded, peer=True, compiled_with=NAME)}
    # For candidates, "invgrid" falls back to a slower path; sorted sparse destinations are the choice there.
    other = "sparse_dd" if case.layout == "candidates" else "invgrid"
    make = partial(_load, case, device, other)
    found[f"{NAME}-{other}"] = Candidate(make, directions=(STEP,), padded=padded, peer=True, compiled_with=NAME)
    return found


def _load(case: MaxSimCase, device: torch.device, backward: str) -> Function:
    from flash_maxsim import flash_maxsim, flash_maxsim_batched, flash_maxsim_batched_train

    shared = case.layout != "candidates"
    lengths = None
    if case.layout == "packed":
        lengths = torch.tensor(case.lengths(), dtype=torch.int32, device=device)

    def scores(queries: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and (queries.requires_grad or documents.requires_grad):
            os.environ[SWITCH] = backward  # read when its gradient runs, which follows before anything else does
            return flash_maxsim_batched_train(queries, documents, shared_docs=shared, doc_lengths=lengths)
        if case.queries == 1 and shared:
            return flash_maxsim(queries[0], documents, lengths)[None]
        return flash_maxsim_batched(queries, documents, doc_lengths=lengths, shared_docs=shared)

    return scores
