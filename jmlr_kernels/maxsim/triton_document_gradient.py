"""d(documents) of MaxSim in Triton: each document token adds the query tokens that it won for, in their order.

A program owns a tile of document tokens. It looks through the winners of its document in scans of a thousand, writes
down those that are its own, in order, and multiplies a one-hot matrix (token by row) with their query rows on the
tensor cores: every winner is multiplied once, in the tile that it belongs to. No atomics, no sort, and no float32 copy
of the gradient: each tile is written once, in the input's dtype. Derivation: docs/maxsim-backward.md.
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
from .triton_query_gradient import _FLOOR_SCALE, apply_tangent


@triton.jit(
    do_not_specialize=["query_count", "query_length", "document_count", "document_length", "tiles", "tasks", "programs"]
)
def maxsim_document_gradient_kernel(
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
    grad_documents,
    notes,
    query_count,
    query_length,
    document_count,
    document_length,
    tiles,
    tasks,
    programs,
    stride_document,
    stride_document_token,
    DIMENSION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    SCAN: tl.constexpr,
    BLOCK_DIMENSION: tl.constexpr,
    DIMENSION_TILES: tl.constexpr,
    CANDIDATES: tl.constexpr,
    NO_WINNER: tl.constexpr,
    RULE: tl.constexpr,
    JACOBIAN: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """d(documents), contiguous [documents, Ld, D] or [T, D].

    A task is one chunk of the embedding dimension and every `tiles`-th token tile of one document, so that a packed
    document of any length is covered without telling the host how long it is. A program does every `programs`-th task
    and has `SCAN` places in `notes` to write on: (place in the scan) * BLOCK_TOKENS + (token in the tile).
    """
    program = tl.program_id(0)
    notes += program.to(tl.int64) * SCAN
    scan = tl.arange(0, SCAN)
    for task in range(program, tasks, programs):
        offset = (task % DIMENSION_TILES) * BLOCK_DIMENSION
        tile = (task // DIMENSION_TILES) % tiles
        place = task // (DIMENSION_TILES * tiles)
        if cu_seqlens is not None:
            start = tl.load(cu_seqlens + place).to(tl.int64)
            length = (tl.load(cu_seqlens + place + 1) - start).to(tl.int32)
            text = documents + start * stride_document_token
        else:
            start = place.to(tl.int64) * document_length
            length = document_length
            text = documents + place.to(tl.int64) * stride_document
        if CANDIDATES:
            first_query = place // document_count
            document = place % document_count
            row_count = query_length
        else:
            first_query = 0
            document = place
            row_count = query_length * query_count
        if document_kept is not None:
            row_count = row_count * (tl.load(document_kept + place) != 0).to(tl.int32)
        dimensions = offset + tl.arange(0, BLOCK_DIMENSION)

        for token_start in range(tile * BLOCK_TOKENS, length, tiles * BLOCK_TOKENS):
            positions = tl.arange(0, BLOCK_TOKENS)
            total = tl.zeros([BLOCK_TOKENS, BLOCK_DIMENSION], tl.float32)
            for row_start in range(0, row_count, SCAN):
                rows = row_start + scan
                row_valid = rows < row_count
                query = (first_query + rows // query_length).to(tl.int64)
                token = rows % query_length
                pair = query * document_count + document
                winner = tl.load(winners + pair * query_length + token, mask=row_valid, other=0).to(tl.int32)
                hit = row_valid & (winner != NO_WINNER)
                hit = hit & (winner >= token_start) & (winner < token_start + BLOCK_TOKENS)
                if query_mask is not None:
                    hit = hit & (tl.load(query_mask + query * query_length + token, mask=hit, other=0) != 0)
                if RULE == "tokens":  # a maximum that the loss does not look at: its query token may hold anything
                    hit = hit & (tl.load(grad + pair * query_length + token, mask=hit, other=0.0) != 0.0)
                counts = hit.to(tl.int32)
                found = tl.sum(counts, axis=0)
                note = scan * BLOCK_TOKENS + (winner - token_start)
                tl.debug_barrier()  # everybody has read the notes of the scan before
                tl.store(notes + tl.cumsum(counts, axis=0) - 1, note.to(notes.dtype.element_ty), mask=hit)
                tl.debug_barrier()  # and everybody sees these
                for first in range(0, found, BLOCK_ROWS):
                    places = first + tl.arange(0, BLOCK_ROWS)
                    valid = places < found
                    taken = tl.load(notes + places, mask=valid, other=0).to(tl.int32)
                    position = taken % BLOCK_TOKENS
                    row = row_start + taken // BLOCK_TOKENS
                    row_query = (first_query + row // query_length).to(tl.int64)
                    row_token = row % query_length
                    row_place = row_query * query_length + row_token
                    factor = score_gradient(
                        grad, scores, row_statistics, temperatures, target, target_row, row_query,
                        tl.zeros_like(row_query) + document, row_token, valid, document_count, query_length, RULE,
                    )  # fmt: skip
                    if query_weights is not None:
                        weight = tl.load(query_weights + row_place, mask=valid, other=0.0)
                        factor = factor * weight.to(tl.float32)
                    if query_scales is not None:
                        factor = factor * tl.load(query_scales + row_place, mask=valid, other=0.0)
                    query_rows = queries + row_place * DIMENSION
                    query_tile = _load_rows(query_rows, valid, offset, DIMENSION, BLOCK_DIMENSION)
                    # The gradient stands in the one-hot matrix, so that query rows go to the product as they are.
                    one_hot = tl.where(positions[:, None] == position[None, :], factor[None, :], 0.0)
                    total = tl.dot(one_hot.to(PRODUCT), query_tile.to(PRODUCT), total, input_precision=PRECISION)
            inside = token_start + positions < length
            if JACOBIAN:
                scale = tl.load(document_scales + start + token_start + positions, mask=inside, other=0.0)
                text_rows = text + (token_start + positions).to(tl.int64) * stride_document_token
                unit = _load_rows(text_rows, inside, 0, DIMENSION, BLOCK_DIMENSION).to(tl.float32) * scale[:, None]
                # A token that won nothing keeps its zero whatever it holds.
                nothing = total == 0.0
                dot = tl.sum(tl.where(nothing, 0.0, total * unit), axis=1)
                dot = tl.where(scale >= _FLOOR_SCALE, 0.0, dot)
                total = tl.where(nothing & (dot == 0.0)[:, None], 0.0, (total - unit * dot[:, None]) * scale[:, None])
            target_rows = grad_documents + (start + token_start + positions)[:, None] * DIMENSION
            tl.store(
                target_rows + dimensions[None, :],
                total.to(grad_documents.dtype.element_ty),
                mask=inside[:, None] & (dimensions < DIMENSION)[None, :],
            )


def document_gradient(
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
    shape: torch.Size,
) -> Tensor:
    """d(documents) of the given shape in their dtype; the other arguments as for `query_gradient`."""
    device = queries.device
    simple = rule in config.SIMPLE_RULES and document_scales is None and not sizes.candidates
    tiles = config.document_gradient_tiles(
        config.capability_of(device), queries.element_size(), sizes.dimension, simple
    )
    # Tokens of a packed list that no document covers have gradient zero and no owner to write it.
    allocate = torch.empty if cu_seqlens is None else torch.zeros
    grad_documents = allocate(shape, dtype=documents.dtype, device=device)
    if grad_documents.numel() == 0:
        return grad_documents
    if sizes.document_length is not None:
        token_tiles = -(-sizes.document_length // tiles.tokens)
    else:  # the mean length decides how many tasks share a document; each strides over its tiles
        mean = grad_documents.numel() / sizes.dimension / sizes.document_count
        token_tiles = max(1, round(2 * mean / tiles.tokens))
    dimension_tiles = -(-sizes.dimension // tiles.dimension)
    jacobian = document_scales is not None and dimension_tiles == 1
    wide = grad_documents
    if document_scales is not None and not jacobian:
        wide = allocate(shape, dtype=torch.float32, device=device)
    tasks = sizes.document_count * token_tiles * dimension_tiles
    programs = min(tasks, config.gradient_programs(config.processors_of(device)))
    rows = sizes.query_length * (1 if sizes.candidates else sizes.query_count)
    scan = config.scan_length(rows, tiles)
    product, precision = product_types(queries.dtype)
    launch(
        maxsim_document_gradient_kernel,
        programs,
        (
            *inputs,
            queries.contiguous(),
            documents,
            winners,
            query_mask,
            document_kept,
            query_weights,
            cu_seqlens,
            query_scales,
            document_scales,
            wide,
            torch.empty(programs * scan, dtype=torch.uint16, device=device),
            sizes.query_count,
            sizes.query_length,
            sizes.documents_per_query,
            sizes.document_length or 0,
            token_tiles,
            tasks,
            programs,
            0 if cu_seqlens is not None else documents.stride(0),
            documents.stride(-2),
        ),
        (
            sizes.dimension,
            tiles.tokens,
            tiles.rows,
            scan,
            tiles.dimension,
            dimension_tiles,
            sizes.candidates,
            code.none if code.marked else -2,
            rule,
            jacobian,
            product,
            precision,
        ),
        (tiles.warps, tiles.stages, tiles.registers),
    )
    if wide is not grad_documents:
        assert document_scales is not None
        apply_tangent(wide, documents, document_scales, grad_documents)
    return grad_documents


def product_types(dtype: torch.dtype) -> tuple[tl.dtype, str]:
    """Operand type and precision of the one-hot product.

    bfloat16 rounds each score's gradient once, to the output's own precision. float16 goes through tf32, whose mantissa
    is as long, because small gradients would underflow in float16 before they are summed.
    """
    if dtype == torch.bfloat16:
        return tl.bfloat16, "tf32"
    return tl.float32, "tf32" if dtype == torch.float16 else "ieee"
