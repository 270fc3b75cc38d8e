// Gradients of smooth MaxSim: three matrix products of the forward's size. A document's tokens are cut into pieces; a
// piece meets every panel of query rows that the document meets, which gives the similarities once more, from them the
// shares, and from these what the panel's rows get from the piece and the piece's tokens from the panel:
//
//     dq(r) += sum over t of share(r, t) * d(t)        dd(t) += sum over r of share(r, t) * w(r) * q(r)
//
// A piece's gradient is complete when its panels are through. Those of query rows are not: pieces are dealt out to
// splits, runs of pieces that one task walks in order, each with its own sums, which are added in the order of splits
// at the end. How many splits there are follows from the problem alone, so results do not depend on threads.
// Derivation: docs/maxsim-smooth-and-xtr.md.

#include <algorithm>
#include <limits>
#include <vector>

#include "cpu_panels.h"

namespace jmlr::maxsim::cpu {
namespace {

constexpr int64_t piece_tokens = 96;  // whose rows, sums and shares stay in a second cache
// Clearing and adding a split's sums takes a few percent of what so many tokens take.
constexpr int64_t split_tokens = 384;
constexpr int64_t least_splits = 8;  // of all groups together, so that threads have some,
constexpr int64_t most_splits = 64;
constexpr int64_t most_sums = int64_t{1} << 26;  // floats of all splits' sums, where there are more than the least

// Tokens [first, last) of document j of the group's queries.
struct Piece {
    int64_t j = 0;
    int64_t first = 0;
    int64_t last = 0;
};

struct Split {
    int64_t group = 0;
    int64_t first_piece = 0;
    int64_t last_piece = 0;
    int64_t sums = 0;  // where its sums start
};

// One worker's memory.
struct Worker {
    Scratch<const char*> rows;  // of a piece's kept tokens,
    Scratch<int32_t> kept;      // and their positions within the piece
    Scratch<float> wide;        // the rows in float32, [tokens][dimension]
    Scratch<float> row;         // [columns], zeros behind the dimension
    Scratch<float> right;       // the rows as a product's right side
    Scratch<float> sums;        // their gradients, [tokens][columns]
    Scratch<float> block;       // shares of one panel
    Scratch<float> maxima;      // of its rows
    Scratch<float> factors;
};

void prefetch(const float* memory, int64_t count) {
    for (int64_t k = 0; k < count; k += 16) __builtin_prefetch(memory + k, 0, 2);
}

int64_t rounded_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

class SmoothBackward {
public:
    SmoothBackward(const Problem& problem, const SmoothBackwardInput& input, const SmoothBackwardOutput& output,
                   const Threads& threads)
        : p(problem),
          in(input),
          out(output),
          threads(threads),
          set(instructions()),
          queries(problem, set),
          bytes(element_bytes(problem.type)),
          width(queries.panel_rows()),
          columns(rounded_up(problem.dimension, set.lanes)),
          right_columns(rounded_up(columns, width)),
          exponent_scale(exponent_scale_of(input.temperature)) {}

    void run() {
        clear_tokens_of_no_document(p, out.grad_documents);
        keep_rows();
        pack_queries();
        make_splits();
        Tasks parallel(threads, static_cast<int64_t>(splits.size()), work);
        for (int64_t w = 0; w < parallel.workers; ++w) workers.push_back(make_worker());
        parallel.run([&](int64_t worker, int64_t task) { run_split(splits[task], workers[worker]); });
        Tasks last(threads, p.query_count,
                   queries.row_begin[p.query_count] * columns * static_cast<int64_t>(splits.size()));
        last.run([&](int64_t, int64_t i) { write_query(i); });
    }

private:
    // ---------------------------------------------------------------- queries

    // Rows that count for any document: excluded ones may hold NaN and take no part.
    void keep_rows() {
        std::vector<char> counts(p.query_count * p.query_length, 0);
        const float* maximum = in.maxima;
        for (int64_t i = 0; i < p.query_count; ++i) {
            for (int64_t j = 0; j < p.documents_per_query; ++j) {
                for (int64_t r = 0; r < p.query_length; ++r, ++maximum) {
                    if (*maximum != -infinity) counts[i * p.query_length + r] = 1;
                }
            }
        }
        queries.make_groups(p.candidates ? 1 : p.query_count,
                            [&](int64_t i, int64_t r) { return counts[i * p.query_length + r] != 0; });
    }

