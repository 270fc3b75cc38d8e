"""Who owns which rows: every row of every head has one owner, and the owner knows the row's group and document.

The kernels' own arithmetic under the interpreter, without their products: with tiles of four rows, short documents
have groups of many tiles.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from jmlr_kernels.ops import triton_interpreted

pytest.importorskip("triton")
if not triton_interpreted() or torch.cuda.is_available():
    pytest.skip("runs in the interpreter", allow_module_level=True)

import triton
import triton.language as tl

from jmlr_kernels.shifted_attention import triton_common as common

BLOCK = 4


@triton.jit
def _group_tiles(
    found,
    cu,
    lens,
    rows,
    documents,
    batches,
    heads,
    group_size,
    BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_LENS: tl.constexpr,
):
    item = tl.program_id(0) if PACKED else tl.arange(0, 256)  # only a bisection must be a number's
    head, batch, document, begin, tile, stop, length = common.group_tile(
        item, cu, lens, rows, documents, batches, heads, group_size, BLOCK, PACKED, HAS_LENS
    )
    found += item * 7
    tl.store(found, head)
    tl.store(found + 1, batch)
    tl.store(found + 2, document)
    tl.store(found + 3, tile)
    tl.store(found + 4, stop)
    tl.store(found + 5, length)
    tl.store(found + 6, begin)


@triton.jit
def _key_tiles(
    found,
    cu,
    lens,
    rows,
    documents,
    batches,
    heads,
    kv_heads,
    group_size,
    BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_LENS: tl.constexpr,
):
    item = tl.program_id(0) if PACKED else tl.arange(0, 256)  # only a bisection must be a number's
    kv_head, batch, document, tile, stop, length = common.key_tile(
        item, cu, lens, rows, documents, batches, heads, kv_heads, group_size, BLOCK, PACKED, HAS_LENS
    )
    found += item * 6
    tl.store(found, kv_head)
    tl.store(found + 1, batch)
    tl.store(found + 2, document)
    tl.store(found + 3, tile)
    tl.store(found + 4, stop)
    tl.store(found + 5, length)


@triton.jit
def _located(
    found, cu, lens, rows, documents, tiles, BLOCK: tl.constexpr, PACKED: tl.constexpr, HAS_LENS: tl.constexpr
):
    item = tl.program_id(0) if PACKED else tl.arange(0, 256)
    batch, first, tile, owned, length = common.locate(item, cu, lens, rows, documents, tiles, BLOCK, PACKED, HAS_LENS)
    found += item * 6
    tl.store(found, 0)
    tl.store(found + 1, batch)
    tl.store(found + 2, first)
    tl.store(found + 3, tile)
    tl.store(found + 4, owned)
    tl.store(found + 5, length)


# (group size, tokens of each document, rows after them): a group and a token, half a group and a token, none, ...
PACKED = ((2, (1, 0, 5), 1), (3, (4, 2), 0), (13, (7, 14), 5), (19, (20, 0, 10), 20), (16, (8, 16), 17), (9, (40,), 0))
ROWS = ((2, 5), (3, 1), (5, 8), (4, 13), (9, 28), (16, 8), (13, 21), (19, 10))  # group size, rows


def cases():
    """(group size, q's leading sizes, cu_seqlens, seq_lens, documents as (batch row, first row, rows owned, length))"""
    for group_size, lengths, tail in PACKED:
        ends = [0, *itertools.accumulate(lengths)]
        documents = [(0, end - length, length, length) for end, length in zip(ends[1:], lengths, strict=True)]
        cu_seqlens = torch.tensor(ends, dtype=torch.int32)
        yield group_size, (ends[-1] + tail,), cu_seqlens, None, [*documents, (0, ends[-1], tail, 0)]
    for number, (group_size, rows) in enumerate(ROWS):
        lengths = [rows, (rows, rows // 2, 0)[number % 3]]
        seq_lens = None if number % 3 == 0 else torch.tensor(lengths, dtype=torch.int32)
        yield group_size, (2, rows), None, seq_lens, [(row, 0, rows, length) for row, length in enumerate(lengths)]


def ends_of(rows, first, group_size):
    return sorted({0, rows, *range(first, rows, group_size)})


def programs(work, cu_seqlens):
    assert work <= 256
    return (1 if cu_seqlens is None else work,)


def owners(found):
    """(head, batch row, row) -> the tiles that own it, as (tile, stop, length, begin where there is one)."""
    owned = {}
    for head, batch, document, tile, stop, length, *begin in found.tolist():
        for position in range(tile, min(tile + BLOCK, stop)):
            owned.setdefault((head, batch, document + position), []).append((tile, stop, length, *begin))
    return owned


def launched_on(lead, cu_seqlens, seq_lens):
    counts = (0, lead[0]) if cu_seqlens is None else (cu_seqlens.shape[0] - 1, 1)
    return (cu_seqlens, seq_lens, lead[-1], *counts), (BLOCK, cu_seqlens is not None, seq_lens is not None)


def test_query_tiles_by_groups():
    for group_size, lead, cu_seqlens, seq_lens, documents in cases():
        q = torch.empty(*lead, 2, 1)
        work = common.group_tiles(q, group_size, BLOCK, cu_seqlens)
        found = torch.empty(256, 7, dtype=torch.int32)
        arguments, constants = launched_on(lead, cu_seqlens, seq_lens)
        _group_tiles[programs(work, cu_seqlens)](found, *arguments, 2, group_size, *constants)
        expected = {}
        for head, first in ((0, group_size), (1, group_size // 2)):
            for batch, document, owned, length in documents:
                for begin, stop in itertools.pairwise(ends_of(owned, first, group_size)):
                    for row in range(begin, stop):
                        tile = begin + (row - begin) // BLOCK * BLOCK
                        expected[head, batch, document + row] = [(tile, stop, length, begin)]
        assert owners(found[:work]) == expected, (group_size, lead, documents)


@pytest.mark.parametrize("kind", ["by groups", "plain"])
def test_tiles_of_a_document(kind):
    """Key tiles, in the order of groups; and the tiles of the kernels by ordinary loads, query and key tiles alike."""
    for group_size, lead, cu_seqlens, seq_lens, documents in cases():
        q = torch.empty(*lead, 2, 1)
        arguments, constants = launched_on(lead, cu_seqlens, seq_lens)
        heads = 2 if kind == "by groups" else 1
        if kind == "by groups":
            work = common.key_tiles(q, 2, group_size, BLOCK, cu_seqlens)
            found = torch.empty(256, 6, dtype=torch.int32)
            _key_tiles[programs(work, cu_seqlens)](found, *arguments, 2, 2, group_size, *constants)
        else:
            rows, count, tiles, work = common.layout(q, BLOCK, cu_seqlens)
            found = torch.empty(256, 6, dtype=torch.int32)
            _located[programs(work, cu_seqlens)](found, cu_seqlens, seq_lens, rows, count, tiles, *constants)
        expected = {
            (head, batch, document + row): [(row // BLOCK * BLOCK, owned, length)]
            for batch, document, owned, length in documents
            for row in range(owned)
            for head in range(heads)
        }
        assert owners(found[:work]) == expected, (group_size, lead, documents)
