"""The two-call baselines with stand-ins for the calls, which no CPU has: bounds, views, heads and gradients are ours.

A stand-in has the signature of the real function (of each torch that has it), computes plainly, and is strict where
the real one is.
"""

from __future__ import annotations

import importlib.machinery
import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import attention
from benchmarks import attention_baselines as baselines
from benchmarks.attention_cases import AttentionCase
from benchmarks.candidate import Function
from benchmarks.peers import varlen
from jmlr_kernels.shifted_attention.reference import shifted_sparse_attention_reference

CPU = torch.device("cpu")
CASES = (
    AttentionCase(64, 16, heads=4, kv_heads=2, dim=8, batch=2),
    AttentionCase(50, 15, heads=4, kv_heads=4, dim=8, batch=2),  # an odd group, a ragged end
    AttentionCase(40, 12, heads=9, kv_heads=3, dim=8, batch=2),  # a kv head serves both halves
    AttentionCase(40, 12, heads=4, kv_heads=1, dim=8),  # the only kv head does
    AttentionCase(7, 30, heads=2, kv_heads=2, dim=8),  # shorter than a group, and than half a group
    AttentionCase(45, 16, heads=6, kv_heads=2, dim=8, batch=3, layout="padded"),
    AttentionCase(90, 7, heads=4, kv_heads=2, dim=8, layout="packed"),
)
by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def plainly(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int, grouped: bool) -> tuple[Tensor, Tensor]:
    """(out [T, h, D], lse [h, T]) of causal attention inside each sequence; what a kernel would not forgive raises."""
    assert q.dim() == k.dim() == 3 and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert ends.dtype == torch.int32 and ends[0] == 0 and ends[-1] == q.shape[0] == k.shape[0]
    lengths = ends.diff()
    assert bool((lengths > 0).all()) and int(lengths.max()) == longest
    assert grouped or q.shape[1] == k.shape[1], "enable_gqa was not asked for"
    ratio = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(ratio, 1), v.repeat_interleave(ratio, 1)
    outs, sums = [], []
    for start, end in itertools.pairwise(ends.tolist()):
        scores = torch.einsum("ihd,jhd->hij", q[start:end], k[start:end]) * q.shape[-1] ** -0.5
        future = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
        sums.append(scores.logsumexp(-1))
        outs.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), v[start:end]))
    return torch.cat(outs), torch.cat(sums, dim=1)


def gradients(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        own = [tensor.detach().clone().requires_grad_() for tensor in (q, k, v)]
        return torch.autograd.grad(plainly(*own, ends, longest, True)[0], own, grad)


def check(case: AttentionCase, function: Function) -> None:
    """Output and gradients in float64 against autograd through the definition."""
    *tensors, grad = case.inputs(CPU, torch.float64)
    grad = grad.double()
    right = shifted_sparse_attention_reference(*tensors, case.group_size, **case.arguments(CPU))
    out = function(*tensors)
    torch.testing.assert_close(out, right)
    for got, expected in zip(
        torch.autograd.grad(out, tensors, grad), torch.autograd.grad(right, tensors, grad), strict=True
    ):
        torch.testing.assert_close(got, expected)


# --------------------------------------------------------------------------- torch's own, in each version


def _torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):  # type: ignore[no-untyped-def]
    assert is_causal and cu_seq_q is cu_seq_k and max_q == max_k
    return plainly(query, key, value, cu_seq_q, max_q, True)[0]


def _torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,  # type: ignore[no-untyped-def]
                window_size=(-1, -1)):  # fmt: skip
    assert window_size == (-1, 0) and cu_seq_q is cu_seq_k and max_q == max_k
    return plainly(query, key, value, cu_seq_q, max_q, True)[0]


def _torch_2_12(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,  # type: ignore[no-untyped-def]
                window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None):  # fmt: skip
    assert window_size == (-1, 0) and cu_seq_q is cu_seq_k and max_q == max_k
    return plainly(query, key, value, cu_seq_q, max_q, enable_gqa)[0]


def _torch_2_12_out(out, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,  # type: ignore[no-untyped-def]
                    window_size=(-1, -1), enable_gqa=False):  # fmt: skip
    assert window_size == (-1, 0) and cu_seq_q is cu_seq_k and max_q == max_k
    result, lse = plainly(query, key, value, cu_seq_q, max_q, enable_gqa)
    out.copy_(result)
    return (out, lse) if return_aux and return_aux.lse else out


def _flash_forward(q, k, v, ends, ends_k, longest, longest_k, dropout, causal, debug):  # type: ignore[no-untyped-def]
    assert ends is ends_k and longest == longest_k and dropout == 0.0 and causal and not debug
    out, lse = plainly(q, k, v, ends, longest, True)
    return out, lse, torch.zeros(2, dtype=torch.uint64), torch.empty(0), torch.empty(0)


