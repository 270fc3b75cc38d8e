"""What the backward kernels of shifted sparse attention at compute capability 9.0 must do, as functions that raise
AssertionError where they do not: the tests run them on the kernels as they are, mutations_attention_sm90_backward.py on
kernels with a bug."""

from __future__ import annotations

import attention_sm90_backward_calls as calls
import torch
from attention_probes import LAYOUTS, expected, int32, make_inputs, recomputing, same
from oracles import assert_as_exact_as_torch

from jmlr_kernels.shifted_attention.reference import allowed, shifted_sparse_attention_reference

NAMES = ("dq", "dk", "dv")

# Blocks own 128 rows, warpgroups 64, stages hold 64: walks that go around the rings, warpgroups of one block in two
# groups, stages that only one of them needs, and so many of these in a row that a stage kept back would stop all.
LONG = {
    "whole groups of tiles": ((1, 512), 2, 1, 24, 512, {}),
    "groups of half a block": ((1, 320), 2, 2, 24, 64, {}),
    "groups of a block and a half": ((1, 400), 2, 2, 24, 192, {}),
    "an odd long group": ((1, 500), 2, 1, 24, 301, {}),
    "a group that parts the warpgroups": ((1, 832), 1, 1, 24, 640, {}),
    "long and padded": ((3, 300), 4, 2, 24, 300, {"seq_lens": (299, 65, 193)}),
    "long and packed": ((900,), 2, 1, 24, 350, {"cu_seqlens": (0, 320, 449, 450, 840)}),
}


def layout(name, dtype, wide=None):
    """`wide`: other columns of a head than the layout's."""
    lead, heads, kv_heads, _, group_size, lengths = {**LAYOUTS, **LONG}[name]
    options = {key: int32(*values) for key, values in lengths.items()}
    tensors = make_inputs(lead, heads, kv_heads, wide or 24, dtype)
    for x in tensors:  # padding may hold anything
        for row, length in enumerate(lengths.get("seq_lens", ())):
            x[row, length:] = (torch.nan, torch.inf)[row % 2]
        if "cu_seqlens" in lengths:
            x[lengths["cu_seqlens"][-1] :] = torch.nan
    close(tensors, group_size, **options)


def close(tensors, group_size, plain=shifted_sparse_attention_reference, **options):
    """The kernels' gradients, which must be as exact as plain torch at the same precision."""
    actual = calls.results(*tensors, group_size, **options)
    clean = [x.nan_to_num(0, 0, 0) for x in tensors]
    low = expected(plain, tensors[0].dtype, clean, group_size, **options)
    exact = expected(shifted_sparse_attention_reference, torch.float64, clean, group_size, **options)
    for name, x, y, z in zip(NAMES, actual, low[1:], exact[1:], strict=True):
        assert_as_exact_as_torch(name, x, y, z)


def widths(dtype, dim):
    close(make_inputs((1, 270), 2, 1, dim, dtype), 200)


def packed_widths(dtype, dim):
    """The last rows of a document are not stored in boxes."""
    close(make_inputs((150,), 2, 1, dim, dtype), 90, cu_seqlens=int32(0, 70, 139))


def a_token_alone(dtype):
    """No score has a gradient, up to the rounding of the two sums that cancel."""
    for lengths in ({}, {"seq_lens": int32(1, 1)}, {"cu_seqlens": int32(0, 1, 2)}):
        q, k, v, grad = make_inputs((2,) if "cu_seqlens" in lengths else (2, 1), 2, 2, 24, dtype)
        dq, dk, dv = calls.results(q, k, v, grad, 2, scale=1.0, **lengths)
        torch.testing.assert_close(dv, grad)
        rounding = 24 * torch.finfo(torch.float32).eps * (grad.float() * v.float()).abs().sum(-1, keepdim=True)
        assert (dq.abs() <= rounding * k.abs()).all()
        assert (dk.abs() <= rounding * q.abs()).all()


def foreign_rows(dtype):
    """What other documents hold beside a document's last row is not read, infinite or not."""
    tensors = make_inputs((420,), 2, 1, 24, dtype)
    ends = int32(0, 70, 300, 420)
    truth = calls.results(*tensors, 200, cu_seqlens=ends)
    for x in tensors:
        x[:70], x[300:] = torch.nan, torch.inf
    actual = calls.results(*tensors, 200, cu_seqlens=ends)
    same([x[70:300] for x in actual], [x[70:300] for x in truth])


