"""Shifted sparse attention as an operation of torch: opcheck, compile, checkpointing, autocast, FLOPs, errors."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from jmlr_kernels.ops import triton_interpreted
from jmlr_kernels.shifted_attention import torch_grouped
from jmlr_kernels.shifted_attention.flops import attention_pairs, backward_flops, forward_flops
from jmlr_kernels.shifted_attention.function import shifted_sparse_attention
from jmlr_kernels.shifted_attention.reference import allowed, shifted_sparse_attention_reference

OPS = torch.ops.jmlr_kernels
LENGTHS = {
    "dense": (None, None),
    "padded": (None, torch.tensor([20, 7], dtype=torch.int32)),
    "packed": (torch.tensor([0, 9, 9, 18], dtype=torch.int32), None),
}
needs_interpreter = pytest.mark.skipif(not triton_interpreted(), reason="needs TRITON_INTERPRET=1")


def make_inputs(layout="dense", dtype=torch.float32, length=20, heads=4, kv_heads=2, dim=16):
    generator = torch.Generator().manual_seed(5)
    lead = (length,) if layout == "packed" else (2, length)
    return [torch.randn(*lead, h, dim, generator=generator).to(dtype) for h in (heads, kv_heads, kv_heads)]


def require_grad(inputs):
    return [x.detach().clone().requires_grad_() for x in inputs]


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_interpreter)])
@pytest.mark.parametrize("layout", LENGTHS)
def test_opcheck(layout, backend):
    q, k, v = make_inputs(layout)
    cu_seqlens, seq_lens = LENGTHS[layout]
    for wrap in (False, True) if backend == "torch" else (False,):
        arguments = (8, cu_seqlens, seq_lens, wrap, 0.25, backend)
        torch.library.opcheck(OPS.shifted_attention_forward.default, (q, k, v, *arguments))
        out, lse = OPS.shifted_attention_forward(q, k, v, *arguments)
        torch.library.opcheck(
            OPS.shifted_attention_backward.default, (torch.ones_like(out), q, k, v, out, lse, *arguments)
        )


@pytest.mark.parametrize("backend", ["auto", "torch", pytest.param("triton", marks=needs_interpreter)])
def test_compiles_without_a_graph_break(backend):
    def step(q, k, v, seq_lens):
        return shifted_sparse_attention(q * 2, k, v, 8, seq_lens=seq_lens, backend=backend).square().sum()

    seq_lens = LENGTHS["padded"][1]
    losses, grads = [], []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        inputs = require_grad(make_inputs())
        losses.append(function(*inputs, seq_lens))
        grads.append(torch.autograd.grad(losses[-1], inputs))
    torch.testing.assert_close(*losses)
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y)


def test_compiles_with_dynamic_shapes():
    compiled = torch.compile(
        lambda q, k, v: shifted_sparse_attention(q, k, v, 8), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for length in (20, 27):
        inputs = make_inputs(length=length)
        torch.testing.assert_close(compiled(*inputs), shifted_sparse_attention(*inputs, 8))


def test_activation_checkpointing_changes_nothing():
    grads = []
    for use_reentrant in (None, False, True):
        inputs = require_grad(make_inputs())
        if use_reentrant is None:
            out = shifted_sparse_attention(*inputs, 8)
        else:
            out = checkpoint(shifted_sparse_attention, *inputs, 8, use_reentrant=use_reentrant)
        grads.append(torch.autograd.grad(out.square().sum(), inputs) if use_reentrant is not True else None)
        if use_reentrant:
            out.square().sum().backward()
            grads[-1] = tuple(x.grad for x in inputs)
    for other in grads[1:]:
        assert all(torch.equal(x, y) for x, y in zip(grads[0], other, strict=True))


def test_autocast_takes_the_autocast_dtype_and_returns_float32_gradients():
    inputs = require_grad(make_inputs())
    with torch.autocast("cpu", torch.bfloat16):
        out = shifted_sparse_attention(*inputs, 8)
    assert out.dtype == torch.bfloat16
    expected = shifted_sparse_attention(*(x.detach().bfloat16() for x in inputs), 8)
    assert torch.equal(out, expected)
    assert all(grad.dtype == torch.float32 for grad in torch.autograd.grad(out.sum(), inputs))
    with torch.autocast("cpu", torch.bfloat16):
        assert shifted_sparse_attention(*make_inputs(dtype=torch.float64), 8).dtype == torch.float64


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "matmul"])
def test_the_operations_themselves_know_no_autocast(fused, monkeypatch):
    """Their inputs were cast before; what they keep in float32 stays in float32."""
    monkeypatch.setattr(torch_grouped, "_fused_cpu", lambda *_: fused)
    q, k, v = make_inputs()
    options = (8, None, None, False, 0.3, "torch")
    out, lse = OPS.shifted_attention_forward(q, k, v, *options)
    grads = OPS.shifted_attention_backward(out, q, k, v, out, lse, *options)
    with torch.autocast("cpu", torch.bfloat16):
        again = OPS.shifted_attention_forward(q, k, v, *options)
        grads_again = OPS.shifted_attention_backward(out, q, k, v, out, lse, *options)
    assert all(torch.equal(x, y) for x, y in zip((out, lse, *grads), (*again, *grads_again), strict=True))


def test_a_second_derivative_is_refused():
    q, k, v = require_grad(make_inputs())
    out = shifted_sparse_attention(q, k, v, 8)
    (grad,) = torch.autograd.grad(out, q, torch.ones_like(out, requires_grad=True), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# --------------------------------------------------------------------------- FLOPs


@pytest.mark.parametrize("boundary", ["split", "wrap"])
@pytest.mark.parametrize("group_size", [2, 5, 8, 40])
@pytest.mark.parametrize("length", [0, 1, 3, 16, 37])
def test_pairs_are_counted_exactly(length, group_size, boundary):
    mask = allowed(length, group_size, 2, boundary)
    assert attention_pairs(length, group_size, boundary) == tuple(mask.sum((1, 2)).tolist())
    assert attention_pairs(length, group_size, boundary).total(5) == allowed(length, group_size, 5, boundary).sum()


# Tokens of each document of LENGTHS; the packed rows end with two tokens of none.
DOCUMENTS = {"dense": [20, 20], "padded": [20, 7], "packed": [9, 0, 9]}


@pytest.mark.parametrize("boundary", ["split", "wrap"])
@pytest.mark.parametrize(
    ("group_size", "heads", "kv_heads", "backend"),
    [
        (8, 4, 2, "torch"),
        (5, 3, 1, "torch"),
        (40, 3, 3, "torch"),
        pytest.param(8, 2, 1, "triton", marks=needs_interpreter),
    ],
)
@pytest.mark.parametrize("layout", LENGTHS)
def test_the_flop_counter_counts_pairs(layout, group_size, heads, kv_heads, backend, boundary):
    """Forward and backward in one counter, and each apart; padding, kv heads and the backend count for nothing."""
    cu_seqlens, seq_lens = LENGTHS[layout]
    masks = [allowed(length, group_size, heads, boundary) for length in DOCUMENTS[layout]]
    pairs = sum(int(mask.sum()) for mask in masks)
    inputs = require_grad(make_inputs(layout, heads=heads, kv_heads=kv_heads))
    with FlopCounterMode(display=False) as both:
        with FlopCounterMode(display=False) as counter:
            out = shifted_sparse_attention(
                *inputs, group_size, cu_seqlens=cu_seqlens, seq_lens=seq_lens, boundary=boundary, backend=backend
            )
        assert counter.get_total_flops() == 4 * 16 * pairs
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        assert counter.get_total_flops() == 10 * 16 * pairs
    assert both.get_total_flops() == 14 * 16 * pairs


def test_the_formulas_are_those_of_torchs_own_attention():
    """Plain torch multiplies every pair, two products forward and four backward; the fifth is the scores again, which
    no kernel stores. What torch counts for its own fused attention is the same per pair."""
    length, heads, dim = 24, 4, 16
    inputs = require_grad(make_inputs(length=length, heads=heads, kv_heads=heads))
    per_pair = {}
    with FlopCounterMode(display=False) as counter:
        out = shifted_sparse_attention_reference(*inputs, 8)
    per_pair["forward"] = counter.get_total_flops() / (2 * heads * length**2)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    per_pair["backward"] = counter.get_total_flops() / (2 * heads * length**2) + 2 * dim
    assert per_pair == {"forward": 4 * dim, "backward": 10 * dim}

    shape = (2, heads, length, dim)
    assert sdpa_flop_count(shape, shape, shape) == 4 * dim * 2 * heads * length**2
    assert sdpa_backward_flop_count(shape, shape, shape, shape) == 10 * dim * 2 * heads * length**2
    q, k, v = make_inputs(length=length, heads=heads, kv_heads=heads)
    pairs = 2 * attention_pairs(length, 8).total(heads)
    assert forward_flops(q, k, v, 8, None, None, False) == per_pair["forward"] * pairs
    lse = q.new_zeros(2, heads, length)
    assert backward_flops(q, q, k, v, q, lse, 8, None, None, False) == per_pair["backward"] * pairs


def test_lengths_beyond_a_row_count_as_its_end():
    lens = torch.tensor([60, -1], dtype=torch.int32)
    q, k, v = make_inputs()
    assert forward_flops(q, k, v, 8, None, lens, False) == 4 * 16 * attention_pairs(20, 8).total(4)


def test_without_readable_lengths_rows_count_as_whole_documents():
    """An upper bound, under fake tensors: there are no values to read."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        q, k, v = (mode.from_tensor(x) for x in make_inputs("padded"))
        seq_lens = mode.from_tensor(LENGTHS["padded"][1])
        with FlopCounterMode(display=False) as counter:
            shifted_sparse_attention(q, k, v, 8, seq_lens=seq_lens)
    assert counter.get_total_flops() == 4 * 16 * 2 * attention_pairs(20, 8).total(4)


