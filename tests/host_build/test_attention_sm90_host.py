"""The forward kernel of shifted sparse attention at compute capability 9.0 on the emulated block: against float64."""

from __future__ import annotations

import pytest
import torch
from attention_probes import LAYOUTS, make_inputs
from attention_sm90_calls import serves
from attention_sm90_probes import LONG, PROBES, layout, packed_widths, widths

DTYPES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("name", [*LAYOUTS, *LONG])
def test_layouts(name: str) -> None:
    layout(name, torch.bfloat16)


@pytest.mark.parametrize("dim", [8, 64, 80, 96, 128, 200, 256])
def test_widths(dim: int) -> None:
    widths(torch.float16, dim)
    packed_widths(torch.bfloat16, dim)


@pytest.mark.parametrize("name", PROBES)
def test_corners(name: str) -> None:
    PROBES[name](torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("name", LONG)
def test_long_layouts_of_every_width(name: str, dim: int) -> None:
    layout(name, torch.float16, dim)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROBES)
def test_corners_of_half(name: str) -> None:
    PROBES[name](torch.float16)


def test_what_is_served() -> None:
    q, k, v, _ = make_inputs((2, 6), 4, 2, 64, torch.bfloat16)
    assert serves(q, k, v)
    assert serves(q.transpose(1, 2).contiguous().transpose(1, 2), k, v)
    assert serves(q[0], k[0], v[0], packed=torch.tensor([0, 6], dtype=torch.int32))
    assert not serves(q, k, v, boundary="wrap")
    assert not serves(q.float(), k.float(), v.float())
    assert not serves(q[..., 1:9], k[..., 1:9], v[..., 1:9]), "a start between multiples of 16 bytes"
    assert not serves(*(x[..., :20] for x in (q, k, v))), "an output whose rows start between multiples of 16 bytes"
    assert not serves(q, k, v[:, :, :1].expand_as(v)), "a stride of 0"
    wide = torch.empty(2, 6, 2, 264, dtype=torch.bfloat16)
    assert not serves(wide, wide, wide), "a head too wide"
    narrow = torch.empty(2, 6, 4, 68, dtype=torch.bfloat16)[..., :64]
    assert not serves(narrow, k, v), "a stride that is no multiple of 16 bytes"
    none = torch.empty(2, 0, 4, 64, dtype=torch.bfloat16)
    assert not serves(none, none, none)
