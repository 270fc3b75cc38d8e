"""The kernels by bulk copies: tiles start where groups start, and rows past a document's end may hold anything."""

from __future__ import annotations

import pytest
import torch
from oracles import assert_as_exact_as_torch

from jmlr_kernels.ops import triton_interpreted
from jmlr_kernels.shifted_attention import config
from jmlr_kernels.shifted_attention.function import shifted_sparse_attention
from jmlr_kernels.shifted_attention.reference import shifted_sparse_attention_reference

pytest.importorskip("triton")
if not triton_interpreted():
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from jmlr_kernels.shifted_attention import triton_backward_tma, triton_forward_tma  # noqa: E402
from jmlr_kernels.shifted_attention.triton_common import descriptor, has_descriptors, programs_of  # noqa: E402


@pytest.fixture
def taken(monkeypatch):
    """The names of the launches by bulk copies, in order."""
    names: list[str] = []
    for module, name in (
        (triton_forward_tma, "launch_forward"),
        (triton_backward_tma, "launch_dq"),
        (triton_backward_tma, "launch_dkdv"),
    ):
        usual = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, usual=usual, name=name: (names.append(name), usual(*args))[1])
    return names


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def make_inputs(lead, heads, kv_heads, dim, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randn(*lead, h, dim, generator=generator).to(dtype).requires_grad_() for h in (heads, kv_heads, kv_heads)
    ]


def results(function, inputs, group_size, **options):
    out = function(*inputs, group_size, **options)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out)
    return (out.detach(), *torch.autograd.grad(out, inputs, grad))


CASES = {
    "whole tiles": ((1, 128), 2, 2, 16, 64, {}),
    "groups of one tile": ((1, 50), 2, 2, 8, 32, {}),
    "groups of many tiles": ((1, 205), 1, 1, 8, 100, {}),
    "odd group, one shifted token over": ((1, 56), 4, 2, 16, 37, {}),
    "odd kv heads": ((1, 50), 6, 3, 8, 40, {}),
    "one kv head for both halves": ((1, 50), 4, 1, 8, 40, {}),
    "one head": ((1, 70), 1, 1, 8, 33, {}),
    "shorter than a group": ((2, 45), 2, 2, 8, 500, {}),
    "head dim no power of two": ((1, 45), 2, 1, 24, 40, {}),
    "right padding": ((4, 75), 2, 1, 8, 40, {"seq_lens": int32(75, 0, 1, 53)}),
    "packed": ((125,), 2, 1, 8, 40, {"cu_seqlens": int32(0, 1, 1, 52, 55, 125)}),
    "packed with a tail": ((110,), 2, 2, 8, 34, {"cu_seqlens": int32(0, 40, 77)}),
    # 101 tokens are a group of four tiles and one token more, which has no whole group's turns.
    "packed, one token over": ((101,), 2, 2, 8, 100, {"cu_seqlens": int32(0, 101)}),
    "many short documents": ((40,), 2, 2, 8, 64, {"cu_seqlens": int32(*range(0, 41, 8))}),
}
HALF = ("odd group, one shifted token over", "right padding")


def documents_of(lead, lengths):
    """bool, of each row of tokens whether it is in a document."""
    if "seq_lens" in lengths:
        return torch.arange(lead[1]) < lengths["seq_lens"][:, None]
    kept = torch.ones(lead, dtype=torch.bool)
    if "cu_seqlens" in lengths:
        kept[lengths["cu_seqlens"][-1] :] = False
    return kept


@pytest.mark.parametrize(
    ("case", "dtype"), [(case, torch.float32) for case in CASES] + [(case, torch.float16) for case in HALF]
)
def test_equals_the_definition(case, dtype, taken):
    lead, heads, kv_heads, dim, group_size, lengths = CASES[case]
    inputs = make_inputs(lead, heads, kv_heads, dim, dtype)
    with torch.no_grad():
        for x in inputs:
            x[~documents_of(lead, lengths)] = float("nan")
    actual = results(shifted_sparse_attention, inputs, group_size, backend="triton", **lengths)
    assert taken == ["launch_forward", "launch_dq", "launch_dkdv"]
    plain = results(shifted_sparse_attention_reference, inputs, group_size, **lengths)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    truth = results(shifted_sparse_attention_reference, exact, group_size, **lengths)
    for name, x, y, z in zip(("out", "dq", "dk", "dv"), actual, plain, truth, strict=True):
        assert_as_exact_as_torch(f"{case} {name}", x, y, z)


@pytest.mark.parametrize(
    ("lengths", "kept"),
    [
        ({"cu_seqlens": (0, 9, 64, 73)}, (9, 64)),  # both gradient loops end inside of a tile
        ({"seq_lens": (24, 20)}, (24, 44)),
    ],
    ids=["packed", "padded"],
)
def test_a_document_does_not_see_its_neighbours(lengths, kept, taken):
    """Everybody else's rows of q, k, v and of the gradient hold NaN: copies carry them along, products must not."""
    lengths = {name: int32(*values) for name, values in lengths.items()}
    start, end = kept
    clean = make_inputs((end - start,), 2, 1, 8)
    out = shifted_sparse_attention_reference(*clean, 40, cu_seqlens=int32(0, end - start))
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(7))
    expected = (out.detach(), *torch.autograd.grad(out, clean, grad))

    def among_nan(x):
        rows = torch.full((73 if "cu_seqlens" in lengths else 48, *x.shape[1:]), float("nan"))
        rows[start:end] = x.detach()
        return rows if "cu_seqlens" in lengths else rows.unflatten(0, (2, 24))

    inputs = [among_nan(x).requires_grad_() for x in clean]
    out = shifted_sparse_attention(*inputs, 40, backend="triton", **lengths)
    actual = (out.detach(), *torch.autograd.grad(out, inputs, among_nan(grad)))
    assert set(taken) == {"launch_forward", "launch_dq", "launch_dkdv"}
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x.reshape(-1, *y.shape[1:])[start:end], y)


