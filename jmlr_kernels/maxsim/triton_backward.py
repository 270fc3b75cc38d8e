"""MaxSim backward in Triton: from the winners, deterministic, without atomics and without recomputed similarities.

d(queries): a program owns query rows and adds, document by document, the winning tokens' rows.
d(documents): a program owns document tokens and walks the query rows in order; a one-hot matrix of winners times the
weighted query rows is added to float32 sums on the tensor cores. Each output element has one owner, which writes it
once in the input's dtype. Derivation: docs/maxsim-backward.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .layout import Layout, layout_of
from .triton_forward import _load_rows, as_list, unit_stride


@triton.jit(do_not_specialize=["query_count", "query_length", "document_count"])
def maxsim_query_gradient_kernel(
    grad_scores,
    queries,
    documents,
    winners,
    query_weights,
    cu_seqlens,
    grad_queries,
    grad_weights,
    query_count,
    query_length,
    document_count,
    stride_query,
    stride_query_token,
    stride_document,
    stride_document_token,
    DIMENSION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIMENSION: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    """d(queries) [Nq, Lq, D] and d(weights) [Nq, Lq]. Program p owns query rows p * BLOCK_ROWS and on."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    # Divided in 32 bits, which the hardware does well; then 64, because offsets may pass 2**31.
    query = (rows // query_length).to(tl.int64)
    token = rows % query_length
    rows = rows.to(tl.int64)
    row_valid = query < query_count
    if query_weights is not None:
        weight = tl.load(query_weights + rows, mask=row_valid, other=0.0).to(tl.float32)
        grad_weight = tl.zeros([BLOCK_ROWS], tl.float32)
    for offset in range(0, DIMENSION, BLOCK_DIMENSION):
        total = tl.zeros([BLOCK_ROWS, BLOCK_DIMENSION], tl.float32)
        for document in range(0, document_count):
            pair = query * document_count + document
            winner = tl.load(winners + pair * query_length + token, mask=row_valid, other=-1)
            won = winner >= 0
            # Selected, not multiplied by zero: an infinite gradient times zero would be NaN.
            grad = tl.load(grad_scores + pair, mask=won, other=0.0)
            place = pair if CANDIDATES else tl.zeros_like(pair) + document
            if cu_seqlens is not None:
                start = tl.load(cu_seqlens + place, mask=won, other=0).to(tl.int64)
                text_rows = documents + (start + winner) * stride_document_token
            else:
                text_rows = documents + place * stride_document + winner.to(tl.int64) * stride_document_token
            text = _load_rows(text_rows, won, offset, DIMENSION, BLOCK_DIMENSION)
            total += grad[:, None] * text.to(tl.float32)
        if query_weights is not None:
            query_rows = queries + query * stride_query + token.to(tl.int64) * stride_query_token
            query_tile = _load_rows(query_rows, row_valid, offset, DIMENSION, BLOCK_DIMENSION)
            # An excluded query token sums to zero, and zero it stays whatever its embedding and weight hold.
            product = tl.where(total == 0.0, 0.0, total * query_tile.to(tl.float32))
            grad_weight += tl.sum(product, axis=1)
            total = tl.where(total == 0.0, 0.0, total * weight[:, None])
        dimensions = offset + tl.arange(0, BLOCK_DIMENSION)
        inside = row_valid[:, None] & (dimensions < DIMENSION)[None, :]
        target = grad_queries + rows[:, None] * DIMENSION + dimensions[None, :]
        tl.store(target, total.to(grad_queries.dtype.element_ty), mask=inside)
    if query_weights is not None:
        tl.store(grad_weights + rows, grad_weight.to(grad_weights.dtype.element_ty), mask=row_valid)


@triton.jit(do_not_specialize=["query_count", "query_length", "document_count", "document_length", "tiles"])
def maxsim_document_gradient_kernel(
    grad_scores,
    queries,
    winners,
    query_weights,
    cu_seqlens,
    grad_documents,
    query_count,
    query_length,
    document_count,
    document_length,
    tiles,
    stride_query,
    stride_query_token,
    DIMENSION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_DIMENSION: tl.constexpr,
    DIMENSION_TILES: tl.constexpr,
    CANDIDATES: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """d(documents), contiguous [documents, Ld, D] or [T, D].

    A program owns one chunk of the embedding dimension and every `tiles`-th token tile of one document, so that a
    packed document of any length is covered without telling the host how long it is.
    """
    program = tl.program_id(0)
    offset = (program % DIMENSION_TILES) * BLOCK_DIMENSION
    tile = (program // DIMENSION_TILES) % tiles
    place = program // (DIMENSION_TILES * tiles)
    if cu_seqlens is not None:
        start = tl.load(cu_seqlens + place).to(tl.int64)
        length = (tl.load(cu_seqlens + place + 1) - start).to(tl.int32)
    else:
        start = place.to(tl.int64) * document_length
        length = document_length
    if CANDIDATES:
        first_query = place // document_count
        document = place % document_count
        row_count = query_length
    else:
        first_query = 0
        document = place
        row_count = query_length * query_count
    dimensions = offset + tl.arange(0, BLOCK_DIMENSION)

    for token_start in range(tile * BLOCK_TOKENS, length, tiles * BLOCK_TOKENS):
        positions = token_start + tl.arange(0, BLOCK_TOKENS)
        total = tl.zeros([BLOCK_TOKENS, BLOCK_DIMENSION], tl.float32)
        for row_start in range(0, row_count, BLOCK_ROWS):
            rows = row_start + tl.arange(0, BLOCK_ROWS)
            row_valid = rows < row_count
            query = (first_query + rows // query_length).to(tl.int64)
            token = rows % query_length
            pair = query * document_count + document
            winner = tl.load(winners + pair * query_length + token, mask=row_valid, other=-1)
            # Rows that won elsewhere are neither read nor multiplied: their NaN stays out of this tile.
            hit = (winner >= token_start) & (winner < token_start + BLOCK_TOKENS)
            factor = tl.load(grad_scores + pair, mask=hit, other=0.0)
            if query_weights is not None:
                weight = tl.load(query_weights + query * query_length + token, mask=hit, other=0.0)
                factor = factor * weight.to(tl.float32)
            query_rows = queries + query * stride_query + token.to(tl.int64) * stride_query_token
            query_tile = _load_rows(query_rows, hit, offset, DIMENSION, BLOCK_DIMENSION)
            contribution = factor[:, None] * query_tile.to(tl.float32)
            one_hot = (positions[:, None] == winner[None, :]).to(PRODUCT)
            total = tl.dot(one_hot, contribution.to(PRODUCT), total, input_precision=PRECISION)
        inside = (positions < length)[:, None] & (dimensions < DIMENSION)[None, :]
        target = grad_documents + (start + positions)[:, None] * DIMENSION + dimensions[None, :]
        tl.store(target, total.to(grad_documents.dtype.element_ty), mask=inside)


def backward(
    grad_scores: Tensor,
    queries: Tensor,
    documents: Tensor,
    winners: Tensor,
    query_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    candidates: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, documents and query_weights in their shapes and dtypes; two runs are bit-identical.

    The third is an empty tensor when there are no weights.
    """
    sizes = layout_of(queries, documents, cu_seqlens, candidates)
    # Tokens of a packed list that no document covers have gradient zero and no owner to write it.
    allocate = torch.empty if cu_seqlens is None else torch.zeros
    grad_documents = allocate(documents.shape, dtype=documents.dtype, device=documents.device)
    grad_queries = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
    grad_weights = torch.empty(
        0 if query_weights is None else query_weights.shape,
        dtype=(queries if query_weights is None else query_weights).dtype,
        device=queries.device,
    )
    if winners.numel() == 0:
        return grad_queries.zero_(), grad_documents.zero_(), grad_weights.zero_()
    grad_scores = grad_scores.to(torch.float32).contiguous()
    queries, texts, winners = unit_stride(queries), as_list(documents), winners.contiguous()
    weights = None if query_weights is None else query_weights.contiguous()
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    tiles = config.query_gradient_tiles(config.capability_of(queries.device), queries.element_size(), sizes.dimension)
    maxsim_query_gradient_kernel[(-(-sizes.query_count * sizes.query_length // tiles.rows),)](
        grad_scores,
        queries,
        texts,
        winners,
        weights,
        cu_seqlens,
        grad_queries,
        None if weights is None else grad_weights,
        sizes.query_count,
        sizes.query_length,
        sizes.documents_per_query,
        queries.stride(0),
        queries.stride(1),
        0 if cu_seqlens is not None else texts.stride(0),
        texts.stride(-2),
        DIMENSION=sizes.dimension,
        BLOCK_ROWS=tiles.rows,
        BLOCK_DIMENSION=tiles.dimension,
        CANDIDATES=candidates,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        maxnreg=config.REGISTERS,
        enable_fp_fusion=True,
    )
    if documents.numel():
        _document_gradient(sizes, grad_scores, queries, winners, weights, cu_seqlens, grad_documents)
    return grad_queries, grad_documents, grad_weights


def _document_gradient(
    sizes: Layout,
    grad_scores: Tensor,
    queries: Tensor,
    winners: Tensor,
    weights: Tensor | None,
    cu_seqlens: Tensor | None,
    grad_documents: Tensor,
) -> None:
    tiles = config.document_gradient_tiles(
        config.capability_of(queries.device), queries.element_size(), sizes.dimension
    )
    if sizes.document_length is not None:
        token_tiles = -(-sizes.document_length // tiles.tokens)
    else:  # the mean length decides how many programs share a document; each strides over its tiles
        mean = grad_documents.shape[0] / sizes.document_count
        token_tiles = max(1, round(2 * mean / tiles.tokens))
    dimension_tiles = -(-sizes.dimension // tiles.dimension)
    product, precision = product_types(queries.dtype)
    maxsim_document_gradient_kernel[(sizes.document_count * token_tiles * dimension_tiles,)](
        grad_scores,
        queries,
        winners,
        weights,
        cu_seqlens,
        grad_documents,
        sizes.query_count,
        sizes.query_length,
        sizes.documents_per_query,
        sizes.document_length or 0,
        token_tiles,
        queries.stride(0),
        queries.stride(1),
        DIMENSION=sizes.dimension,
        BLOCK_ROWS=tiles.rows,
        BLOCK_TOKENS=tiles.tokens,
        BLOCK_DIMENSION=tiles.dimension,
        DIMENSION_TILES=dimension_tiles,
        CANDIDATES=sizes.candidates,
        PRODUCT=product,
        PRECISION=precision,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        maxnreg=config.REGISTERS,
        enable_fp_fusion=True,
    )


def product_types(dtype: torch.dtype) -> tuple[tl.dtype, str]:
    """Operand type and precision of the one-hot product.

    bfloat16 rounds gradient * query once, to the output's own precision. float16 goes through tf32, whose mantissa is
    as long, because small gradients would underflow in float16 before they are summed.
    """
    if dtype == torch.bfloat16:
        return tl.bfloat16, "tf32"
    return tl.float32, "tf32" if dtype == torch.float16 else "ieee"
