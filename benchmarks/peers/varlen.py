"""Shifted sparse attention as two calls of somebody's variable-length attention, on views of the two head halves.

This is the strongest general form that exists: groups are the call's sequences, nothing of q, k or v is copied where
the heads divide, and every library's fastest kernel can serve. What it costs beyond one call: a second launch, and
putting the halves' outputs and gradients together, which ``varlen-out`` saves in the forward.

* ``varlen``: ``torch.nn.attention.varlen.varlen_attn``, with the backend that this torch prefers: FlashAttention,
  and in the newest releases cuDNN where it can.
* ``varlen-out``: each call writes its half of one output (torch >= 2.12).
* ``varlen-flash``, ``varlen-cudnn``: torch's operations behind it, one backend forced where torch would take the other.
  cuDNN's gets contiguous copies: its gradients take the strides of q, k and v, and releases differ in whether they
  are allocated so.
* ``flash-attn``, ``flash-attn-3``, ``flash-attn-4``: Dao et al.'s packages, where they can be imported.
* ``fla``: flash-linear-attention's parallel attention in Triton, where it can be imported.

Right padding is taken out of the rows first and put back after, inside of the timing, as a model has to.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.torch_version import TorchVersion

from benchmarks.candidate import Candidate, Function

if TYPE_CHECKING:
    from benchmarks.attention_cases import AttentionCase

Tensor = torch.Tensor
# (q [T, h, D], k, v [T, hkv, D], cu_seqlens of the groups, the longest of them) -> [T, h, D], causal.
Call = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
# The same for both halves in one go, given as (q, k, v, cu_seqlens, longest) each.
Halves = list[tuple[Tensor, Tensor, Tensor, Tensor, int]]

_aten: Any = torch.ops.aten


def group_ends(lengths: list[int], group_size: int, shifted: bool) -> list[int]:
    """cu_seqlens of the groups of one half of the heads, documents one after another."""
    ends, start = [0], 0
    for length in lengths:
        first = group_size // 2 if shifted else group_size
        ends += [*range(start + first, start + length, group_size), start + length] if length else []
        start += length
    return ends


def kv_heads_of(heads: range, ratio: int) -> slice | list[int]:
    """Which kv heads serve query heads `heads`: a slice that a grouped call can take as it is, or one for each."""
    serving = [head // ratio for head in heads]
    counts = [serving.count(head) for head in range(serving[0], serving[-1] + 1)]
    return slice(serving[0], serving[-1] + 1) if len(set(counts)) == 1 else serving


@dataclass(frozen=True)
class _HeadHalves:
    """How both halves of the heads are cut out of q and of k and v, and where the groups of each end."""

    heads: list[slice]
    kv_heads: list[slice | Tensor]
    ends: list[Tensor]
    longest: list[int]

    def of(self, q: Tensor, k: Tensor, v: Tensor) -> Halves:
        parts = (_cut(q, self.heads), _cut(k, self.kv_heads), _cut(v, self.kv_heads), self.ends, self.longest)
        return list(zip(*parts, strict=True))


def _cut(x: Tensor, parts: Sequence[slice | Tensor]) -> list[Tensor]:
    """Both parts of x [T, heads, D]. As one split where they are side by side: its gradient is one concatenation,
    that of two slices two zeroed tensors and their sum."""
    first, second = parts
    if isinstance(first, slice) and isinstance(second, slice) and first.stop == second.start:
        return list(x.split([first.stop - first.start, second.stop - second.start], dim=1))
    found = []
    for part in parts:
        if isinstance(part, Tensor):
            found.append(x.index_select(1, part))
        else:
            found.append(x if part == slice(0, x.shape[1]) else x[:, part])
    return found


def _halves(case: AttentionCase, device: torch.device) -> _HeadHalves:
    ranges = range(case.heads // 2), range(case.heads // 2, case.heads)
    serving = [kv_heads_of(heads, case.heads // case.kv_heads) for heads in ranges]
    ends = [group_ends(case.lengths(), case.group_size, shifted) for shifted in (False, True)]
    return _HeadHalves(
        [slice(heads.start, heads.stop) for heads in ranges],
        [one if isinstance(one, slice) else torch.tensor(one, device=device) for one in serving],
        [torch.tensor(bounds, dtype=torch.int32, device=device) for bounds in ends],
        [max(end - start for start, end in itertools.pairwise(bounds)) for bounds in ends],
    )


def on_rows(case: AttentionCase, device: torch.device, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Function:
    """`attend` over [T, heads, dim] without padding, as a function of the case's own layout."""
    if case.layout == "packed":
        return attend
    rows = case.batch * case.length
    kept = None
    if case.layout == "padded":
        kept = torch.cat([torch.arange(start, end) for start, end in case.documents()]).to(device)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flat = [tensor.flatten(0, 1) for tensor in (q, k, v)]
        if kept is None:
            return attend(*flat).view_as(q)
        out = attend(*(tensor.index_select(0, kept) for tensor in flat))
        return out.new_zeros((rows, *out.shape[1:])).index_copy(0, kept, out).view_as(q)

    return attention


