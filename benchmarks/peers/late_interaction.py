"""late-interaction-kernels (H Company, Apache-2.0): Triton MaxSim, one program for a (query, document) pair."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch


def load() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Its in-batch form with its own choice of backward (``auto``): some shapes get a non-deterministic one."""
    os.environ.setdefault("LIK_SUPPRESS_NORM_WARN", "1")
    from late_interaction_kernels import maxsim

    return lambda queries, documents: maxsim(queries, documents, backward="auto")
