// d(documents) where all query tokens that meet a document fit one list: a block sorts the winners of all of them by
// document token, once, and every token's sum stays in registers until it is complete. Nothing is kept in float but
// what two groups of lanes have of a token between them. No atomics: the order of every sum follows from the list
// alone. Derivation, and why it needs no more of compute capability 9.0 than its shared memory:
// docs/maxsim-backward.md.
#pragma once

#include "document_tile.cuh"
#include "sm90_backward_tiles.h"

namespace jmlr::maxsim::sm90 {

// kDimension: columns that a block holds, see gradient_dimension. kNormalized: sums pass the norm's Jacobian, which
// takes more registers.
template <class Element, int kDimension, bool kNormalized>
struct SortedDocumentGradient {
    static constexpr BackwardTiles kTiles = backward_tiles(int(sizeof(Element)), kDimension, kNormalized);
    static constexpr int kWarps = kTiles.warps;
    static constexpr int kThreads = kTiles.threads();
    static constexpr int kTokens = kTiles.tokens;
    static constexpr int kRows = kTiles.rows;
    static constexpr int kSteps = 8;  // query tokens that a lane looks at a time
    static constexpr int kLanes = gradient_lanes(int(sizeof(Element)), kDimension);
    static constexpr int kPerLane = kDimension / kLanes;
    static constexpr int kGroups = kThreads / kLanes;  // each adds up a part of the list
    static_assert(kRows <= 1 << 16 && kTokens <= kThreads && kTokens <= 1 << 16);

    struct Params {
        Problem problem;
        BackwardInput in;
        const int32_t* kept_lengths;  // as in QueryGradient
        Element* grad_documents;
        float* wide;  // not null: sums go here, for FinishRows
        Divider query_length;
        int64_t token_tiles;        // blocks that share a document; each takes every token_tiles-th tile
        int tile_tokens;            // up to kTokens
        int chunks;                 // of the embedding
        bool whole_queries, whole;  // as in DocumentGradient; both must hold
    };
    using Tile = DocumentTile<Element>;

    // Shared memory, in bytes.
    static constexpr int kHeadsAt = 0;                                         // [groups][dimension]
    static constexpr int kHeadTokensAt = kHeadsAt + kGroups * kDimension * 4;  // [groups]
    static constexpr int kFirstsAt = kHeadTokensAt + kGroups * 4;              // [tokens + 1]
    static constexpr int kWarpTotalsAt = kFirstsAt + (kTokens + 1) * 4;        // [warps]
    static constexpr int kGradientsAt = kWarpTotalsAt + kWarps * 4;            // [queries]
    static constexpr int kCountsAt = kGradientsAt + kTiles.gradients * 4;      // [warps][tokens], then where they start
    static constexpr int kSortedAt = kCountsAt + kWarps * kTokens * 2;         // [rows]
    static constexpr int kSharedBytes = kSortedAt + kRows * 2;
    static_assert(kTiles.min_blocks * (kSharedBytes + 1024) <= tiles::kSharedOfHopper + 1024);

    static JMLR_DEVICE tiles::Shared<float> head(int group) {
        return tiles::shared_memory<float>(kHeadsAt) + group * kDimension;
    }
    // The token of a group's head: what it has of a token that an earlier group began.
    static constexpr int kNoHead = -1, kNoRows = -2;
    static JMLR_DEVICE tiles::Shared<int> head_tokens() { return tiles::shared_memory<int>(kHeadTokensAt); }
    static JMLR_DEVICE tiles::Shared<int> firsts() { return tiles::shared_memory<int>(kFirstsAt); }
    static JMLR_DEVICE tiles::Shared<int> warp_totals() { return tiles::shared_memory<int>(kWarpTotalsAt); }
    static JMLR_DEVICE tiles::Shared<float> gradients() { return tiles::shared_memory<float>(kGradientsAt); }
    static JMLR_DEVICE tiles::Shared<uint16_t> counts(int warp) {
        return tiles::shared_memory<uint16_t>(kCountsAt) + warp * kTokens;
    }
    static JMLR_DEVICE tiles::Shared<uint16_t> sorted() { return tiles::shared_memory<uint16_t>(kSortedAt); }

