"""d(queries) and d(weights) of MaxSim in Triton: each query token gathers the document tokens that won for it.

A program owns a few query tokens and takes several documents side by side, one lane each, so that their rows are in
flight together; each lane sums its documents in order, and the lanes are added at the end. Where query tokens are few
(one query, thousands of documents) the documents are split among programs, whose float32 sums a second kernel adds in
order. Derivation: docs/maxsim-backward.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from . import config
from .gradient_rule import RuleInputs
from .layout import Layout, WinnerCode
from .triton_forward import _load_rows
from .triton_gradient_rule import score_gradient

# Scales of vectors shorter than the norm's floor: the floor is a constant, so they have no Jacobian but the scale.
_FLOOR_SCALE = tl.constexpr(9.99e11)


@triton.jit
def _finish(
    total, chunk_dot, query_rows, rows, row_valid, weight, scale, offset, grad_queries, DIMENSION: tl.constexpr,
    BLOCK_DIMENSION: tl.constexpr, WEIGHTED: tl.constexpr, JACOBIAN: tl.constexpr,
):  # fmt: skip
    """Writes one chunk of d(queries) from the sum over documents; returns <query, sum> so far."""
    dimensions = offset + tl.arange(0, BLOCK_DIMENSION)
    if WEIGHTED or JACOBIAN:
        query_tile = _load_rows(query_rows, row_valid, offset, DIMENSION, BLOCK_DIMENSION).to(tl.float32)
        if scale is not None:
            query_tile = query_tile * scale[:, None]
        # An excluded query token sums to zero, and zero it stays whatever its embedding and weight hold.
        nothing = total == 0.0
        dot = tl.sum(tl.where(nothing, 0.0, total * query_tile), axis=1)
        chunk_dot += dot
        if JACOBIAN:
            dot = tl.where(scale >= _FLOOR_SCALE, 0.0, dot)
            total = tl.where(nothing & (dot == 0.0)[:, None], 0.0, total - query_tile * dot[:, None])
        if WEIGHTED:
            total = tl.where(total == 0.0, 0.0, total * weight[:, None])
    if JACOBIAN:
        total = tl.where(total == 0.0, 0.0, total * scale[:, None])
    inside = row_valid[:, None] & (dimensions < DIMENSION)[None, :]
    target = grad_queries + rows[:, None] * DIMENSION + dimensions[None, :]
    tl.store(target, total.to(grad_queries.dtype.element_ty), mask=inside)
    return chunk_dot


@triton.jit(do_not_specialize=["query_count", "query_length", "document_count", "document_length", "splits"])
def maxsim_query_gradient_kernel(
    grad,
    scores,
    row_statistics,
    temperatures,
    target,
    target_row,
    queries,
    documents,
    winners,
    query_mask,
    document_kept,
    query_weights,
    cu_seqlens,
    query_scales,
    document_scales,
    grad_queries,
    grad_weights,
    partial,
    query_count,
    query_length,
    document_count,
    document_length,
    splits,
    stride_query,
    stride_query_token,
    stride_document,
    stride_document_token,
    DIMENSION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_DIMENSION: tl.constexpr,
    CANDIDATES: tl.constexpr,
    NO_WINNER: tl.constexpr,
    RULE: tl.constexpr,
    JACOBIAN: tl.constexpr,
):
    """d(queries) [Nq, Lq, D] and d(weights) [Nq, Lq]; with `partial`, sums [splits, Nq * Lq, D] instead.

    Program p owns query tokens (p // splits) * BLOCK_ROWS and on, and the p % splits-th part of the documents.
    NO_WINNER is the code of "nobody won", or -2 where masks alone say so (`query_mask`, `document_kept`).
    """
    program = tl.program_id(0)
    split = program % splits
    first_row = (program // splits).to(tl.int64) * BLOCK_ROWS
    lanes = tl.arange(0, BLOCK_ROWS * LANES)
    lane_row = first_row + lanes // LANES
    lane_document = lanes % LANES
    query = lane_row // query_length
    token = lane_row - query * query_length
    lane_valid = query < query_count
    if query_mask is not None:
        lane_valid = lane_valid & (tl.load(query_mask + lane_row, mask=lane_valid, other=0) != 0)
    per_split = tl.cdiv(tl.cdiv(document_count, splits), LANES) * LANES
    first_document = split * per_split
    last_document = tl.minimum(first_document + per_split, document_count)

    rows = first_row + tl.arange(0, BLOCK_ROWS)
    row_query = rows // query_length
    row_valid = row_query < query_count
    query_rows = queries + row_query * stride_query + (rows - row_query * query_length) * stride_query_token
    weight = None
    scale = None
    if query_weights is not None:
        weight = tl.load(query_weights + rows, mask=row_valid, other=0.0).to(tl.float32)
    if query_scales is not None:
        scale = tl.load(query_scales + rows, mask=row_valid, other=0.0)
    dot = tl.zeros([BLOCK_ROWS], tl.float32)
    for offset in range(0, DIMENSION, BLOCK_DIMENSION):
        sums = tl.zeros([BLOCK_ROWS * LANES, BLOCK_DIMENSION], tl.float32)
        for document_start in range(first_document, last_document, LANES):
            document = (document_start + lane_document).to(tl.int64)
            pair = query * document_count + document
            valid = lane_valid & (document < last_document)
            winner = tl.load(winners + pair * query_length + token, mask=valid, other=0).to(tl.int32)
            won = valid & (winner != NO_WINNER)
            place = pair if CANDIDATES else document
            if document_kept is not None:
                won = won & (tl.load(document_kept + place, mask=valid, other=0) != 0)
            # Selected, not multiplied by zero: an infinite gradient times zero would be NaN.
            factor = score_gradient(
                grad, scores, row_statistics, temperatures, target, target_row, query, document, token, won,
                document_count, query_length, RULE,
            )  # fmt: skip
            if RULE == "tokens":  # a maximum that the loss does not look at: its winner may hold anything
                won = won & (factor != 0.0)
            if cu_seqlens is not None:
                token_place = tl.load(cu_seqlens + place, mask=won, other=0).to(tl.int64) + winner
                text_rows = documents + token_place * stride_document_token
            else:
                token_place = place * document_length + winner
                text_rows = documents + place * stride_document + winner.to(tl.int64) * stride_document_token
            if document_scales is not None:
                factor = factor * tl.load(document_scales + token_place, mask=won, other=0.0)
            text = _load_rows(text_rows, won, offset, DIMENSION, BLOCK_DIMENSION)
            sums += factor[:, None] * text.to(tl.float32)
        total = tl.sum(tl.reshape(sums, [BLOCK_ROWS, LANES, BLOCK_DIMENSION]), axis=1)
        if partial is not None:
            dimensions = offset + tl.arange(0, BLOCK_DIMENSION)
            place = (split.to(tl.int64) * query_count * query_length + rows) * DIMENSION
            inside = row_valid[:, None] & (dimensions < DIMENSION)[None, :]
            tl.store(partial + place[:, None] + dimensions[None, :], total, mask=inside)
        else:
            dot = _finish(
                total, dot, query_rows, rows, row_valid, weight, scale, offset, grad_queries,
                DIMENSION, BLOCK_DIMENSION, query_weights is not None, JACOBIAN,
            )  # fmt: skip
    if grad_weights is not None and partial is None:
        tl.store(grad_weights + rows, dot.to(grad_weights.dtype.element_ty), mask=row_valid)


@triton.jit(do_not_specialize=["query_count", "query_length", "splits"])
def maxsim_query_gradient_sum_kernel(
    partial,
    queries,
    query_weights,
    query_scales,
    grad_queries,
    grad_weights,
    query_count,
    query_length,
    splits,
    stride_query,
    stride_query_token,
    DIMENSION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIMENSION: tl.constexpr,
    JACOBIAN: tl.constexpr,
):
    """d(queries) and d(weights) from the splits' sums [splits, Nq * Lq, D], added in order."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_query = rows // query_length
    row_valid = row_query < query_count
    query_rows = queries + row_query * stride_query + (rows - row_query * query_length) * stride_query_token
    weight = None
    scale = None
    if query_weights is not None:
        weight = tl.load(query_weights + rows, mask=row_valid, other=0.0).to(tl.float32)
    if query_scales is not None:
        scale = tl.load(query_scales + rows, mask=row_valid, other=0.0)
    dot = tl.zeros([BLOCK_ROWS], tl.float32)
    for offset in range(0, DIMENSION, BLOCK_DIMENSION):
        total = tl.zeros([BLOCK_ROWS, BLOCK_DIMENSION], tl.float32)
        for split in range(0, splits):
            part = partial + (tl.cast(split, tl.int64) * query_count * query_length + rows) * DIMENSION
            total += _load_rows(part, row_valid, offset, DIMENSION, BLOCK_DIMENSION)
        dot = _finish(
            total, dot, query_rows, rows, row_valid, weight, scale, offset, grad_queries,
            DIMENSION, BLOCK_DIMENSION, query_weights is not None, JACOBIAN,
        )  # fmt: skip
    if grad_weights is not None:
        tl.store(grad_weights + rows, dot.to(grad_weights.dtype.element_ty), mask=row_valid)


@triton.jit(do_not_specialize=["token_count", "document_length"])
def maxsim_tangent_kernel(
    gradient,
    tokens,
    scales,
    out,
    token_count,
    document_length,
    stride_document,
    stride_token,
    DIMENSION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIMENSION: tl.constexpr,
):
    """The Jacobian of u = x / |x| for embeddings too long for one tile: out = (du - u <u, du>) / |x|, row by row."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    valid = token < token_count
    document = token // document_length
    rows = tokens + document * stride_document + (token - document * document_length) * stride_token
    scale = tl.load(scales + token, mask=valid, other=0.0)
    dot = tl.zeros([BLOCK_ROWS], tl.float32)
    for offset in range(0, DIMENSION, BLOCK_DIMENSION):
        change = _load_rows(gradient + token * DIMENSION, valid, offset, DIMENSION, BLOCK_DIMENSION)
        unit = _load_rows(rows, valid, offset, DIMENSION, BLOCK_DIMENSION).to(tl.float32) * scale[:, None]
        dot += tl.sum(tl.where(change == 0.0, 0.0, change * unit), axis=1)
    dot = tl.where(scale >= _FLOOR_SCALE, 0.0, dot)
    for offset in range(0, DIMENSION, BLOCK_DIMENSION):
        change = _load_rows(gradient + token * DIMENSION, valid, offset, DIMENSION, BLOCK_DIMENSION)
        unit = _load_rows(rows, valid, offset, DIMENSION, BLOCK_DIMENSION).to(tl.float32) * scale[:, None]
        # A token that won nothing keeps its zero whatever it holds; its norm may never have been computed.
        still = (change == 0.0) & (dot == 0.0)[:, None]
        change = tl.where(still, 0.0, (change - unit * dot[:, None]) * scale[:, None])
        dimensions = offset + tl.arange(0, BLOCK_DIMENSION)
        inside = valid[:, None] & (dimensions < DIMENSION)[None, :]
        place = out + token[:, None] * DIMENSION + dimensions[None, :]
        tl.store(place, change.to(out.dtype.element_ty), mask=inside)


def query_gradient(
    sizes: Layout,
    code: WinnerCode,
    rule: str,
    inputs: RuleInputs,
    queries: Tensor,
    documents: Tensor,
    winners: Tensor,
    query_mask: Tensor | None,
    document_kept: Tensor | None,
    query_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    query_scales: Tensor | None,
    document_scales: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """d(queries) in their dtype and d(weights) (empty without weights).

    Documents are a list [count, Ld, D] or packed [T, D]; both sides have unit stride in D. `query_mask` and
    `document_kept` (bytes) are given where the winners' code has no "nobody".
    """
    device, rows = queries.device, sizes.query_count * sizes.query_length
    tiles = config.query_gradient_tiles(config.capability_of(device), queries.element_size(), sizes.dimension)
    splits = config.document_splits(rows, sizes.documents_per_query, tiles, config.processors_of(device))
    grad_queries = torch.empty(queries.shape, dtype=queries.dtype, device=device)
    grad_weights = torch.empty(
        (0,) if query_weights is None else query_weights.shape,
        dtype=(queries if query_weights is None else query_weights).dtype,
        device=device,
    )
    whole = tiles.dimension >= sizes.dimension
    wide = grad_queries
    if query_scales is not None and not whole:
        wide = torch.empty(queries.shape, dtype=torch.float32, device=device)
    partial = None
    if splits > 1:
        partial = torch.empty((splits, rows, sizes.dimension), dtype=torch.float32, device=device)
    jacobian = query_scales is not None and whole
    ends = (None if query_weights is None else grad_weights,)
    launch(
        maxsim_query_gradient_kernel,
        -(-rows // tiles.rows) * splits,
        (
            *inputs,
            queries,
            documents,
            winners,
            query_mask,
            document_kept,
            query_weights,
            cu_seqlens,
            query_scales,
            document_scales,
            wide,
            *ends,
            partial,
            sizes.query_count,
            sizes.query_length,
            sizes.documents_per_query,
            sizes.document_length or 0,
            splits,
            queries.stride(0),
            queries.stride(1),
            0 if cu_seqlens is not None else documents.stride(0),
            documents.stride(-2),
        ),
        (
            sizes.dimension,
            tiles.rows,
            tiles.lanes,
            tiles.dimension,
            sizes.candidates,
            code.none if code.marked else -2,
            rule,
            jacobian,
        ),
        (tiles.warps, tiles.stages, tiles.registers),
    )
    if partial is not None:
        launch(
            maxsim_query_gradient_sum_kernel,
            -(-rows // tiles.rows),
            (
                partial,
                queries,
                query_weights,
                query_scales,
                wide,
                *ends,
                sizes.query_count,
                sizes.query_length,
                splits,
                queries.stride(0),
                queries.stride(1),
            ),
            (sizes.dimension, tiles.rows, tiles.dimension, jacobian),
            (tiles.warps, 1, tiles.registers),
        )
    if wide is not grad_queries:
        assert query_scales is not None
        apply_tangent(wide, queries, query_scales, grad_queries)
    return grad_queries, grad_weights


def apply_tangent(gradient: Tensor, tokens: Tensor, scales: Tensor, out: Tensor) -> None:
    """`out` = Jacobian of the normalisation of `tokens` [N, L, D] or [T, D] applied to float32 `gradient`."""
    dimension = tokens.shape[-1]
    launch(
        maxsim_tangent_kernel,
        -(-scales.numel() // 16),
        (
            gradient,
            tokens,
            scales,
            out,
            scales.numel(),
            tokens.shape[-2],
            0 if tokens.dim() == 2 else tokens.stride(0),
            tokens.stride(-2),
        ),
        (dimension, 16, min(128, config.next_power_of_two(dimension, 16))),
        (4, 1, config.REGISTERS),
    )
