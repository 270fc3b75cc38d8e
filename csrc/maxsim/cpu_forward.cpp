// Scores and winners of the hard maximum. A similarity is one lane of one register, and the maximum over a document's
// tokens an instruction between registers: no similarity is ever stored. cpu_walk.h says how rows and tokens meet.

#include <algorithm>
#include <limits>
#include <vector>

#include "cpu_walk.h"

namespace jmlr::maxsim::cpu {
namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

class HardMaximum final : public Walk {
public:
    HardMaximum(const Problem& problem, const ForwardOutput& output, const Decoder* decoder, const Threads& threads)
        : Walk(problem, output.normalize ? Scales{output.query_scales, output.document_scales} : Scales{}, decoder,
               threads),
          out(output) {}

private:
    // One worker's memory, of a group's rows.
    struct Best {
        Scratch<float> maxima;
        Scratch<int32_t> winners;
    };

    void make_workers(int64_t count) override {
        const int64_t rows = queries.most_vectors * set.lanes;
        for (int64_t w = 0; w < count; ++w) {
            best.push_back({Scratch<float>(rows), Scratch<int32_t>(out.winners ? rows : 0)});
        }
    }

    void start(int64_t worker, int64_t rows) override {
        std::fill_n(best[worker].maxima.get(), rows, -infinity);
        if (out.winners) std::fill_n(best[worker].winners.get(), rows, 0);
    }

    void meet(int64_t worker, const PanelTask& shared, int64_t row) override {
        PanelTask task = shared;
        task.best = best[worker].maxima.get() + row;
        task.winners = out.winners ? best[worker].winners.get() + row : nullptr;
        queries.pairs ? set.maxima_of_pairs(task) : set.maxima(task);
    }

    void write(int64_t worker, const Pair& pair) override {
        const int64_t index = pair.i * p.documents_per_query + pair.j, begin = queries.row_begin[pair.i];
        const int64_t count = queries.row_begin[pair.i + 1] - begin;
        const float nothing = pair.too_long ? std::numeric_limits<float>::quiet_NaN() : 0.0f;
        float* found = best[worker].maxima.get() + pair.in_group;
        if (pair.has_tokens && !row_factor.empty()) {
            for (int64_t k = 0; k < count; ++k) found[k] *= row_factor[begin + k];
        }
        if (!out.per_token) {
            out.scores[index] = pair.has_tokens ? sum_of(found, count) : nothing;
        } else {
            float* maxima = out.scores + index * p.query_length;
            std::fill_n(maxima, p.query_length, nothing);
            for (int64_t k = 0; pair.has_tokens && k < count; ++k) maxima[queries.row_token[begin + k]] = found[k];
        }
        if (out.winners == nullptr) return;
        const int64_t first = index * p.query_length;
        switch (out.code.type) {
            case WinnerType::uint8:
                return write_winners(static_cast<uint8_t*>(out.winners) + first, worker, pair);
            case WinnerType::uint16:
                return write_winners(static_cast<uint16_t*>(out.winners) + first, worker, pair);
            case WinnerType::int32:
                return write_winners(static_cast<int32_t*>(out.winners) + first, worker, pair);
        }
    }

    template <class Integer>
    void write_winners(Integer* to, int64_t worker, const Pair& pair) const {
        const int32_t* found = best[worker].winners.get() + pair.in_group;
        const int32_t* kept = pair.kept;
        const int64_t begin = queries.row_begin[pair.i], count = queries.row_begin[pair.i + 1] - begin;
        if (!pair.has_tokens || count < p.query_length) {
            std::fill_n(to, p.query_length, static_cast<Integer>(out.code.marked ? out.code.none : 0));
        }
        if (!pair.has_tokens) return;
        if (count == p.query_length && kept == nullptr) {
            for (int64_t k = 0; k < count; ++k) to[k] = static_cast<Integer>(found[k]);
            return;
        }
        for (int64_t k = 0; k < count; ++k) {
            to[queries.row_token[begin + k]] = static_cast<Integer>(kept ? kept[found[k]] : found[k]);
        }
    }

    const ForwardOutput& out;
    std::vector<Best> best;
};

template <class Integer>
void fill_winners(const ForwardOutput& output, int64_t count) {
    std::fill_n(static_cast<Integer*>(output.winners), count,
                static_cast<Integer>(output.code.marked ? output.code.none : 0));
}

// No query, no document, no token or no dimension: zeros.
void write_nothing(const Problem& p, const ForwardOutput& output) {
    const int64_t pairs = p.query_count * p.documents_per_query;
    std::fill_n(output.scores, pairs * (output.per_token ? p.query_length : 1), 0.0f);
    if (output.normalize) {
        const int64_t tokens = p.packed() ? p.packed_tokens : p.document_count() * p.document_length;
        std::fill_n(output.query_scales, p.query_count * p.query_length, 1.0f / norm_floor);
        std::fill_n(output.document_scales, tokens, 1.0f / norm_floor);
    }
    if (output.winners == nullptr) return;
    const int64_t count = pairs * p.query_length;
    if (output.code.type == WinnerType::uint8) fill_winners<uint8_t>(output, count);
    if (output.code.type == WinnerType::uint16) fill_winners<uint16_t>(output, count);
    if (output.code.type == WinnerType::int32) fill_winners<int32_t>(output, count);
}

}  // namespace

void forward(const Problem& problem, const ForwardOutput& output, const Threads& threads) {
    forward(problem, output, nullptr, threads);
}

void forward(const Problem& problem, const ForwardOutput& output, const Decoder* decoder, const Threads& threads) {
    check_offsets(problem);
    const int64_t tokens = problem.packed() ? problem.packed_tokens : problem.document_length;
    if (problem.query_count == 0 || problem.query_length == 0 || problem.dimension == 0 ||
        problem.documents_per_query == 0 || tokens == 0) {
        return write_nothing(problem, output);
    }
    if (output.normalize && problem.packed()) {  // tokens before the first document and behind the last
        const int64_t first = problem.cu_seqlens[0], last = problem.cu_seqlens[problem.document_count()];
        std::fill_n(output.document_scales, first, 0.0f);
        std::fill_n(output.document_scales + last, problem.packed_tokens - last, 0.0f);
    }
    HardMaximum(problem, output, decoder, threads).run();
}

const char* instruction_set() { return instructions().name; }

}  // namespace jmlr::maxsim::cpu