# --------------------------------------------------------------------------- errors


def arguments(**changes):
    q, k, v = make_inputs()
    return {"q": q, "k": k, "v": v, "group_size": 8, **changes}


LENS = torch.tensor([20, 20], dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 0.25}, "not a ratio"),
        ({"group_size": 1}, "at least 2"),
        ({"group_size": "8"}, "as an int"),
        ({name: torch.zeros(2, 20, 2, 0) for name in "qkv"}, "at least one dimension"),
        ({name: torch.zeros(2, 20, 2, 16).to(torch.float8_e5m2) for name in "qkv"}, "one floating dtype"),
        ({"seq_lens": [20, 20]}, "a list"),
        ({"boundary": "roll"}, "'split' or 'wrap'"),
        ({"backend": "magic"}, "choose one of"),
        ({"q": torch.zeros(20, 4, 16)}, "expected"),
        ({"q": torch.zeros(2, 20, 3, 16)}, "multiple of the kv heads"),
        ({"k": torch.zeros(2, 21, 2, 16)}, "shape of q"),
        ({"v": torch.zeros(2, 20, 1, 16)}, "shape of q"),
        ({"k": torch.zeros(2, 20, 2, 16, dtype=torch.float16)}, "one floating dtype"),
        ({"q": torch.zeros(2, 20, 16, 4).mT}, r"q\.contiguous"),
        ({"seq_lens": LENS.long()}, "int32"),
        ({"seq_lens": LENS[:1]}, "one per row"),
        ({"seq_lens": LENS.to("meta")}, "move it there"),
        ({"v": torch.zeros(2, 20, 2, 16, device="meta")}, "one device"),
        ({"group_size": True}, "not a ratio"),
        ({"seq_lens": LENS + 1}, "between 0 and"),
        ({"seq_lens": LENS, "cu_seqlens": LENS}, "exclude each other"),
        ({"cu_seqlens": LENS}, "with cu_seqlens"),
    ],
)
def test_bad_input_gets_one_sentence(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        shifted_sparse_attention(**arguments(**changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_interpreter)])
def test_one_dimension_may_have_any_stride(backend):
    inputs = [torch.randn(1, 1, 12, 2).permute(0, 2, 3, 1) for _ in range(3)]
    assert inputs[0].shape == (1, 12, 2, 1) and inputs[0].stride(-1) == 24
    torch.testing.assert_close(
        shifted_sparse_attention(*inputs, 4, backend=backend), shifted_sparse_attention_reference(*inputs, 4)
    )


