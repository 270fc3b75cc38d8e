"""What the CUDA kernels of shifted sparse attention must do, as functions that raise AssertionError where they do not:
the tests run them on the kernels as they are, mutations_shifted_attention.py on kernels with a bug."""

from __future__ import annotations

from unittest.mock import patch

import attention_calls
import torch
from oracles import assert_as_exact_as_torch

from jmlr_kernels.shifted_attention import torch_grouped
from jmlr_kernels.shifted_attention.reference import allowed, shifted_sparse_attention_reference

NAMES = ("out", "dq", "dk", "dv")


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def make_inputs(lead, heads, kv_heads, dim, dtype, seed=3):
    """q, k, v and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*lead, h, dim, generator=generator).to(dtype) for h in (heads, kv_heads, kv_heads, heads)]


def expected(function, dtype, tensors, group_size, **options):
    """(out, dq, dk, dv) of a differentiable function in `dtype`."""
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in tensors[:3])
    out = function(q, k, v, group_size, **options)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), tensors[3].to(dtype), materialize_grads=True)


def close(tensors, group_size, plain=shifted_sparse_attention_reference, **options):
    """The kernels' results, which must be as exact as plain torch at the same precision."""
    actual = attention_calls.results(*tensors, group_size, **options)
    low = expected(plain, tensors[0].dtype, tensors, group_size, **options)
    exact = expected(shifted_sparse_attention_reference, torch.float64, tensors, group_size, **options)
    for name, x, y, z in zip(NAMES, actual, low, exact, strict=True):
        assert_as_exact_as_torch(name, x, y, z)
    return actual


def same(left, right):
    assert all(torch.equal(x, y) for x, y in zip(left, right, strict=True)), "two results differ"


# --------------------------------------------------------------------------- layouts of documents and groups

# Tiles have 16 to 128 rows: lengths cross their edges, groups begin and end inside of them, walks have several of them.
LAYOUTS = {
    "whole groups": ((1, 256), 2, 2, 20, 128, {}),
    "odd group": ((2, 201), 2, 1, 20, 67, {}),
    # Rolled by 127 and by 129 in "wrap": to the last and to the second token of a tile of keys.
    "one short group": ((1, 150), 3, 3, 20, 254, {}),
    "one group and a half": ((1, 150), 2, 1, 20, 258, {}),
    "groups shorter than a tile": ((1, 140), 6, 3, 20, 7, {}),
    "one head": ((1, 135), 1, 1, 20, 60, {}),
    # A shifted group starts at 130: in one of its key tiles, the last key alone must be masked for a single query.
    "long walks": ((1, 400), 2, 1, 32, 260, {}),
    "padded": ((4, 150), 2, 1, 20, 100, {"seq_lens": (150, 0, 77, 129)}),
    "packed": ((330,), 6, 3, 20, 90, {"cu_seqlens": (0, 1, 1, 131, 131, 290)}),
    "one document": ((140,), 2, 2, 20, 48, {"cu_seqlens": (0, 140)}),
    "no document": ((40,), 2, 1, 20, 16, {"cu_seqlens": (0,)}),
}


def layout(name, dtype, boundary, wide=None):
    """`wide`: other columns of a head than the layout's."""
    lead, heads, kv_heads, dim, group_size, lengths = LAYOUTS[name]
    dim = wide or dim
    options = {key: int32(*values) for key, values in lengths.items()}
    tensors = make_inputs(lead, heads, kv_heads, dim, dtype)
    for x in tensors:  # padding may hold anything
        for row, length in enumerate(lengths.get("seq_lens", ())):
            x[row, length:] = (torch.nan, torch.inf)[row % 2]
        if "cu_seqlens" in lengths:
            x[lengths["cu_seqlens"][-1] :] = torch.nan
    actual = attention_calls.results(*tensors, group_size, boundary=boundary, **options)
    clean = [x.nan_to_num(0, 0, 0) for x in tensors]
    low, exact = (
        expected(shifted_sparse_attention_reference, t, clean, group_size, boundary=boundary, **options)
        for t in (dtype, torch.float64)
    )
    for which, x, y, z in zip(NAMES, actual, low, exact, strict=True):
        assert_as_exact_as_torch(which, x, y, z)


# --------------------------------------------------------------------------- corners, each for one dtype


def widths(dtype, dim, kilobytes=163):
    """With `kilobytes` of shared memory for a block, by which the tiles are chosen."""
    with attention_calls.device(kilobytes=kilobytes):
        close(make_inputs((1, 140), 2, 1, dim, dtype), 100)