def two_calls(case: AttentionCase, device: torch.device, call: Call) -> Function:
    """`call` for each half of the heads, outputs side by side."""
    halves = _halves(case, device)
    return on_rows(case, device, lambda q, k, v: torch.cat([call(*half) for half in halves.of(q, k, v)], dim=1))


def both_calls(case: AttentionCase, device: torch.device, call: Callable[[Tensor, Halves], Tensor]) -> Function:
    """`call` gets both halves at once, so that it can write them into one output."""
    halves = _halves(case, device)
    return on_rows(case, device, lambda q, k, v: call(q, halves.of(q, k, v)))


# --------------------------------------------------------------------------- the calls


def torch_call() -> Call:
    """``varlen_attn`` made causal, by whatever arguments this torch has: ``is_causal`` in 2.10, a window from 2.11 on,
    ``enable_gqa`` from 2.12 on (before, fewer kv heads are taken without being asked)."""
    from torch.nn.attention.varlen import varlen_attn

    parameters = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in parameters else {"is_causal": True}
    asks = "enable_gqa" in parameters

    def causal(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int) -> Tensor:
        grouped: dict[str, Any] = {"enable_gqa": True} if asks and q.shape[1] != k.shape[1] else {}
        out = varlen_attn(q, k, v, ends, ends, longest, longest, **options, **grouped)
        assert isinstance(out, Tensor)  # no auxiliary output was asked for
        return out

    return causal


class _OneOutput(torch.autograd.Function):
    """Both halves by ``varlen_attn_out`` into views of one output; each half's gradients by the FlashAttention
    operation that torch itself uses for them."""

    @staticmethod
    def forward(ctx: Any, like: Tensor, ends: tuple[Tensor, ...], longest: tuple[int, ...], *halves: Tensor) -> Tensor:
        from torch.nn.attention.varlen import AuxRequest, varlen_attn_out

        out, sums, first = torch.empty_like(like, memory_format=torch.contiguous_format), [], 0
        for half in range(2):
            q, k, v = halves[3 * half : 3 * half + 3]
            heads = q.shape[1]
            _, lse = varlen_attn_out(
                out[:, first : first + heads],
                q, k, v, ends[half], ends[half], longest[half], longest[half],
                return_aux=AuxRequest(lse=True), window_size=(-1, 0), enable_gqa=heads != k.shape[1],
            )  # fmt: skip
            sums.append(lse)
            first += heads
        ctx.save_for_backward(out, *ends, *sums, *halves)
        ctx.longest = longest
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        out, *saved = ctx.saved_tensors
        grads, first = [], 0
        state = torch.zeros(2, dtype=torch.uint64, device=out.device)  # of a dropout that there is not
        for half in range(2):
            q, k, v = saved[4 + 3 * half : 7 + 3 * half]
            heads = slice(first, first + q.shape[1])
            ends, longest = saved[half], ctx.longest[half]
            grads += _aten._flash_attention_backward(
                grad[:, heads], q, k, v, out[:, heads], saved[2 + half], ends, ends, longest, longest, 0.0, True,
                state, state.new_empty(0), window_size_left=-1, window_size_right=0,
            )  # fmt: skip
            first += q.shape[1]
        return None, None, None, *grads


