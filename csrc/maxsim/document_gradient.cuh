// d(documents): a block owns a tile of a document's tokens, whose sums it keeps in shared memory in float. It looks
// through the winners of all query tokens in scans: notes those that lie in its tile, sorts them by token (stably, so
// that the order is that of the query tokens), and its warps share the sorted list evenly, however many one token has
// won. A warp adds the query rows of each token in order; of a token that two warps share, the later warp's sum is
// added afterwards, in the warps' order. No atomics. Derivation: docs/maxsim-backward.md.
#pragma once

#include "document_tile.cuh"
#include "tile_sizes.h"

namespace jmlr::maxsim {

// kDimension: columns that a block holds, see gradient_dimension.
template <class Element, int kDimension>
struct DocumentGradient {
    static constexpr DocumentGradientTiles kTiles = document_gradient_tiles(kDimension);
    static constexpr int kWarps = kTiles.warps;
    static constexpr int kThreads = kWarps * tiles::kWarp;
    static constexpr int kMinBlocks = kTiles.min_blocks;
    static constexpr int kTokens = kTiles.tokens;
    static constexpr int kScan = kTiles.scan;
    static constexpr int kScanPerWarp = kScan / kWarps;
    static constexpr int kPerLane = kDimension / tiles::kWarp;

    struct Params {
        Problem problem;
        BackwardInput in;
        const int32_t* kept_lengths;  // as in QueryGradient
        Element* grad_documents;
        float* wide;  // not null: sums go here, for FinishRows
        Divider query_length;
        int64_t token_tiles;        // blocks that share a document; each takes every token_tiles-th tile
        int chunks;                 // of the embedding
        bool whole_queries, whole;  // slices of queries (documents and sums) are aligned, and fill the embedding
    };

    // A winner in the tile, in 32 bits: the query token's place in the scan, the document token, and among the warp's
    // notes of that token the rank.
    static constexpr int kRowBits = 12, kTokenBits = 7;
    static_assert(kScan <= 1 << kRowBits && kTokens <= 1 << kTokenBits &&
                  kScanPerWarp < 1 << (32 - kRowBits - kTokenBits));
    static JMLR_DEVICE uint32_t note_of(int row, int token, int rank) {
        return uint32_t(row) | uint32_t(token) << kRowBits | uint32_t(rank) << (kRowBits + kTokenBits);
    }
    static JMLR_DEVICE int row_of(uint32_t note) { return int(note & ((1u << kRowBits) - 1)); }
    static JMLR_DEVICE int token_of(uint32_t note) { return int(note >> kRowBits & ((1u << kTokenBits) - 1)); }
    static JMLR_DEVICE int rank_of(uint32_t note) { return int(note >> (kRowBits + kTokenBits)); }

    // Shared memory, in bytes.
    static constexpr int kSumsAt = 0;                                         // [tokens][dimension]
    static constexpr int kHeadsAt = kSumsAt + kTokens * kDimension * 4;       // [warps][dimension]
    static constexpr int kHeadTokensAt = kHeadsAt + kWarps * kDimension * 4;  // [warps], -1: none
    static constexpr int kNotesAt = kHeadTokensAt + kWarps * 4;               // [warps][scan / warps]
    static constexpr int kSortedAt = kNotesAt + kScan * 4;                    // [scan]
    static constexpr int kCountsAt = kSortedAt + kScan * 4;                   // [warps][tokens], then where they start
    static constexpr int kTotalsAt = kCountsAt + kWarps * kTokens * 4;        // [tokens], then their sum
    static constexpr int kSharedBytes = kTotalsAt + (kTokens + 1) * 4;
    static_assert(kSharedBytes <= bytes_of(tiles::SharedMemory::small));

    static JMLR_DEVICE tiles::Shared<float> sums() { return tiles::shared_memory<float>(kSumsAt); }
    static JMLR_DEVICE tiles::Shared<float> head(int warp) {
        return tiles::shared_memory<float>(kHeadsAt) + warp * kDimension;
    }
    static JMLR_DEVICE tiles::Shared<int> head_tokens() { return tiles::shared_memory<int>(kHeadTokensAt); }
    static JMLR_DEVICE tiles::Shared<uint32_t> notes(int warp) {
        return tiles::shared_memory<uint32_t>(kNotesAt) + warp * kScanPerWarp;
    }
    static JMLR_DEVICE tiles::Shared<uint32_t> sorted() { return tiles::shared_memory<uint32_t>(kSortedAt); }
    static JMLR_DEVICE tiles::Shared<int> counts(int warp) {
        return tiles::shared_memory<int>(kCountsAt) + warp * kTokens;
    }
    static JMLR_DEVICE tiles::Shared<int> totals() { return tiles::shared_memory<int>(kTotalsAt); }

