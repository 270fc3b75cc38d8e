"""Shapes on which shifted sparse attention is timed, most important first, and their exact work.

Three layouts: ``dense`` (equal rows), ``padded`` (right padding: rows of different lengths, as ``seq_lens`` says) and
``packed`` (documents of different lengths side by side, as ``cu_seqlens`` says).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

import jmlr_kernels
from benchmarks import roofline
from benchmarks.candidate import BACKWARD, FORWARD, STEP

# Useful TFLOP/s (forward, backward) that an H200 must reach in bf16 at D = 128, by group size.
H200_BARS = {512: (315.0, 160.0), 1024: (425.0, 240.0), 2048: (520.0, 370.0)}
# Packed documents are as long as passages and articles are: a lognormal with this median and spread, cut at both ends.
MEDIAN_TOKENS, SPREAD, SHORTEST_DOCUMENT, LONGEST_DOCUMENT = 600.0, 0.9, 16, 4096


@dataclass(frozen=True)
class AttentionCase:
    """One shape: q [batch, length, heads, dim] and k, v with kv_heads, or packed [length, heads, dim].

    `length` counts the tokens of a row with its padding, or of all packed documents. A case with `bar` must not be
    slower than the best other, and reach H200_BARS where its group size has one.
    """

    length: int
    group_size: int
    heads: int = 32
    kv_heads: int = 32
    dim: int = 128
    batch: int = 1
    layout: str = "dense"
    bar: bool = False

    # Of every case; a race for each.
    directions = (FORWARD, BACKWARD, STEP)
    # Less would time ours and leave the strongest baselines out.
    least_seconds = 9.0

    @property
    def name(self) -> str:
        layout = "" if self.layout == "dense" else f" {self.layout}"
        rows = f" B={self.batch}" if self.layout != "packed" else f" N={len(self.lengths())}"
        return f"S={self.length} G={self.group_size} H={self.heads}/{self.kv_heads} D={self.dim}{rows}{layout}"

    @property
    def bar_tflops(self) -> dict[str, float] | None:
        """Useful TFLOP/s to be reached on an H200, by direction; None where there is no such bar."""
        rates = H200_BARS.get(self.group_size) if self.bar else None
        return None if rates is None else dict(zip((FORWARD, BACKWARD), rates, strict=True))

    @property
    def least_ratio(self) -> float | None:
        """How many times faster than the best other at least."""
        return 1.0 if self.bar else None

    def lengths(self) -> list[int]:
        """Tokens of each document, without padding; the same on every device."""
        generator = torch.Generator().manual_seed(0)
        if self.layout == "packed":
            found: list[int] = []
            median = min(MEDIAN_TOKENS, self.length / 8)
            while sum(found) < self.length:
                drawn = float(torch.empty(()).log_normal_(0.0, SPREAD, generator=generator)) * median
                document = min(max(round(drawn), SHORTEST_DOCUMENT), LONGEST_DOCUMENT)
                found.append(min(document, self.length - sum(found)))
            return found
        if self.layout == "padded":
            drawn_rows = torch.randint(max(1, self.length // 8), self.length + 1, (self.batch,), generator=generator)
            return [self.length, *drawn_rows.tolist()[1:]]
        return [self.length] * self.batch

    def documents(self) -> list[tuple[int, int]]:
        """(first row, row after the last) of each document in [rows, heads, dim], all batch rows one after another."""
        lengths = self.lengths()
        if self.layout == "packed":
            ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
            return list(zip(ends[:-1], ends[1:], strict=True))
        return [(row * self.length, row * self.length + length) for row, length in enumerate(lengths)]

    def arguments(self, device: torch.device) -> dict[str, torch.Tensor]:
        """What tells the operation where documents end: ``cu_seqlens``, ``seq_lens`` or nothing."""
        if self.layout == "packed":
            ends = torch.tensor([0, *self.lengths()]).cumsum(0)
            return {"cu_seqlens": ends.to(device=device, dtype=torch.int32)}
        if self.layout == "padded":
            return {"seq_lens": torch.tensor(self.lengths(), dtype=torch.int32, device=device)}
        return {}

    def pairs(self) -> int:
        """Exact number of score pairs over all documents and query heads."""
        return sum(jmlr_kernels.attention_pairs(length, self.group_size).total(self.heads) for length in self.lengths())

    def forward_flops(self) -> int:
        return 4 * self.dim * self.pairs()

    def backward_flops(self) -> int:
        return 10 * self.dim * self.pairs()

    def work(self, element_size: int) -> roofline.AttentionWork:
        """Exact useful FLOPs and compulsory bytes at this many bytes per element."""
        rows = self.length if self.layout == "packed" else self.batch * self.length
        return roofline.AttentionWork(
            forward_flops=self.forward_flops(),
            backward_flops=self.backward_flops(),
            query_bytes=rows * self.heads * self.dim * element_size,
            key_bytes=rows * self.kv_heads * self.dim * element_size,
            lse_bytes=4 * rows * self.heads,
        )

    def memory_bar(self, direction: str, element_size: int) -> int:
        """Bytes beyond the inputs that cannot be avoided: output and lse; for a backward the gradients."""
        work = self.work(element_size)
        forward, gradients = work.query_bytes + work.lse_bytes, work.query_bytes + 2 * work.key_bytes
        return {FORWARD: forward, BACKWARD: gradients, STEP: forward + gradients}[direction]

    def inputs(self, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """q, k, v that ask for gradients, and a random gradient of the output."""
        generator = torch.Generator(device=device).manual_seed(0)
        lead = (self.length,) if self.layout == "packed" else (self.batch, self.length)

        def random(heads: int) -> torch.Tensor:
            shape = (*lead, heads, self.dim)
            return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

        q, k, v = (random(heads).requires_grad_() for heads in (self.heads, self.kv_heads, self.kv_heads))
        return q, k, v, random(self.heads)


GPU_CASES = (
    *(
        # 16k tokens each, as in FlashAttention-3's tables.
        AttentionCase(length, length // 4, kv_heads=kv_heads, batch=16384 // length, bar=True)
        for length in (4096, 8192, 2048, 16384)
        for kv_heads in (32, 8)
    ),
    AttentionCase(16384, 512, kv_heads=8, layout="packed"),
    AttentionCase(4096, 1024, kv_heads=8, dim=64, batch=4),
    AttentionCase(2048, 512, heads=9, kv_heads=3, dim=64, batch=8),  # SmolLM2-135M: an odd number of kv heads
    AttentionCase(4096, 1000, kv_heads=8, batch=4),  # no multiple of any tile
    AttentionCase(4096, 1024, kv_heads=8, batch=8, layout="padded"),
    AttentionCase(32768, 4096, kv_heads=8),
    AttentionCase(8192, 256, kv_heads=8, batch=2),
    AttentionCase(4096, 1024, dim=64, batch=4),
    AttentionCase(32768, 2048),
    AttentionCase(8192, 2048, kv_heads=8, dim=64, batch=2),
    AttentionCase(16384, 2048, layout="packed"),
)
CPU_CASES = (
    AttentionCase(256, 64, heads=4, kv_heads=4, dim=32, batch=12),
    AttentionCase(1024, 256, heads=9, kv_heads=3, dim=64),
    AttentionCase(1024, 128, heads=8, kv_heads=2, dim=64, layout="packed"),
    AttentionCase(256, 64, heads=8, kv_heads=2, dim=64, batch=4, layout="padded"),
)
DRY_CASES = (
    AttentionCase(64, 16, heads=4, kv_heads=2, dim=32, batch=2, bar=True),
    AttentionCase(60, 25, heads=3, kv_heads=1, dim=16, batch=3, layout="padded"),
    AttentionCase(300, 32, heads=4, kv_heads=2, dim=16, layout="packed"),
)