    // Panels for the similarities; rows times weights as the right side of the documents' product.
    void pack_queries() {
        const int64_t rows = queries.row_begin[p.query_count];
        weighted = Scratch<float>(rows * right_columns);
        Tasks parallel(threads, p.query_count, p.query_count * p.query_length * p.dimension);
        Scratch<float> scratch(parallel.workers * columns);
        std::fill_n(scratch.get(), parallel.workers * columns, 0.0f);
        parallel.run([&](int64_t worker, int64_t i) {
            const Group& group = group_of(i);
            float* row = scratch.get() + worker * columns;
            for (int64_t k = queries.row_begin[i]; k < queries.row_begin[i + 1]; ++k) {
                const int64_t in_group = k - queries.row_begin[group.first];
                const char* source = query_row(p, i, queries.row_token[k]);
                set.widen(p.type, source, p.dimension, row);
                queries.put(group, in_group, queries.pairs ? source : reinterpret_cast<const char*>(row));
                const float weight = query_weight(p, i, queries.row_token[k]);
                for (int64_t d = 0; d < p.dimension; ++d) row[d] *= weight;
                put_right(row, weighted_rows(group) + in_group * width, group.rows * width);
            }
            if (i + 1 == group.last) queries.clear_rest(group);
        });
    }

    const Group& group_of(int64_t i) const { return queries.groups[p.candidates ? i : 0]; }

    float* weighted_rows(const Group& group) const {
        return weighted.get() + queries.row_begin[group.first] * right_columns;
    }

    void put_right(const float* row, float* to, int64_t slice) const {
        for (int64_t column = 0; column < columns; column += width, to += slice) {
            std::copy_n(row + column, std::min(width, columns - column), to);
        }
    }

    // -------------------------------------------------------------- documents

    void make_splits() {
        const int64_t groups = static_cast<int64_t>(queries.groups.size());
        const int64_t rows = std::max<int64_t>(1, queries.row_begin[p.query_count]);
        const int64_t least = std::max<int64_t>(1, least_splits / groups);
        const int64_t affordable = most_sums / (rows * std::max<int64_t>(1, columns));
        const int64_t most = std::max(least, std::min(most_splits / groups, affordable));
        int64_t place = 0;
        for (int64_t g = 0; g < groups; ++g) {
            const auto begin = static_cast<int64_t>(pieces.size());
            int64_t tokens = 0;
            for (int64_t j = 0; j < p.documents_per_query; ++j) {
                const int64_t length = document_at(p, queries.groups[g].first, j).length;
                const int64_t count = (length + piece_tokens - 1) / piece_tokens;
                const int64_t step = count ? std::min(piece_tokens, rounded_up((length + count - 1) / count, 12)) : 1;
                for (int64_t first = 0; first < length; first += step) {
                    pieces.push_back({j, first, std::min(first + step, length)});
                }
                tokens += length;
            }
            work += 3 * tokens * queries.groups[g].rows * p.dimension;
            split_begin.push_back(static_cast<int64_t>(splits.size()));
            const int64_t wanted = std::clamp(tokens / split_tokens, least, most);
            const int64_t share = (tokens + wanted - 1) / wanted, end = static_cast<int64_t>(pieces.size());
            for (int64_t first = begin; first < end;) {
                int64_t last = first, sum = 0;
                while (last < end && sum < share) sum += pieces[last].last - pieces[last].first, ++last;
                splits.push_back({g, first, last, place});
                place += queries.groups[g].rows * columns;
                first = last;
            }
        }
        split_begin.push_back(static_cast<int64_t>(splits.size()));
        sums_of_splits = Scratch<float>(place);
    }

    Worker make_worker() const {
        Worker worker;
        worker.rows = Scratch<const char*>(piece_tokens);
        worker.kept = Scratch<int32_t>(piece_tokens);
        worker.wide = Scratch<float>(piece_tokens * p.dimension);
        worker.row = Scratch<float>(columns);
        std::fill_n(worker.row.get(), columns, 0.0f);
        worker.right = Scratch<float>(piece_tokens * right_columns);
        worker.sums = Scratch<float>(piece_tokens * columns);
        worker.block = Scratch<float>(piece_tokens * width);
        worker.maxima = Scratch<float>(width);
        worker.factors = Scratch<float>(width);
        return worker;
    }