def scales(dtype):
    """Whatever the scale's sign is."""
    tensors = make_inputs((1, 256), 2, 1, 24, dtype)
    for scale in (-3.0, 0.0, 1.0):
        close(tensors, 256, plain=recomputing(tensors[3]), scale=scale)


def large_scores(dtype):
    """An exponential of anything but the distance to lse would overflow, or vanish."""
    q, k, v, grad = make_inputs((1, 400), 2, 1, 24, dtype)
    close([5 * q, 5 * k, v, grad], 400, plain=recomputing(grad))


def causality(dtype):
    """With unit vectors for the output's gradient dv is the weights: nothing where a query may not attend. With a
    single query that has a gradient, dk and dq have none anywhere else."""
    for length, group_size in ((120, 37), (128, 64), (128, 100), (67, 2)):
        q, k, v, _ = make_inputs((1, length), 2, 2, 128, dtype)
        unit = torch.eye(length, 128, dtype=dtype)[None, :, None].expand(1, length, 2, 128).contiguous()
        _, _, dv = calls.results(q / 8, k, v, unit, group_size)
        mask = allowed(length, group_size, 2, "split")
        assert torch.equal(dv[0, :, :, :length].permute(1, 2, 0) > 0, mask), "weights of forbidden or missing pairs"
        one = torch.zeros_like(q)
        one[0, length // 2] = 1
        dq, dk, _ = calls.results(q / 8, k, v, one, group_size)
        assert not dk[0][~mask[:, length // 2].T].any(), "keys of another query"
        dq[0, length // 2] = 0
        assert not dq.any(), "queries without a gradient"


def strides(dtype):
    """Layouts that models hand over: the same bits."""
    q, k, v, grad = make_inputs((2, 140), 2, 1, 32, dtype)
    truth = calls.results(q, k, v, grad, 100)
    fused = torch.cat([k, v, k], dim=2)
    turned = q.transpose(1, 2).contiguous().transpose(1, 2)
    same(calls.results(turned, fused[:, :, :1], fused[:, :, 1:2], grad, 100), truth)
    every_other = torch.full((4, 280, 2, 32), torch.nan, dtype=dtype)
    every_other[::2, ::2] = grad
    same(calls.results(q, k, v, every_other[::2, ::2], 100), truth)


def order_of_blocks(dtype):
    """No result depends on which block or warp comes first, nor on how many blocks there are."""
    tensors = make_inputs((1, 270), 4, 2, 24, dtype)
    truth = calls.results(*tensors, 200)
    for seed, processors in ((1, 1), (2, 7), (3, 132)):
        same(calls.results(*tensors, 200, seed=seed, processors=processors), truth)


def long_groups(dtype):
    """Ends of groups do not fit 32 bits."""
    for group_size in (2**31 - 1, 2**31, 2**40 + 7):
        close(make_inputs((1, 40), 2, 1, 24, dtype), group_size)


def long_lengths(dtype):
    """A row holds no more tokens than it has, and no less than none: lengths on a GPU are not read before a launch."""
    q, k, v, grad = make_inputs((3, 70), 2, 1, 24, dtype)
    out, lse = torch.randn(3, 70, 2, 24).to(dtype), torch.ones(3, 2, 70)
    same(
        calls.backward(grad, q, k, v, out, lse, 36, None, int32(100, 2**31 - 1, -5), 0.2),
        calls.backward(grad, q, k, v, out, lse, 36, None, int32(70, 70, 0), 0.2),
    )


def many_query_heads(dtype):
    """Query heads of both halves share a kv head, and are summed up in order."""
    close(make_inputs((1, 200), 12, 2, 24, dtype), 130)
    close(make_inputs((1, 130), 6, 1, 24, dtype), 64)


_CORNERS = (a_token_alone, foreign_rows, scales, large_scores, causality, strides, order_of_blocks)
_CORNERS += (long_groups, long_lengths, many_query_heads)
PROBES = {probe.__name__.replace("_", " "): probe for probe in _CORNERS}
