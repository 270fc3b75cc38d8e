"""late-interaction-kernels (H Company, Apache-2.0): Triton MaxSim, one program for a (query, document) pair.

Its backward is a choice: ``unified`` adds d(documents) up by float32 atomics, ``lowmem`` multiplies one-hot matrices
and is deterministic, ``auto`` takes one of the two by shape. All are timed; the best counts. Its forward is tuned by
measurement once per length class of queries, on the first shape that comes; that is left as its users get it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch

from benchmarks.candidate import STEP, Candidate, Function

if TYPE_CHECKING:
    from benchmarks.maxsim_cases import MaxSimCase

NAME = "late-interaction-kernels"


def candidates(case: MaxSimCase, device: torch.device) -> dict[str, Candidate]:
    """Its dense form for in-batch and candidates; its packed form, and its dense one with a mask, for packed ones."""
    os.environ.setdefault("LIK_SUPPRESS_NORM_WARN", "1")  # a look at the norms that waits for the device
    packed = case.layout == "packed"
    found = {NAME: Candidate(partial(_packed, case, device), peer=True, compiled_with=NAME)} if packed else {}
    for backward in ("auto", "unified", "lowmem"):
        name = NAME + ("-padded" if packed else "") + ("" if backward == "auto" else f"-{backward}")
        found[name] = Candidate(
            partial(_dense, case, device, backward),
            directions=("forward", STEP) if backward == "auto" else (STEP,),
            padded=packed,
            peer=True,
            compiled_with=NAME,
        )
    return found


def _dense(case: MaxSimCase, device: torch.device, backward: str) -> Function:
    from late_interaction_kernels import maxsim

    mask = case.mask(device) if case.layout == "packed" else None
    return lambda queries, documents: maxsim(queries, documents, None, mask, backward=backward)


def _packed(case: MaxSimCase, device: torch.device) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    from late_interaction_kernels import maxsim_varlen

    ends = torch.arange(case.queries + 1, dtype=torch.int32, device=device) * case.query_length
    offsets = case.offsets(device)

    def scores(queries: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
        flat = queries.flatten(0, 1)
        return maxsim_varlen(flat, documents, ends, offsets, case.query_length, case.document_length)

    return scores
