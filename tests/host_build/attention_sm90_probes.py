"""What the forward kernel of shifted sparse attention at compute capability 9.0 must do, as functions that raise
AssertionError where it does not: the tests run them on the kernel as it is, mutations_attention_sm90.py on kernels with
a bug."""

from __future__ import annotations

import attention_sm90_calls
import torch
from attention_probes import LAYOUTS, int32, make_inputs
from oracles import assert_as_exact_as_torch

from jmlr_kernels.shifted_attention.reference import allowed, shifted_sparse_attention_reference

# Blocks have 128 queries, warpgroups 64, tiles of keys 128: walks of several tiles, rings that come around, queries of
# one block in two groups, tiles that only one of the two warpgroups sees.
LONG = {
    "whole groups of tiles": ((1, 1024), 2, 1, 24, 512, {}),
    "groups of half a tile": ((1, 320), 2, 2, 24, 64, {}),
    "groups of a tile and a half": ((1, 500), 2, 2, 24, 192, {}),
    # The first query of a warpgroup may see all but one key of a tile: the last, the first.
    "a key after the queries": ((1, 300), 2, 1, 24, 130, {}),
    "a key before the queries' group": ((1, 200), 2, 1, 24, 129, {}),
    "an odd long group": ((1, 700), 2, 1, 24, 401, {}),
    "pairs of heads": ((2, 300), 8, 2, 24, 140, {}),
    "pairs that do not agree": ((1, 300), 6, 3, 24, 140, {}),
    "packed pairs": ((500,), 4, 2, 24, 200, {"cu_seqlens": (0, 70, 300, 500)}),
    "padded pairs": ((2, 300), 4, 1, 24, 250, {"seq_lens": (0, 210)}),
    "long and padded": ((3, 300), 2, 1, 24, 300, {"seq_lens": (299, 65, 193)}),
    "long and packed": ((900,), 2, 1, 24, 350, {"cu_seqlens": (0, 320, 449, 450, 840)}),
}


def layout(name, dtype, wide=None):
    """`wide`: other columns of a head than the layout's."""
    lead, heads, kv_heads, _, group_size, lengths = {**LAYOUTS, **LONG}[name]
    options = {key: int32(*values) for key, values in lengths.items()}
    tensors = make_inputs(lead, heads, kv_heads, wide or 24, dtype)[:3]
    for x in tensors:  # padding may hold anything
        for row, length in enumerate(lengths.get("seq_lens", ())):
            x[row, length:] = (torch.nan, torch.inf)[row % 2]
        if "cu_seqlens" in lengths:
            x[lengths["cu_seqlens"][-1] :] = torch.nan
    close(tensors, group_size, **options)


def close(tensors, group_size, **options):
    """The kernel's output, which must be as exact as plain torch at the same precision."""
    out, lse = attention_sm90_calls.forward(*tensors, group_size, **options)
    clean = [x.nan_to_num(0, 0, 0) for x in tensors]
    low, exact = (
        shifted_sparse_attention_reference(*(x.to(t) for x in clean), group_size, **options)
        for t in (out.dtype, torch.float64)
    )
    assert_as_exact_as_torch("out", out, low, exact)
    assert not lse.isnan().any(), "sums of exponentials that nobody wrote"
    return out, lse


def same(left, right):
    assert all(torch.equal(x, y) for x, y in zip(left, right, strict=True)), "two results differ"


def widths(dtype, dim):
    close(make_inputs((1, 270), 2, 1, dim, dtype)[:3], 200)


def packed_widths(dtype, dim):
    """The last rows of a document are not stored in boxes."""
    close(make_inputs((150,), 2, 1, dim, dtype)[:3], 90, cu_seqlens=int32(0, 70, 139))


def a_token_alone(dtype):
    """Its output is its value."""
    for lengths in ({}, {"seq_lens": int32(1, 1)}, {"cu_seqlens": int32(0, 1, 2)}):
        q, k, v, _ = make_inputs((2,) if "cu_seqlens" in lengths else (2, 1), 2, 2, 24, dtype)
        out, _ = attention_sm90_calls.forward(q, k, v, 2, scale=1.0, **lengths)
        torch.testing.assert_close(out, v)


def foreign_values(dtype):
    """What other documents hold beside a document's last row is not read, infinite or not."""
    q, k, v, _ = make_inputs((420,), 2, 1, 24, dtype)
    ends = int32(0, 70, 300, 420)
    truth, _ = attention_sm90_calls.forward(q, k, v, 200, cu_seqlens=ends)
    for x in (q, k, v):
        x[:70], x[300:] = torch.nan, torch.inf
    out, _ = attention_sm90_calls.forward(q, k, v, 200, cu_seqlens=ends)
    assert torch.equal(out[70:300], truth[70:300]), "a document sees its neighbours"


def scales(dtype):
    """Maxima are found whatever the scale's sign is."""
    tensors = make_inputs((1, 256), 2, 1, 24, dtype)[:3]
    for scale in (-3.0, 0.0, 1.0):
        close(tensors, 256, scale=scale)


def large_scores(dtype):
    """An exponential of anything but the distance to the largest score would overflow, or vanish."""
    q, k, v, _ = make_inputs((1, 400), 2, 1, 24, dtype)
    close([5 * q, 5 * k, v], 400)


