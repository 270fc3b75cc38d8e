"""MaxSim in plain PyTorch, fast enough to train with on a CPU and a fallback on any device.

Forward: matrix products over chunks of documents, each reduced to its row maxima before the next one, so that memory
is bounded whatever the number of documents. Backward: nothing is recomputed. The winners make a sparse matrix with
one entry per (query token, document); its product with the documents is d(queries), its transpose's product with the
queries is d(documents). Both run as `embedding_bag`, a gather with a weighted sum in the order of its indices, which
is deterministic. Derivation: docs/maxsim-backward.md.

Half-precision inputs are multiplied in float32, chunk by chunk; float64 inputs stay float64 throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from .gradient_rule import pair_gradient, unpack
from .layout import Layout, decode_winners, layout_of, score_dtype, winner_code

# Similarities of one chunk, in elements: 4 MiB in float32, which stays in a core's outer cache.
_CHUNK_ELEMENTS = 2**20
# Winners whose gradients are computed at once; each takes about 40 bytes of sorting space.
_BACKWARD_ENTRIES = 2**21
# Packed documents are grouped by length rounded up to this many tokens: little padding, few matrix products.
_LENGTH_STEP = 16
# Of a vector shorter than this, the direction is noise: it is divided by the floor instead (torch's own default).
_NORM_FLOOR = 1e-12


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """The operation's own precision holds: autocast has already had its say in function.py."""

    @wraps(function)
    def wrapped(first: Any, *args: Any) -> Any:
        device = (first[0] if isinstance(first, list) else first).device.type
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            return function(first, *args)

    return wrapped


