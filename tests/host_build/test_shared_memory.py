"""GPUs whose blocks have 99 KB of shared memory, and what a launch asks of a device: once, and of each."""

from __future__ import annotations

import attention_calls
import pytest
import torch
from attention_probes import LAYOUTS, layout, make_inputs, same, widths
from host_module import load
from maxsim_calls import in_place_of_triton
from maxsim_cases import make_case

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [32, 64, 96, 128, 256])
def test_every_width_of_attention_fits_99_kilobytes(dim: int, dtype: torch.dtype) -> None:
    widths(dtype, dim, kilobytes=99)


def small_layout(name: str, boundary: str, dim: int, dtype: torch.dtype) -> None:
    with attention_calls.device(kilobytes=99):
        layout(name, dtype, boundary, wide=dim)


@pytest.mark.parametrize("dim", [128, 256])
@pytest.mark.parametrize(
    ("name", "boundary"), [("odd group", "split"), ("one short group", "wrap"), ("packed", "wrap")]
)
def test_layouts_in_the_small_tiles(name: str, boundary: str, dim: int) -> None:
    small_layout(name, boundary, dim, torch.float16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dim", "dtype"), [(128, torch.bfloat16), (256, torch.bfloat16), (256, torch.float32)], ids=str
)
@pytest.mark.parametrize("boundary", ["split", "wrap"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_all_layouts_in_the_small_tiles(name: str, boundary: str, dim: int, dtype: torch.dtype) -> None:
    small_layout(name, boundary, dim, dtype)


@pytest.mark.parametrize("kilobytes", [100, 162])
def test_between_the_classes_the_small_one_is_taken(kilobytes: int) -> None:
    tensors = make_inputs((1, 70), 2, 1, 256, torch.float16)
    results = []
    for each in (99, kilobytes):
        with attention_calls.device(kilobytes=each):
            results.append(attention_calls.results(*tensors, 40))
    same(*results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dimension", [64, 128, 256, 300])
def test_maxsim_has_the_same_tiles_everywhere(
    dimension: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    with in_place_of_triton(monkeypatch):
        for kilobytes in (99, 163):
            with attention_calls.device(kilobytes=kilobytes):
                for query_count in (1, 5):  # few rows, and many
                    case = make_case(query_count=query_count, query_length=20, documents=2, document_length=70,
                                     dimension=dimension, normalize=True).to(dtype)  # fmt: skip
                    found.append(case.run("triton"))
    for small, large in zip(found[:2], found[2:], strict=True):
        assert all(torch.equal(value, large[name]) for name, value in small.items())


def test_less_is_an_error() -> None:
    q, k, v, _ = make_inputs((1, 8), 2, 1, 256, torch.float16)
    with attention_calls.device(number=40, kilobytes=64), pytest.raises(load().Violation, match="there are 65536"):
        attention_calls.forward(q, k, v, 4, None, None, False, 1.0)


def test_shared_memory_is_asked_for_once_on_each_device() -> None:
    q, k, v, _ = make_inputs((1, 8), 2, 1, 256, torch.bfloat16)
    asked = []
    # A device beyond those that are kept in mind is asked each time.
    for number in (41, 41, 42, 41, 42, 64, 64):
        with attention_calls.device(number=number) as module:
            before = module.times_asked_for_shared_memory()
            attention_calls.forward(q, k, v, 4, None, None, False, 1.0)
            asked.append(module.times_asked_for_shared_memory() - before)
    assert asked == [1, 0, 1, 0, 0, 1, 1]


def test_narrow_heads_ask_for_nothing() -> None:
    tensors = make_inputs((1, 8), 2, 1, 32, torch.float16)
    with attention_calls.device(number=43) as module:
        before = module.times_asked_for_shared_memory()
        attention_calls.results(*tensors, 4)
        assert module.times_asked_for_shared_memory() == before


def test_threads_that_launch_for_the_first_time_at_once() -> None:
    load().first_launches(32, 4)
