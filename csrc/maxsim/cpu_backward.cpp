// Gradients from the winners. A document's gradient belongs to one task, which sorts the winners by token (a counting
// sort, in the order of queries and their tokens) and sums the query rows that each token won. A query token's gradient
// belongs to one task too, which sums the document rows that won, in the order of documents. So two runs agree to the
// bit on any number of threads. Derivation: docs/maxsim-backward.md.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "cpu_common.h"

namespace jmlr::maxsim::cpu {
namespace {

constexpr int64_t rows_at_once = 256;  // of one sum; a bound on scratch memory

// One worker's memory.
struct Worker {
    Scratch<int32_t> token;  // [entries] the winners of one document, in the order of queries
    Scratch<float> factor;
    Scratch<const void*> row;
    Scratch<float> sorted_factor;  // the same sorted by token
    Scratch<const void*> sorted_row;
    Scratch<int64_t> begin;         // [length + 1] into the sorted ones
    Scratch<float> pair_gradients;  // [documents of a query]
    Scratch<float> sum;             // [dimension] each
    Scratch<float> unit;
};

class Backward {
public:
    Backward(const Problem& problem, const BackwardInput& input, const BackwardOutput& output, const Threads& threads)
        : p(problem),
          in(input),
          out(output),
          threads(threads),
          set(instructions()),
          bytes(element_bytes(problem.type)) {
        queries_of_document = p.candidates ? 1 : p.query_count;
        for (int64_t n = 0; n < p.document_count(); ++n) {
            documents.push_back(
                document_at(p, p.candidates ? n / p.documents_per_query : 0, n % p.documents_per_query));
            longest = std::max(longest, documents.back().length);
        }
        if (!in.code.marked && p.document_mask) {
            for (const Document& document : documents) has_tokens.push_back(any_kept(document));
        }
    }

    void run() {
        clear_tokens_of_no_document(p, out.grad_documents);
        // A few query tokens a task where there are few queries.
        const int64_t rows = p.query_count * p.query_length, wanted = 8 * threads.count;
        const int64_t row_step = std::clamp<int64_t>(rows / wanted, 1, p.query_length);
        const int64_t row_tasks = (p.query_length + row_step - 1) / row_step;
        const int64_t document_tasks = p.document_count(), query_tasks = p.query_count * row_tasks;
        const int64_t entries = rows * p.documents_per_query;
        const int64_t tokens = p.packed() ? p.packed_tokens : p.document_count() * p.document_length;
        Tasks parallel(threads, document_tasks + query_tasks, (2 * entries + tokens / 8) * p.dimension);
        for (int64_t w = 0; w < parallel.workers; ++w) workers.push_back(make_worker());
        parallel.run([&](int64_t worker, int64_t task) {
            if (task < document_tasks) {
                document_gradient(task, workers[worker]);
            } else {
                const int64_t part = task - document_tasks, first = part % row_tasks * row_step;
                query_gradients(part / row_tasks, first, std::min(first + row_step, p.query_length), workers[worker]);
            }
        });
        if (winner_outside) throw std::runtime_error("winners holds a position outside of its document");
    }

private:
    Worker make_worker() const {
        const int64_t entries = queries_of_document * p.query_length;
        Worker worker;
        worker.token = Scratch<int32_t>(entries);
        worker.factor = Scratch<float>(entries);
        worker.row = Scratch<const void*>(std::max(entries, rows_at_once));
        worker.sorted_factor = Scratch<float>(std::max(entries, rows_at_once));
        worker.sorted_row = Scratch<const void*>(entries);
        worker.begin = Scratch<int64_t>(longest + 2);
        worker.pair_gradients = Scratch<float>(p.documents_per_query);
        worker.sum = Scratch<float>(p.dimension);
        worker.unit = Scratch<float>(p.dimension);
        return worker;
    }

    static bool any_kept(const Document& document) {
        for (int64_t t = 0; t < document.length; ++t) {
            if (document.keeps(t)) return true;
        }
        return false;
    }

    // ------------------------------------------------------------ the winners

    int64_t position_at(int64_t index) const {
        switch (in.code.type) {
            case WinnerType::uint8:
                return static_cast<const uint8_t*>(in.winners)[index];
            case WinnerType::uint16:
                return static_cast<const uint16_t*>(in.winners)[index];
            default:
                return static_cast<const int32_t*>(in.winners)[index];
        }
    }