    static JMLR_DEVICE uint32_t lanes_before() { return (1u << tiles::lane()) - 1; }

    using Tile = DocumentTile<Element>;

    // Whether a query token's winner lies in the tile; then the document token, counted from the tile's first.
    static JMLR_DEVICE bool wins_here(const Params& p, const Tile& tile, int row, int& token) {
        QueryToken q = query_token(p, tile, row);
        token = load_winner(p.in.winners, p.in.code.type, winner_place(p, tile, q)) - tile.first_token;
        return lies_in_tile(p, tile, q, token, kTokens);
    }

    // The warp's part of a scan: notes of the winners in the tile, in order. Returns how many.
    static JMLR_DEVICE int note_winners(const Params& p, const Tile& tile, int scan_start) {
        int warp = tiles::warp();
        tiles::Shared<uint32_t> own = notes(warp);
        int found = 0;
        for (int i = 0; i < kScanPerWarp; i += tiles::kWarp) {
            int place = warp * kScanPerWarp + i + tiles::lane(), token = 0;
            bool hit = scan_start + place < tile.row_count && wins_here(p, tile, scan_start + place, token);
            uint32_t hits = tiles::ballot(hit);
            if (hit) own.write(found + tiles::count_bits(hits & lanes_before()), note_of(place, token, 0));
            found += tiles::count_bits(hits);
        }
        return found;
    }

    // How many of the warp's notes each token has, and the rank of each note among them.
    static JMLR_DEVICE void rank_notes(int found) {
        tiles::Shared<uint32_t> own = notes(tiles::warp());
        tiles::Shared<int> own_counts = counts(tiles::warp());
        for (int token = tiles::lane(); token < kTokens; token += tiles::kWarp) own_counts.write(token, 0);
        tiles::sync_warp();  // of the notes too
        for (int first = 0; first < found; first += tiles::kWarp) {
            bool inside = first + tiles::lane() < found;
            uint32_t note = inside ? own.read(first + tiles::lane()) : 0;
            int token = token_of(note);
            uint32_t same = tiles::ballot(inside);  // lanes with the same token
            JMLR_UNROLL
            for (int bit = 0; bit < kTokenBits; ++bit) {
                bool set = token >> bit & 1;
                uint32_t votes = tiles::ballot(set);
                same &= set ? votes : ~votes;
            }
            int rank = tiles::count_bits(same & lanes_before());
            int before = inside ? own_counts.read(token) : 0;
            tiles::sync_warp();
            if (inside) {
                own.write(first + tiles::lane(), note_of(row_of(note), token, before + rank));
                if (rank == 0) own_counts.write(token, before + tiles::count_bits(same));
            }
            tiles::sync_warp();
        }
    }

    // From counts to where each warp's notes of each token start in the sorted list.
    static JMLR_DEVICE void place_notes() {
        tiles::sync_block();
        int token = tiles::thread_index();
        if (token < kTokens) {
            int total = 0;
            for (int warp = 0; warp < kWarps; ++warp) total += counts(warp).read(token);
            totals().write(token, total);
        }
        tiles::sync_block();
        if (token <= kTokens) {
            int start = 0;
            for (int other = 0; other < token; ++other) start += totals().read(other);
            for (int warp = 0; warp < kWarps && token < kTokens; ++warp) {
                int count = counts(warp).read(token);
                counts(warp).write(token, start);
                start += count;
            }
            if (token == kTokens) totals().write(kTokens, start);
        }
        tiles::sync_block();
    }

    static JMLR_DEVICE void sort_notes(int found) {
        tiles::Shared<uint32_t> own = notes(tiles::warp());
        tiles::Shared<int> starts = counts(tiles::warp());
        for (int i = tiles::lane(); i < found; i += tiles::kWarp) {
            uint32_t note = own.read(i);
            sorted().write(starts.read(token_of(note)) + rank_of(note), note);
        }
        tiles::sync_block();
    }