def _flash_backward(grad, q, k, v, out, lse, ends, ends_k, longest, longest_k, dropout, causal, state, unused,  # type: ignore[no-untyped-def]
                    *, window_size_left=None, window_size_right=None):  # fmt: skip
    assert ends is ends_k and longest == longest_k and dropout == 0.0 and causal and state.dtype == torch.uint64
    own_out, own_lse = plainly(q, k, v, ends, longest, True)
    torch.testing.assert_close(out, own_out)  # its own half of the output, and of the sums
    torch.testing.assert_close(lse, own_lse)
    return gradients(grad, q, k, v, ends, longest)


def _cudnn_forward(q, k, v, bias, ends, ends_k, longest, longest_k, wants_lse, dropout, causal, debug):  # type: ignore[no-untyped-def]
    assert bias is None and ends is ends_k and wants_lse and dropout == 0.0 and causal and not debug
    assert q.is_contiguous() and k.is_contiguous() and v.is_contiguous()
    out, lse = plainly(q, k, v, ends, longest, True)
    return out, lse, ends, ends, longest, longest, torch.zeros(()), torch.zeros(()), torch.empty(0)


def _cudnn_backward(grad, q, k, v, out, lse, seed, offset, bias, ends, ends_k, longest, longest_k, dropout, causal):  # type: ignore[no-untyped-def]
    assert bias is None and ends is ends_k and dropout == 0.0 and causal and grad.is_contiguous()
    assert seed.shape == offset.shape == () and lse.shape == (q.shape[1], q.shape[0]) and out.shape == q.shape
    return gradients(grad, q, k, v, ends, longest)