    void run_split(const Split& split, Worker& worker) const {
        const Group& group = queries.groups[split.group];
        float* sums_of_queries = sums_of_splits.get() + split.sums;
        std::fill_n(sums_of_queries, group.rows * columns, 0.0f);
        for (int64_t n = split.first_piece; n < split.last_piece; ++n) {
            const Piece& piece = pieces[n];
            const Document document = document_at(p, group.first, piece.j);
            const int64_t tokens = keep_tokens(piece, document, worker);
            std::fill_n(worker.sums.get(), tokens * columns, 0.0f);
            if (tokens > 0) meet(group, piece, tokens, sums_of_queries, worker);
            write_piece(piece, document, tokens, worker);
        }
    }

    // Rows of the piece's kept tokens: where they lie, and as a product's right side.
    int64_t keep_tokens(const Piece& piece, const Document& document, Worker& worker) const {
        int64_t tokens = 0;
        for (int64_t t = piece.first; t < piece.last; ++t) {
            if (!document.keeps(t)) continue;
            worker.kept[tokens] = static_cast<int32_t>(t - piece.first);
            worker.rows[tokens++] = document.token(t);
        }
        const bool widened = p.type != Type::float32 && !queries.pairs;
        for (int64_t k = 0; k < tokens; ++k) {
            set.widen(p.type, worker.rows[k], p.dimension, worker.row.get());
            put_right(worker.row.get(), worker.right.get() + k * width, tokens * width);
            if (!widened) continue;
            float* wide = worker.wide.get() + k * p.dimension;
            std::copy_n(worker.row.get(), p.dimension, wide);
            worker.rows[k] = reinterpret_cast<const char*>(wide);
        }
        return tokens;
    }

    // All rows of the group meet the piece, a panel at a time.
    void meet(const Group& group, const Piece& piece, int64_t tokens, float* sums_of_queries, Worker& worker) const {
        const auto similarities = queries.pairs ? set.smooth.similarities_of_pairs : set.smooth.similarities;
        PanelTask panel;
        panel.steps = queries.steps;
        panel.half_step = queries.half_step();
        panel.rows = worker.rows.get();
        panel.tokens = tokens;
        SharesTask shares;
        shares.block = worker.block.get();
        shares.tokens = tokens;
        shares.exponent_scale = exponent_scale;
        shares.maxima = worker.maxima.get();
        shares.factors = worker.factors.get();
        ProductTask to_queries;
        to_queries.left = worker.block.get();
        to_queries.transposed = true;
        to_queries.right = worker.right.get();
        to_queries.slice = tokens * width;
        to_queries.depth = tokens;
        to_queries.columns = columns;
        ProductTask to_documents = to_queries;
        to_documents.transposed = false;
        to_documents.slice = group.rows * width;
        to_documents.sums = worker.sums.get();
        to_documents.rows = tokens;
        int64_t i = group.first;
        for (int64_t row = 0; row < group.rows; row += width) {
            const int64_t rows = std::min(width, group.rows - row);
            panel.vectors = shares.vectors = queries.vectors(group, row);
            panel.panel = queries.panel(group, row);
            // Into the second cache while the similarities are multiplied: all rows of a group do not fit there.
            prefetch(sums_of_queries + row * columns, rows * columns);
            for (int64_t slice = 0; slice < right_columns; slice += width) {
                prefetch(weighted_rows(group) + slice * group.rows + row * width, rows * width);
            }
            similarities(panel, worker.block.get());
            look_up(group, row, rows, piece.j, i, worker);
            set.smooth.shares(shares);
            to_queries.sums = sums_of_queries + row * columns;
            to_queries.rows = to_documents.depth = rows;
            to_documents.right = weighted_rows(group) + row * width;
            set.smooth.add_product(to_queries);
            set.smooth.add_product(to_documents);
        }
    }