def a_token_alone(dtype):
    """Its output is its value and no score has a gradient, up to the rounding of the two sums that cancel."""
    for lengths in ({}, {"seq_lens": int32(1, 1)}, {"cu_seqlens": int32(0, 1, 2)}):
        q, k, v, grad = make_inputs((2,) if "cu_seqlens" in lengths else (2, 1), 2, 2, 20, dtype)
        out, dq, dk, dv = attention_calls.results(q, k, v, grad, 2, scale=1.0, **lengths)
        torch.testing.assert_close(out, v)
        torch.testing.assert_close(dv, grad)
        rounding = 20 * torch.finfo(torch.float32).eps * (grad.float() * v.float()).abs().sum(-1, keepdim=True)
        assert (dq.abs() <= rounding * k.abs()).all()
        assert (dk.abs() <= rounding * q.abs()).all()


def recomputing(grad):
    """The torch backend as a differentiable function: unlike the definition it computes weights again for gradients,
    and errs by the rounding of a large score. By matrix products: torch's CPU kernel takes positive scales only.
    """

    def function(q, k, v, group_size, scale=None):
        options = (group_size, None, None, False, q.shape[-1] ** -0.5 if scale is None else scale)
        with torch.no_grad(), patch.object(torch_grouped, "_fused_cpu", lambda *_: False):
            out, lse = torch_grouped.forward(q, k, v, *options)
            grads = torch_grouped.backward(grad.to(q), q, k, v, out, lse, *options)
        return _Given.apply(out, grads, q, k, v)

    return function


def scales(dtype):
    """Maxima are found whatever the scale's sign is."""
    tensors = make_inputs((1, 256), 2, 1, 20, dtype)
    for scale in (-3.0, 0.0, 1.0):
        close(tensors, 256, plain=recomputing(tensors[3]), scale=scale)


def large_scores(dtype):
    """An exponential of anything but the distance to the largest score would overflow, or vanish."""
    q, k, v, grad = make_inputs((1, 140), 2, 1, 20, dtype)
    close([5 * q, 5 * k, v, grad], 128, plain=recomputing(grad))


class _Given(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out, grads, *_):
        ctx.grads = grads
        return out.clone()

    @staticmethod
    def backward(ctx, _):
        return None, None, *ctx.grads


def log_sums(dtype):
    """lse is the natural logarithm of the sum of a row's exponentials, +inf for padding."""
    q, k, v, _ = make_inputs((2, 140), 4, 2, 20, dtype)
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double().repeat_interleave(2, dim=2)) * 0.2
    for boundary in ("split", "wrap"):
        truth = torch.full((2, 4, 140), torch.inf, dtype=torch.float64)
        for row, length in enumerate((140, 50)):
            mask = allowed(length, 30, 4, boundary)
            truth[row, :, :length] = scores[row, :, :length, :length].masked_fill(~mask, -torch.inf).logsumexp(-1)
        _, lse = attention_calls.forward(q, k, v, 30, None, int32(140, 50), boundary == "wrap", 0.2)
        torch.testing.assert_close(lse, truth.float())
        packed = [x[0] for x in (q, k, v)]
        _, lse = attention_calls.forward(*packed, 30, int32(0, 140), None, boundary == "wrap", 0.2)
        torch.testing.assert_close(lse, truth[0].float())


def causality(dtype):
    """With unit vectors for values the output is the weights, with unit vectors for its gradient d(v) is: neither has
    anything where a query may not attend."""
    for length, group_size, boundary in ((120, 37, "split"), (120, 64, "wrap"), (50, 200, "split"), (67, 2, "split")):
        q, k, v, _ = make_inputs((1, length), 2, 2, 128, dtype)
        unit = torch.eye(length, 128, dtype=dtype)[None, :, None].expand(1, length, 2, 128)
        out, _, _, dv = attention_calls.results(q / 8, k, unit, unit, group_size, boundary=boundary)
        mask = allowed(length, group_size, 2, boundary)
        assert torch.equal(out[0, :, :, :length].permute(1, 0, 2) > 0, mask), "weights of forbidden or missing pairs"
        assert torch.equal(dv[0, :, :, :length].permute(1, 2, 0) > 0, mask), "weights of forbidden or missing pairs"


