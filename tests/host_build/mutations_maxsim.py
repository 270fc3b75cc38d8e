"""Bugs that MaxSim's CUDA kernels might have, one line each, and the build that shows them: float16 alone.

``python tests/host_build/mutations_maxsim.py`` tries all of them and prints which probe, or which check of the emulator,
noticed; exit code 1 if one survived.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from types import ModuleType

import torch
from mutate import Mutation, Workshop

DTYPE = torch.float16
SOURCES = ["emulator.cpp", "maxsim_half.cpp", "maxsim_module.cpp", "maxsim_sm80.cpp"]
_SIGNATURES = (
    "void forward_{0}(const Problem&, const ForwardOutput&, void*, int, void*)",
    "void backward_{0}(const Problem&, const BackwardInput&, const BackwardOutput&, void*, int, void*)",
)
# The module's entry, and the element types that are left out.
EXTRA = {
    "only_maxsim.cpp": """
#include <pybind11/pybind11.h>
#include "../../csrc/maxsim/sm80.h"
#include "emulator.h"
namespace host_build { void bind_maxsim(pybind11::module_& module); }
PYBIND11_MODULE(jmlr_host_build, module) {
    pybind11::register_exception<emulator::Violation>(module, "Violation");
    host_build::bind_maxsim(module);
}
namespace jmlr::maxsim::sm80 {
"""
    + "\n".join(
        signature.format(name) + " { std::abort(); }" for signature in _SIGNATURES for name in ("float", "bfloat16")
    )
    + "\n}\n",
}

_FORWARD, _DOCUMENTS, _QUERIES = "maxsim/forward.cuh", "maxsim/document_gradient.cuh", "maxsim/query_gradient.cuh"
_GATHER, _ROWS, _PREPARE, _PLAN = "maxsim/gather.cuh", "maxsim/rows.cuh", "maxsim/prepare.cuh", "maxsim/plan.h"

MUTATIONS = [
    # Barriers and copies.
    Mutation("no barrier before a stage is read", _FORWARD, "sync_block();  // the stage has arrived", "sync_warp();  //"),
    Mutation("no wait for a stage", _FORWARD, "            tiles::wait_copies<kStages - 2>();\n            tiles::sync_block();  //",
             "            tiles::sync_block();  //"),
    Mutation("a stage too early", _FORWARD, "tiles::wait_copies<kStages - 2>();\n            tiles::sync_block();  //",
             "tiles::wait_copies<kStages - 1>();\n            tiles::sync_block();  //"),
    Mutation("the stage that is being read is filled", _FORWARD, "(stage + kStages - 1) % kStages", "stage"),
    Mutation("no barrier before the last document's end", _FORWARD,
             "        tiles::wait_copies<0>();\n        tiles::sync_block();\n", "        tiles::wait_copies<0>();\n"),
    Mutation("one buffer of maxima", _FORWARD, "parity ^= 1;", "parity ^= 0;"),
    Mutation("no barrier before query rows are loaded", _FORWARD,
             "            tiles::wait_copies<kStages - 2>();\n            tiles::sync_block();\n            load_rows",
             "            tiles::wait_copies<kStages - 2>();\n            load_rows"),
    Mutation("no barrier before counts are added up", _DOCUMENTS,
             "    static JMLR_DEVICE void place_notes() {\n        tiles::sync_block();",
             "    static JMLR_DEVICE void place_notes() {\n        tiles::sync_warp();"),
    Mutation("no barrier before totals are added up", _DOCUMENTS,
             "        tiles::sync_block();\n        if (token <= kTokens)", "        if (token <= kTokens)"),
    Mutation("no barrier after notes have their place", _DOCUMENTS,
             "            if (token == kTokens) totals().write(kTokens, start);\n        }\n        tiles::sync_block();",
             "            if (token == kTokens) totals().write(kTokens, start);\n        }\n"),
    Mutation("no barrier after sorting", _DOCUMENTS, "rank_of(note), note);\n        }\n        tiles::sync_block();",
             "rank_of(note), note);\n        }\n"),
    Mutation("no barrier before heads are added", _DOCUMENTS,
             "    static JMLR_DEVICE void add_heads() {\n        tiles::sync_block();", "    static JMLR_DEVICE void add_heads() {"),
    Mutation("no barrier before a tile is written", _DOCUMENTS, "            tiles::sync_block();\n            write_tile",
             "            write_tile"),
    Mutation("no barrier before sums are cleared", _DOCUMENTS,
             "            tiles::sync_block();\n            for (int i = tiles::thread_index(); i < kTokens * kDimension",
             "            for (int i = tiles::thread_index(); i < kTokens * kDimension"),
    Mutation("no warp barrier after notes", _DOCUMENTS, "        tiles::sync_warp();\n        return found;", "        return found;"),
    Mutation("no warp barrier before counts change", _DOCUMENTS,
             "            int before = inside ? own_counts.read(token) : 0;\n            tiles::sync_warp();",
             "            int before = inside ? own_counts.read(token) : 0;"),
    Mutation("no warp barrier after counts change", _DOCUMENTS,
             "before + tiles::count_bits(same));\n            }\n            tiles::sync_warp();",
             "before + tiles::count_bits(same));\n            }\n"),
    # Ties, NaN, masks.
    Mutation("ties to the later tile", _FORWARD, "!(highest <= best.value)", "!(highest < best.value)"),
    Mutation("ties to the later lane", _FORWARD, "tie ? b.position < a.position", "tie ? b.position > a.position"),
    Mutation("ties to the later column", _FORWARD, "== highest) column =", "== highest && column == 0) column ="),
    Mutation("NaN gives way", _FORWARD, "bool better = best.value == best.value && ", "bool better = "),
    Mutation("NaN has no place", _FORWARD, "if (x != x) column", "if (x > x) column"),
    Mutation("NaN of another lane is dropped", _FORWARD, "(b_nan || b.value > a.value)", "(b.value > a.value)"),
    Mutation("NaN is dropped", _FORWARD, "best.value = tiles::maximum_or_nan(best.value, highest)",
             "best.value = tiles::larger(best.value, highest)"),
    Mutation("NaN is dropped within a tile", _FORWARD, "highest = tiles::maximum_or_nan(highest, ",
             "highest = tiles::larger(highest, "),
    Mutation("maxima start at zero", _FORWARD, "{-tiles::kInfinity, 0}", "{0.0f, 0}"),
    Mutation("maxima go on from document to document", _FORWARD, "if (reading.first == 0) {", "if (reading.first == 0 && reading.number == from) {"),
    Mutation("similarities go on from tile to tile", _FORWARD, "if (reading.chunk == 0) {", "if (reading.chunk == 0 && reading.first == 0) {"),
    Mutation("a place past the end is the next token", _FORWARD, "tiles::smaller(walk.first + i, d.length - 1)", "walk.first + i"),
    Mutation("a place past the end is the first token", _FORWARD, "tiles::smaller(walk.first + i, d.length - 1)",
             "(walk.first + i < d.length ? walk.first + i : 0)"),
    Mutation("query mask is not looked at", _FORWARD, "row.inside && query_token_counts(p.problem, row.query, row.token)", "row.inside"),
    Mutation("excluded rows take part", _FORWARD, "kRowCountsAt).read(row) == 0) return 0.0f;", "kRowCountsAt).read(row) == 0 && false) return 0.0f;"),
    Mutation("documents are not masked", _PLAN, "if (p.document_mask != nullptr) {", "if (p.document_mask != nullptr && p.documents_per_query < 0) {"),
    Mutation("winner among kept tokens, not in the document", _FORWARD, "won ? position_of(d, best.position)", "won ? best.position"),
    Mutation("kept length of another document", _FORWARD, "p.kept_lengths + document_number(p.problem, tile.first_query, number)",
             "p.kept_lengths + number"),
    Mutation("empty document wins", _FORWARD, "bool won = !empty && ", "bool won = "),
    Mutation("empty document scores what was there", _FORWARD, "if (inside && !empty && !too_long) {", "if (inside && !too_long) {"),
    Mutation("longer documents pass", _FORWARD, "d.text.length > problem.max_length", "d.length < 0"),
    # Index arithmetic.
    Mutation("first token of a warp", _FORWARD, "first + first_token() + column", "first + column"),
    Mutation("column of a lane", _FORWARD, "+ column + tiles::accumulator_column(0)", "+ column"),
    Mutation("row of a lane", _FORWARD, "base + m * 16 + tiles::accumulator_row(2 * half)", "base + m * 16 + tiles::accumulator_row(0)"),
    Mutation("rows past a query's end", _FORWARD, "segment < p.queries_per_tile && query < p.problem.query_count", "query < p.problem.query_count"),
    Mutation("a query too far", _FORWARD, "{query, place - segment * p.query_length.divisor(),\n                segment < p.queries_per_tile && query < p.problem.query_count}",
             "{query, place - segment * p.query_length.divisor(),\n                segment < p.queries_per_tile && query <= p.problem.query_count}"),
    Mutation("a long query's second tile sums the first one's rows", _FORWARD, "p.query_length.divisor() - tile.chunk * kRows, kRows", "p.query_length.divisor(), kRows"),
    Mutation("parts overwrite each other", _FORWARD, "(tile.chunk * problem.query_count + query)", "(query)"),
    Mutation("queries of a run's next tile", _FORWARD, "tile.number / p.row_chunks * p.queries_per_tile", "tile.number * p.queries_per_tile"),
    Mutation("a document too far", _FORWARD, "tiles::smaller(from + p.documents_per_block, p.problem.documents_per_query)", "from + p.documents_per_block"),
    Mutation("a column too far", _FORWARD, "int(p.problem.dimension) - first, p.whole_documents", "int(p.problem.dimension) + 1 - first, p.whole_documents"),
    Mutation("the same chunk again", _FORWARD, "p.problem.document_token_stride + first; }", "p.problem.document_token_stride; }"),
    Mutation("the query's first chunk again", _FORWARD, "query_tile(stage, reading.chunk)", "query_tile(stage, 0)"),
    Mutation("chunks of the query too early", _FORWARD, "if (kWalk) fill_queries(p, tile, query_tile(stage, 0), walk.chunk)",
             "if (kWalk && walk.first == 0) fill_queries(p, tile, query_tile(stage, 0), walk.chunk)"),
    Mutation("norms of another stage", _FORWARD, "scale_columns(s, stage)", "scale_columns(s, 0)"),
    Mutation("norms at every other column", _FORWARD, "first_token() + n * 8 + tiles::accumulator_column(i)", "first_token() + n * 8 + tiles::accumulator_column(0)"),
    Mutation("norms of a row forgotten", _FORWARD, "if (counts && p.out.query_scales != nullptr)", "if (!counts && p.out.query_scales != nullptr)"),
    Mutation("weights forgotten", _FORWARD, "counts ? query_weight(p.problem, row.query, row.token) : 0.0f", "1.0f"),
    Mutation("aligned where it is not", "maxsim/sm80_common.h", "multiples(bytes / int(sizeof(Element)), strides)", "true"),
    Mutation("candidates share the first query's documents", _ROWS, "(p.candidates ? query * p.document_query_stride : 0)", "0"),
    Mutation("Kept tokens a bit too few", _PREPARE, "votes & ((1u << tiles::lane()) - 1)", "votes & ((1u << tiles::lane()) / 2)"),
    Mutation("norms under the floor", _ROWS, "tiles::maximum_or_nan(sqrtf(squares), kNormFloor)", "sqrtf(squares)"),
    Mutation("a part too few", _PREPARE, "part < p.part_count; ++part) sum", "part < p.part_count - 1; ++part) sum"),
    # Gradients.
    Mutation("a winner that nobody is", _QUERIES, "won = winner != p.in.code.none", "won = winner >= 0"),
    Mutation("unmasked queries only", _QUERIES, "p.in.code.marked || query_token_counts(problem, query, token)", "true"),
    Mutation("emptied documents give their first token", _QUERIES, "tiles::load(p.kept_lengths + document_number(problem, query, document)) > 0", "true"),
    Mutation("norms of winners forgotten", _QUERIES, "factor *= tiles::load(p.in.document_scales + text.place + winner)", "factor *= 1.0f"),
    Mutation("norm of the document's first token", _QUERIES, "text.place + winner", "text.place"),
    Mutation("unused maxima send zero times infinity", _QUERIES, "won = factor != 0.0f", "won = true"),
    Mutation("splits leave a gap", _QUERIES, "from + p.documents_per_split, problem", "from + p.documents_per_split - 1, problem"),
    Mutation("a row's end for every chunk", _QUERIES, "} else if (p.grad_weights == nullptr && p.in.query_scales == nullptr) {", "} else if (false) {"),
    Mutation("rows under way are added twice", _GATHER, "            if (taken != 0) add(", "            if (true) add("),
    Mutation("one row for all", _GATHER, "tiles::shuffle(place, tiles::larger(tiles::lowest_bit(left), 0))", "tiles::shuffle(place, 0)"),
    Mutation("the Jacobian without its projection", _GATHER, "(sum.value[i] - unit.value[i] * scale * along) * scale", "sum.value[i] * scale"),
    Mutation("the Jacobian without its scale", _GATHER, "(sum.value[i] - unit.value[i] * scale * along) * scale", "(sum.value[i] - unit.value[i] * scale * along)"),
    Mutation("a projection under the floor", _GATHER, "scale >= kFloorScale ? 0.0f : dot", "dot"),
    Mutation("d(weight) of whatever an excluded row holds", _GATHER, "if (sum.value[i] != 0.0f) dot", "dot"),
    Mutation("excluded rows take their weight", _GATHER, "sum.value[i] == 0.0f ? 0.0f : sum.value[i] * weight", "sum.value[i] * weight"),
    Mutation("still rows move", _GATHER, "still ? 0.0f :", "false ? 0.0f :"),
    Mutation("parts of another row", _GATHER, "(part * count + number)", "(number)"),
    Mutation("notes out of order", _DOCUMENTS, "found + tiles::count_bits(hits & lanes_before())", "found + tiles::count_bits(hits) - 1 - tiles::count_bits(hits & lanes_before())"),
    Mutation("ranks of another lane", _DOCUMENTS, "int rank = tiles::count_bits(same & lanes_before())", "int rank = tiles::count_bits(same & lanes_before() >> 1)"),
    Mutation("a bit of the token ignored", _DOCUMENTS, "for (int bit = 0; bit < kTokenBits; ++bit)", "for (int bit = 1; bit < kTokenBits; ++bit)"),
    Mutation("a token too far", _DOCUMENTS, "token < 0 || token >= kTokens", "token < 0 || token > kTokens"),
    Mutation("a token too few", _DOCUMENTS, "token < 0 || token >= kTokens", "token < 0 || token >= kTokens - 1"),
    Mutation("nobody wins the last position", _DOCUMENTS, "p.in.code.marked ? winner == p.in.code.none", "true ? winner == p.in.code.none"),
    Mutation("excluded queries win", _DOCUMENTS, ": !query_token_counts(p.problem, q.query, q.token)", ": false"),
    Mutation("emptied documents receive", _DOCUMENTS, "tiles::load(p.kept_lengths + number) == 0", "false"),
    Mutation("unused maxima receive", _DOCUMENTS, "if (p.in.rule.rule != Rule::tokens) return true;", "if (true) return true;"),
    Mutation("only the first scan", _DOCUMENTS, "scan_start < tile.row_count; scan_start += kScan", "scan_start < tile.row_count && scan_start < kScan; scan_start += kScan"),
    Mutation("the scan's place forgotten", _DOCUMENTS, "query_token(p, tile, scan_start + row_of(note))", "query_token(p, tile, row_of(note))"),
    Mutation("rows past the last query", _DOCUMENTS, "scan_start + place < tile.row_count && ", ""),
    Mutation("heads are forgotten", _DOCUMENTS, "for (int warp = 1; warp < kWarps; ++warp) {\n                int token = head", "for (int warp = 2; warp < kWarps; ++warp) {\n                int token = head"),
    Mutation("heads of the scan before", _DOCUMENTS, "if (tiles::lane() == 0) head_tokens().write(tiles::warp(), -1);", ""),
    Mutation("two warps add to one token", _DOCUMENTS, "begin > 0 && token_of(sorted().read(begin - 1)) == token", "false"),
    Mutation("a warp's sums go on", _DOCUMENTS, "            sum = Slice<kPerLane>{};\n            shared = false;", "            shared = false;"),
    Mutation("every sum is a head", _DOCUMENTS, "            shared = false;\n", ""),
    Mutation("weights forgotten in d(documents)", _DOCUMENTS, "if (problem.query_weights != nullptr) factor", "if (false) factor"),
    Mutation("norms forgotten in d(documents)", _DOCUMENTS, "if (p.in.query_scales != nullptr) {", "if (false) {"),
    Mutation("a packed document's tiles once", _DOCUMENTS, "from < tile.text.length; from += step", "from < tile.text.length; from += tile.text.length"),
    Mutation("tokens past the document's end", _DOCUMENTS, "tiles::smaller(tile.text.length - tile.first_token, kTokens)", "kTokens"),
    Mutation("columns of the first chunk", _DOCUMENTS, "first - tile.first_column + i", "first % kDimension / 2 * 2 + i - tile.first_column * 0"),
    Mutation("tokens behind the last document forgotten", _PREPARE, "for (int64_t i = from + own; ", "for (int64_t i = from + step + own; "),
    Mutation("tokens before the first document forgotten", _PREPARE, "i < before; i += step", "i < 0; i += step"),
]  # fmt: skip


def noticed_by(module: ModuleType) -> str | None:
    """The first probe that fails on these kernels, and how; None if all pass."""
    import maxsim_calls
    import maxsim_probes
    import pytest

    todo = {name: (lambda dtype, n=name, m=masked: maxsim_probes.shape(n, dtype, m))
            for masked in (True, False) for name in maxsim_probes.SHAPES}  # fmt: skip
    maxsim_calls.kernels = module
    try:
        with maxsim_calls.in_place_of_triton(pytest.MonkeyPatch()):
            for name, probe in {**maxsim_probes.PROBES, **todo}.items():
                try:
                    probe(DTYPE)
                except (AssertionError, module.Violation) as error:
                    return f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}"
    finally:
        maxsim_calls.kernels = None
    return None


def main(names: list[str]) -> int:
    survivors = []
    with tempfile.TemporaryDirectory() as directory:
        workshop = Workshop(Path(directory) / "workshop", SOURCES, EXTRA)
        found = noticed_by(workshop.module())
        print(f"without a bug: {found or 'nothing noticed'}", flush=True)
        for mutation in MUTATIONS:
            if names and not any(name in mutation.name for name in names):
                continue
            found = noticed_by(workshop.module(mutation))
            print(f"{mutation.name}: {found or 'SURVIVED'}", flush=True)
            survivors += [] if found else [mutation.name]
    print(f"{len(MUTATIONS)} bugs, {len(survivors)} survived")
    return 1 if survivors else 0


if __name__ == "__main__":
    tests = Path(__file__).parents[1]
    sys.path[:0] = [str(tests / "kernels"), str(tests), str(tests.parent)]
    sys.exit(main(sys.argv[1:]))