@pytest.mark.parametrize("ends", [(1, 20), (0, 9, 5), (0, 21), ()])
def test_bad_cu_seqlens(ends):
    with pytest.raises(ValueError, match="cu_seqlens"):
        shifted_sparse_attention(*make_inputs("packed"), 8, cu_seqlens=torch.tensor(ends, dtype=torch.int32))


def test_a_forced_backend_that_cannot_run_raises():
    with pytest.raises(RuntimeError, match="cannot run"):
        shifted_sparse_attention(*make_inputs(), 8, backend="cuda")
    with pytest.raises(RuntimeError, match="float64"):
        shifted_sparse_attention(*make_inputs(dtype=torch.float64), 8, backend="triton")


@needs_interpreter
def test_heads_too_wide_for_the_kernels(monkeypatch):
    from jmlr_kernels import ops

    wide = make_inputs(dim=257)
    with pytest.raises(RuntimeError, match="at most 256"):
        shifted_sparse_attention(*wide, 8, backend="triton")
    monkeypatch.setattr(ops, "resolve_backend", lambda *_: "triton")  # as on a GPU
    with pytest.warns(RuntimeWarning, match="at most 256"):
        out = shifted_sparse_attention(*wide, 8)
    torch.testing.assert_close(out, shifted_sparse_attention_reference(*wide, 8))


def test_meta_tensors_give_shapes():
    inputs = [x.to("meta").requires_grad_() for x in make_inputs()]
    out = shifted_sparse_attention(*inputs, 8)
    assert out.device.type == "meta" and out.shape == inputs[0].shape
    assert [x.shape for x in torch.autograd.grad(out.sum(), inputs)] == [x.shape for x in inputs]


@pytest.mark.parametrize("option", ["dropout_p", "softcap", "window_size"])
def test_what_is_not_there_is_not_ignored(option):
    with pytest.raises(TypeError, match=option):
        shifted_sparse_attention(*make_inputs(), 8, **{option: 0.5})