def strides(dtype):
    """Layouts that models hand over, and views that start or step at no multiple of 16 bytes: the same bits."""
    plain = make_inputs((2, 70), 2, 1, 32, dtype)
    truth = attention_calls.results(*plain, 50, boundary="wrap")

    def equal(*tensors):
        same(attention_calls.results(*tensors, 50, boundary="wrap"), truth)

    q, k, v, grad = plain
    fused = torch.cat([k, v, k], dim=2)
    equal(q.transpose(1, 2).contiguous().transpose(1, 2), fused[:, :, :1], fused[:, :, 1:2], grad)
    equal(q, torch.empty(k.numel() + 1, dtype=dtype)[1:].view(k.shape).copy_(k), v, grad)
    every_other = torch.full((4, 140, 2, 32), torch.nan, dtype=dtype)
    every_other[::2, ::2] = q
    equal(every_other[::2, ::2], k, v, grad)
    for steps in ((5600, 80, 33), (5680, 81, 40), (5601, 80, 40)):  # only heads, only tokens, only rows of the batch
        apart = (torch.full((12000,), torch.nan, dtype=dtype).as_strided(x.shape, (*steps, 1)) for x in plain)
        equal(*(y.copy_(x) for x, y in zip(plain, apart, strict=True)))


def narrow_heads(dtype):
    """Aligned rows whose last chunk belongs to the head in part: what comes after it is not read."""
    plain = make_inputs((2, 70), 2, 1, 20, dtype)
    apart = [torch.full((*x.shape[:-1], 32), torch.nan, dtype=dtype)[..., :20].copy_(x) for x in plain]
    same(attention_calls.results(*apart, 50), attention_calls.results(*plain, 50))


def gradient_of_a_sum(dtype):
    """Its strides are 0, but for the unit stride of the last dimension."""
    q, k, v, _ = make_inputs((2, 140), 2, 1, 24, dtype)
    row = torch.ones(24, dtype=dtype).expand(2, 140, 2, 24)
    same(attention_calls.results(q, k, v, row, 50), attention_calls.results(q, k, v, row.contiguous(), 50))


def order_of_blocks(dtype):
    """No result depends on which block or warp comes first."""
    tensors = make_inputs((1, 270), 4, 2, 20, dtype)
    truth = attention_calls.results(*tensors, 110)
    for seed in (1, 2):
        same(attention_calls.results(*tensors, 110, seed=seed), truth)


def long_groups(dtype):
    """Ends of groups do not fit 32 bits."""
    for boundary in ("split", "wrap"):
        for group_size in (2**31 - 1, 2**31, 2**40 + 7):
            close(make_inputs((1, 40), 2, 1, 20, dtype), group_size, boundary=boundary)


def long_lengths(dtype):
    """A row holds no more tokens than it has, and no less than none: lengths on a GPU are not read before a launch."""
    tensors = make_inputs((3, 70), 2, 1, 20, dtype)
    for boundary in ("split", "wrap"):
        same(
            attention_calls.results(*tensors, 36, boundary=boundary, seq_lens=int32(100, 2**31 - 1, -5)),
            attention_calls.results(*tensors, 36, boundary=boundary, seq_lens=int32(70, 70, 0)),
        )


def far_rows(dtype):
    """Rows lie more than 2**31 elements apart: reserved, not touched, since the system gives memory page by page."""
    span = torch.empty(2**31 + 1024, dtype=dtype)
    for lead, steps in (((1, 3), (2**31, 2**30, 256)), ((3,), (2**30, 256)), ((2, 2), (2**31 + 512, 32, 64))):
        tensors = make_inputs(lead, 1 if lead != (2, 2) else 2, 1, 16, dtype)
        apart = [span.as_strided(x.shape, (*steps, 1), 128 * number).copy_(x) for number, x in enumerate(tensors)]
        options = {"cu_seqlens": int32(0, 1, 3)} if len(lead) == 1 else {}
        same(attention_calls.results(*apart, 2, **options), attention_calls.results(*tensors, 2, **options))


def several_devices(dtype):
    """What a launch must ask of a device it asks of each."""
    tensors = make_inputs((1, 8), 2, 1, 256, dtype)
    truth = attention_calls.results(*tensors, 4)
    for number in (1, 0, 2):
        with attention_calls.device(number):
            same(attention_calls.results(*tensors, 4), truth)


_CORNERS = (a_token_alone, scales, large_scores, log_sums, causality, strides, narrow_heads, gradient_of_a_sum)
_CORNERS += (order_of_blocks, long_groups, long_lengths, far_rows, several_devices)
PROBES = {probe.__name__.replace("_", " "): probe for probe in _CORNERS}
