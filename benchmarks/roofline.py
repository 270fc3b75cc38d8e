"""The least time that a step can take on a chip: exact work, and two measured or published ceilings.

MaxSim. Forward: every token pair's product, every input byte read once, the scores written. Backward: each winner
sends one row to each gradient; queries, the documents' rows that won, winners and the scores' gradient are read once,
both gradients written. Attention. Forward: two products for every pair that may attend, q, k and v read once, output
and lse written. Backward: five products; q, k, v, output, its gradient and lse read, three gradients written.

A step can take no less than its products at the chip's matrix rate and no less than its bytes at the memory's
bandwidth. What moves inside of the chip is not counted, except in :func:`gather_seconds`, which shows what re-reading
winners from the L2 cache would cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

# L2 bandwidth of an H100 or H200 by common microbenchmarks. An assumption, not measured here.
ASSUMED_L2_BANDWIDTH = 5.5e12


@dataclass(frozen=True)
class Ceilings:
    """Matrix products per second (bf16, FLOP/s) and bytes per second of device memory, and where they come from."""

    flops: float
    bandwidth: float
    source: str


PUBLISHED = {
    "H200": Ceilings(790e12, 4.3e12, "sustained figures of an H200: large matrix products and copies"),
    "H100": Ceilings(989e12, 3.35e12, "NVIDIA's data sheet of the H100 SXM: dense bf16 and memory bandwidth"),
}


@dataclass(frozen=True)
class Work:
    """What a MaxSim case cannot avoid, in FLOPs and bytes."""

    forward_flops: int
    backward_flops: int
    query_bytes: int
    document_bytes: int
    scores_bytes: int
    winners_bytes: int
    gathered_bytes: int

    @property
    def input_bytes(self) -> int:
        return self.query_bytes + self.document_bytes

    @property
    def forward_bytes(self) -> int:
        """Inputs read once, scores written."""
        return self.input_bytes + self.scores_bytes

    @property
    def backward_bytes(self) -> int:
        """Winners written by the forward and read back, scores' gradient, queries and those documents' rows that won
        read, gradients written, zeros included."""
        rows_that_won = min(self.document_bytes, self.gathered_bytes // 2)
        return self.input_bytes + self.query_bytes + rows_that_won + self.scores_bytes + 2 * self.winners_bytes


@dataclass(frozen=True)
class AttentionWork:
    """What an attention case cannot avoid, in FLOPs and bytes; `query_bytes` is the size of q, `key_bytes` of k."""

    forward_flops: int
    backward_flops: int
    query_bytes: int
    key_bytes: int
    lse_bytes: int

    @property
    def forward_bytes(self) -> int:
        """q, k, v read, output and lse written."""
        return 2 * self.query_bytes + 2 * self.key_bytes + self.lse_bytes

    @property
    def backward_bytes(self) -> int:
        """q, k, v, output, its gradient and lse read, three gradients written."""
        return 4 * self.query_bytes + 4 * self.key_bytes + self.lse_bytes


def maxsim_work(
    queries: int,
    query_length: int,
    document_tokens: int,
    documents: int,
    dim: int,
    element_size: int,
    *,
    shared: bool,
    index_bytes: int,
) -> Work:
    """Work of `queries` queries against `documents` documents of `document_tokens` tokens in all.

    `shared` documents meet every query; others are split evenly among the queries. `index_bytes` is the size of a
    stored winner.
    """
    meetings = queries if shared else 1  # how many queries each document meets
    winners = meetings * documents * query_length
    return Work(
        forward_flops=2 * dim * query_length * document_tokens * meetings,
        backward_flops=2 * 2 * dim * winners,
        query_bytes=queries * query_length * dim * element_size,
        document_bytes=document_tokens * dim * element_size,
        scores_bytes=4 * meetings * documents,
        winners_bytes=winners * index_bytes,
        gathered_bytes=2 * winners * dim * element_size,
    )


def time_floor(work: Work | AttentionWork, ceilings: Ceilings, direction: str) -> float:
    """Seconds that a "forward", a "backward" or a "forward+backward" cannot undercut."""
    forward = max(work.forward_flops / ceilings.flops, work.forward_bytes / ceilings.bandwidth)
    backward = max(work.backward_flops / ceilings.flops, work.backward_bytes / ceilings.bandwidth)
    return {"forward": forward, "backward": backward, "forward+backward": forward + backward}[direction]


def gather_seconds(work: Work, bandwidth: float = ASSUMED_L2_BANDWIDTH) -> float:
    """Seconds to move every winner's row for both gradients at an on-chip bandwidth."""
    return work.gathered_bytes / bandwidth


def published(gpu: str | None) -> Ceilings | None:
    """The ceilings known for a GPU's name, if any."""
    return next((ceilings for name, ceilings in PUBLISHED.items() if gpu and name in gpu), None)


def measured(device: torch.device, size: int = 8192, copy_bytes: int = 2**30) -> Ceilings:
    """Both ceilings of this machine, now: a large bf16 product and a large copy, the best of a few each.

    A copy of n bytes reads and writes them: 2n. On a CPU the figures are for a dry run alone.
    """
    from benchmarks.timing import best_seconds

    if device.type != "cuda":
        size, copy_bytes = 256, 2**20
    generator = torch.Generator(device=device).manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    left, right = (torch.randn((size, size), generator=generator, device=device).to(dtype) for _ in range(2))
    product = torch.empty((size, size), dtype=dtype, device=device)
    flops = 2 * size**3 / best_seconds(lambda: torch.mm(left, right, out=product), device)
    source = torch.zeros(copy_bytes, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * copy_bytes / best_seconds(lambda: target.copy_(source), device)
    return Ceilings(flops, bandwidth, f"measured in this run: {size}^3 product, copy of {copy_bytes >> 20} MiB")


def share(work: Work | AttentionWork, milliseconds: float, ceilings: Ceilings, direction: str) -> float:
    """The floor over the time taken: 1.0 is the roofline."""
    return time_floor(work, ceilings, direction) / (milliseconds / 1e3)


def record(work: Work | AttentionWork, element_size: int) -> dict[str, Any]:
    """JSON-ready account of a case's work."""
    account: dict[str, Any] = {
        "element_size": element_size,
        "forward_flops": work.forward_flops,
        "backward_flops": work.backward_flops,
        "forward_bytes": work.forward_bytes,
        "backward_bytes": work.backward_bytes,
    }
    if isinstance(work, Work):
        account["gather_ms_at_assumed_l2_bandwidth"] = gather_seconds(work) * 1e3
        account["assumed_l2_bandwidth"] = ASSUMED_L2_BANDWIDTH
    return account
