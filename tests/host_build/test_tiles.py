"""The tile primitives on the emulated block, and the emulator itself: each fault that it must find, it finds."""

from __future__ import annotations

import pytest
import torch
from host_module import load

FAULTS = {
    1: "race|under way|nobody has written",  # no barrier after the load
    2: "race|under way",  # no barrier before the tile is filled again
    3: "under way",  # no wait for asynchronous copies
    4: "outside of every tensor|race",  # a column too far
    5: "outside of every tensor",  # a row too far
    6: "two (blocks|threads) write",
    7: "not all lanes",
    8: "race|under way|nobody has written|wait at a barrier",  # a barrier that one warp does not reach
    9: "under way",  # copies that no wait covers
    10: "misaligned",
    11: "write to the input",
    13: "different warp-wide instructions|not all lanes",  # the warp's number asked for by one lane
}


def product(a, b, transposed=False, fault=0, seed=0):
    rows, columns = (a.shape[1], b.shape[1]) if transposed else (a.shape[0], b.shape[0])
    c = torch.full((rows, columns), torch.nan)
    load().product(a, b, c, transposed, fault, seed)
    return c


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("rows", "columns", "depth"), [(64, 32, 32), (63, 17, 40), (130, 33, 101), (1, 1, 1)])
def test_product(dtype, transposed, rows, columns, depth):
    torch.manual_seed(0)
    a, b = torch.randn(rows, depth).to(dtype), torch.randn(columns, depth).to(dtype)
    exact = a.double() @ b.double().T
    if transposed:
        a, b = a.T.contiguous(), b.T.contiguous()
    for seed in range(2):
        c = product(a, b, transposed, seed=seed)
        # Products of 16-bit numbers are exact in float32; of 3xTF32 a product keeps 21 bits or more.
        bound = 2.0**-20 * (a.double().abs().amax() * b.double().abs().amax()) * depth
        assert (c - exact).abs().max() <= bound


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fault):
    torch.manual_seed(0)
    a, b = torch.randn(100, 96).to(torch.bfloat16), torch.randn(50, 96).to(torch.bfloat16)
    violation = load().Violation
    product(a, b)
    with pytest.raises(violation, match=FAULTS[fault]):
        product(a, b, fault=fault)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_infinities_meet_only_what_the_factors_hold(dtype):
    a, b = torch.ones(16, 32), torch.full((16, 32), 1 / 3)
    a[0, 3], a[1, 5], b[2, 5] = torch.inf, -torch.inf, torch.inf
    b[3, 3] = 0
    a, b = a.to(dtype), b.to(dtype)
    torch.testing.assert_close(product(a, b), a.float() @ b.float().T, equal_nan=True)


def test_tf32_would_be_noticed():
    """One product of 19-bit numbers is a thousand times less exact than the three we take."""
    torch.manual_seed(0)
    a, b = torch.randn(16, 64), torch.randn(16, 64)
    exact = a.double() @ b.double().T
    cut = lambda x: (x.view(torch.int32) & -8192).view(torch.float32).double()  # noqa: E731
    once = (cut(a) @ cut(b).T - exact).abs().max()
    assert (product(a, b) - exact).abs().max() < once / 300