    // Smooth maxima of a panel's rows for document j, and d(loss)/d(score); `i` is the query of the last row looked at.
    void look_up(const Group& group, int64_t row, int64_t rows, int64_t j, int64_t& i, Worker& worker) const {
        std::fill_n(worker.maxima.get(), width, -infinity);
        std::fill_n(worker.factors.get(), width, 0.0f);
        for (int64_t k = 0; k < rows; ++k) {
            const int64_t place = queries.row_begin[group.first] + row + k;
            while (queries.row_begin[i + 1] <= place) ++i;
            const int64_t pair = i * p.documents_per_query + j;
            worker.maxima[k] = in.maxima[pair * p.query_length + queries.row_token[place]];
            worker.factors[k] = in.grad_scores[pair];
        }
    }

    void write_piece(const Piece& piece, const Document& document, int64_t tokens, const Worker& worker) const {
        const int64_t row = p.dimension * bytes;
        char* gradients = static_cast<char*>(out.grad_documents) + (document.first_token + piece.first) * row;
        if (tokens < piece.last - piece.first) std::memset(gradients, 0, (piece.last - piece.first) * row);
        for (int64_t k = 0; k < tokens; ++k) {
            set.narrow(p.type, worker.sums.get() + k * columns, p.dimension, gradients + worker.kept[k] * row);
        }
    }

    // ---------------------------------------------------------------- results

    void write_query(int64_t i) const {
        const Group& group = group_of(i);
        const int64_t g = &group - queries.groups.data(), row_bytes = p.dimension * bytes;
        char* gradients = static_cast<char*>(out.grad_queries) + i * p.query_length * row_bytes;
        std::memset(gradients, 0, p.query_length * row_bytes);
        if (out.grad_weights) write_weights(i);
        if (split_begin[g] == split_begin[g + 1]) return;
        for (int64_t k = queries.row_begin[i]; k < queries.row_begin[i + 1]; ++k) {
            const int64_t in_group = k - queries.row_begin[group.first], r = queries.row_token[k];
            float* sum = sums_of_splits.get() + splits[split_begin[g]].sums + in_group * columns;
            for (int64_t s = split_begin[g] + 1; s < split_begin[g + 1]; ++s) {
                const float* more = sums_of_splits.get() + splits[s].sums + in_group * columns;
                for (int64_t d = 0; d < columns; ++d) sum[d] += more[d];
            }
            const float weight = query_weight(p, i, r);
            for (int64_t d = 0; d < columns; ++d) sum[d] *= weight;
            set.narrow(p.type, sum, p.dimension, gradients + r * row_bytes);
        }
    }

    void write_weights(int64_t i) const {
        for (int64_t r = 0; r < p.query_length; ++r) {
            double sum = 0;
            for (int64_t j = 0; j < p.documents_per_query; ++j) {
                const int64_t pair = i * p.documents_per_query + j;
                const float maximum = in.maxima[pair * p.query_length + r];
                if (maximum != -infinity) sum += static_cast<double>(in.grad_scores[pair]) * maximum;
            }
            out.grad_weights[i * p.query_length + r] = static_cast<float>(sum);
        }
    }

    static constexpr float infinity = std::numeric_limits<float>::infinity();

    const Problem& p;
    const SmoothBackwardInput& in;
    const SmoothBackwardOutput& out;
    const Threads& threads;
    const Instructions& set;
    QueryPanels queries;
    const int64_t bytes;
    const int64_t width;          // rows of a panel and columns of a slice
    const int64_t columns;        // the dimension in whole vectors,
    const int64_t right_columns;  // and in whole slices
    const float exponent_scale;
    int64_t work = 0;
    Scratch<float> weighted;  // kept query rows times weights, by group, as right sides
    std::vector<Piece> pieces;
    std::vector<Split> splits;
    std::vector<int64_t> split_begin;  // [groups + 1]
    Scratch<float> sums_of_splits;
    std::vector<Worker> workers;
};

}  // namespace

void smooth_backward(const Problem& problem, const SmoothBackwardInput& input, const SmoothBackwardOutput& output,
                     const Threads& threads) {
    check_offsets(problem);
    // Without a dimension there are still the weights' gradients.
    if (problem.query_count * problem.query_length == 0 || problem.documents_per_query == 0) {
        return write_zero_gradients(problem, output);
    }
    SmoothBackward(problem, input, output, threads).run();
}

}  // namespace jmlr::maxsim::cpu