def _one_output(q: Tensor, halves: Halves) -> Tensor:
    tensors = [tensor for half in halves for tensor in half[:3]]
    out = _OneOutput.apply(q.detach(), tuple(half[3] for half in halves), tuple(half[4] for half in halves), *tensors)
    assert isinstance(out, Tensor)
    return out


class _Flash(torch.autograd.Function):
    """torch's FlashAttention operation, whatever ``varlen_attn`` would prefer."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int) -> Tensor:
        out, lse, state, unused, _ = _aten._flash_attention_forward(
            q, k, v, ends, ends, longest, longest, 0.0, True, False
        )
        ctx.save_for_backward(q, k, v, out, lse, state, unused, ends)
        ctx.longest = longest
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, k, v, out, lse, state, unused, ends = ctx.saved_tensors
        grads = _aten._flash_attention_backward(
            grad, q, k, v, out, lse, ends, ends, ctx.longest, ctx.longest, 0.0, True, state, unused
        )
        return *grads, None, None


class _Cudnn(torch.autograd.Function):
    """torch's cuDNN operation on ragged sequences."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        found = _aten._cudnn_attention_forward(q, k, v, None, ends, ends, longest, longest, True, 0.0, True, False)
        out, lse, seed, offset = found[0], found[1], found[6], found[7]
        ctx.save_for_backward(q, k, v, out, lse, seed, offset, ends)
        ctx.longest = longest
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, k, v, out, lse, seed, offset, ends = ctx.saved_tensors
        grads = _aten._cudnn_attention_backward(
            grad.contiguous(), q, k, v, out, lse, seed, offset, None, ends, ends, ctx.longest, ctx.longest, 0.0, True
        )
        return *grads, None, None


def forced_call(function: type[torch.autograd.Function]) -> Call:
    def causal(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int) -> Tensor:
        out = function.apply(q, k, v, ends, longest)
        assert isinstance(out, Tensor)
        return out

    return causal


def flash_call(module: str) -> Call:
    """``flash_attn_varlen_func`` of one of Dao et al.'s packages, whose arguments and results differ a little."""
    function = importlib.import_module(module).flash_attn_varlen_func
    known = inspect.signature(function).parameters

    def causal(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int) -> Tensor:
        named = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": longest, "max_seqlen_k": longest}
        out = function(q, k, v, **{name: value for name, value in named.items() if name in known}, causal=True)
        return out[0] if isinstance(out, tuple) else out

    return causal


def fla_call() -> Call:
    parallel = importlib.import_module("fla.ops.attn.parallel").parallel_attn

    def causal(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int) -> Tensor:
        return parallel(q[None], k[None], v[None], cu_seqlens=ends)[0]

    return causal


def present(module: str) -> bool:
    """Whether a module can be found here."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # its parent package is absent, or a stand-in
        return False


def candidates(case: AttentionCase, device: torch.device) -> dict[str, Candidate]:
    """What this machine offers for a case, each to be compared with float64 before it is timed."""
    if case.heads < 2:
        return {}  # there is one half only
    found: dict[str, Callable[[], Function]] = {}

    def calls(name: str, make: Callable[[], Call]) -> None:
        found[name] = lambda: two_calls(case, device, make())

    if present("torch.nn.attention.varlen"):
        calls("varlen", torch_call)
        if hasattr(importlib.import_module("torch.nn.attention.varlen"), "varlen_attn_out"):
            found["varlen-out"] = lambda: both_calls(case, device, _one_output)
        calls("varlen-cudnn", partial(forced_call, _Cudnn))
        if TorchVersion(torch.__version__) >= "2.14":
            calls("varlen-flash", partial(forced_call, _Flash))
    for name, module in (
        ("flash-attn", "flash_attn"),
        ("flash-attn-3", "flash_attn_interface"),
        ("flash-attn-4", "flash_attn.cute"),
    ):
        if present(module):
            calls(name, partial(flash_call, module))
    if present("fla.ops.attn.parallel"):
        calls("fla", fla_call)
    return {name: Candidate(make, peer=True) for name, make in found.items()}
