"""Shifted sparse attention on the torch backend: the definition, LongLoRA's two paths, causality and the label leak."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_as_exact_as_torch

from jmlr_kernels.shifted_attention import torch_grouped
from jmlr_kernels.shifted_attention.function import shifted_sparse_attention
from jmlr_kernels.shifted_attention.reference import allowed, shifted_sparse_attention_reference

BOUNDARIES = ("split", "wrap")


def make_inputs(batch, length, heads, kv_heads, dim, dtype=torch.float64, packed=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lead = (length,) if packed else (batch, length)
    return [
        torch.randn(*lead, h, dim, dtype=dtype, generator=generator).requires_grad_()
        for h in (heads, kv_heads, kv_heads)
    ]


def results(function, inputs, group_size, **options):
    """out, dq, dk, dv for one fixed output gradient."""
    out = function(*inputs, group_size, **options)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(out)
    return (out.detach(), *torch.autograd.grad(out, inputs, grad, materialize_grads=True))


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


CASES = {
    "whole groups": (2, 32, 4, 4, 8, {}),
    "ragged length": (2, 37, 4, 2, 5, {}),
    "one token": (3, 1, 2, 1, 4, {}),
    "shorter than a group": (1, 5, 6, 3, 4, {}),
    "odd kv heads": (2, 29, 9, 3, 4, {}),
    "one head": (2, 19, 1, 1, 4, {}),
    "right padding": (4, 31, 4, 1, 4, {"seq_lens": int32(31, 0, 1, 18)}),
    "packed": (1, 50, 4, 2, 4, {"cu_seqlens": int32(0, 1, 1, 14, 47, 50)}),
    "packed with a tail": (1, 50, 2, 2, 4, {"cu_seqlens": int32(0, 20, 43)}),
}


@pytest.fixture(params=["fused", "matmul"])
def torch_path(request, monkeypatch):
    """Both ways in which the torch backend computes a group: torch's CPU kernel, and the one of every other device."""
    if request.param == "matmul":
        monkeypatch.setattr(torch_grouped, "_fused_cpu", lambda *_: False)
        monkeypatch.setattr(torch_grouped, "_QUERY_ROWS", 5)
        monkeypatch.setattr(torch_grouped, "_MAX_SCORES", 200)
    monkeypatch.setattr(torch_grouped, "_MAX_ROWS", 16)


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("group_size", [2, 7, 8, 64])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_definition_in_float64(case, group_size, boundary, torch_path):
    batch, length, heads, kv_heads, dim, lengths = CASES[case]
    inputs = make_inputs(batch, length, heads, kv_heads, dim, packed="cu_seqlens" in lengths)
    options = {"boundary": boundary, "scale": 0.4, **lengths}
    actual = results(shifted_sparse_attention, inputs, group_size, **options)
    expected = results(shifted_sparse_attention_reference, inputs, group_size, **options)
    for name, x, y in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("scale", [-0.4, 0.0])
def test_a_scale_may_be_negative_or_zero(scale):
    """torch's fused CPU attention multiplies its mask of -inf by the scale, which gives NaN."""
    inputs = make_inputs(2, 37, 4, 2, 5)
    actual = results(shifted_sparse_attention, inputs, 8, scale=scale, backend="torch")
    expected = results(shifted_sparse_attention_reference, inputs, 8, scale=scale)
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_equals_the_definition_anywhere(data):
    kv_heads, ratio = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    batch, length = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 40))
    group_size = data.draw(st.integers(2, 20))
    options = {"boundary": data.draw(st.sampled_from(BOUNDARIES))}
    layout = data.draw(st.sampled_from(["dense", "padded", "packed"]))
    if layout == "padded":
        options["seq_lens"] = int32(*(data.draw(st.integers(0, length)) for _ in range(batch)))
    if layout == "packed":
        ends = sorted(data.draw(st.lists(st.integers(0, length), max_size=4)))
        options["cu_seqlens"] = int32(0, *ends)
    inputs = make_inputs(batch, length, kv_heads * ratio, kv_heads, 3, packed=layout == "packed")
    actual = results(shifted_sparse_attention, inputs, group_size, **options)
    expected = results(shifted_sparse_attention_reference, inputs, group_size, **options)
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)


# --------------------------------------------------------------------------- LongLoRA, re-stated