@pytest.mark.parametrize("strided", range(3), ids=["q", "k", "v"])
def test_strides_that_no_copy_can_address_take_the_other_kernels(strided, taken):
    inputs = make_inputs((1, 40), 2, 2, 32)
    wide = torch.zeros(1, 40, 2, 33)  # rows of 33 numbers do not start at multiples of 16 bytes
    wide[..., :32] = inputs[strided].detach()
    inputs[strided] = wide[..., :32].requires_grad_()
    assert not has_descriptors(*inputs)
    actual = results(shifted_sparse_attention, inputs, 32, backend="triton")
    assert not taken
    for x, y in zip(actual, results(shifted_sparse_attention_reference, inputs, 32), strict=True):
        torch.testing.assert_close(x, y)


def test_what_copies_can_address():
    x = torch.zeros(2, 6, 4, 16)
    assert has_descriptors(x, x[:, 1:], x.half(), x.transpose(1, 2))
    for other in (x[:, :, :1].expand(2, 6, 4, 16), x.flatten()[1:-15].view(1, -1, 1, 16), torch.zeros(2, 6, 4, 15)):
        assert not has_descriptors(x, other)
    # The stride of a single row, head or batch entry says nothing, and the hardware must not be told.
    single = torch.zeros(50).as_strided((1, 3, 1, 8), (7, 8, 5, 1))
    assert has_descriptors(single)
    assert all(stride % 4 == 0 for stride in descriptor(single, 2, 8).strides[:-1])


def test_output_gradients_that_no_copy_can_address(taken):
    inputs = make_inputs((1, 45), 2, 1, 8)
    grad = torch.randn(1, 45, 1, 8).expand(1, 45, 2, 8)
    out = shifted_sparse_attention(*inputs, 40, backend="triton")
    actual = torch.autograd.grad(out, inputs, grad)
    assert taken == ["launch_forward"]
    expected = torch.autograd.grad(shifted_sparse_attention_reference(*inputs, 40), inputs, grad)
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y)


def test_transposed_views_are_not_copied(taken):
    q, k, v = (torch.randn(2, heads, 45, 16).transpose(1, 2).requires_grad_() for heads in (2, 1, 1))
    assert has_descriptors(q, k, v)
    actual = results(shifted_sparse_attention, [q, k, v], 40, backend="triton")
    expected = results(shifted_sparse_attention_reference, [q, k, v], 40)
    assert taken == ["launch_forward", "launch_dq", "launch_dkdv"]
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y)


def test_when_they_are_taken():
    def name(kernel="forward", dtype=torch.bfloat16, dim=128, capability=90, group_size=512, wrap=False, scale=1.0):
        return config.tma_kernel(kernel, dtype, dim, capability, group_size, wrap, scale)

    assert name() == "forward_tma"
    assert name("backward_dkdv", group_size=2) == "backward_dkdv_tma"
    refused = ({"dtype": torch.float32}, {"capability": 80}, {"capability": 120}, {"group_size": 127}, {"wrap": True})
    refused += ({"capability": 100, "dim": 256},)
    for change in (*refused, {"scale": -1.0}, {"scale": 0.0}, {"kernel": "backward_dkdv", "dim": 256}):
        assert name(**change) is None, change


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_are_not_positive(scale, taken):
    inputs = make_inputs((1, 45), 2, 2, 8)
    actual = results(shifted_sparse_attention, inputs, 40, scale=scale, backend="triton")
    expected = results(shifted_sparse_attention_reference, inputs, 40, scale=scale)
    assert "launch_forward" not in taken
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y)


def test_persistent_programs_are_as_many_as_fit():
    persistent = config.Tiles(128, 128, 8, 2, 255, per_processor=2)
    cpu = torch.device("cpu")
    assert programs_of(1000, persistent, cpu) == 6
    assert programs_of(4, persistent, cpu) == 4
    assert programs_of(1000, persistent._replace(per_processor=0), cpu) == 1000


def test_two_runs_are_bit_identical(taken):
    inputs = make_inputs((1, 56), 4, 2, 16)
    first, second = (results(shifted_sparse_attention, inputs, 37, backend="triton") for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert len(taken) == 6


def test_tuned_tiles_go_before_the_guess(monkeypatch):
    found = config.Tiles(64, 32, 4, 2, 255, 2)
    monkeypatch.setattr(config, "_tuned", lambda: {"forward_tma-sm90-16bit-d128": found})
    assert config.tiles("forward_tma", torch.bfloat16, 96, 90) == found
    assert config.tiles("forward_tma", torch.bfloat16, 64, 90) != found
    # Smaller tiles serve smaller groups, of a tile of queries at least.
    assert config.tma_kernel("forward", torch.bfloat16, 128, 90, 63, False, 1.0) is None
    assert config.tma_kernel("forward", torch.bfloat16, 128, 90, 64, False, 1.0) == "forward_tma"


def test_wrap_is_never_tuned(monkeypatch):
    found = config.Tiles(16, 16, 4, 1)
    monkeypatch.setattr(config, "_tuned", lambda: {"forward-sm90-16bit-d128": found})
    assert config.tiles("forward", torch.bfloat16, 128, 90) == found
    assert config.tiles("forward", torch.bfloat16, 128, 90, wrap=True) != found