    static JMLR_DEVICE uint32_t lanes_before() { return (1u << tiles::lane()) - 1; }

    // Winners of a lane's query tokens, a warp's width apart, from `first_row` on: all under way at a time.
    template <class Winner>
    static JMLR_DEVICE void load_winners(const Params& p, const Tile& tile, int first_row, int (&winners)[kSteps]) {
        JMLR_UNROLL
        for (int i = 0; i < kSteps; ++i) {
            int row = first_row + i * tiles::kWarp;
            winners[i] = -1;
            if (row < tile.row_count) {
                int64_t place = winner_place(p, tile, query_token(p, tile, row));
                winners[i] = int(tiles::load(static_cast<const Winner*>(p.in.winners) + place));
            }
        }
    }

    // The warp's share of the query tokens, in order. `counts(warp)` grows by the winners of each token; `placed`:
    // it begins with the places of the list where they go.
    static JMLR_DEVICE void walk_winners(const Params& p, const Tile& tile, int tokens, bool placed) {
        tiles::Shared<uint16_t> own = counts(tiles::warp());
        const int share = tiles::ceil_div(tile.row_count, kThreads) * tiles::kWarp, begin = tiles::warp() * share;
        for (int first = 0; first < share; first += kSteps * tiles::kWarp) {
            int winners[kSteps], first_row = begin + first + tiles::lane();
            if (p.in.code.type == WinnerType::uint8) load_winners<uint8_t>(p, tile, first_row, winners);
            else if (p.in.code.type == WinnerType::uint16) load_winners<uint16_t>(p, tile, first_row, winners);
            else load_winners<int32_t>(p, tile, first_row, winners);
            JMLR_UNROLL
            for (int i = 0; i < kSteps; ++i) {
                if (first + i * tiles::kWarp >= share) break;
                int row = first_row + i * tiles::kWarp, token = winners[i] - tile.first_token;
                bool hit = lies_in_tile(p, tile, query_token(p, tile, row), token, tokens);
                count_winner(own, hit, token, tokens, placed, row);
            }
        }
    }

    // Lanes with the same token find each other by their votes on its bits.
    static JMLR_DEVICE void count_winner(tiles::Shared<uint16_t> own, bool hit, int token, int tokens, bool placed,
                                         int row) {
        uint32_t same = tiles::ballot(hit);
        for (int bit = 1; bit < tokens; bit *= 2) {
            bool set = (token & bit) != 0;
            uint32_t votes = tiles::ballot(set);
            same &= set ? votes : ~votes;
        }
        int rank = tiles::count_bits(same & lanes_before()), before = hit ? own.read(token) : 0;
        tiles::sync_warp();
        if (hit && rank == 0) own.write(token, uint16_t(before + tiles::count_bits(same)));
        if (hit && placed) sorted().write(before + rank, uint16_t(row));
        tiles::sync_warp();
    }

    static JMLR_DEVICE void sort_winners(const Params& p, const Tile& tile, int tokens) {
        tiles::Shared<uint16_t> own = counts(tiles::warp());
        for (int token = tiles::lane(); token < tokens; token += tiles::kWarp) own.write(token, 0);
        tiles::sync_warp();
        JMLR_UNROLL_BY(1)
        for (int pass = 0; pass < 2; ++pass) {
            walk_winners(p, tile, tokens, pass == 1);
            if (pass == 0) place_tokens(tokens);
        }
        tiles::sync_block();
    }

    // A sum over the lanes up to this one.
    static JMLR_DEVICE int running_sum(int x) {
        JMLR_UNROLL
        for (int step = 1; step < tiles::kWarp; step *= 2) {
            int other = tiles::shuffle(x, tiles::larger(tiles::lane() - step, 0));
            if (tiles::lane() >= step) x += other;
        }
        return x;
    }

