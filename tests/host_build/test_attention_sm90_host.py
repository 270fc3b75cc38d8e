"""The forward kernel of shifted sparse attention at compute capability 9.0 on the emulated block: against float64."""

from __future__ import annotations

from pathlib import Path

import mutations_attention_sm90
import pytest
import torch
from attention_probes import LAYOUTS
from attention_sm90_probes import LONG, PROBES, layout, packed_widths, widths
from mutate import Mutation, Workshop

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


@pytest.mark.slow
@pytest.mark.parametrize("tiles", ["3, 64, 2, true, false, true"])
def test_other_tiles(tiles: str, tmp_path: Path) -> None:
    """What a tuner may choose, at every width of a head."""
    switch = "#ifdef JMLR_TUNE_ATTENTION_FORWARD"
    chosen = f"    return {{{tiles}}};\n{switch}"
    workshop = Workshop(tmp_path / "workshop", mutations_attention_sm90.SOURCES, mutations_attention_sm90.EXTRA)
    module = workshop.module(Mutation(tiles, "shifted_attention/sm90_tiles.h", switch, chosen))
    assert mutations_attention_sm90.noticed_by(module) is None
