// Scores and smooth maxima, temperature * log sum exp(similarity / temperature). The similarities of one panel and some
// document tokens go to the first cache, where a pass finds their maxima and another sums exponentials below them;
// later tokens rescale what came before. Derivation: docs/maxsim-smooth-and-xtr.md.

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu_walk.h"

namespace jmlr::maxsim::cpu {
namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr int64_t block_tokens = 96;  // 12 KiB of similarities beside a panel and document rows

class SmoothMaximum final : public Walk {
public:
    SmoothMaximum(const Problem& problem, const SmoothForwardOutput& output, const Threads& threads)
        : Walk(problem, {}, nullptr, threads), out(output), exponent_scale(exponent_scale_of(output.temperature)) {
        fixed_chunks = true;
    }

private:
    // One worker's memory.
    struct Sums {
        Scratch<float> best;  // of a group's rows
        Scratch<float> total;
        Scratch<float> block;
    };

    void make_workers(int64_t count) override {
        const int64_t rows = queries.most_vectors * set.lanes;
        for (int64_t w = 0; w < count; ++w) {
            sums.push_back(
                {Scratch<float>(rows), Scratch<float>(rows), Scratch<float>(block_tokens * queries.panel_rows())});
        }
    }

    void start(int64_t worker, int64_t rows) override {
        std::fill_n(sums[worker].best.get(), rows, -infinity);
        std::fill_n(sums[worker].total.get(), rows, 0.0f);
    }

    void meet(int64_t worker, const PanelTask& all, int64_t row) override {
        const Sums& own = sums[worker];
        const auto similarities = queries.pairs ? set.smooth.similarities_of_pairs : set.smooth.similarities;
        for (int64_t first = 0; first < all.tokens; first += block_tokens) {
            PanelTask task = all;
            task.tokens = std::min(block_tokens, all.tokens - first);
            task.first_row += first * task.row_bytes;
            if (task.rows) task.rows += first;
            similarities(task, own.block.get());
            set.smooth.add_exponentials(own.block.get(), task.tokens, task.vectors, exponent_scale,
                                        own.best.get() + row, own.total.get() + row);
        }
    }

    void write(int64_t worker, const Pair& pair) override {
        const int64_t index = pair.i * p.documents_per_query + pair.j, begin = queries.row_begin[pair.i];
        const int64_t count = queries.row_begin[pair.i + 1] - begin;
        float* maxima = out.maxima ? out.maxima + index * p.query_length : nullptr;
        if (maxima && (!pair.has_tokens || count < p.query_length)) std::fill_n(maxima, p.query_length, -infinity);
        out.scores[index] = 0;
        if (!pair.has_tokens) return;
        const float* best = sums[worker].best.get() + pair.in_group;
        float* total = sums[worker].total.get() + pair.in_group;
        for (int64_t k = 0; k < count; ++k) {
            const float smooth = std::log(total[k]) * out.temperature + (std::isinf(best[k]) ? 0.0f : best[k]);
            if (maxima) maxima[queries.row_token[begin + k]] = smooth;
            total[k] = row_factor.empty() ? smooth : smooth * row_factor[begin + k];
        }
        out.scores[index] = sum_of(total, count);
    }

    const SmoothForwardOutput& out;
    const float exponent_scale;
    std::vector<Sums> sums;
};

}  // namespace

void smooth_forward(const Problem& problem, const SmoothForwardOutput& output, const Threads& threads) {
    check_offsets(problem);
    const int64_t tokens = problem.packed() ? problem.packed_tokens : problem.document_length;
    const int64_t pairs = problem.query_count * problem.documents_per_query;
    if (pairs == 0 || problem.query_length == 0 || tokens == 0) {
        std::fill_n(output.scores, pairs, 0.0f);
        if (output.maxima) std::fill_n(output.maxima, pairs * problem.query_length, -infinity);
        return;
    }
    SmoothMaximum(problem, output, threads).run();
}

}  // namespace jmlr::maxsim::cpu