    // The position that won for query token r, or -1. `gradient` is that of the pair's score, replaced by that of the
    // token's own maximum where the rule gives one; a maximum that the loss does not look at has no winner.
    int64_t winner(int64_t i, int64_t j, int64_t r, const Document& document, float& gradient) {
        const int64_t index = (i * p.documents_per_query + j) * p.query_length + r, position = position_at(index);
        if (in.code.marked) {
            if (position == in.code.none) return -1;
        } else {
            const uint8_t* mask = p.query_mask;
            if (mask && mask[i * p.query_mask_stride + r * p.query_mask_token_stride] == 0) return -1;
            if (!has_tokens.empty() && !has_tokens[&document - documents.data()]) return -1;
        }
        if (in.rule.rule == Rule::tokens) {
            gradient = in.rule.grad[index];
            if (gradient == 0) return -1;
        }
        if (position < 0 || position >= document.length) {
            winner_outside = true;
            return -1;
        }
        return position;
    }

    // d(loss)/d(score of query i and document j); jmlr_kernels/maxsim/gradient_rule.py has the table.
    float pair_gradient(int64_t i, int64_t j) const {
        const RuleInput& rule = in.rule;
        const int64_t pair = i * p.documents_per_query + j;
        if (rule.rule == Rule::scores) return rule.grad[pair];
        if (rule.rule == Rule::tokens) return 0;
        const float up = rule.grad[i], score = rule.scores[pair], first = rule.row[2 * i], second = rule.row[2 * i + 1];
        if (rule.rule == Rule::margins) {
            if (j == 0) return up * (static_cast<float>(p.documents_per_query) * first - second);
            return up * (score - rule.teacher[pair] - first);
        }
        const float temperature = rule.temperatures[0];
        const float probability = std::exp((score - first) / temperature - second);
        float target = 0;
        if (rule.rule == Rule::teacher) {
            const float top = rule.teacher_row[2 * i], mass = rule.teacher_row[2 * i + 1];
            target = std::exp((rule.teacher[pair] - top) / rule.temperatures[1] - mass);
        } else if (rule.labels) {
            target = rule.labels[i] == j ? 1.0f : 0.0f;
        }
        return up / temperature * (probability - target);
    }

    // -------------------------------------------------------------- documents

    void document_gradient(int64_t n, Worker& worker) {
        const Document& document = documents[n];
        const int64_t entries = gather_winners(n, document, worker);
        sort_winners(entries, document.length, worker);
        auto gradient = static_cast<char*>(out.grad_documents) + document.first_token * p.dimension * bytes;
        for (int64_t t = 0; t < document.length; ++t, gradient += p.dimension * bytes) {
            const int64_t begin = worker.begin[t], count = worker.begin[t + 1] - begin;
            if (count == 0) {
                std::memset(gradient, 0, p.dimension * bytes);
                continue;
            }
            float* sum = worker.sum.get();
            std::fill_n(sum, p.dimension, 0.0f);
            set.weighted_sum(p.type, worker.sorted_row.get() + begin, worker.sorted_factor.get() + begin, count,
                             p.dimension, sum);
            if (in.document_scales) {
                project(document.token(t), in.document_scales[document.first_token + t], sum, worker.unit.get());
            }
            set.narrow(p.type, sum, p.dimension, gradient);
        }
    }

    // The query tokens that any token of this document won, with their factors.
    int64_t gather_winners(int64_t n, const Document& document, Worker& worker) {
        const int64_t first = p.candidates ? n / p.documents_per_query : 0, j = n % p.documents_per_query;
        int64_t entries = 0;
        for (int64_t i = first; i < first + queries_of_document; ++i) {
            float gradient = pair_gradient(i, j);
            for (int64_t r = 0; r < p.query_length; ++r) {
                const int64_t position = winner(i, j, r, document, gradient);
                if (position < 0) continue;
                worker.token[entries] = static_cast<int32_t>(position);
                const float scale = in.query_scales ? in.query_scales[i * p.query_length + r] : 1.0f;
                worker.factor[entries] = gradient * query_weight(p, i, r) * scale;
                worker.row[entries] = query_row(p, i, r);
                ++entries;
            }
        }
        return entries;
    }

    static void sort_winners(int64_t entries, int64_t length, Worker& worker) {
        int64_t* begin = worker.begin.get();  // begin[t + 1] counts, then moves from where t starts to where it ends
        std::fill_n(begin, length + 2, 0);
        for (int64_t e = 0; e < entries; ++e) ++begin[worker.token[e] + 2];
        for (int64_t t = 2; t <= length; ++t) begin[t] += begin[t - 1];
        for (int64_t e = 0; e < entries; ++e) {
            const int64_t place = begin[worker.token[e] + 1]++;
            worker.sorted_factor[place] = worker.factor[e];
            worker.sorted_row[place] = worker.row[e];
        }
    }

