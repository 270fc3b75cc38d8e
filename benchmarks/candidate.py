"""What is timed: one way to compute a case, and what the benchmark must know of it to be fair."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

Function = Callable[..., torch.Tensor]

FORWARD, BACKWARD, STEP = "forward", "backward", "forward+backward"


@dataclass(frozen=True)
class Candidate:
    """One way to compute a case.

    Attributes:
        make: gives the function of the case's tensors; may raise where it cannot run.
        directions: what it is timed on, as far as the case asks for it. A variant that differs in its backward alone
            leaves "forward" out.
        padded: takes padded documents where the case's are packed; the padding is done outside of the timed region.
        rounds: keeps similarities in the input dtype, so that a near tie can move a winner: its gradients are held to
            a wider bound, and the error is reported.
        peer: another library, or a form as strong as one: never left out for want of time. Peers are compared with
            float64 on the case's second data set too.
        compiled_with: candidates of one name here compile the same kernels, for seconds before the first result: one
            process does them ahead, beside those of other names. None where there is nothing to compile.
        under: every call runs within what this gives.
        comparable: computes the same function; False for a yardstick, which is timed without being compared.
    """

    make: Callable[[], Function]
    directions: tuple[str, ...] = (FORWARD, BACKWARD, STEP)
    padded: bool = False
    rounds: bool = False
    peer: bool = False
    compiled_with: str | None = None
    comparable: bool = True
    under: Callable[[], AbstractContextManager[None]] = nullcontext

    def steps(self, steps: dict[str, Callable[[], Any]]) -> dict[str, Callable[[], Any]]:
        """Every step, each of its calls within `under`."""
        if self.under is nullcontext:
            return steps
        return {name: partial(self._call, step) for name, step in steps.items()}

    def _call(self, step: Callable[[], Any]) -> Any:
        with self.under():
            return step()
