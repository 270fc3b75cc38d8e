"""Do the kernels for compute capability 9.0 run, end, and agree with those for 8.0? One operation after the other.

    python -m tools.hopper_smoke [attention-forward attention-backward maxsim-forward maxsim-backward]

These kernels wait on barriers for copies that other warps ordered: a fault in them may never end. So `make gpu` asks
here first, each operation in a process with a time limit, and keeps the rest of its phases from kernels that fail.
Exit code 0: they agree; 1: they do not, or failed; 2: no such GPU or library.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch

import jmlr_kernels
from jmlr_kernels import native

# Two roundings of bfloat16 in results of size 1, as the benchmarks' comparison with float64 allows.
TOLERANCE = 2e-2


def _attention(device: torch.device, backward: bool) -> list[torch.Tensor]:
    results: list[torch.Tensor] = []
    for dim, length, group, lengths in ((128, 640, 256, None), (64, 300, 100, (300, 77)), (128, 129, 64, (129, 1))):
        shape = (len(lengths or (0,)), length)
        q = torch.randn(*shape, 4, dim, device=device, dtype=torch.bfloat16)
        k, v = (torch.randn(*shape, 2, dim, device=device, dtype=torch.bfloat16) for _ in range(2))
        seq_lens = torch.tensor(lengths, dtype=torch.int32, device=device) if lengths else None
        inputs = tuple(tensor.requires_grad_(backward) for tensor in (q, k, v))
        out = jmlr_kernels.shifted_sparse_attention(q, k, v, group, seq_lens=seq_lens, backend="cuda")
        results += torch.autograd.grad(out, inputs, torch.randn_like(out)) if backward else [out]
    return results


def _maxsim(device: torch.device, backward: bool) -> list[torch.Tensor]:
    results: list[torch.Tensor] = []
    for queries, query_length, documents, length, dim in (
        (9, 32, 17, 300, 128),
        (1, 32, 40, 130, 128),
        (3, 70, 5, 64, 64),
    ):
        q = torch.nn.functional.normalize(torch.randn(queries, query_length, dim, device=device), dim=-1).bfloat16()
        d = torch.nn.functional.normalize(torch.randn(documents, length, dim, device=device), dim=-1).bfloat16()
        mask = torch.rand(documents, length, device=device) > 0.1
        inputs = tuple(tensor.requires_grad_(backward) for tensor in (q, d))
        scores = jmlr_kernels.maxsim(q, d, document_mask=mask, backend="cuda")
        results += torch.autograd.grad(scores, inputs, torch.randn_like(scores)) if backward else [scores]
    return results


CHECKS: dict[str, Callable[[torch.device], list[torch.Tensor]]] = {
    "attention-forward": lambda device: _attention(device, False),
    "attention-backward": lambda device: _attention(device, True),
    "maxsim-forward": lambda device: _maxsim(device, False),
    "maxsim-backward": lambda device: _maxsim(device, True),
}


def error_of(name: str, device: torch.device) -> float:
    """||ours - the others'|| / ||the others'||, the worst of all results; NaN where one of them has NaN."""
    found = {}
    for kernels in ("sm80", "auto"):
        torch.manual_seed(0)
        with native.cuda_kernels(kernels):
            found[kernels] = [result.double() for result in CHECKS[name](device)]
    pairs = zip(found["auto"], found["sm80"], strict=True)
    return max(float((ours - other).norm() / other.norm()) for ours, other in pairs)


def main(arguments: list[str] | None = None) -> int:
    """Run the checks, a line each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("checks", nargs="*", metavar="check", help=f"{', '.join(CHECKS)} (default: all)")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.checks if name not in CHECKS]
    if unknown:
        print(f"tools.hopper_smoke: no check {unknown[0]!r}; choose from {', '.join(CHECKS)}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available() or not native.has_hopper_kernels(torch.device("cuda", 0)):
        print("tools.hopper_smoke: no GPU of compute capability 9.0 with a library that has kernels for it")
        return 2
    failed = False
    for name in options.checks or CHECKS:
        error = error_of(name, torch.device("cuda", 0))
        agrees = error <= TOLERANCE
        failed |= not agrees
        print(f"{name}: relative difference {error:.2e}, {'agrees' if agrees else 'differs'}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
