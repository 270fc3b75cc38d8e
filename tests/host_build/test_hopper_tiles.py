"""The primitives of compute capability 9.0 on the emulated block: each fault that the emulator must find, it finds."""

from __future__ import annotations

import itertools

import pytest
import torch
from host_module import ROOT, device, load

from tools import wgmma_registers

TYPES = [torch.bfloat16, torch.float16, torch.float8_e4m3fn]
# (a outer-major, b outer-major, a from registers)
FORMS = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0), (1, 1, 0)]
SHARED = {
    "no wait for copies": (1, "under way|nobody has written"),
    "fewer bytes expected than come": (2, "more than .* expects"),
    "more bytes expected than come": (3, "deadlock: .* lacks 0 arrivals and 16 bytes"),
    "more arrivals than expected": (4, "more arrivals than the 1 "),
    "a barrier made twice": (5, "made twice"),
    "no barrier of the block after init": (6, "without a barrier of the block|before its init"),
    "no fence after init": (7, r"without fence_barriers\(\)"),
    "a box not on 1024 bytes": (8, "misaligned"),
    "a wait for the wrong parity": (9, "deadlock: .* parity|under way|nobody has written"),
    "an accumulator touched before the wait": (10, "touches an accumulator"),
    "a wait without a name": (11, "does not name"),
    "a wait that names too early": (12, "still under way"),
    "no open_products": (13, r"no open_products\(\)"),
    "no close_products": (14, "still under way"),
    "warps with different products": (15, "different products"),
    "a named barrier for more than come": (16, "deadlock: .* named barrier"),
    "two counts at a named barrier": (17, "and for|twice"),
    "registers that nobody gave": (18, "deadlock: .* registers"),
    "warps with different registers": (19, "different numbers of registers"),
    "a copy after the last": (21, "under way|deadlock|waits for"),
    "a store that nobody waits for": (22, "stores of boxes under way"),
    "coordinates for another tensor": (23, "3 axes .* 4 coordinates"),
    "a write to a copy's target": (24, "under way"),
    "a box outside of shared memory": (25, "outside shared memory"),
    "no wait before a stage is filled again": (26, "under way|race|more arrivals"),
    "a stage handed back before its products": (27, "under way|race"),
    "a wait of one lane for its warp": (28, "under way|nobody has written|race"),
    "no fence before a store": (30, r"without a fence_async\(\)"),
    "no barrier before a store": (31, "race|nobody has written"),
    "a write to what a store reads": (32, "while a store"),
    "a write to a barrier": (33, "where a barrier lies"),
    "a fence by the reader alone": (34, r"without a fence_async\(\)"),
}
FROM_REGISTERS = {
    "a's registers written anew": (20, "registers a have been written"),
    "lanes whose reads the arrival leaves out": (29, "race"),
}

CLUSTER = {
    "a stage that the other block still reads": (1, "race|under way|more arrivals|deadlock"),
    "no barrier of the cluster after init": (2, "without a barrier of the cluster|before its init"),
    "a block that ends while the other tells it": (3, "after that block has ended"),
    "copies to more blocks than there are": (4, "a block that the cluster does not have"),
    "the bytes of one block's copies": (5, "more than .* expects|nobody has written|under way"),
    "a barrier in a block that there is not": (6, "a cluster without a block 2"),
}


def operand(x: torch.Tensor, outer: bool) -> torch.Tensor:
    return x.transpose(1, 2).contiguous() if outer else x


def product(a, b, columns=128, form=(0, 0, 0), **options):
    """a [batch, rows, depth] times b [batch, columns, depth], both inner-major."""
    c = torch.full((a.shape[0], a.shape[1], b.shape[1]), torch.nan)
    outer_a, outer_b, registers = map(bool, form)
    with device(load(), kilobytes=227) as module:
        module.hopper_product(
            operand(a, outer_a), operand(b, outer_b), c, outer_a, outer_b, registers, columns, **options
        )
    return c


