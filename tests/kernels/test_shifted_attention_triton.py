"""The Triton kernels against the definition: in the interpreter on a CPU, compiled where there is a GPU."""

from __future__ import annotations

import pytest
import torch
from oracles import assert_as_exact_as_torch

from jmlr_kernels.ops import triton_interpreted
from jmlr_kernels.shifted_attention import config
from jmlr_kernels.shifted_attention.function import shifted_sparse_attention
from jmlr_kernels.shifted_attention.reference import shifted_sparse_attention_reference

pytest.importorskip("triton")
OPS = torch.ops.jmlr_kernels
DEVICE = "cuda" if torch.cuda.is_available() and not triton_interpreted() else "cpu"
if DEVICE == "cpu" and not triton_interpreted():
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def make_inputs(lead, heads, kv_heads, dim, dtype):
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randn(*lead, h, dim, generator=generator).to(DEVICE, dtype).requires_grad_()
        for h in (heads, kv_heads, kv_heads)
    ]


def results(function, inputs, group_size, **options):
    out = function(*inputs, group_size, **options)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out)
    return (out.detach(), *torch.autograd.grad(out, inputs, grad, materialize_grads=True))


def check(inputs, group_size, **options):
    actual = results(shifted_sparse_attention, inputs, group_size, backend="triton", **options)
    plain = results(shifted_sparse_attention_reference, inputs, group_size, **options)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    truth = results(shifted_sparse_attention_reference, exact, group_size, **options)
    for name, x, y, z in zip(("out", "dq", "dk", "dv"), actual, plain, truth, strict=True):
        assert_as_exact_as_torch(name, x, y, z)
    return actual


@pytest.mark.parametrize("boundary", ["split", "wrap"])
@pytest.mark.parametrize(
    ("lead", "heads", "kv_heads", "group_size", "lengths"),
    [
        ((1, 96), 2, 2, 64, {}),
        ((2, 50), 2, 1, 33, {}),
        ((1, 50), 3, 3, 162, {}),  # rolled by 31 in "wrap": to the last token of a tile of keys
        ((1, 40), 6, 3, 7, {}),
        ((3, 50), 2, 1, 36, {"seq_lens": (50, 0, 37)}),
        ((80,), 2, 1, 24, {"cu_seqlens": (0, 1, 1, 34, 73)}),
        ((64,), 2, 2, 16, {"cu_seqlens": (0, 64)}),
    ],
    ids=["aligned", "odd group", "one short group", "odd kv heads", "padded", "packed", "one document"],
)
def test_float32_layouts(lead, heads, kv_heads, group_size, lengths, boundary):
    lengths = {name: int32(*values) for name, values in lengths.items()}
    check(make_inputs(lead, heads, kv_heads, 32, torch.float32), group_size, boundary=boundary, **lengths)


@pytest.mark.parametrize("lengths", [{}, {"seq_lens": (1, 1)}, {"cu_seqlens": (0, 1, 2)}], ids=str)
def test_a_token_alone_attends_to_itself(lengths):
    """Its output is its value and no score has a gradient, up to the rounding of the two sums that cancel."""
    lengths = {name: int32(*values) for name, values in lengths.items()}
    inputs = make_inputs((2,) if "cu_seqlens" in lengths else (2, 1), 2, 2, 32, torch.float32)
    q, k, v = inputs
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(7)).to(q)
    out = shifted_sparse_attention(q, k, v, 2, scale=1.0, backend="triton", **lengths)
    dq, dk, dv = torch.autograd.grad(out, inputs, grad)
    assert torch.equal(out, v)
    assert torch.equal(dv, grad)
    rounding = 32 * torch.finfo(torch.float32).eps * (grad * v).abs().sum(-1, keepdim=True)
    assert (dq.abs() <= rounding * k.abs()).all()
    assert (dk.abs() <= rounding * q.abs()).all()