@_without_autocast
def forward(
    queries: Tensor,
    documents: Tensor,
    query_mask: Tensor | None,
    document_mask: Tensor | None,
    query_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    candidates: bool,
    normalize: bool,
    per_token: bool,
    need_winners: bool,
    max_length: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores [Nq, N] or maxima [Nq, N, Lq], winners, and inverse norms of queries and documents.

    float32, or float64 for float64 inputs. Arguments are checked by function.py. What was not asked for is empty.
    """
    sizes = layout_of(queries, documents, cu_seqlens, candidates)
    code = winner_code(documents, cu_seqlens, max_length)
    dtype = score_dtype(queries)
    shape = sizes.winners_shape if per_token else sizes.winners_shape[:2]
    if normalize:
        query_scales, document_scales = _inverse_norms(queries, dtype), _inverse_norms(documents, dtype)
    else:
        query_scales, document_scales = (torch.empty(0, dtype=dtype, device=queries.device) for _ in range(2))
    if queries.numel() == 0 or documents.numel() == 0:
        nobody = (sizes.winners_shape if need_winners else (0,), code.none if code.marked else 0)
        winners = torch.full(nobody[0], nobody[1], dtype=code.dtype, device=queries.device)
        return queries.new_zeros(shape, dtype=dtype), winners, query_scales, document_scales
    # Every query against the same documents is one group of rows; candidates are one group per query.
    groups = sizes.query_count if candidates else 1
    rows = queries.to(dtype)
    rows = (rows * query_scales[..., None] if normalize else rows).reshape(groups, -1, sizes.dimension)
    scales = document_scales if normalize else None
    if cu_seqlens is not None:
        best, index = _packed_maxima(rows, documents, document_mask, cu_seqlens, scales, dtype, need_winners)
    elif document_mask is not None and not candidates and _mostly_padding(rows, document_mask):
        count, length = document_mask.shape
        offsets = torch.arange(0, count * length + 1, length, device=documents.device)
        packed = documents.reshape(-1, sizes.dimension), document_mask.reshape(-1), offsets
        best, index = _packed_maxima(rows, *packed, None if scales is None else scales.reshape(-1), dtype, need_winners)
    else:
        grid = documents if candidates else documents[None]
        mask = document_mask if candidates or document_mask is None else document_mask[None]
        scales = scales if candidates or scales is None else scales[None]
        best, index = _padded_maxima(rows, grid, mask, scales, dtype, need_winners)
    best = best.view(sizes.query_count, sizes.query_length, sizes.documents_per_query)
    counts = index.view_as(best) >= 0 if need_winners else _has_tokens(sizes, document_mask, cu_seqlens)
    if query_mask is not None:
        kept = query_mask[:, :, None]
        counts = kept if counts is None else counts & kept
    if query_weights is not None:
        best = best * query_weights.to(dtype)[:, :, None]
    if counts is not None:
        best = best.masked_fill(~counts, 0)
    if max_length and cu_seqlens is not None:  # a longer document's winners may not fit their integer: loud, not wrong
        longer = cu_seqlens.diff() > max_length
        best = best.masked_fill(longer.view(-1, 1, sizes.documents_per_query), torch.nan)
    scores = best.transpose(1, 2).contiguous() if per_token else best.sum(1)
    if not need_winners:
        return scores, torch.empty(0, dtype=code.dtype, device=queries.device), query_scales, document_scales
    winners = index.view_as(best)
    if counts is not None:
        winners = winners.masked_fill(~counts, code.none if code.marked else 0)
    winners = winners.transpose(1, 2).to(code.dtype, memory_format=torch.contiguous_format)
    return scores, winners, query_scales, document_scales


def _inverse_norms(tokens: Tensor, dtype: torch.dtype) -> Tensor:
    return 1 / torch.linalg.vector_norm(tokens, dim=-1, dtype=dtype).clamp_min(_NORM_FLOOR)


def _has_tokens(sizes: Layout, document_mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor | None:
    """Which documents have a kept token, broadcastable to [Nq, Lq, N]; None when all have."""
    if cu_seqlens is None:
        if document_mask is None:
            return None
        kept = document_mask.any(-1)
    elif document_mask is None:
        kept = cu_seqlens[1:] > cu_seqlens[:-1]
    else:
        running = torch.nn.functional.pad(document_mask.cumsum(0), (1, 0))
        kept = running[cu_seqlens[1:].long()] > running[cu_seqlens[:-1].long()]
    return kept.view(-1, 1, sizes.documents_per_query)


def _mostly_padding(rows: Tensor, document_mask: Tensor) -> bool:
    """Whether leaving excluded tokens out of the products saves more than gathering the kept ones costs."""
    pairs = rows.shape[1] * document_mask.numel()
    return pairs > _CHUNK_ELEMENTS and int(document_mask.sum()) < 0.75 * document_mask.numel()


def _padded_maxima(
    rows: Tensor,
    documents: Tensor,
    mask: Tensor | None,
    scales: Tensor | None,
    dtype: torch.dtype,
    need_winners: bool,
) -> tuple[Tensor, Tensor]:
    """Row maxima [groups, rows, N] and their positions (int32, -1 for a document without kept tokens).

    rows [groups, rows, D]; documents [groups, N, L, D]; mask and scales [groups, N, L].
    """
    groups, count, length, dimension = documents.shape
    row_count = rows.shape[1]
    best = rows.new_empty((groups, row_count, count))
    index = best.new_empty(best.shape if need_winners else 0, dtype=torch.int32)
    document_step = max(1, _CHUNK_ELEMENTS // max(1, row_count * length))
    group_step = max(1, document_step // max(1, count))
    ceiling = None if mask is None else _ceiling(mask, dtype)
    for g in _slices(groups, group_step):
        for n in _slices(count, document_step):
            chunk = documents[g, n].to(dtype)
            if scales is not None:
                chunk = chunk * scales[g, n][..., None]
            chunk = chunk.flatten(1, 2).transpose(1, 2)
            similarity = torch.matmul(rows[g], chunk).unflatten(2, (-1, length))
            if mask is None or ceiling is None:
                values, positions = _row_maxima(similarity, need_winners)
            else:
                kept = mask[g, n].unsqueeze(1)
                torch.minimum(similarity, ceiling[g, n].unsqueeze(1), out=similarity)
                values, positions = _row_maxima(similarity, need_winners)
                if values.isnan().any():  # NaN passes a minimum: do not let it come from an excluded token
                    similarity = torch.matmul(rows[g], chunk).unflatten(2, (-1, length))
                    values, positions = _row_maxima(torch.where(kept, similarity, -torch.inf), need_winners)
                if need_winners:
                    positions = _only_kept(positions, values, kept)
            best[g, :, n] = values
            if need_winners:
                index[g, :, n] = positions
    return best, index


def _ceiling(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Infinity for kept tokens and -infinity for excluded ones: a minimum is ten times as fast as masked_fill."""
    return torch.full(mask.shape, -torch.inf, dtype=dtype, device=mask.device).masked_fill_(mask, torch.inf)


def _row_maxima(similarity: Tensor, need_winners: bool) -> tuple[Tensor, Tensor]:
    if need_winners:
        values, positions = similarity.max(-1)  # the lowest of equal positions; NaN wins
        return values, positions
    return similarity.amax(-1), similarity


def _only_kept(positions: Tensor, values: Tensor, kept: Tensor) -> Tensor:
    """Where a maximum is -inf, the first token may be an excluded one: name the first kept token instead, or -1.

    positions, values [groups, rows, n]; kept [groups, 1, n, L].
    """
    lowest = values == -torch.inf
    if not lowest.any():
        return positions
    first = torch.where(kept.any(-1), kept.to(torch.uint8).argmax(-1), -1)
    return torch.where(lowest, first, positions)


def _packed_maxima(
    rows: Tensor,
    documents: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor,
    scales: Tensor | None,
    dtype: torch.dtype,
    need_winners: bool,
) -> tuple[Tensor, Tensor]:
    """The same for packed documents [T, D]: documents of about equal length share a matrix product, and excluded
    tokens are left out of it, so that neither padding nor holes cost anything."""
    starts = cu_seqlens[:-1].long()
    tokens = torch.arange(documents.shape[0], device=documents.device)
    if mask is None:
        lengths = cu_seqlens.diff().long()
        kept_starts = starts
    else:
        running = torch.nn.functional.pad(mask.cumsum(0), (1, 0))
        tokens = tokens[mask]
        kept_starts = running[starts]
        lengths = running[cu_seqlens[1:].long()] - kept_starts
    groups, row_count, _ = rows.shape
    count = lengths.numel()
    best = rows.new_full((groups, row_count, count // groups), -torch.inf)
    index = best.new_full(best.shape if need_winners else (0,), -1, dtype=torch.int32)
    buckets = (lengths + _LENGTH_STEP - 1) // _LENGTH_STEP
    for bucket in buckets.unique().tolist():
        if bucket == 0:
            continue
        padded = bucket * _LENGTH_STEP
        position = torch.arange(padded, device=documents.device)
        members = (buckets == bucket).nonzero().squeeze(1)
        for chunk in members.split(max(1, _CHUNK_ELEMENTS // max(1, row_count * padded))):
            inside = position < lengths[chunk, None]
            places = torch.where(inside, kept_starts[chunk, None] + position, 0)
            flat = tokens[places]
            text = documents[flat].to(dtype)
            if scales is not None:
                text = text * scales[flat][..., None]
            if groups == 1:
                values, where = _padded_maxima(rows, text[None], inside[None], None, dtype, need_winners)
                into: tuple[Any, ...] = (slice(None), slice(None), chunk)
            else:  # candidates: each document meets its own query only
                owner = chunk // (count // groups)
                values, where = _padded_maxima(rows[owner], text[:, None], inside[:, None], None, dtype, need_winners)
                into = (owner, slice(None), chunk % (count // groups))
                values, where = values.squeeze(2), where.squeeze(2) if need_winners else where
            best[into] = values
            if need_winners:  # from a place among the kept tokens to a position in the document
                source = (flat - starts[chunk, None]).to(torch.int32)
                if groups == 1:
                    index[into] = source.T.gather(0, where[0].long())[None]
                else:
                    index[into] = source.gather(1, where.long())
    return best, index


@_without_autocast
def backward(
    rule_tensors: list[Tensor],
    queries: Tensor,
    documents: Tensor,
    winners: Tensor,
    query_mask: Tensor | None,
    document_mask: Tensor | None,
    query_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    query_scales: Tensor | None,
    document_scales: Tensor | None,
    rule: str,
    candidates: bool,
    max_length: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, documents and query_weights in their own shapes and dtypes.

    The third is an empty tensor when there are no weights. Two runs are bit-identical. The scores' gradient is
    computed slice by slice, by the rule (gradient_rule.py).
    """
    sizes = layout_of(queries, documents, cu_seqlens, candidates)
    code = winner_code(documents, cu_seqlens, max_length)
    dtype = score_dtype(queries)
    inputs = unpack(rule, rule_tensors, dtype)
    rows = queries.to(dtype).reshape(-1, sizes.dimension)
    if query_scales is not None:
        rows = rows * query_scales.reshape(-1, 1)
    flat_documents = documents.reshape(-1, sizes.dimension)
    flat_scales = None if document_scales is None else document_scales.reshape(-1, 1)
    gathered = rows.new_zeros(rows.shape)
    grad_documents = torch.zeros_like(flat_documents, memory_format=torch.contiguous_format)
    weights = None if query_weights is None else query_weights.to(dtype).reshape(-1)
    starts = None if cu_seqlens is None else cu_seqlens.tolist()
    count, tokens_per_query = sizes.documents_per_query, sizes.query_length
    entries_per_slice = tokens_per_query * (count if candidates else sizes.query_count)
    step = max(1, _BACKWARD_ENTRIES // max(1, entries_per_slice))
    for part in _slices(sizes.query_count if candidates else count, step):
        # A slice of queries with all their candidates, or a slice of documents with all queries: either way the
        # documents' tokens are one contiguous range.
        chosen = (part, slice(None)) if candidates else (slice(None), part)
        first, last = (part.start * count, part.stop * count) if candidates else (part.start, part.stop)
        if starts is None or cu_seqlens is None:
            length = sizes.document_length or 0
            low, high = first * length, last * length
            base = torch.arange(last - first, device=rows.device) * length
        else:
            low, high = starts[first], starts[last]
            base = cu_seqlens[first:last].long() - low
        row_part = slice(part.start * tokens_per_query, part.stop * tokens_per_query) if candidates else slice(None)
        query_part = chosen[0]
        won, valid = decode_winners(
            winners[chosen],
            code,
            None if query_mask is None else query_mask[query_part],
            None if document_mask is None or code.marked else document_mask[chosen if candidates else part],
        )
        coefficients = pair_gradient(rule, inputs, chosen).to(dtype)
        if rule == "tokens":  # a maximum that the loss does not look at: its winner may hold anything
            valid = (coefficients != 0) if valid is None else (coefficients != 0) & valid
            coefficients = coefficients.transpose(1, 2)
        else:
            coefficients = coefficients[:, None, :].expand(-1, tokens_per_query, -1)
        valid = None if valid is None else valid.expand(won.shape).transpose(1, 2)
        won = won.transpose(1, 2)
        base = base.view(-1, count)[:, None, :] if candidates else base
        bags = _Bags(
            (won + base).reshape(-1, won.shape[2]),
            None if valid is None else valid.reshape(-1, won.shape[2]),
            coefficients.reshape(-1, won.shape[2]),
        )
        text = flat_documents[low:high].to(dtype)
        if flat_scales is not None:
            text = text * flat_scales[low:high]
        gathered[row_part] += bags.sum_tokens(text)
        part_weights = None if weights is None else weights[row_part]
        bags.add_rows(grad_documents[low:high], rows[row_part], part_weights, text, flat_scales, low)
    grad_documents = grad_documents.view(documents.shape)
    # d(weight) is <q, sum of g * winning token>: the sum that d(query) needs, before its weight is applied.
    # An excluded query token's sum is zero, and zero it stays whatever its embedding and weight hold.
    nothing = gathered == 0
    grad_weights = queries.new_empty(0)
    if query_weights is not None and weights is not None:
        grad_weights = (gathered * rows).masked_fill(nothing, 0).sum(-1)
        grad_weights = grad_weights.view(query_weights.shape).to(query_weights.dtype)
        gathered = (gathered * weights[:, None]).masked_fill(nothing, 0)
    if query_scales is not None:
        gathered = _tangent(gathered, rows, query_scales.reshape(-1, 1))
    return gathered.view_as(queries).to(queries.dtype), grad_documents, grad_weights


def _tangent(gradient: Tensor, units: Tensor, scales: Tensor) -> Tensor:
    """The Jacobian of u = x * scale: (du - u <u, du>) * scale, row by row; zero rows stay zero whatever u holds."""
    still = (gradient == 0).all(-1, keepdim=True)
    along = (gradient * units).sum(-1, keepdim=True)
    # Under the norm's floor, the scale is a constant.
    along = along.masked_fill(scales >= 0.999 / _NORM_FLOOR, 0)
    return ((gradient - units * along) * scales).masked_fill(still, 0)


class _Bags:
    """The sparse matrix of winners: row r holds, for each document, the token that won and the score's gradient."""

    def __init__(self, tokens: Tensor, valid: Tensor | None, coefficients: Tensor) -> None:
        """tokens, valid (None: all), coefficients [rows, documents]; `tokens` counts from the documents' first."""
        self.row_count, width = tokens.shape
        row_index = torch.arange(self.row_count, device=tokens.device)
        tokens, coefficients = tokens.reshape(-1), coefficients.reshape(-1)
        if valid is None or valid.all():
            self.tokens, self.coefficients = tokens, coefficients
            self.offsets = row_index * width
            self.rows = row_index[:, None].expand(-1, width).reshape(-1)
        else:
            # Entries without a winner are left out, not weighted by zero: zero times NaN would poison the sum.
            entries = valid.reshape(-1).nonzero().squeeze(1)
            self.tokens, self.coefficients = tokens[entries], coefficients[entries]
            per_row = valid.sum(1)
            self.offsets = per_row.cumsum(0) - per_row
            self.rows = entries.div(width, rounding_mode="floor")

    def sum_tokens(self, documents: Tensor) -> Tensor:
        """Per query token, the sum over documents of gradient * winning token: [rows, D]."""
        if self.tokens.numel() == 0:
            return documents.new_zeros((self.row_count, documents.shape[1]))
        return embedding_bag(self.tokens, documents, self.offsets, per_sample_weights=self.coefficients, mode="sum")

    def add_rows(
        self, into: Tensor, rows: Tensor, weights: Tensor | None, text: Tensor, scales: Tensor | None, low: int
    ) -> None:
        """Per document token, the sum over the query tokens it won of gradient * weight * query token.

        Written to `into` [tokens, D], which is zero; most tokens of a long list of documents win nothing. With
        `scales`, of which token `low` is the first one here, `text` holds unit vectors and the sum goes through their
        Jacobian.
        """
        if self.tokens.numel() == 0:
            return
        tokens, order = self.tokens.to(torch.int32).sort(stable=True)
        won, per_token = tokens.unique_consecutive(return_counts=True)
        winners_of_token = self.rows[order]
        coefficients = self.coefficients[order]
        if weights is not None:
            coefficients = coefficients * weights[winners_of_token]
        offsets = per_token.cumsum(0) - per_token
        sums = embedding_bag(winners_of_token, rows, offsets, per_sample_weights=coefficients, mode="sum")
        place = won.long()
        if scales is not None:
            sums = _tangent(sums, text[place], scales[place + low])
        into.index_copy_(0, place, sums.to(into.dtype))


def _slices(total: int, step: int) -> Iterator[slice]:
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))
