"""MaxSim's forward for compute capability 9.0 on the emulated block: against that for 8.0 and the definition."""

from __future__ import annotations

from collections.abc import Iterator

import maxsim_probes
import maxsim_sm90_probes
import pytest
import torch
from maxsim_sm90_calls import in_place_of_triton

DTYPES = [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    with in_place_of_triton(monkeypatch) as served:
        yield served


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", maxsim_sm90_probes.SHAPES)
def test_as_on_sm80(name: str, dtype: torch.dtype) -> None:
    maxsim_sm90_probes.shape(name, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", maxsim_sm90_probes.PROBES)
def test_corners(name: str, dtype: torch.dtype) -> None:
    maxsim_sm90_probes.PROBES[name](dtype)


SERVED = ["queries_share_a_tile", "few_rows", "several_tiles", "one_token", "resident_chunks", "candidates", "packed"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", SERVED)
def test_definition(name: str, masked: bool, dtype: torch.dtype, served: list[bool]) -> None:
    """Random numbers, within the tolerance rule of the definition in float64; gradients by the saved winners."""
    maxsim_probes.shape(name, dtype, masked)
    assert all(served)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["ties", "not_a_number", "unmarked_winners", "empty_sides", "per_token"])
def test_corners_of_the_definition(name: str, dtype: torch.dtype, served: list[bool]) -> None:
    maxsim_probes.PROBES[name](dtype)
    assert any(served)
