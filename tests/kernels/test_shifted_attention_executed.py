"""The count of executed FLOPs against the products that Triton's interpreter makes, one `tl.dot` after the other."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import jmlr_kernels
from jmlr_kernels.ops import triton_interpreted
from jmlr_kernels.shifted_attention import config
from jmlr_kernels.shifted_attention.executed import (
    executed_flops,
    group_key_tiles,
    group_query_tiles,
    key_tiles,
    query_tiles,
)
from jmlr_kernels.shifted_attention.flops import attention_pairs

pytestmark = [
    pytest.mark.skipif(not triton_interpreted(), reason="needs TRITON_INTERPRET=1"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter"),
]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """FLOPs of every tl.dot, by the kernel that was launched."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    found: Counter[str] = Counter()
    running = [""]
    multiply, launch = InterpreterBuilder.create_dot, GridExecutor.__call__

    def counting(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        found[running[0]] += 2 * a.data.shape[-2] * a.data.shape[-1] * b.data.shape[-1]
        return multiply(self, a, b, *rest)

    def named(self: Any, *args: Any, **kwargs: Any) -> Any:
        running[0] = self.fn.__name__.removesuffix("_kernel")
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", counting)
    monkeypatch.setattr(GridExecutor, "__call__", named)
    yield found


def _documents(rng: random.Random, layout: str) -> tuple[list[int], dict[str, Any], tuple[int, ...]]:
    """(lengths of the documents, arguments that say so, leading sizes of q)."""
    lengths = [rng.choice((0, 1, rng.randint(2, 50))) for _ in range(2)] + [rng.randint(1, 70)]
    if layout == "packed":
        ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        return lengths, {"cu_seqlens": ends}, (sum(lengths) + rng.choice((0, 20)),)
    if layout == "padded":
        return lengths, {"seq_lens": torch.tensor(lengths, dtype=torch.int32)}, (len(lengths), 71)
    return [lengths[-1]] * 2, {}, (2, lengths[-1])


PRODUCTS = {"forward": 2, "backward_dq": 3, "backward_dkdv": 4}


@pytest.mark.parametrize("kind", ["wrap", "split", "split by bulk copies"])
@pytest.mark.parametrize("layout", ["dense", "padded", "packed"])
def test_executed_flops_are_what_the_kernels_multiply(
    layout: str, kind: str, counted: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, boundary = random.Random(f"{layout} {kind}"), kind.split()[0]
    copies = kind.endswith("copies")
    if not copies:
        monkeypatch.setattr(config, "tma_kernel", lambda *_: None)
    for heads, kv_heads in ((2, 1), (3, 3)):
        lengths, arguments, lead = _documents(rng, layout)
        group_size, dim = rng.randint(32, 60) if copies else rng.randint(2, 60), rng.choice((16, 20))
        q, k, v = (torch.randn(*lead, count, dim, requires_grad=True) for count in (heads, kv_heads, kv_heads))
        counted.clear()
        out = jmlr_kernels.shifted_sparse_attention(
            q, k, v, group_size, boundary=boundary, backend="triton", **arguments
        )
        torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
        names = [f"{name}_tma" if copies else name for name in PRODUCTS]
        assert {name for name, flops in counted.items() if flops} <= {*names}
        for name in names:
            tiles = config.tiles(name, torch.float32, dim, config.INTERPRETER, boundary == "wrap")
            expected = executed_flops(
                name, lengths, group_size, heads, config.block_d(dim), tiles.block_m, tiles.block_n, boundary
            )
            assert counted[name] == expected > 0, (name, lengths, group_size)


@pytest.mark.parametrize("blocks", [(16, 16), (128, 64), (64, 128)])
def test_useful_is_never_more_than_executed(blocks: tuple[int, int]) -> None:
    rng = random.Random(0)
    for _ in range(50):
        length, group_size = rng.randint(0, 2000), rng.randint(2, 700)
        for boundary in ("split", "wrap"):
            pairs = attention_pairs(length, group_size, boundary).total(5)
            for kernel, products in PRODUCTS.items():
                if boundary == "split":
                    assert (
                        executed_flops(f"{kernel}_tma", [length], group_size, 5, 64, *blocks)
                        >= 2 * products * 64 * pairs
                    )
                executed = executed_flops(kernel, [length], group_size, 5, 64, *blocks, boundary)
                assert executed >= 2 * products * 64 * pairs


def test_tiles_counted_by_hand() -> None:
    """Tiles of 128 divide groups of 1024 and their halves: of 8 x 8 tiles, 36 are on or below the diagonal."""
    for count in (key_tiles, query_tiles, group_key_tiles, group_query_tiles):
        assert count(4096, 1024, 128, 128) == 4 * 36
        assert count(4096, 1024, 128, 128, shift=512) == 10 + 3 * 36 + 10
    # Queries 192 to 255 of a group of 256 need four key tiles of 64, those before one less each.
    assert key_tiles(512, 256, 64, 64) == query_tiles(512, 256, 64, 64) == 2 * (1 + 2 + 3 + 4)
    # Tiles that start with the groups waste the group's last one alone; the others straddle edges.
    assert group_key_tiles(200, 100, 64, 64) == 2 * (1 + 2) < key_tiles(200, 100, 64, 64)
    # A key tile of 32 in the last query tile of 64 still meets it whole.
    assert query_tiles(64, 64, 64, 32) == 2


def test_another_name_is_refused() -> None:
    for kernel, boundary in (("backward", "split"), ("forward", "roll"), ("forward_tma", "wrap")):
        with pytest.raises(ValueError, match="choose of"):
            executed_flops(kernel, [4], 2, 2, 16, 16, 16, boundary)
