"""MaxSim forward in Triton: one program holds up to 128 query rows and streams documents past them.

A matrix tile of one query's 32 tokens would leave the tensor cores waiting for the second-level cache, so several
queries share a tile: rows never mix, since the maximum is per row and the sum over a query's rows comes after. Queries
longer than a tile are cut into row tiles whose partial sums are added afterwards, in order. No similarity leaves
the program; packed documents are read token by token, without padding.

The work on each similarity, beside its product, is one maximum; with winners, a comparison and a predicated minimum
more. That is why nothing is masked: the places past a document's end repeat its last token, which is never the lowest
of equals, and a mask is turned into a list of the kept positions beforehand, by which the tokens are fetched. Excluded
tokens, holes or padding, cost nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from . import config
from .layout import Layout, layout_of, winner_code

_NO_TOKEN = tl.constexpr(2**31 - 1)
# Of a vector shorter than this, the direction is noise: it is divided by the floor instead (torch's own default).
_NORM_FLOOR = tl.constexpr(1e-12)


@triton.jit
def _larger_or_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _row_maxima(values, NAN_REDUCTION: tl.constexpr):
    """Maximum of each row, NaN if the row has one. tl.max alone drops NaN."""
    if NAN_REDUCTION:
        return tl.reduce(values, 1, _larger_or_nan)
    # The interpreter walks a custom reduction element by element; this says the same in two of its fast ones.
    has_nan = tl.max((values != values).to(tl.int32), axis=1) > 0
    return tl.where(has_nan, float("nan"), tl.max(values, axis=1))


@triton.jit
def _load_rows(rows, valid, offset, DIMENSION: tl.constexpr, BLOCK_DIMENSION: tl.constexpr):
    """[rows, BLOCK_DIMENSION] from row pointers, zeros outside; `valid` None: every row is inside."""
    dimensions = offset + tl.arange(0, BLOCK_DIMENSION)
    places = rows[:, None] + dimensions[None, :]
    whole: tl.constexpr = DIMENSION % BLOCK_DIMENSION == 0
    if valid is None and whole:
        tile = tl.load(places)
    elif valid is None:
        tile = tl.load(places, mask=(dimensions < DIMENSION)[None, :], other=0.0)
    elif whole:
        tile = tl.load(places, mask=valid[:, None], other=0.0)
    else:
        tile = tl.load(places, mask=valid[:, None] & (dimensions < DIMENSION)[None, :], other=0.0)
    return tile


@triton.jit
def _inverse_norms(squares):
    return 1.0 / _larger_or_nan(tl.sqrt(squares), _NORM_FLOOR)


@triton.jit
def _squares(tile):
    """Sum of squares of each row, in float32."""
    wide = tile.to(tl.float32)
    return tl.sum(wide * wide, axis=1)


@triton.jit
def _absorb(
    similarity, best, winner, token_start, BLOCK_TOKENS: tl.constexpr, TRACK: tl.constexpr, NAN_REDUCTION: tl.constexpr
):
    """The running maximum of each row, and with TRACK its position, after one more tile of similarities."""
    highest = _row_maxima(similarity, NAN_REDUCTION)
    if not TRACK:
        return _larger_or_nan(best, highest), winner
    # The lowest position of the maximum. Where that is NaN nothing is below it, and the bar of infinity leaves
    # the NaNs (and infinities) alone above it.
    bar = tl.where(highest == highest, highest, float("inf"))
    columns = tl.arange(0, BLOCK_TOKENS)
    position = tl.min(tl.where(similarity < bar[:, None], _NO_TOKEN, columns[None, :]), axis=1)
    better = (best == best) & ((highest > best) | (highest != highest))
    return tl.where(better, highest, best), tl.where(better, token_start + position, winner)


@triton.jit(
    do_not_specialize=[
        "query_count",
        "query_length",
        "document_count",
        "document_length",
        "max_length",
        "row_tiles",
        "row_chunks",
        "queries_per_tile",
        "documents_per_program",
    ]
)
def maxsim_forward_kernel(
    queries,
    documents,
    query_mask,
    kept,
    kept_lengths,
    query_weights,
    cu_seqlens,
    query_scales,
    document_scales,
    scores,
    winners,
    query_count,
    query_length,
    document_count,
    document_length,
    max_length,
    row_tiles,
    row_chunks,
    queries_per_tile,
    documents_per_program,
    stride_query,
    stride_query_token,
    stride_document,
    stride_document_token,
    DIMENSION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_DIMENSION: tl.constexpr,
    SEGMENTS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    NORMALIZE: tl.constexpr,
    NO_WINNER: tl.constexpr,
    PRECISION: tl.constexpr,
    NAN_REDUCTION: tl.constexpr,
):
    """Scores [row_chunks, Nq, N] (with PER_TOKEN the maxima [Nq, N, Lq]) and winners [Nq, N, Lq]; absent optional
    arguments are None.

    Program p serves row tile p % row_tiles and the p // row_tiles-th run of documents: neighbours share documents.
    `document_count` is N, the documents per query; with CANDIDATES a tile never holds two queries. NORMALIZE is
    "none", "load" (documents' inverse norms are read) or "compute" (they are computed here and written); the queries'
    are computed here and written. `kept` and `kept_lengths` come from maxsim_kept_kernel.
    """
    program = tl.program_id(0)
    tile = program % row_tiles
    first_document = (program // row_tiles) * documents_per_program
    first_query = (tile // row_chunks) * queries_per_tile

    rows = (tile % row_chunks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    segment = rows // query_length
    query = first_query + segment
    token = rows - segment * query_length
    row_valid = (segment < queries_per_tile) & (query < query_count)
    query_token = query.to(tl.int64) * query_length + token
    query_rows = queries + query.to(tl.int64) * stride_query + token.to(tl.int64) * stride_query_token
    row_counts = row_valid
    if query_mask is not None:
        row_counts = row_counts & (tl.load(query_mask + query_token, mask=row_valid, other=0) != 0)
    if query_weights is not None:
        weight = tl.load(query_weights + query_token, mask=row_counts, other=0.0).to(tl.float32)
    if BLOCK_DIMENSION >= DIMENSION:
        query_tile = _load_rows(query_rows, row_valid, 0, DIMENSION, BLOCK_DIMENSION)
    if NORMALIZE != "none":
        if BLOCK_DIMENSION >= DIMENSION:
            squares = _squares(query_tile)
        else:
            squares = tl.zeros([BLOCK_ROWS], tl.float32)
            for offset in range(0, DIMENSION, BLOCK_DIMENSION):
                squares += _squares(_load_rows(query_rows, row_valid, offset, DIMENSION, BLOCK_DIMENSION))
        row_scale = _inverse_norms(squares)
        tl.store(query_scales + query_token, row_scale, mask=row_valid & (first_document == 0))

    # 64 bits from here on: an offset into documents or winners may pass 2**31.
    first_place = first_query.to(tl.int64) * (document_count if CANDIDATES else 0)
    for document in range(first_document, tl.minimum(first_document + documents_per_program, document_count)):
        place = first_place + document
        if cu_seqlens is not None:
            start = tl.load(cu_seqlens + place).to(tl.int64)
            length = (tl.load(cu_seqlens + place + 1) - start).to(tl.int32)
            text = documents + start * stride_document_token
        else:
            start = place * document_length
            length = document_length
            text = documents + place * stride_document
        full_length = length
        if kept is not None:
            length = tl.load(kept_lengths + place)

        best = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
        winner = tl.zeros([BLOCK_ROWS], tl.int32)
        for token_start in range(0, length, BLOCK_TOKENS):
            positions = tl.minimum(token_start + tl.arange(0, BLOCK_TOKENS), length - 1)
            if kept is not None:
                positions = tl.load(kept + start + positions)
            token_rows = text + positions.to(tl.int64) * stride_document_token
            if BLOCK_DIMENSION >= DIMENSION:
                text_tile = _load_rows(token_rows, None, 0, DIMENSION, BLOCK_DIMENSION)
                similarity = tl.dot(query_tile, tl.trans(text_tile), input_precision=PRECISION)
                if NORMALIZE == "compute":
                    text_squares = _squares(text_tile)
            else:
                similarity = tl.zeros([BLOCK_ROWS, BLOCK_TOKENS], tl.float32)
                if NORMALIZE == "compute":
                    text_squares = tl.zeros([BLOCK_TOKENS], tl.float32)
                for offset in range(0, DIMENSION, BLOCK_DIMENSION):
                    query_part = _load_rows(query_rows, row_valid, offset, DIMENSION, BLOCK_DIMENSION)
                    text_part = _load_rows(token_rows, None, offset, DIMENSION, BLOCK_DIMENSION)
                    similarity = tl.dot(query_part, tl.trans(text_part), similarity, input_precision=PRECISION)
                    if NORMALIZE == "compute":
                        text_squares += _squares(text_part)
            if NORMALIZE == "compute":
                scale = _inverse_norms(text_squares)
                # Places past the end repeat the last token and write its norm once more.
                tl.store(document_scales + start + positions, scale)
                similarity = similarity * scale[None, :]
            elif NORMALIZE == "load":
                similarity = similarity * tl.load(document_scales + start + positions)[None, :]
            best, winner = _absorb(
                similarity, best, winner, token_start, BLOCK_TOKENS, winners is not None, NAN_REDUCTION
            )

        counts = row_counts & (length > 0)
        best = tl.where(counts, best, 0.0)
        if NORMALIZE != "none":
            best = tl.where(counts, best * row_scale, 0.0)
        if max_length > 0:  # a longer document's winners would not fit their integer: loud, not wrong
            best = tl.where(full_length > max_length, float("nan"), best)
        if winners is not None:
            if kept is not None:
                winner = tl.load(kept + start + winner, mask=counts, other=0)
            won = tl.where(counts, winner, NO_WINNER)
            entry = (query.to(tl.int64) * document_count + document) * query_length + token
            tl.store(winners + entry, won.to(winners.dtype.element_ty), mask=row_valid)
        if PER_TOKEN:
            entry = (query.to(tl.int64) * document_count + document) * query_length + token
            tl.store(scores + entry, best, mask=row_valid)
        else:
            if query_weights is not None:
                best = tl.where(counts, best * weight, 0.0)
            chunk = (tile % row_chunks).to(tl.int64)
            segments = tl.arange(0, SEGMENTS)
            if SEGMENTS == 1:
                sums = tl.sum(best, axis=0) + tl.zeros([SEGMENTS], tl.float32)
            else:
                mine = segments[:, None] == segment[None, :]
                sums = tl.sum(tl.where(mine, best[None, :], 0.0), axis=1)
            target = first_query + segments
            score_valid = (segments < queries_per_tile) & (target < query_count)
            pair = (chunk * query_count + target) * document_count + document
            tl.store(scores + pair, sums, mask=score_valid)


@triton.jit(do_not_specialize=["document_length"])
def maxsim_kept_kernel(document_mask, cu_seqlens, kept, kept_lengths, document_length, SCAN: tl.constexpr):
    """Where each document's kept tokens are, from its mask (bytes): their positions int32, side by side from the
    document's first place in `kept` [tokens], and how many there are, int32 [documents]. One program a document."""
    place = tl.program_id(0).to(tl.int64)
    if cu_seqlens is not None:
        start = tl.load(cu_seqlens + place).to(tl.int64)
        length = (tl.load(cu_seqlens + place + 1) - start).to(tl.int32)
    else:
        start = place * document_length
        length = document_length
    found = 0
    for first in range(0, length, SCAN):
        positions = first + tl.arange(0, SCAN)
        counts = (tl.load(document_mask + start + positions, mask=positions < length, other=0) != 0).to(tl.int32)
        tl.store(kept + start + found + tl.cumsum(counts, axis=0) - 1, positions, mask=counts > 0)
        found += tl.sum(counts, axis=0)
    tl.store(kept_lengths + place, found)


@triton.jit(do_not_specialize=["token_count", "document_length"])
def maxsim_norms_kernel(
    tokens,
    scales,
    token_count,
    document_length,
    stride_document,
    stride_token,
    DIMENSION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIMENSION: tl.constexpr,
):
    """Inverse norms float32 [tokens] of documents [documents, document_length, D]."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    valid = token < token_count
    document = token // document_length
    rows = tokens + document * stride_document + (token - document * document_length) * stride_token
    squares = tl.zeros([BLOCK_ROWS], tl.float32)
    for offset in range(0, DIMENSION, BLOCK_DIMENSION):
        squares += _squares(_load_rows(rows, valid, offset, DIMENSION, BLOCK_DIMENSION))
    tl.store(scales + token, _inverse_norms(squares), mask=valid)


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
    """Scores float32 [Nq, N] (or maxima [Nq, N, Lq]), winners, and inverse norms of queries and documents.

    float16, bfloat16 or float32 inputs, checked by function.py; float32 is multiplied in full float32. What was not
    asked for is empty.
    """
    sizes = layout_of(queries, documents, cu_seqlens, candidates)
    code = winner_code(documents, cu_seqlens, max_length)
    device = queries.device
    winners = torch.empty(sizes.winners_shape if need_winners else (0,), dtype=code.dtype, device=device)
    scales = [
        torch.empty(side.shape[:-1] if normalize else (0,), dtype=torch.float32, device=device)
        for side in (queries, documents)
    ]
    shape = sizes.winners_shape if per_token else sizes.winners_shape[:2]
    if queries.numel() == 0 or sizes.documents_per_query == 0:
        return torch.zeros(shape, dtype=torch.float32, device=device), winners, scales[0].zero_(), scales[1].zero_()
    queries, documents = unit_stride(queries), as_list(documents)
    capability = config.capability_of(device)
    sharing_rows = sizes.query_length * (1 if candidates else sizes.query_count)
    tiles = config.forward_tiles(capability, queries.element_size(), sizes.dimension, sharing_rows)
    row_chunks = -(-sizes.query_length // tiles.rows)
    per_tile = 1 if candidates else max(1, tiles.rows // sizes.query_length)
    row_tiles = -(-sizes.query_count // per_tile) * row_chunks
    run = config.documents_per_program(sizes.documents_per_query, row_tiles, tiles.warps, config.processors_of(device))
    # Visited once, documents are normalised on the way; visited by several row tiles, in a pass before.
    visits = row_chunks if candidates else row_tiles
    on_the_way = visits == 1 and config.normalizes_on_the_way(queries.element_size(), sizes.dimension)
    if normalize and not on_the_way:
        _document_norms(documents, scales[1])
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    kept = (None, None) if document_mask is None else _kept_tokens(document_mask, cu_seqlens, sizes)
    partial = torch.empty((1 if per_token else row_chunks, *shape), dtype=torch.float32, device=device)
    launch(
        maxsim_forward_kernel,
        row_tiles * -(-sizes.documents_per_query // run),
        (
            queries,
            documents,
            as_bytes(query_mask),
            *kept,
            None if query_weights is None else query_weights.contiguous(),
            cu_seqlens,
            scales[0] if normalize else None,
            scales[1] if normalize else None,
            partial,
            winners if need_winners else None,
            sizes.query_count,
            sizes.query_length,
            sizes.documents_per_query,
            sizes.document_length or 0,
            max_length if cu_seqlens is not None else 0,
            row_tiles,
            row_chunks,
            per_tile,
            run,
            queries.stride(0),
            queries.stride(1),
            0 if cu_seqlens is not None else documents.stride(0),
            documents.stride(-2),
        ),
        (
            sizes.dimension,
            tiles.rows,
            tiles.tokens,
            tiles.dimension,
            config.next_power_of_two(per_tile),
            candidates,
            per_token,
            "none" if not normalize else "compute" if on_the_way else "load",
            code.none,
            config.product_precision(queries.dtype),
            not config.interpreted(),
        ),
        (tiles.warps, tiles.stages, tiles.registers),
    )
    # One chunk, the usual case, is a view; several are added in order.
    return partial[0] if partial.shape[0] == 1 else partial.sum(0), winners, scales[0], scales[1]


def _kept_tokens(document_mask: Tensor, cu_seqlens: Tensor | None, sizes: Layout) -> tuple[Tensor, Tensor]:
    """Positions int32 of the kept tokens, document by document, and their numbers int32 [documents]."""
    kept = torch.empty(document_mask.numel(), dtype=torch.int32, device=document_mask.device)
    lengths = torch.empty(sizes.document_count, dtype=torch.int32, device=document_mask.device)
    launch(
        maxsim_kept_kernel,
        sizes.document_count,
        (as_bytes(document_mask), cu_seqlens, kept, lengths, sizes.document_length or 0),
        (512,),
        (4, 1, config.REGISTERS),
    )
    return kept, lengths


def _document_norms(documents: Tensor, scales: Tensor) -> None:
    """Inverse norms of documents [N, Ld, D] or packed [T, D], written to `scales`."""
    length, dimension = documents.shape[-2:]
    block = min(128, config.next_power_of_two(dimension, 16))
    launch(
        maxsim_norms_kernel,
        -(-scales.numel() // 16),
        (
            documents,
            scales,
            scales.numel(),
            length,
            0 if documents.dim() == 2 else documents.stride(0),
            documents.stride(-2),
        ),
        (dimension, 16, block),
        (4, 1, config.REGISTERS),
    )


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor itself when its embedding dimension is contiguous, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def as_list(documents: Tensor) -> Tensor:
    """Documents as [count, Ld, D] (candidates of all queries in one list) or packed [T, D], unit stride in D."""
    return unit_stride(documents.flatten(0, 1) if documents.dim() == 4 else documents)


def as_bytes(mask: Tensor | None) -> Tensor | None:
    """A boolean mask as contiguous bytes, which Triton loads without conversion."""
    return None if mask is None else mask.contiguous().view(torch.uint8)