    // ---------------------------------------------------------------- queries

    void query_gradients(int64_t i, int64_t first, int64_t last, Worker& worker) {
        float* gradients = worker.pair_gradients.get();
        for (int64_t j = 0; j < p.documents_per_query; ++j) gradients[j] = pair_gradient(i, j);
        for (int64_t r = first; r < last; ++r) query_gradient(i, r, worker);
    }

    void query_gradient(int64_t i, int64_t r, Worker& worker) {
        const Document* own = documents.data() + (p.candidates ? i * p.documents_per_query : 0);
        float *sum = worker.sum.get(), *unit = worker.unit.get();
        std::fill_n(sum, p.dimension, 0.0f);
        int64_t count = 0;
        const auto flush = [&] {
            set.weighted_sum(p.type, worker.row.get(), worker.sorted_factor.get(), count, p.dimension, sum);
            count = 0;
        };
        for (int64_t j = 0; j < p.documents_per_query; ++j) {
            float gradient = worker.pair_gradients[j];
            const int64_t position = winner(i, j, r, own[j], gradient);
            if (position < 0) continue;
            const float scale = in.document_scales ? in.document_scales[own[j].first_token + position] : 1.0f;
            worker.row[count] = own[j].token(position);
            worker.sorted_factor[count] = gradient * scale;
            if (++count == rows_at_once) flush();
        }
        flush();
        const int64_t index = i * p.query_length + r;
        const float scale = in.query_scales ? in.query_scales[index] : 1.0f;
        if (out.grad_weights) {
            // <q, sum of gradient * winning token>: what is zero stays zero, whatever the embedding and the weight
            // hold.
            set.widen(p.type, query_row(p, i, r), p.dimension, unit);
            out.grad_weights[index] = dot_where_not_zero(sum, unit, scale);
            const float factor = query_weight(p, i, r);
            for (int64_t d = 0; d < p.dimension; ++d) sum[d] = sum[d] == 0 ? 0.0f : sum[d] * factor;
        }
        if (in.query_scales) project(query_row(p, i, r), scale, sum, unit);
        set.narrow(p.type, sum, p.dimension, static_cast<char*>(out.grad_queries) + index * p.dimension * bytes);
    }

    float dot_where_not_zero(const float* sum, const float* row, float scale) const {
        float parts[4] = {0, 0, 0, 0};
        for (int64_t d = 0; d < p.dimension; ++d) parts[d % 4] += sum[d] == 0 ? 0.0f : sum[d] * (row[d] * scale);
        return (parts[0] + parts[2]) + (parts[1] + parts[3]);
    }

    // The Jacobian of u = x * scale: (du - u <u, du>) * scale. A zero gradient stays zero whatever u holds; under the
    // norm's floor the scale is a constant.
    void project(const char* row, float scale, float* gradient, float* unit) const {
        bool still = true;
        for (int64_t d = 0; d < p.dimension; ++d) still = still && gradient[d] == 0;
        if (still) return;
        set.widen(p.type, row, p.dimension, unit);
        for (int64_t d = 0; d < p.dimension; ++d) unit[d] *= scale;
        const float along = scale >= 0.999f / norm_floor ? 0.0f : set.dot(gradient, unit, p.dimension);
        for (int64_t d = 0; d < p.dimension; ++d) gradient[d] = (gradient[d] - unit[d] * along) * scale;
    }

    const Problem& p;
    const BackwardInput& in;
    const BackwardOutput& out;
    const Threads& threads;
    const Instructions& set;
    const int64_t bytes;
    int64_t queries_of_document = 0;
    int64_t longest = 0;
    std::vector<Document> documents;
    std::vector<char> has_tokens;  // of each document, where the winners do not say it
    std::vector<Worker> workers;
    std::atomic<bool> winner_outside{false};
};

}  // namespace

void backward(const Problem& problem, const BackwardInput& input, const BackwardOutput& output,
              const Threads& threads) {
    check_offsets(problem);
    if (problem.dimension == 0 || problem.query_count * problem.query_length == 0 || problem.documents_per_query == 0) {
        return write_zero_gradients(problem, output);
    }
    Backward(problem, input, output, threads).run();
}

}  // namespace jmlr::maxsim::cpu
