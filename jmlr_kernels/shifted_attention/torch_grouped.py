"""Shifted sparse attention from torch's own operations: the CPU path, and the fallback of every other device.

Groups become a batch dimension, so nothing of size [S, S] exists. A batch without ragged documents needs no index:
every head half is one or a few runs of equal groups, each a strided view. Ragged batches gather their groups by
rows, longest first and in bounded chunks, so that a short document does not pay for a long one.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

# Scores held at once by the matmul path, and padded rows held at once by a ragged gather.
_MAX_SCORES = 1 << 23
_MAX_ROWS = 1 << 16
_QUERY_ROWS = 256


# --------------------------------------------------------------------------- where the groups are


@dataclass(frozen=True)
class _Run:
    """`count` neighbouring groups of `length` tokens from token `start` on, in every row of [B, S, h, D]."""

    start: int
    count: int
    length: int

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        x = x[:, self.start : self.start + self.count * self.length]
        return x.unflatten(1, (self.count, self.length)).flatten(0, 1).transpose(1, 2)

    def scatter(self, x: torch.Tensor, groups: torch.Tensor) -> None:
        x = x[:, self.start : self.start + self.count * self.length].unflatten(1, (self.count, self.length))
        x.copy_(groups.transpose(1, 2).unflatten(0, (-1, self.count)))


@dataclass(frozen=True)
class _Rows:
    """Groups of unequal length as rows of [T, h, D]: `index` int64 [groups, longest], `kept` marks its real rows.

    Filler stands behind a group's last token, so the causal mask hides it from every real query.
    """

    index: torch.Tensor
    kept: torch.Tensor

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        return x[self.index].transpose(1, 2)

    def scatter(self, x: torch.Tensor, groups: torch.Tensor) -> None:
        x[self.index[self.kept]] = groups.transpose(1, 2)[self.kept]


@functools.lru_cache(maxsize=256)
def _runs(length: int, group_size: int, first: int) -> tuple[_Run, ...]:
    """A document of `length` tokens whose first group has `first` tokens, the others `group_size`."""
    first = min(first, length)
    whole, rest = divmod(length - first, group_size)
    runs = (_Run(0, 1, first), _Run(first, whole, group_size), _Run(length - rest, 1, rest))
    return tuple(run for run in runs if run.count > 0 and run.length > 0)


def _ragged(starts: torch.Tensor, lengths: torch.Tensor, group_size: int, first: int, roll: int) -> list[_Rows]:
    """The groups of documents at rows `starts`, int64 [N]; walked from token `roll` on and around (0: not at all)."""
    # A first group of `first` tokens is a whole one of which `missing` tokens lie before the document.
    missing = group_size - first
    counts = torch.where(lengths > 0, (lengths + missing + group_size - 1) // group_size, 0)
    document = torch.arange(lengths.shape[0], device=lengths.device).repeat_interleave(counts)
    number = torch.arange(document.shape[0], device=lengths.device) - (counts.cumsum(0) - counts)[document]
    begin = (number * group_size - missing).clamp(min=0)
    size = torch.minimum((number + 1) * group_size - missing, lengths[document]) - begin

    order = torch.argsort(size, descending=True, stable=True)
    sizes = size[order].tolist()
    pieces, at = [], 0
    while at < len(sizes):
        chunk = order[at : at + max(1, _MAX_ROWS // sizes[at])]
        offset = torch.arange(sizes[at], device=lengths.device)
        kept = offset < size[chunk, None]
        position = begin[chunk, None] + torch.minimum(offset, size[chunk, None] - 1)
        length = lengths[document[chunk], None]
        pieces.append(_Rows(starts[document[chunk], None] + (position + roll) % length, kept))
        at += chunk.shape[0]
    return pieces


# --------------------------------------------------------------------------- causal attention inside equal groups


def _fused_cpu(q: torch.Tensor, scale: float) -> bool:
    """Whether torch has it fused. That multiplies masked scores, which are -inf, by the scale: it must be positive."""
    there = hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward")
    return q.device.type == "cpu" and there and scale > 0


def _causal_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q, k, v [N, h, L, D] -> out [N, h, L, D], natural-log lse [N, h, L]."""
    if _fused_cpu(q, scale):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3], dtype=_accumulate(q), device=q.device)
    for batch, rows, keys in _blocks(q):
        scores = _scores(q[batch, :, rows], k[batch, :, keys], rows, scale)
        total = scores.logsumexp(-1)
        out[batch, :, rows] = (scores - total[..., None]).exp() @ v[batch, :, keys].to(scores.dtype)
        lse[batch, :, rows] = total
    return out, lse