    // From counts to where the winners of each token start in the list, and each warp's among them.
    static JMLR_DEVICE void place_tokens(int tokens) {
        tiles::sync_block();
        const int token = tiles::thread_index(), own_warp = tiles::warp();
        int total = 0;
        if (token < tokens) {
            JMLR_UNROLL
            for (int warp = 0; warp < kWarps; ++warp) total += counts(warp).read(token);
        }
        int up_to = running_sum(total);
        if (tiles::lane() == tiles::kWarp - 1) warp_totals().write(own_warp, up_to);
        tiles::sync_block();
        int start = up_to - total;
        for (int warp = 0; warp < own_warp; ++warp) start += warp_totals().read(warp);
        if (token < tokens) {
            firsts().write(token, start);
            if (token == tokens - 1) firsts().write(tokens, start + total);
            JMLR_UNROLL
            for (int warp = 0; warp < kWarps; ++warp) {
                int count = counts(warp).read(token);
                counts(warp).write(token, uint16_t(start));
                start += count;
            }
        }
        tiles::sync_block();
    }

    // d(score) of the document and every query, computed once and not for every query token.
    static JMLR_DEVICE void keep_gradients(const Params& p, const Tile& tile) {
        if (p.in.rule.rule == Rule::tokens) return;
        int queries = p.problem.candidates ? 1 : int(p.problem.query_count);
        for (int i = tiles::thread_index(); i < queries; i += kThreads)
            gradients().write(i, score_gradient(p.in.rule, p.problem, tile.first_query + i, tile.document, 0));
    }
    static JMLR_DEVICE float gradient_of(const Params& p, const Tile& tile, QueryToken q) {
        if (p.in.rule.rule == Rule::tokens)
            return maximum_gradient(p.in.rule, p.problem, q.query, tile.document, q.token);
        return gradients().read(int(q.query - tile.first_query));
    }

    // The sums of a group of lanes, each a slice; `token`: whose, -1 before the first.
    struct Sums {
        Slice<kPerLane> slice{};
        int token, left;  // of its rows in the list
        bool head;        // an earlier group began it
    };

    // The token of a place in the list.
    static JMLR_DEVICE int token_at(int place, int tokens) {
        int low = 0, high = tokens - 1;
        while (low < high) {
            int middle = (low + high + 1) / 2;
            if (firsts().read(middle) <= place) low = middle;
            else high = middle - 1;
        }
        return low;
    }

    static JMLR_DEVICE int first_column(const Tile& tile) {
        return tile.first_column + tiles::lane() % kLanes * kPerLane;
    }

    // Complete sums to memory, of the groups for which `active`; all lanes call.
    static JMLR_DEVICE void write_token(const Params& p, const Tile& tile, int token, bool active,
                                        const Slice<kPerLane>& sum) {
        int64_t place = tile.text.place + tile.first_token + token;
        int columns = int(p.problem.dimension), first = first_column(tile);
        if (p.wide != nullptr) {
            if (active && first < columns) store_whole(p.wide + place * columns + first, sum);
        } else if constexpr (!kNormalized) {
            if (active && first < columns) store_whole(p.grad_documents + place * columns + first, sum);
        } else {
            RowEnd<Element, Element, kPerLane, kLanes> end{};
            end.row = tile.text.first + (tile.first_token + token) * p.problem.document_token_stride;
            end.whole = true;
            end.normalized = true;
            end.scale = active ? tiles::load(p.in.document_scales + place) : 0.0f;
            end.out = p.grad_documents + place * columns;
            end.finish(active ? columns : 0, [&](int) { return sum; });
        }
    }

    static JMLR_DEVICE void write_head(int group, const Sums& sums) {
        int column = tiles::lane() % kLanes * kPerLane;
        JMLR_UNROLL
        for (int i = 0; i < kPerLane; ++i) head(group).write(column + i, sums.slice.value[i]);
        if (tiles::lane() % kLanes == 0) head_tokens().write(group, sums.token);
    }