@pytest.fixture
def aten(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins = {
        "_flash_attention_forward": _flash_forward,
        "_flash_attention_backward": _flash_backward,
        "_cudnn_attention_forward": _cudnn_forward,
        "_cudnn_attention_backward": _cudnn_backward,
    }
    monkeypatch.setattr(varlen, "_aten", SimpleNamespace(**stand_ins))


@by_name
@pytest.mark.parametrize("stand_in", [_torch_2_10, _torch_2_11, _torch_2_12], ids=["2.10", "2.11", "2.12"])
def test_torch_varlen(case: AttentionCase, stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
    check(case, varlen.candidates(case, CPU)["varlen"].make())


@by_name
def test_torch_varlen_into_one_output(case: AttentionCase, monkeypatch: pytest.MonkeyPatch, aten: None) -> None:
    pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn_out", _torch_2_12_out, raising=False)
    check(case, varlen.candidates(case, CPU)["varlen-out"].make())


@by_name
@pytest.mark.parametrize("name", ["varlen-cudnn", "varlen-flash"])
def test_forced_backends(case: AttentionCase, name: str, monkeypatch: pytest.MonkeyPatch, aten: None) -> None:
    monkeypatch.setattr(torch, "__version__", "2.15.0")
    check(case, varlen.candidates(case, CPU)[name].make())


def test_what_the_stand_ins_take_is_what_torch_takes() -> None:
    """The operations behind varlen_attn: arguments by position are the same here."""
    for name, taken in (("_flash_attention_forward", 10), ("_cudnn_attention_forward", 12)):
        arguments = getattr(torch.ops.aten, name).default._schema.arguments
        positional = [argument.name for argument in arguments if not argument.kwarg_only]
        assert len(positional) == taken and positional[:3] == ["query", "key", "value"]
        assert positional[-2:] == ["is_causal", "return_debug_mask"]
    for name, start, state in (
        ("_flash_attention_backward", 6, ["rng_state", "unused"]),
        ("_cudnn_attention_backward", 9, []),
    ):
        arguments = getattr(torch.ops.aten, name).default._schema.arguments
        positional = [argument.name for argument in arguments if not argument.kwarg_only]
        assert positional[:6] == ["grad_out", "query", "key", "value", "out", "logsumexp"]
        assert positional[start : start + 2] == ["cum_seq_q", "cum_seq_k"]
        assert positional[start + 4 :] == ["dropout_p", "is_causal", *state]


# --------------------------------------------------------------------------- other libraries


def _flash_2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,  # type: ignore[no-untyped-def]
             causal=False, window_size=(-1, -1)):  # fmt: skip
    assert causal and cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k
    return plainly(q, k, v, cu_seqlens_q, max_seqlen_q, True)[0]


def _flash_3(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, causal=False):  # type: ignore[no-untyped-def]
    assert causal
    return plainly(q, k, v, cu_seqlens_q, max_seqlen_q, True)


def _flash_4(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, softmax_scale=None, causal=False):  # type: ignore[no-untyped-def]
    assert causal
    longest = int(cu_seqlens_q.diff().max())
    return plainly(q, k, v, cu_seqlens_q, longest, True)


def _fla(q, k, v, g=None, scale=None, window_size=None, cu_seqlens=None):  # type: ignore[no-untyped-def]
    assert q.shape[0] == 1
    return plainly(q[0], k[0], v[0], cu_seqlens, int(cu_seqlens.diff().max()), True)[0][None]


def _install(monkeypatch: pytest.MonkeyPatch, path: str, **functions: Callable[..., Any]) -> None:
    """A module of that name, its parents included."""
    parts = path.split(".")
    for depth in range(1, len(parts) + 1):
        name = ".".join(parts[:depth])
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    vars(module).update(functions)


@by_name
@pytest.mark.parametrize(
    ("name", "module", "functions"),
    [
        ("flash-attn", "flash_attn", {"flash_attn_varlen_func": _flash_2}),
        ("flash-attn-3", "flash_attn_interface", {"flash_attn_varlen_func": _flash_3}),
        ("flash-attn-4", "flash_attn.cute", {"flash_attn_varlen_func": _flash_4}),
        ("fla", "fla.ops.attn.parallel", {"parallel_attn": _fla}),
    ],
    ids=["flash-attn", "flash-attn-3", "flash-attn-4", "fla"],
)
def test_libraries(
    case: AttentionCase, name: str, module: str, functions: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _install(monkeypatch, module, **functions)
    check(case, varlen.candidates(case, CPU)[name].make())


def test_what_cannot_be_imported_is_left_out() -> None:
    names = set(varlen.candidates(CASES[0], CPU))
    installed = {
        "flash-attn": "flash_attn",
        "flash-attn-3": "flash_attn_interface",
        "flash-attn-4": "flash_attn.cute",
        "fla": "fla.ops.attn.parallel",
    }
    for name, module in installed.items():
        assert (name in names) == varlen.present(module)
    assert varlen.candidates(replace(CASES[0], heads=1, kv_heads=1), CPU) == {}


# --------------------------------------------------------------------------- layouts


def test_groups_end_where_the_definition_says() -> None:
    assert varlen.group_ends([8, 3, 0, 5], 4, False) == [0, 4, 8, 11, 15, 16]
    assert varlen.group_ends([8, 3, 0, 5], 4, True) == [0, 2, 6, 8, 10, 11, 13, 16]
    assert varlen.group_ends([5], 5, True) == [0, 2, 5]  # an odd group: the first half is the smaller


def test_kv_heads_are_views_where_they_can_be() -> None:
    assert varlen.kv_heads_of(range(0, 16), 4) == slice(0, 4) and varlen.kv_heads_of(range(16, 32), 4) == slice(4, 8)
    assert varlen.kv_heads_of(range(16, 32), 32) == slice(0, 1)
    assert varlen.kv_heads_of(range(4, 9), 3) == [1, 1, 2, 2, 2]


@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=lambda case: case.name)
def test_nothing_is_copied_before_the_calls(case: AttentionCase) -> None:
    *tensors, _ = case.inputs(CPU, torch.float32)
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors}

    def call(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int) -> Tensor:
        assert {x.untyped_storage().data_ptr() for x in (q, k, v)} == storages
        return plainly(q, k, v, ends, longest, True)[0]

    varlen.two_calls(case, CPU, call)(*tensors)


def test_longlora_moves_data_as_it_does_and_is_right() -> None:
    case = CASES[0]

    def call(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int) -> Tensor:
        assert q.shape == k.shape == (2 * 2 * 64, 2, 8)  # kv heads repeated, halves stacked
        return plainly(q, k, v, ends, longest, False)[0]

    check(case, baselines.longlora_copies(case, CPU, call))
    check(case, baselines.sdpa_groups(case, CPU))


def test_gpu_cases_meet_their_baselines() -> None:
    """Every case has two-call and FlexAttention baselines, the bar cases all of them; names only, nothing runs."""
    cuda = torch.device("cuda")
    for case in attention.GPU_CASES:
        names = set(attention.candidates(case, cuda, compiled=2))
        assert {"jmlr", "torch", "varlen", "varlen-cudnn", "flex", "flex-tuned"} <= names
        if case.bar:
            assert {"sdpa-groups", "longlora-copies", "sdpa-dense-cudnn", "sdpa-dense-flash"} <= names
        assert ("flex" in attention.candidates(case, cuda, compiled=0)) is False