    // The warp's share of the sorted list: its rows, times their gradients, into the sums of their tokens.
    static JMLR_DEVICE void add_rows(const Params& p, const Tile& tile, int scan_start, int total) {
        const Problem& problem = p.problem;
        int warp = tiles::warp(), begin = total * warp / kWarps, end = total * (warp + 1) / kWarps;
        if (tiles::lane() == 0) head_tokens().write(warp, -1);
        tiles::sync_warp();
        if (begin == end) return;
        int token = token_of(sorted().read(begin));
        bool shared = begin > 0 && token_of(sorted().read(begin - 1)) == token;  // the warp before has begun it
        int column = tiles::lane() * kPerLane, first = tile.first_column + column;
        Slice<kPerLane> sum{};
        auto flush = [&] {
            if (shared && tiles::lane() == 0) head_tokens().write(warp, token);
            tiles::Shared<float> to = shared ? head(warp) + column : sums() + (token * kDimension + column);
            JMLR_UNROLL
            for (int i = 0; i < kPerLane; ++i) to.write(i, shared ? sum.value[i] : to.read(i) + sum.value[i]);
            sum = Slice<kPerLane>{};
            shared = false;
        };
        for (int i = begin; i < end; i += tiles::kWarp) {
            bool inside = i + tiles::lane() < end;
            int64_t place = 0;
            float factor = 0.0f;
            int own_token = 0;
            if (inside) {
                uint32_t note = sorted().read(i + tiles::lane());
                own_token = token_of(note);
                QueryToken q = query_token(p, tile, scan_start + row_of(note));
                place = q.query * problem.query_stride + q.token * problem.query_token_stride;
                factor = row_factor(p, q, score_gradient(p.in.rule, problem, q.query, tile.document, q.token));
            }
            uint32_t taken = tiles::ballot(inside);
            auto add = [&](int entry, const Slice<kPerLane>& row) {
                int next = tiles::shuffle(own_token, entry);
                if (next != token) {
                    flush();
                    token = next;
                }
                add_scaled(sum, tiles::shuffle(factor, entry), row);
            };
            const Element* base = static_cast<const Element*>(problem.queries);
            int columns = int(problem.dimension);
            if (p.whole_queries) for_each_row<true, kPerLane>(base, place, taken, first, columns, add);
            else for_each_row<false, kPerLane>(base, place, taken, first, columns, add);
        }
        flush();
    }

    // What later warps have of tokens that an earlier one began, in the warps' order.
    static JMLR_DEVICE void add_heads() {
        tiles::sync_block();
        for (int column = tiles::thread_index(); column < kDimension; column += kThreads) {
            for (int warp = 1; warp < kWarps; ++warp) {
                int token = head_tokens().read(warp);
                if (token < 0) continue;
                int to = token * kDimension + column;
                sums().write(to, sums().read(to) + head(warp).read(column));
            }
        }
    }

    static JMLR_DEVICE void write_tile(const Params& p, const Tile& tile) {
        const Problem& problem = p.problem;
        int last = tiles::smaller(tile.text.length - tile.first_token, kTokens);
        for (int token = tiles::warp(); token < last; token += kWarps) {
            int64_t place = tile.text.place + tile.first_token + token;
            auto total = [&](int first) {
                Slice<kPerLane> sum;
                JMLR_UNROLL
                for (int i = 0; i < kPerLane; ++i)
                    sum.value[i] = sums().read(token * kDimension + first - tile.first_column + i);
                return sum;
            };
            int columns = int(problem.dimension), first = tile.first_column + tiles::lane() * kPerLane;
            if (p.wide != nullptr) {
                store_slice(p.wide + place * columns, first, columns, p.whole, total(first));
            } else if (p.in.document_scales == nullptr) {
                store_slice(p.grad_documents + place * columns, first, columns, p.whole, total(first));
            } else {
                RowEnd<Element, Element, kPerLane> end{};
                end.row = tile.text.first + (tile.first_token + token) * problem.document_token_stride;
                end.whole = p.whole;
                end.normalized = true;
                end.scale = tiles::load(p.in.document_scales + place);
                end.out = p.grad_documents + place * columns;
                end.finish(columns, total);
            }
        }
    }

    static JMLR_DEVICE void run(const Params& p) {
        int64_t task = tiles::block_index();
        int64_t number = task / p.chunks / p.token_tiles;
        Tile tile = tile_of_document<Element>(p, number, int(task % p.chunks) * kDimension);

        int64_t step = p.token_tiles * kTokens;
        for (int64_t from = task / p.chunks % p.token_tiles * kTokens; from < tile.text.length; from += step) {
            tile.first_token = int(from);
            tiles::sync_block();
            for (int i = tiles::thread_index(); i < kTokens * kDimension; i += kThreads) sums().write(i, 0.0f);
            for (int scan_start = 0; scan_start < tile.row_count; scan_start += kScan) {
                int found = note_winners(p, tile, scan_start);
                rank_notes(found);
                place_notes();
                sort_notes(found);
                add_rows(p, tile, scan_start, totals().read(kTokens));
                add_heads();
            }
            tiles::sync_block();
            write_tile(p, tile);
        }
    }
};

}  // namespace jmlr::maxsim