    // The group's part of the list: its rows, times their gradients, into the sums of their tokens.
    static JMLR_DEVICE void add_rows(const Params& p, const Tile& tile, int tokens) {
        const Problem& problem = p.problem;
        const int total = firsts().read(tokens), group = tiles::thread_index() / kLanes;
        const int begin = total * group / kGroups, end = total * (group + 1) / kGroups;
        const int longest = tiles::ceil_div(total, kGroups);
        Sums sums;
        sums.token = begin < end ? token_at(begin, tokens) : 0;
        sums.left = begin < end ? firsts().read(sums.token + 1) - begin : 1;
        sums.head = begin < end && firsts().read(sums.token) < begin;
        if (tiles::lane() % kLanes == 0) head_tokens().write(group, begin < end ? kNoHead : kNoRows);
        for (int i = 0; i < longest; i += kLanes) {
            const int at = begin + i + tiles::lane() % kLanes;
            bool inside = at < end;
            int64_t place = 0;
            float factor = 0.0f;
            if (inside) {
                QueryToken q = query_token(p, tile, sorted().read(at));
                place = q.query * problem.query_stride + q.token * problem.query_token_stride;
                factor = row_factor(p, q, gradient_of(p, tile, q));
            }
            auto add = [&](int entry, bool taken, const Slice<kPerLane>& row) {
                bool complete = taken && sums.left == 0;
                if (tiles::ballot(complete) != 0) {
                    write_token(p, tile, sums.token, complete && !sums.head, sums.slice);
                    if (complete) {
                        if (sums.head) write_head(group, sums);
                        do ++sums.token, sums.left = firsts().read(sums.token + 1) - firsts().read(sums.token);
                        while (sums.left == 0);
                        sums.slice = Slice<kPerLane>{};
                        sums.head = false;
                    }
                }
                --sums.left;
                add_scaled(sums.slice, tiles::shuffle(factor, entry), row);
            };
            const Element* base = static_cast<const Element*>(problem.queries);
            const int columns = int(problem.dimension), first = first_column(tile);
            constexpr int kUnderWay = kTiles.rows_under_way;
            uint32_t taken = tiles::ballot(inside);
            for_each_row_in_groups<true, kPerLane, kLanes, kUnderWay>(base, place, taken, first, columns, add);
        }
        if (sums.head) write_head(group, sums);
        tiles::sync_block();
        bool last = begin < end && !sums.head;
        if (last) add_heads(group, sums);
        write_token(p, tile, sums.token, last, sums.slice);
    }

    // What later groups have of the token, in their order.
    static JMLR_DEVICE void add_heads(int group, Sums& sums) {
        int column = tiles::lane() % kLanes * kPerLane;
        for (int other = group + 1; other < kGroups; ++other) {
            int token = head_tokens().read(other);
            if (token == kNoRows) continue;
            if (token != sums.token) break;
            JMLR_UNROLL
            for (int i = 0; i < kPerLane; ++i) sums.slice.value[i] += head(other).read(column + i);
        }
    }

    // Tokens that won nothing.
    static JMLR_DEVICE void write_zeros(const Params& p, const Tile& tile, int tokens) {
        const int columns = int(p.problem.dimension), first = first_column(tile);
        for (int token = tiles::thread_index() / kLanes; token < tokens; token += kGroups) {
            if (firsts().read(token) != firsts().read(token + 1)) continue;
            if (first >= columns) continue;
            int64_t place = (tile.text.place + tile.first_token + token) * columns + first;
            if (p.wide != nullptr) store_whole(p.wide + place, Slice<kPerLane>{});
            else store_whole(p.grad_documents + place, Slice<kPerLane>{});
        }
    }

    static JMLR_DEVICE void run_block(const Params& p, int64_t task) {
        Tile tile = tile_of_document<Element>(p, task / p.chunks / p.token_tiles, int(task % p.chunks) * kDimension);
        keep_gradients(p, tile);
        int64_t from = task / p.chunks % p.token_tiles * p.tile_tokens;
        for (; from < tile.text.length; from = tile.first_token + p.token_tiles * p.tile_tokens) {
            tile.first_token = int(from);
            int tokens = tiles::smaller(tile.text.length - tile.first_token, p.tile_tokens);
            sort_winners(p, tile, tokens);
            write_zeros(p, tile, tokens);
            add_rows(p, tile, tokens);
        }
    }
};

}  // namespace jmlr::maxsim::sm90
