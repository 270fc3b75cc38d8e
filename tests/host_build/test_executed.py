"""The count of executed FLOPs of the native library against the products that the emulated tensor cores make."""

from __future__ import annotations

import random
from typing import Any

import attention_calls
import attention_sm90_backward_calls
import attention_sm90_calls
import pytest
import torch
from host_module import load

from jmlr_kernels import native
from jmlr_kernels.shifted_attention.executed import library_flops
from jmlr_kernels.shifted_attention.flops import attention_pairs

# A product is 16 rows by 8 columns by 16, and by 8 for TF32, three of which make one of float32.
FLOPS = {torch.float16: 2 * 16 * 8 * 16, torch.bfloat16: 2 * 16 * 8 * 16, torch.float32: 2 * 16 * 8 * 8 / 3}
# Every width of tiles, in one type at least, and both sets of those that have two.
CASES = [
    (torch.float16, 20, 163), (torch.float32, 33, 163), (torch.bfloat16, 80, 163),
    (torch.float16, 128, 163), (torch.bfloat16, 128, 99), (torch.bfloat16, 200, 163), (torch.float16, 200, 99),
]  # fmt: skip
SLOW = [(torch.float32, dim, kilobytes) for dim, kilobytes in ((20, 163), (80, 163), (128, 99), (200, 99), (200, 163))]
USEFUL = {"forward": 2, "backward_dq": 3, "backward_dkdv": 4}


@pytest.fixture(autouse=True)
def library() -> None:
    if native.loaded().problem:
        pytest.skip(f"the library tells its tile sizes, and is not there: {native.loaded().problem}")


def documents(rng: random.Random, layout: str, longest: int) -> tuple[list[int], dict[str, Any], tuple[int, ...]]:
    """(lengths of the documents, arguments that say so, leading sizes of q)."""
    lengths = [rng.choice((0, 1, rng.randint(2, 50))) for _ in range(2)] + [rng.randint(1, longest)]
    if layout == "packed":
        ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        return lengths, {"cu_seqlens": ends}, (sum(lengths) + rng.choice((0, 20)),)
    if layout == "padded":
        return lengths, {"seq_lens": torch.tensor(lengths, dtype=torch.int32)}, (len(lengths), longest + 1)
    return [lengths[-1]] * 2, {}, (2, lengths[-1])


@pytest.mark.parametrize("cases", [CASES, pytest.param(SLOW, marks=pytest.mark.slow)], ids=["fast", "float32"])
@pytest.mark.parametrize("boundary", ["split", "wrap"])
@pytest.mark.parametrize("layout", ["dense", "padded", "packed"])
def test_executed_flops_are_what_the_tensor_cores_multiply(
    layout: str, boundary: str, cases: list[tuple[torch.dtype, int, int]]
) -> None:
    rng = random.Random(f"{layout} {boundary}")
    for dtype, dim, kilobytes in cases:
        heads, kv_heads = rng.choice(((2, 1), (3, 3)))
        longest = 300 if dim < 80 else 150
        lengths, arguments, lead = documents(rng, layout, longest)
        group_size = rng.randint(2, longest)
        shapes = [(*lead, count, dim) for count in (heads, kv_heads, kv_heads, heads)]
        tensors = [torch.randn(shape).to(dtype) for shape in shapes]
        with attention_calls.device(kilobytes=kilobytes) as module:
            module.take_products()
            attention_calls.results(*tensors, group_size, boundary=boundary, **arguments)
            made = [round(products * FLOPS[dtype]) for products in module.take_products()]
        expected = library_flops(lengths, group_size, heads, dim, dtype, kilobytes * 1024, boundary)
        assert made == list(expected.values()), (dtype, dim, lengths, group_size)
        for kernel, flops in expected.items():
            pairs = sum(attention_pairs(length, group_size, boundary).total(heads) for length in lengths)
            assert flops >= 2 * USEFUL[kernel] * dim * pairs > 0


@pytest.mark.parametrize("layout", ["dense", "padded", "packed"])
def test_executed_flops_of_the_hopper_kernels(layout: str) -> None:
    rng = random.Random(layout)
    for dtype, dim in ((torch.float16, 128), (torch.bfloat16, 64), (torch.float16, 80), (torch.bfloat16, 200)):
        heads, kv_heads = rng.choice(((2, 1), (3, 3)))
        lengths, arguments, lead = documents(rng, layout, 500)
        group_size = rng.randint(2, 400)
        q, k, v, grad = (torch.randn((*lead, count, dim)).to(dtype) for count in (heads, kv_heads, kv_heads, heads))
        expected = library_flops(lengths, group_size, heads, dim, dtype, 227 * 1024, hopper=True)
        module = load()
        module.take_products()
        attention_sm90_calls.forward(q, k, v, group_size, **arguments)
        made = [round(products * FLOPS[dtype]) for products in module.take_products()]
        if dim <= 128:
            attention_sm90_backward_calls.results(q, k, v, grad, group_size, **arguments)
            made += [round(products * FLOPS[dtype]) for products in module.take_products()]
        assert made == list(expected.values())[: len(made)], (dtype, dim, lengths, group_size)
        for kernel, flops in expected.items():
            pairs = sum(attention_pairs(length, group_size).total(heads) for length in lengths)
            assert flops >= 2 * USEFUL[kernel] * dim * pairs > 0


def test_the_hopper_kernels_count_only_what_they_take() -> None:
    arguments = ([300], 128, 2)
    for dtype, dim, boundary in (
        (torch.float32, 64, "split"),
        (torch.float16, 60, "split"),
        (torch.float16, 64, "wrap"),
    ):
        usual = library_flops(*arguments, dim, dtype, 227 * 1024, boundary)
        assert library_flops(*arguments, dim, dtype, 227 * 1024, boundary, hopper=True) == usual
    wide = library_flops(*arguments, 256, torch.float16, 227 * 1024, hopper=True)
    usual = library_flops(*arguments, 256, torch.float16, 227 * 1024)
    assert wide["forward"] != usual["forward"] and wide["backward_dq"] == usual["backward_dq"]


def test_what_the_library_does_not_have_is_an_error() -> None:
    for dtype, dim, problem in ((torch.float64, 64, "2 or 4 bytes"), (torch.float16, 257, "1 to 256")):
        with pytest.raises(RuntimeError, match=problem):
            library_flops([8], 4, 2, dim, dtype, 99 * 1024)
