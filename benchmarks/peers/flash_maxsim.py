"""flash-maxsim (IBM Research, Apache-2.0): Triton MaxSim; the training form adds gradients with float32 atomics."""

from __future__ import annotations

from collections.abc import Callable

import torch


def load() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The form with gradients where a gradient is asked for, its faster forward-only form elsewhere."""
    from flash_maxsim import flash_maxsim_batched, flash_maxsim_batched_train

    def scores(queries: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and (queries.requires_grad or documents.requires_grad):
            return flash_maxsim_batched_train(queries, documents, shared_docs=True)
        return flash_maxsim_batched(queries, documents, shared_docs=True)

    return scores