def inputs(dtype, rows=136, columns=128, depth=144, batches=1):
    torch.manual_seed(0)
    a, b = torch.randn(batches, rows, depth), torch.randn(batches, columns, depth)
    return a.to(dtype), b.to(dtype)


def assert_product(c, a, b) -> None:
    exact = a.double() @ b.double().transpose(1, 2)
    # Exact products; an instruction cuts the sum once, in float32.
    steps = a.shape[2] * a.element_size() // 32 + 1
    bound = 2.0**-23 * steps * (a.double().abs() @ b.double().abs().transpose(1, 2))
    assert ((c - exact).abs() <= bound).all()


def check(a, b, *arguments, **options) -> None:
    assert_product(product(a, b, *arguments, **options), a, b)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("columns", [8, 48, 128, 256])
def test_products(dtype: torch.dtype, columns: int) -> None:
    for form in FORMS:
        if dtype.itemsize == 2 or not (form[0] or form[1]):
            check(*inputs(dtype, columns=columns), columns, form)


@pytest.mark.parametrize("seed", range(4))
def test_boxes_beyond_the_tensor_and_blocks_with_many_items(seed: int) -> None:
    for blocks, form in itertools.product((1, 3), ((0, 0, 0), (1, 1, 0))):
        check(*inputs(torch.bfloat16, 200, 200, 72, batches=2), 128, form, seed=seed, blocks=blocks)


def test_views_are_read_in_place() -> None:
    a, b = inputs(torch.float16, depth=192)
    check(a[:, 8:, 64:], b[:, :120, :128])


def test_executed_products_are_counted() -> None:
    for dtype in TYPES:
        load().take_products()
        product(*inputs(dtype, 128, 128, 256))
        assert load().take_products() == [128 // 16 * 128 // 8 * 256 // 16]


@pytest.mark.parametrize("fault", SHARED)
def test_faults_are_found(fault: str) -> None:
    number, message = SHARED[fault]
    a, b = inputs(torch.bfloat16, depth=256)
    with pytest.raises(load().Violation, match=message):
        product(a, b, fault=number)


@pytest.mark.parametrize("fault", FROM_REGISTERS)
def test_faults_of_products_from_registers_are_found(fault: str) -> None:
    number, message = FROM_REGISTERS[fault]
    a, b = inputs(torch.bfloat16, depth=256)
    with pytest.raises(load().Violation, match=message):
        product(a, b, form=(0, 0, 1), fault=number)


def cluster(rows=200, depth=256, **options):
    a, b = inputs(torch.bfloat16, rows, 64, depth)
    c = torch.full((1, rows, 64), torch.nan)
    with device(load(), kilobytes=227) as module:
        module.hopper_cluster(a, b, c, **options)
    assert_product(c, a, b)


@pytest.mark.parametrize("seed", range(4))
def test_clusters(seed: int) -> None:
    cluster(seed=seed)


@pytest.mark.parametrize("fault", CLUSTER)
def test_faults_of_clusters_are_found(fault: str) -> None:
    number, message = CLUSTER[fault]
    with pytest.raises(load().Violation, match=message):
        for seed in range(8):
            cluster(fault=number, seed=seed)


def test_maps_that_no_copy_can_take() -> None:
    a, b = inputs(torch.bfloat16, depth=144)
    for x, y in ((a[:, :, 4:140], b[:, :, :136]), (a[:, :, :140].contiguous(), b[:, :, :140])):
        with pytest.raises(load().Violation, match="a map of a tensor"):
            product(x, y)


def test_less_shared_memory_than_the_kernel_takes() -> None:
    a, b = inputs(torch.bfloat16)
    with device(load(), number=50, kilobytes=163) as module, pytest.raises(module.Violation, match="there are"):
        module.hopper_product(a, b, torch.empty(1, 136, 128), columns=256)


def test_the_operand_lists_are_those_of_the_tool() -> None:
    written = (ROOT / "csrc" / "tiles" / "wgmma_registers.h").read_text(encoding="utf-8")
    assert written == wgmma_registers.header()