def causal(q, k, v):
    """Causal attention over [S, H, D]."""
    scores = torch.einsum("ihd,jhd->hij", q, k) * q.shape[-1] ** -0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(future, float("-inf")).softmax(-1), v)


def longlora_flash(q, k, v, group_size, attention=causal):
    """Its flash path: both head halves become rows, each with its own cu_seqlens, [0, G, ...] and [0, G/2, ..., S]."""
    batch, length, heads, _ = q.shape
    plain = [*range(0, length, group_size), length]
    shifted = [0, *range(group_size // 2, length, group_size), length]
    rows = []
    for row in range(batch):
        halves = []
        for ends, half in ((plain, slice(0, heads // 2)), (shifted, slice(heads // 2, heads))):
            parts = [x[row, :, half] for x in (q, k, v)]
            groups = [attention(*(x[a:b] for x in parts)) for a, b in zip(ends[:-1], ends[1:], strict=True)]
            halves.append(torch.cat(groups))
        rows.append(torch.cat(halves, dim=1))
    return torch.stack(rows)


def longlora_roll(q, k, v, group_size):
    """Its non-flash path: roll the second half of the heads by -G/2, attend in groups, roll back."""
    batch, length, heads, dim = q.shape

    def shift(x):
        x = x.clone()
        x[:, :, heads // 2 :] = x[:, :, heads // 2 :].roll(-group_size // 2, dims=1)
        return x.reshape(batch * length // group_size, group_size, heads, dim)

    groups = torch.stack([causal(*group) for group in zip(shift(q), shift(k), shift(v), strict=True)])
    out = groups.reshape(batch, length, heads, dim).clone()
    out[:, :, heads // 2 :] = out[:, :, heads // 2 :].roll(group_size // 2, dims=1)
    return out


@pytest.mark.parametrize(("boundary", "longlora"), [("split", longlora_flash), ("wrap", longlora_roll)])
def test_equals_longlora(boundary, longlora):
    inputs = make_inputs(2, 32, 4, 4, 8)
    actual = results(shifted_sparse_attention, inputs, 8, boundary=boundary)
    for x, y in zip(actual, results(longlora, inputs, 8), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)


def test_the_boundaries_differ():
    inputs = make_inputs(1, 32, 2, 2, 8)
    split, wrap = (shifted_sparse_attention(*inputs, 8, boundary=b) for b in BOUNDARIES)
    assert torch.equal(split[:, :, 0], wrap[:, :, 0])
    assert not torch.allclose(split[:, :, 1], wrap[:, :, 1])


# --------------------------------------------------------------------------- causality


def who_reads_whom(batch, length, heads, kv_heads, group_size, **lengths):
    """bool [head, i, j] over flat rows: the gradient of out[i, head] with respect to v[j] is not zero."""
    q, k, v = make_inputs(batch, length, heads, kv_heads, 2, packed="cu_seqlens" in lengths)
    out = shifted_sparse_attention(q, k, v, group_size, **lengths)
    out = out.reshape(-1, heads, 2)
    reads = torch.zeros(heads, out.shape[0], out.shape[0], dtype=torch.bool)
    for head in range(heads):
        for i in range(out.shape[0]):
            (grad,) = torch.autograd.grad(out[i, head].sum(), v, retain_graph=True)
            reads[head, i] = (grad.reshape(-1, kv_heads, 2)[:, head // (heads // kv_heads)] != 0).any(-1)
    return reads


@pytest.mark.parametrize("group_size", [2, 5, 8])
@pytest.mark.parametrize(
    ("batch", "length", "heads", "kv_heads", "lengths"),
    [
        (1, 19, 2, 2, {}),
        (1, 16, 3, 1, {}),
        (2, 13, 6, 3, {"seq_lens": int32(13, 6)}),
        (1, 23, 4, 2, {"cu_seqlens": int32(0, 9, 10, 10, 21)}),
    ],
    ids=["ragged", "odd heads", "padded", "packed"],
)
def test_reads_exactly_what_it_may(batch, length, heads, kv_heads, lengths, group_size):
    if "cu_seqlens" in lengths:
        ends = lengths["cu_seqlens"].tolist()
        documents = list(zip(ends[:-1], ends[1:], strict=True))
    else:
        own = lengths.get("seq_lens", [length] * batch)
        documents = [(row * length, row * length + int(own[row])) for row in range(batch)]
    expected = torch.zeros(heads, batch * length, batch * length, dtype=torch.bool)
    for start, end in documents:
        for head in range(heads):
            for i in range(end - start):
                # Stated again, in the words of the specification, and not taken from the reference.
                shift = 0 if head < heads // 2 else group_size - group_size // 2
                same = [j for j in range(i + 1) if (j + shift) // group_size == (i + shift) // group_size]
                expected[head, start + i, [start + j for j in same]] = True
    reads = who_reads_whom(batch, length, heads, kv_heads, group_size, **lengths)
    assert torch.equal(reads, expected)


def test_the_definition_of_wrap_reads_the_future():
    mask = allowed(32, 8, 2, "wrap")
    future = torch.ones(32, 32, dtype=torch.bool).triu(1)
    assert not (mask[0] & future).any()
    assert (mask[1] & future).any(-1).nonzero().flatten().tolist() == [0, 1, 2, 3]


def answer_reaches_its_predictor(boundary, layers, length=64, group_size=16):
    """Whether the state before the last token depends on the last token, after `layers` of attention and residual."""
    generator = torch.Generator().manual_seed(1)
    embedded = torch.randn(1, length, 16, dtype=torch.float64, generator=generator)
    weights = [torch.randn(16, 16, dtype=torch.float64, generator=generator) / 4 for _ in range(layers)]

    def predictor(answer):
        state = torch.cat([embedded[:, :-1], answer], dim=1)
        for weight in weights:
            heads = torch.tanh(state @ weight).unflatten(-1, (4, 4))
            mixed = shifted_sparse_attention(heads, heads, heads, group_size, boundary=boundary)
            state = state + mixed.flatten(-2)
        return state[0, -2]

    answer = embedded[:, -1:].clone().requires_grad_()
    (grad,) = torch.autograd.grad(predictor(answer).sum(), answer)
    return bool((grad != 0).any())


def test_no_label_leak():
    assert not answer_reaches_its_predictor("split", 12)


def test_wrap_leaks_the_label_once_the_layers_reach_around():
    # The answer enters the first tokens through the rolled group, and half a group per layer brings it back.
    reached = [answer_reaches_its_predictor("wrap", layers) for layers in (1, 2, 12)]
    assert reached == [False, False, True]
    first = next(layers for layers in range(1, 13) if answer_reaches_its_predictor("wrap", layers))
    assert 3 <= first <= 8, first


# --------------------------------------------------------------------------- robustness


def test_padding_may_hold_nan(torch_path):
    lens = int32(9, 0, 20)
    clean = make_inputs(3, 20, 4, 2, 4)
    dirty = [x.detach().clone() for x in clean]
    for row, length in enumerate(lens.tolist()):
        for x in dirty:
            x[row, length:] = float("nan")
    dirty = [x.requires_grad_() for x in dirty]
    for x, y in zip(*(results(shifted_sparse_attention, i, 8, seq_lens=lens) for i in (dirty, clean)), strict=True):
        assert torch.equal(x, y)
        assert all(not x[row, length:].any() for row, length in enumerate(lens.tolist()))


def torch_attention(q, k, v, group_size):
    """PyTorch's own causal attention, group by group: what "low-precision PyTorch" means for a fused kernel."""

    def fused(q, k, v):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1)

    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    return longlora_flash(q, k, v, group_size, fused)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_errs_no_more_than_torch_at_the_same_precision(dtype):
    low = [x.detach().to(dtype).requires_grad_() for x in make_inputs(2, 100, 4, 2, 16)]
    exact = [x.detach().double().requires_grad_() for x in low]
    actual = results(shifted_sparse_attention, low, 24)
    plain = results(torch_attention, low, 24)
    truth = results(shifted_sparse_attention_reference, exact, 24)
    for name, x, y, z in zip(("out", "dq", "dk", "dv"), actual, plain, truth, strict=True):
        assert_as_exact_as_torch(f"{name} {dtype}", x, y, z)


@pytest.mark.parametrize("lengths", [{}, {"seq_lens": int32(40, 17)}], ids=["dense", "padded"])
def test_two_runs_are_bit_identical(lengths):
    inputs = make_inputs(2, 40, 4, 2, 8, dtype=torch.float32)
    first, second = (results(shifted_sparse_attention, inputs, 16, **lengths) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