@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128, 256, 20])
def test_float16_head_dims(dim):
    check(make_inputs((1, 41), 2, 1, dim, torch.float16), 16)


@pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter computes bfloat16 wrongly")
def test_bfloat16():
    check(make_inputs((2, 300), 4, 2, 128, torch.bfloat16), 128)


def test_strided_views_without_a_copy(monkeypatch):
    """The layouts that models hand over: a transposed [B, H, S, D], and slices of one fused projection."""
    fused = torch.randn(2, 40, 4, 32, device=DEVICE)
    q = torch.randn(2, 2, 40, 32, device=DEVICE).transpose(1, 2)
    inputs = [x.requires_grad_() for x in (q, fused[:, :, 1:2], fused[:, :, 3:])]
    contiguous = [x.detach().contiguous().requires_grad_() for x in inputs]
    expected = results(shifted_sparse_attention, contiguous, 16, backend="triton")
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x, *_: pytest.fail("copied") if not x.is_contiguous() else x)
    actual = results(shifted_sparse_attention, inputs, 16, backend="triton")
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


def test_output_gradient_of_a_sum_has_no_strides():
    inputs = make_inputs((1, 20), 2, 2, 32, torch.float32)
    grads = [
        torch.autograd.grad(shifted_sparse_attention(*inputs, 8, backend=backend).sum(), inputs)
        for backend in ("triton", "torch")
    ]
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    ("name", "lead", "table"),
    [("seq_lens", (3, 40), [[33, 1], [5, 2], [40, 3]]), ("cu_seqlens", (40,), [[0, 1], [7, 2], [40, 3]])],
)
def test_lengths_may_be_a_column_of_a_table(name, lead, table):
    column = int32(*table)[:, 0]
    inputs = make_inputs(lead, 2, 2, 32, torch.float32)
    strided, plain = (
        results(shifted_sparse_attention, inputs, 16, backend="triton", **{name: x})
        for x in (column, column.contiguous())
    )
    assert all(torch.equal(x, y) for x, y in zip(strided, plain, strict=True))


@pytest.mark.parametrize("boundary", ["split", "wrap"])
def test_a_group_may_be_longer_than_any_document(boundary):
    """Ends of groups do not fit 32 bits, and a launch has no more programs than for a group of twice the rows."""
    inputs = make_inputs((1, 20), 2, 1, 32, torch.float32)
    for group_size in (2**31 - 1, 2**31, 2**40 + 7):
        check(inputs, group_size, boundary=boundary)


# A group shorter than a tile is the work of the kernels by ordinary loads, a longer one of those by bulk copies.
BOTH_PATHS = pytest.mark.parametrize("group_size", [16, 40], ids=["loads", "copies"])


@BOTH_PATHS
def test_scores_may_be_large(group_size):
    """An exponential of anything but the distance to the largest score would overflow, or vanish."""
    q, k, v = make_inputs((1, 45), 2, 1, 32, torch.float32)
    inputs = [(5 * x).detach().requires_grad_() for x in (q, k)] + [v]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    truth = results(shifted_sparse_attention_reference, exact, group_size)
    # Not the definition, which keeps its weights: who computes them again errs by the rounding of a large score.
    plain, actual = (
        results(shifted_sparse_attention, inputs, group_size, backend=backend) for backend in ("torch", "triton")
    )
    for name, x, y, z in zip(("out", "dq", "dk", "dv"), actual, plain, truth, strict=True):
        assert_as_exact_as_torch(name, x, y, z)


@pytest.mark.parametrize("wrap", [False, True], ids=["split", "wrap"])
@BOTH_PATHS
def test_a_row_holds_no_more_tokens_than_it_has(group_size, wrap):
    """Lengths on a GPU are not read before the launch."""
    q, k, v = (x.detach() for x in make_inputs((2, 45), 2, 1, 32, torch.float32))
    found = []
    for lens in (int32(60, 2**31 - 1), int32(45, 45)):
        options = (group_size, None, lens, wrap, 0.2, "triton")
        out, lse = OPS.shifted_attention_forward(q, k, v, *options)
        found.append((out, lse, *OPS.shifted_attention_backward(q, q, k, v, out, lse, *options)))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@BOTH_PATHS