def _causal_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of :func:`_causal_forward`; the derivation is docs/shifted-attention-backward.md."""
    if _fused_cpu(q, scale):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, q, k, v, out, lse, 0.0, True, scale=scale
        )
    dtype = _accumulate(q)
    dq = torch.empty_like(q)
    dk, dv = torch.zeros_like(k, dtype=dtype), torch.zeros_like(v, dtype=dtype)
    for batch, rows, keys in _blocks(q):
        grad, query = grad_out[batch, :, rows].to(dtype), q[batch, :, rows].to(dtype)
        p = (_scores(query, k[batch, :, keys], rows, scale) - lse[batch, :, rows, None]).exp()
        delta = (grad * out[batch, :, rows].to(dtype)).sum(-1, keepdim=True)
        ds = p * (grad @ v[batch, :, keys].to(dtype).mT - delta) * scale
        dv[batch, :, keys] += p.mT @ grad
        dk[batch, :, keys] += ds.mT @ query
        dq[batch, :, rows] = ds @ k[batch, :, keys].to(dtype)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _accumulate(q: torch.Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _blocks(q: torch.Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """(batch, query rows, keys) slices that cover the lower triangle with at most _MAX_SCORES scores each, or the
    scores of one batch entry's _QUERY_ROWS rows where those are more."""
    entries, heads, length, _ = q.shape
    step = max(1, _MAX_SCORES // (heads * min(length, _QUERY_ROWS) * length))
    for entry in range(0, entries, step):
        for row in range(0, length, _QUERY_ROWS):
            end = min(row + _QUERY_ROWS, length)
            yield slice(entry, entry + step), slice(row, end), slice(0, end)


def _scores(q: torch.Tensor, k: torch.Tensor, rows: slice, scale: float) -> torch.Tensor:
    dtype = _accumulate(q)
    scores = (q.to(dtype) * scale) @ k.to(dtype).mT
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(rows.start + 1)
    return scores.masked_fill_(future, float("-inf"))


# --------------------------------------------------------------------------- both head halves


def _halves(heads: int, group_size: int, wrap: bool) -> tuple[tuple[slice, int, int], ...]:
    """(query heads, tokens in the first group, roll) of the plain and of the shifted half."""
    half = group_size // 2
    plain, shifted = slice(0, heads // 2), slice(heads // 2, heads)
    both = ((plain, group_size, 0), (shifted, group_size, half) if wrap else (shifted, half, 0))
    return both[heads < 2 :]


def _kv_heads(x: torch.Tensor, heads: slice, ratio: int) -> torch.Tensor:
    """x[..., Hkv, D] -> one kv head for each of the query heads in `heads`."""
    if ratio == 1:
        return x[..., heads, :]
    return x.index_select(-2, torch.arange(heads.start, heads.stop, device=x.device) // ratio)


@dataclass(frozen=True)
class _Plan:
    """What to compute: for each half its heads and its pieces, and how to see a tensor so that the pieces fit it."""

    halves: list[tuple[slice, Sequence[_Run | _Rows]]]
    flat: bool  # pieces are rows of [T, ...]; otherwise tokens of [B, S, ...]
    longest: int  # tokens per row that any piece reaches; unused when flat
    padding: torch.Tensor | None  # bool [B, longest]: tokens that pieces reach and no document holds

    def view(self, x: torch.Tensor) -> torch.Tensor:
        """[B, S, h, D] or [T, h, D] as the pieces index it."""
        return x.flatten(0, 1) if self.flat and x.dim() == 4 else x

    def clean(self, x: torch.Tensor) -> torch.Tensor:
        """The same for an input. Its padding may hold anything, and 0 * NaN would reach real rows."""
        if self.padding is None:
            return self.view(x)
        return x[:, : self.longest].masked_fill(self.padding[..., None, None], 0)


def _plan(
    q: torch.Tensor, group_size: int, cu_seqlens: torch.Tensor | None, seq_lens: torch.Tensor | None, wrap: bool
) -> _Plan:
    halves = _halves(q.shape[-2], group_size, wrap)
    if cu_seqlens is None and not wrap:
        longest, padding = q.shape[1], None
        if seq_lens is not None:
            # Reading a CPU tensor costs nothing; on another device it would wait for the device.
            longest = int(seq_lens.max()) if seq_lens.device.type == "cpu" else longest
            padding = torch.arange(longest, device=q.device) >= seq_lens[:, None]
        return _Plan([(h, _runs(longest, group_size, first)) for h, first, _ in halves], False, longest, padding)
    if cu_seqlens is not None:
        starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    else:
        starts = torch.arange(q.shape[0], device=q.device) * q.shape[1]
        lengths = torch.full_like(starts, q.shape[1]) if seq_lens is None else seq_lens.long().clamp(0, q.shape[1])
    return _Plan([(h, _ragged(starts, lengths, group_size, first, roll)) for h, first, roll in halves], True, 0, None)


def _outputs(q: torch.Tensor, count: int, ragged: bool) -> list[torch.Tensor]:
    """`count` contiguous tensors like q, zero where pieces may not reach every row."""
    new = torch.zeros if ragged else torch.empty
    return [new(q.shape, dtype=q.dtype, device=q.device) for _ in range(count)]


# --------------------------------------------------------------------------- the two operations


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    group_size: int,
    cu_seqlens: torch.Tensor | None,
    seq_lens: torch.Tensor | None,
    wrap: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operation ``shifted_attention_forward``: (out, lse); lse of padding is +inf."""
    ratio = q.shape[-2] // k.shape[-2]
    (out,) = _outputs(q, 1, cu_seqlens is not None or seq_lens is not None)
    lse = torch.full((*q.shape[:-1], 1), float("inf"), dtype=_accumulate(q), device=q.device)
    if q.numel():
        with torch.autocast(q.device.type, enabled=False):
            plan = _plan(q, group_size, cu_seqlens, seq_lens, wrap)
            q, k, v = (plan.clean(x) for x in (q, k, v))
            out_view, lse_view = plan.view(out), plan.view(lse)
            for heads, pieces in plan.halves:
                queries, keys, values = q[..., heads, :], _kv_heads(k, heads, ratio), _kv_heads(v, heads, ratio)
                for piece in pieces:
                    group_out, group_lse = _causal_forward(
                        piece.gather(queries), piece.gather(keys), piece.gather(values), scale
                    )
                    piece.scatter(out_view[..., heads, :], group_out)
                    piece.scatter(lse_view[..., heads, :], group_lse[..., None])
            if plan.padding is not None:
                out[:, : plan.longest].masked_fill_(plan.padding[..., None, None], 0)
                lse[:, : plan.longest].masked_fill_(plan.padding[..., None, None], float("inf"))
    return out, lse[..., 0].transpose(-1, -2).contiguous()


def backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    group_size: int,
    cu_seqlens: torch.Tensor | None,
    seq_lens: torch.Tensor | None,
    wrap: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The operation ``shifted_attention_backward``: (dq, dk, dv). Deterministic: every sum has a fixed order."""
    kv_heads, ratio = k.shape[-2], q.shape[-2] // k.shape[-2]
    # dk and dv are first kept per query head: a kv head's sum runs over heads of both halves.
    dq, dk, dv = _outputs(q, 3, cu_seqlens is not None or seq_lens is not None)
    if q.numel():
        with torch.autocast(q.device.type, enabled=False):
            plan = _plan(q, group_size, cu_seqlens, seq_lens, wrap)
            grad_out = grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous()
            out = out.contiguous()  # torch's flash attention on a CPU takes its last stride for 1
            grad_out, q, k, v, out = (plan.clean(x) for x in (grad_out, q, k, v, out))
            lse = plan.view(lse.transpose(-1, -2)[..., None])
            views = [plan.view(grad) for grad in (dq, dk, dv)]
            for heads, pieces in plan.halves:
                keys, values = _kv_heads(k, heads, ratio), _kv_heads(v, heads, ratio)
                grads, queries, outs = (x[..., heads, :] for x in (grad_out, q, out))
                for piece in pieces:
                    grad = piece.gather(grads)
                    if isinstance(piece, _Rows):
                        grad = grad.masked_fill(~piece.kept[:, None, :, None], 0)
                    results = _causal_backward(
                        grad,
                        piece.gather(queries),
                        piece.gather(keys),
                        piece.gather(values),
                        piece.gather(outs),
                        piece.gather(lse[..., heads, :])[..., 0],
                        scale,
                    )
                    for view, result in zip(views, results, strict=True):
                        piece.scatter(view[..., heads, :], result)
    if ratio > 1:
        dtype = _accumulate(q)
        dk, dv = (x.unflatten(-2, (kv_heads, ratio)).sum(-2, dtype=dtype).to(x.dtype) for x in (dk, dv))
    return dq, dk, dv
