"""Losses without the logits of a whole window, and dense perplexity with its interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from jmlr.evaluate.statistics import Interval, mean_interval
from jmlr.extend.windows import held_out_windows
from jmlr.llm import causal_model


def token_losses(model: nn.Module, inputs: Tensor, labels: Tensor, chunk: int) -> Tensor:
    """Cross-entropy of each label in nats: inputs and labels int64 [B, S] -> float32 [B, S].

    Logits exist for `chunk` tokens at a time, in the backward pass too, which computes them again: at 32,768 tokens and
    49,152 words the logits, their float32 copy and its gradient would take 16 GB. (torch 2.13 has the like as
    ``linear_cross_entropy``; the package supports older ones.)
    """
    causal = causal_model(model)
    states = causal.model(input_ids=inputs, use_cache=False).last_hidden_state.flatten(0, 1)

    def losses(states: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(causal.lm_head(states).float(), labels, reduction="none")

    def part(states: Tensor, labels: Tensor) -> Any:
        return checkpoint(losses, states, labels, use_reentrant=False)

    compute: Callable[[Tensor, Tensor], Any] = part if torch.is_grad_enabled() else losses
    parts = zip(states.split(chunk), labels.flatten().split(chunk), strict=True)
    return torch.cat([compute(*piece) for piece in parts]).view_as(labels)


@dataclass(frozen=True)
class Perplexity:
    """What a model lost on the held-out documents, at one window length."""

    length: int  # of a window, in tokens
    nats: list[float]  # mean loss of each block of `longest` tokens
    documents: list[str]  # whose block it is
    quarters: list[float]  # mean loss in the four quarters of a window

    def interval(self, confidence: float, resamples: int) -> Interval:
        """Perplexity, with a bootstrap interval over documents."""
        nats = mean_interval(self.nats, self.documents, confidence, resamples)
        return Interval(*(math.exp(value) for value in (nats.mean, nats.low, nats.high)))


@torch.no_grad()
def evaluate(
    model: nn.Module,
    documents: Sequence[tuple[str, Tensor]],
    lengths: Sequence[int],
    *,
    batch_tokens: int,
    chunk: int,
    device: torch.device,
    report: Callable[[int], None] | None = None,
) -> list[Perplexity]:
    """Dense perplexity of (id, tokens) at each window length, the last of which is the longest.

    Windows do not overlap, and every length predicts the same tokens. A document's end that fills no whole longest
    window is left out by :func:`jmlr.extend.windows.held_out_windows`.
    """
    training, longest = model.training, lengths[-1]
    model.eval()
    found, done = [], 0
    for length in lengths:
        nats: list[float] = []
        names: list[str] = []
        sums, counts = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
        quarter = torch.arange(length) * 4 // length
        for name, tokens in documents:
            inputs, labels = held_out_windows(tokens, length, longest)
            rows = max(1, batch_tokens // length)
            losses = torch.cat(
                [
                    token_losses(model, x.to(device), y.to(device), chunk).double().cpu()
                    for x, y in zip(inputs.split(rows), labels.split(rows), strict=True)
                ]
            )
            blocks = losses.view(-1, longest).mean(1).tolist()
            nats += blocks
            names += [name] * len(blocks)
            sums.index_add_(0, quarter, losses.sum(0))
            counts.index_add_(0, quarter, torch.full((length,), float(losses.shape[0]), dtype=torch.float64))
            done += 1
            if report is not None:
                report(done)
        found.append(Perplexity(length, nats, names, (sums / counts).tolist()))
    model.train(training)
    return found