def log_sums(dtype):
    """lse is the natural logarithm of the sum of a row's exponentials, +inf for padding."""
    q, k, v, _ = make_inputs((2, 300), 4, 2, 24, dtype)
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double().repeat_interleave(2, dim=2)) * 0.2
    truth = torch.full((2, 4, 300), torch.inf, dtype=torch.float64)
    for row, length in enumerate((300, 50)):
        mask = allowed(length, 170, 4, "split")
        truth[row, :, :length] = scores[row, :, :length, :length].masked_fill(~mask, -torch.inf).logsumexp(-1)
    _, lse = attention_sm90_calls.forward(q, k, v, 170, seq_lens=int32(300, 50), scale=0.2)
    torch.testing.assert_close(lse, truth.float())
    packed = [x[0] for x in (q, k, v)]
    _, lse = attention_sm90_calls.forward(*packed, 170, cu_seqlens=int32(0, 300), scale=0.2)
    torch.testing.assert_close(lse, truth[0].float())


def causality(dtype):
    """With unit vectors for values the output is the weights: nothing where a query may not attend."""
    for length, group_size in ((120, 37), (250, 64), (250, 200), (250, 500), (67, 2)):
        q, k, _, _ = make_inputs((1, length), 2, 2, 256, dtype)
        unit = torch.eye(length, 256, dtype=dtype)[None, :, None].expand(1, length, 2, 256).contiguous()
        out, _ = attention_sm90_calls.forward(q / 16, k, unit, group_size)
        mask = allowed(length, group_size, 2, "split")
        assert torch.equal(out[0, :, :, :length].permute(1, 0, 2) > 0, mask), "weights of forbidden or missing pairs"


def strides(dtype):
    """Layouts that models hand over: the same bits."""
    q, k, v, _ = make_inputs((2, 140), 2, 1, 32, dtype)
    truth = attention_sm90_calls.forward(q, k, v, 100)
    fused = torch.cat([k, v, k], dim=2)
    turned = q.transpose(1, 2).contiguous().transpose(1, 2)
    same(attention_sm90_calls.forward(turned, fused[:, :, :1], fused[:, :, 1:2], 100), truth)
    every_other = torch.full((4, 280, 2, 32), torch.nan, dtype=dtype)
    every_other[::2, ::2] = q
    same(attention_sm90_calls.forward(every_other[::2, ::2], k, v, 100), truth)


def order_of_blocks(dtype):
    """No result depends on which block or warp comes first, nor on how many blocks there are."""
    tensors = make_inputs((2, 400), 4, 2, 24, dtype)[:3]
    truth = attention_sm90_calls.forward(*tensors, 300)
    for seed, processors in ((1, 1), (2, 7), (3, 132)):  # one is no pair
        same(attention_sm90_calls.forward(*tensors, 300, seed=seed, processors=processors), truth)


def long_groups(dtype):
    """Ends of groups do not fit 32 bits."""
    for group_size in (2**31 - 1, 2**31, 2**40 + 7):
        close(make_inputs((1, 40), 2, 1, 24, dtype)[:3], group_size)


def long_lengths(dtype):
    """A row holds no more tokens than it has, and no less than none: lengths on a GPU are not read before a launch."""
    tensors = make_inputs((3, 70), 2, 1, 24, dtype)[:3]
    same(
        attention_sm90_calls.forward(*tensors, 36, seq_lens=int32(100, 2**31 - 1, -5)),
        attention_sm90_calls.forward(*tensors, 36, seq_lens=int32(70, 70, 0)),
    )


def far_rows(dtype):
    """Rows lie more than 2**31 elements apart: reserved, not touched, since the system gives memory page by page."""
    span = torch.empty(2**31 + 1024, dtype=dtype)
    for lead, steps in (((1, 3), (2**31, 2**30, 256)), ((3,), (2**30, 256)), ((2, 2), (2**31 + 512, 32, 64))):
        tensors = make_inputs(lead, 1 if lead != (2, 2) else 2, 1, 16, dtype)[:3]
        apart = [span.as_strided(x.shape, (*steps, 1), 128 * number).copy_(x) for number, x in enumerate(tensors)]
        options = {"cu_seqlens": int32(0, 1, 3)} if len(lead) == 1 else {}
        same(attention_sm90_calls.forward(*apart, 2, **options), attention_sm90_calls.forward(*tensors, 2, **options))


def what_is_served(dtype):
    """What copies of boxes can read, and "split" alone: all else is left to the kernels of compute capability 8.0."""
    serves = attention_sm90_calls.serves
    q, k, v, _ = make_inputs((2, 6), 4, 2, 64, dtype)
    assert serves(q, k, v)
    assert serves(q.transpose(1, 2).contiguous().transpose(1, 2), k, v)
    assert serves(q[0], k[0], v[0], packed=int32(0, 6))
    assert not serves(q, k, v, boundary="wrap")
    assert not serves(q.float(), k.float(), v.float())
    assert not serves(q[..., 1:9], k[..., 1:9], v[..., 1:9]), "a start between multiples of 16 bytes"
    assert not serves(*(x[..., :20] for x in (q, k, v))), "an output whose rows start between multiples of 16 bytes"
    assert not serves(q, k, v[:, :, :1].expand_as(v)), "a stride of 0"
    wide = torch.empty(2, 6, 2, 264, dtype=dtype)
    assert not serves(wide, wide, wide), "a head too wide"
    narrow = torch.empty(2, 6, 4, 68, dtype=dtype)[..., :64]
    assert not serves(narrow, k, v), "a stride that is no multiple of 16 bytes"
    none = torch.empty(2, 0, 4, 64, dtype=dtype)
    assert not serves(none, none, none)


_CORNERS = (a_token_alone, foreign_values, scales, large_scores, log_sums, causality, strides, order_of_blocks)
_CORNERS += (long_groups, long_lengths, far_rows, what_is_served)
PROBES = {probe.__name__.replace("_", " "): probe for probe in _CORNERS}
