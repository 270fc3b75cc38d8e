"""The backward kernels of shifted sparse attention at compute capability 9.0 on the emulated block: against float64."""

from __future__ import annotations

import pytest
import torch
from attention_probes import LAYOUTS, make_inputs
from attention_sm90_backward_calls import results
from attention_sm90_backward_probes import LONG, PROBES, layout, packed_widths, widths


@pytest.mark.parametrize("name", [*LAYOUTS, *LONG])
def test_layouts(name: str) -> None:
    layout(name, torch.bfloat16)


@pytest.mark.parametrize("dim", [8, 32, 64, 80, 96, 128])
def test_widths(dim: int) -> None:
    widths(torch.float16, dim)
    packed_widths(torch.bfloat16, dim)


@pytest.mark.parametrize("name", PROBES)
def test_corners(name: str) -> None:
    PROBES[name](torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [96, 128])
@pytest.mark.parametrize("name", LONG)
def test_long_layouts_of_wide_heads(name: str, dim: int) -> None:
    layout(name, torch.float16, dim)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROBES)
def test_corners_of_half(name: str) -> None:
    PROBES[name](torch.float16)


def test_what_is_not_served() -> None:
    q, k, v, grad = make_inputs((2, 6), 4, 2, 64, torch.bfloat16)
    assert len(results(q, k, v, grad, 4)) == 3
    wide = make_inputs((2, 6), 4, 2, 136, torch.bfloat16)
    summed = torch.ones(64, dtype=grad.dtype).expand_as(grad)
    shifted = torch.empty(grad.numel() + 1, dtype=grad.dtype)[1:].view_as(grad)
    for tensors in (wide, (q, k, v, summed), (q, k, v, shifted), [x[..., :20] for x in (q, k, v, grad)]):
        with pytest.raises(ValueError, match="not served"):
            results(*tensors, 4)