def test_tokens_past_two_to_the_31_elements(group_size):
    # 2**31 elements are reserved, not touched: the system gives memory page by page, as it is written.
    span = torch.empty(2**31 + 128, dtype=torch.float16, device=DEVICE)
    inputs = make_inputs((1, 3), 1, 1, 16, torch.float16)
    apart = []
    for number, x in enumerate(inputs):
        y = span.as_strided(x.shape, (span.numel(), 2**30, 16, 1), 32 * number)
        apart.append(y.copy_(x.detach()).detach().requires_grad_())
    actual, expected = (results(shifted_sparse_attention, xs, group_size, backend="triton") for xs in (apart, inputs))
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


@pytest.mark.parametrize("backend", ["triton", "torch"])
@BOTH_PATHS
def test_what_the_backward_pass_is_given_may_have_any_strides(group_size, backend):
    q, k, v = (x.detach() for x in make_inputs((2, 45), 2, 1, 32, torch.float32))
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(7)).to(q)
    options = (group_size, None, None, False, 0.2, backend)
    out, lse = OPS.shifted_attention_forward(q, k, v, *options)
    strided = (x.transpose(0, -1).contiguous().transpose(0, -1) for x in (out, lse))
    actual = OPS.shifted_attention_backward(grad, q, k, v, *strided, *options)
    expected = OPS.shifted_attention_backward(grad, q, k, v, out, lse, *options)
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y)


def test_two_runs_are_bit_identical():
    inputs = make_inputs((2, 45), 2, 1, 32, torch.float16)
    first, second = (results(shifted_sparse_attention, inputs, 32, backend="triton") for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_padding_may_hold_nan():
    lens = int32(33, 0)
    inputs = [x.detach() for x in make_inputs((2, 50), 2, 2, 32, torch.float32)]
    for x in inputs:
        x[0, 33:] = x[1] = float("nan")
    actual = results(
        shifted_sparse_attention, [x.requires_grad_() for x in inputs], 16, backend="triton", seq_lens=lens
    )
    for x in actual:
        assert torch.isfinite(x).all()
        assert not x[0, 33:].any()
        assert not x[1].any()


def test_out_and_lse_agree_with_the_torch_backend():
    q, k, v = (x.detach() for x in make_inputs((2, 50), 4, 2, 32, torch.float32))
    lens = int32(50, 21)
    forward = torch.ops.jmlr_kernels.shifted_attention_forward
    for packed in (False, True):
        arguments = (q, k, v, 16, None, lens) if not packed else (q[0], k[0], v[0], 16, int32(0, 20, 45), None)
        triton_result, torch_result = (forward(*arguments, False, 0.2, backend) for backend in ("triton", "torch"))
        for x, y in zip(triton_result, torch_result, strict=True):
            assert x.dtype == y.dtype
            torch.testing.assert_close(x, y)
        assert torch.isinf(triton_result[1]).sum() == (4 * 5 if packed else 4 * 29)


def test_every_tile_is_a_power_of_two_within_the_compiler_s_limits():
    for capability in (config.INTERPRETER, 80, 86, 89, 90, 100, 103, 120):
        for kernel in config.KERNELS:
            for dtype in (torch.float16, torch.bfloat16, torch.float32):
                for dim in (1, 20, 32, 64, 80, 96, 128, 200, 256):
                    for wrap in (False, True):
                        tiles = config.tiles(kernel, dtype, dim, capability, wrap)
                        assert all(size >= 16 and size & (size - 1) == 0 for size in tiles[:2])
                        assert tiles.num_warps in (4, 8)
                        assert config.block_d(dim) >= dim
