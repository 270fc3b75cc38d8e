// Scores and winners. Queries are packed once into panels, whose vectors hold one embedding dimension of as many query
// tokens as a vector has lanes; documents are read where they lie. A similarity is then one lane of one register, and
// the maximum over a document's tokens an instruction between registers: no similarity is ever stored.
//
// Queries that share documents form groups whose panels fit a core's second cache. A task is one group and a run of
// documents. Derivation and measurements: docs/maxsim-cpu.md.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu_forward.h"

namespace jmlr::maxsim::cpu {
namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr int64_t panels_bytes = 512 * 1024;  // of a group, in half of a second cache
constexpr int64_t chunk_bytes = 128 * 1024;   // of a document that is kept there while all panels meet it
constexpr int64_t burst_bytes = 12 * 1024;    // of one that is decoded for a single panel, in the first cache
constexpr int64_t chunk_step = 12;            // every instruction set's tiles divide this many tokens
constexpr int64_t tasks_per_thread = 16;

// Queries [first, last) with their panels.
struct Group {
    int64_t first = 0;
    int64_t last = 0;
    int64_t rows = 0;          // kept query tokens
    int64_t vectors = 0;       // that hold them
    int64_t panel_offset = 0;  // of the first panel, in units
};

struct Task {
    int64_t group = 0;
    int64_t first_document = 0;
    int64_t last_document = 0;
};

// One worker's memory.
struct Worker {
    Scratch<int32_t> kept;      // positions of a document's kept tokens, where some are excluded
    Scratch<const char*> rows;  // and their rows
    Scratch<float> scales;      // inverse norms of kept tokens, or a chunk's factors
    Scratch<float> decoded;     // a chunk's rows
    Scratch<float> row;         // one token in float32
    Scratch<float> best;        // of the group's rows
    Scratch<int32_t> winners;
};

class Forward {
public:
    Forward(const Problem& problem, const ForwardOutput& output, const Decoder* stored, const Threads& threads)
        : p(problem), out(output), threads(threads), set(instructions()), widen(problem), decoder(stored) {
        pairs = meets_pairs(p);
        if (decoder == nullptr && p.type != Type::float32 && !pairs) decoder = &widen;
        document_bytes = decoder ? decoder->element_bytes : element_bytes(p.type);
        normalize = out.normalize;
        steps = pairs ? (p.dimension + 1) / 2 : p.dimension;
        longest = longest_document(p);
    }

    void run() {
        make_groups();
        pack_queries();
        if (normalize && groups.size() > 1 && !p.candidates) compute_document_scales();
        make_tasks();
        Tasks parallel(threads, static_cast<int64_t>(tasks.size()), work);
        for (int64_t w = 0; w < parallel.workers; ++w) workers.push_back(make_worker());
        parallel.run([&](int64_t worker, int64_t task) { run_task(workers[worker], tasks[task]); });
    }

private:
    // ---------------------------------------------------------------- queries

    void make_groups() {
        row_begin.resize(p.query_count + 1);
        for (int64_t i = 0; i < p.query_count; ++i) {
            row_begin[i] = static_cast<int64_t>(row_token.size());
            for (int64_t r = 0; r < p.query_length; ++r) {
                if (keeps(i, r)) row_token.push_back(static_cast<int32_t>(r));
            }
        }
        row_begin[p.query_count] = static_cast<int64_t>(row_token.size());
        const int64_t per_group = queries_per_group();
        int64_t offset = 0;
        for (int64_t first = 0; first < p.query_count; first += per_group) {
            Group group;
            group.first = first;
            group.last = std::min(first + per_group, p.query_count);
            group.rows = row_begin[group.last] - row_begin[group.first];
            group.vectors = (group.rows + set.lanes - 1) / set.lanes;
            group.panel_offset = offset;
            offset += group.vectors * set.lanes * steps;
            groups.push_back(group);
            most_vectors = std::max(most_vectors, group.vectors);
        }
        panels = Scratch<uint32_t>(offset);
    }

    int64_t queries_per_group() const {
        if (p.candidates) return 1;
        const int64_t query_bytes = std::max<int64_t>(1, p.query_length * steps * 4);
        int64_t count = std::max<int64_t>(1, panels_bytes / query_bytes);
        // Few documents: smaller groups, so that every thread has some.
        const int64_t groups_wanted = (4 * threads.count + p.documents_per_query - 1) / p.documents_per_query;
        const int64_t vectors_kept =
            std::max<int64_t>(1, widest_panel * set.lanes / std::max<int64_t>(1, p.query_length));
        count = std::min(count, std::max(vectors_kept, p.query_count / groups_wanted));
        return std::min(count, p.query_count);
    }

    bool keeps(int64_t i, int64_t r) const {
        return p.query_mask == nullptr || p.query_mask[i * p.query_mask_stride + r * p.query_mask_token_stride] != 0;
    }

    void pack_queries() {
        if (pairs ? normalize || p.query_weights : p.query_weights != nullptr) row_factor.resize(row_token.size());
        const int64_t per_group = groups[0].last - groups[0].first;
        Tasks parallel(threads, p.query_count, p.query_count * p.query_length * p.dimension);
        Scratch<float> rows(parallel.workers * p.dimension);
        parallel.run([&](int64_t worker, int64_t i) {
            const Group& group = groups[i / per_group];
            const int64_t begin = row_begin[group.first];
            if (normalize) std::fill_n(out.query_scales + i * p.query_length, p.query_length, 0.0f);
            for (int64_t k = row_begin[i]; k < row_begin[i + 1]; ++k) {
                pack_row(group, k - begin, i, row_token[k], rows.get() + worker * p.dimension);
            }
            if (i + 1 < group.last) return;
            for (int64_t row = group.rows; row < group.vectors * set.lanes; ++row) {  // lanes that nobody looks at
                for (int64_t s = 0; s < steps; ++s) unit(group, row, s) = 0;
            }
        });
    }

    // The place of step s of a group's row.
    uint32_t& unit(const Group& group, int64_t row, int64_t s) const {
        const int64_t width = widest_panel * set.lanes, panel = row / width;
        const int64_t own = std::min(width, group.vectors * set.lanes - panel * width);
        return panels[group.panel_offset + panel * width * steps + s * own + row % width];
    }

    void pack_row(const Group& group, int64_t at, int64_t i, int64_t r, float* row) {
        const char* source = static_cast<const char*>(p.queries) +
                             (i * p.query_stride + r * p.query_token_stride) * element_bytes(p.type);
        float factor = 1.0f;
        if (!pairs || normalize) set.widen(p.type, source, p.dimension, row);
        if (normalize) {
            const float scale = inverse_norm(row);
            out.query_scales[i * p.query_length + r] = scale;
            if (pairs) {
                factor = scale;  // the pairs stay as they are: their maximum is scaled
            } else {
                for (int64_t d = 0; d < p.dimension; ++d) row[d] *= scale;
            }
        }
        if (p.query_weights) factor *= p.query_weights[i * p.query_weights_stride + r * p.query_weights_token_stride];
        if (!row_factor.empty()) row_factor[row_begin[group.first] + at] = factor;
        const char* units = pairs ? source : reinterpret_cast<const char*>(row);
        uint32_t* place = &unit(group, at, 0);
        const int64_t stride = steps > 1 ? &unit(group, at, 1) - place : 0;
        const bool half = pairs && p.dimension % 2 != 0;
        const int64_t whole = steps - (half ? 1 : 0);
        for (int64_t s = 0; s < whole; ++s) std::memcpy(place + s * stride, units + s * 4, 4);
        if (half) {
            uint16_t last;
            std::memcpy(&last, units + whole * 4, 2);
            place[whole * stride] = last;
        }
    }

    float inverse_norm(const float* row) const {
        const float norm = std::sqrt(set.dot(row, row, p.dimension));
        return 1.0f / (norm < norm_floor ? norm_floor : norm);  // NaN stays NaN
    }

    // -------------------------------------------------------------- documents

    Document at(int64_t i, int64_t j) const { return document_at(p, i, j, document_bytes); }

    // Inverse norms of a document's kept tokens, 0 for the others.
    void compute_scales(const Document& document, float* row) const {
        float* scales = out.document_scales + document.first_token;
        for (int64_t t = 0; t < document.length; ++t) {
            scales[t] = 0;
            if (!document.keeps(t)) continue;
            const auto floats = reinterpret_cast<const float*>(document.token(t));
            if (p.type != Type::float32) set.widen(p.type, document.token(t), p.dimension, row);
            scales[t] = inverse_norm(p.type == Type::float32 ? floats : row);
        }
    }

    // Several groups meet every document: its norms come before all of them.
    void compute_document_scales() {
        const int64_t count = p.document_count();
        Tasks parallel(threads, count, count * std::max<int64_t>(longest, 1) * p.dimension);
        Scratch<float> rows(parallel.workers * p.dimension);
        parallel.run([&](int64_t worker, int64_t n) { compute_scales(at(0, n), rows.get() + worker * p.dimension); });
        scales_are_known = true;
    }

    void make_tasks() {
        const int64_t count = p.documents_per_query;
        const auto cost = [&](const Group& group, int64_t j) {
            const Document document = at(group.first, j);
            return (document.length + chunk_step) * std::max<int64_t>(group.vectors, 1) * steps * set.lanes;
        };
        for (const Group& group : groups) {
            for (int64_t j = 0; j < count; ++j) work += cost(group, j);
        }
        const int64_t share = std::max(work / (threads.count * tasks_per_thread), int64_t{1} << 18);
        for (int64_t g = 0; g < static_cast<int64_t>(groups.size()); ++g) {
            for (int64_t first = 0; first < count;) {
                int64_t last = first, sum = 0;
                while (last < count && sum < share) sum += cost(groups[g], last++);
                tasks.push_back({g, first, last});
                first = last;
            }
        }
    }

    Worker make_worker() const {
        Worker worker;
        worker.kept = Scratch<int32_t>(p.document_mask ? longest : 0);
        worker.rows = Scratch<const char*>(p.document_mask ? longest : 0);
        const int64_t chunk = std::min(longest, chunk_tokens());
        const bool factors = decoder && decoder->has_factors;
        worker.scales = Scratch<float>(normalize && p.document_mask ? longest : factors ? chunk : 0);
        worker.decoded = Scratch<float>(decoder ? chunk * steps : 0);
        worker.row = Scratch<float>(p.dimension);
        worker.best = Scratch<float>(most_vectors * set.lanes);
        worker.winners = Scratch<int32_t>(out.winners ? most_vectors * set.lanes : 0);
        return worker;
    }

    int64_t chunk_tokens() const {
        const bool single = decoder && most_vectors <= widest_panel;
        const int64_t tokens = (single ? burst_bytes : chunk_bytes) / (steps * 4) / chunk_step * chunk_step;
        return std::max(tokens, chunk_step);
    }

    void run_task(Worker& worker, const Task& task) {
        const Group& group = groups[task.group];
        for (int64_t j = task.first_document; j < task.last_document; ++j) {
            const Document document = at(group.first, j);
            const bool too_long = is_too_long(p, document.length);
            if (normalize && !scales_are_known) compute_scales(document, worker.row.get());
            const int64_t kept = too_long ? 0 : keep_tokens(document, worker);
            if (kept > 0) find_maxima(group, document, kept, worker);
            for (int64_t i = group.first; i < group.last; ++i) write(group, i, j, kept > 0, too_long, worker);
        }
    }

    int64_t keep_tokens(const Document& document, Worker& worker) const {
        if (document.mask == nullptr) return document.length;
        int64_t kept = 0;
        for (int64_t t = 0; t < document.length; ++t) {
            if (!document.keeps(t)) continue;
            worker.kept[kept] = static_cast<int32_t>(t);
            worker.rows[kept] = document.token(t);
            if (normalize) worker.scales[kept] = out.document_scales[document.first_token + t];
            ++kept;
        }
        return kept;
    }

    void find_maxima(const Group& group, const Document& document, int64_t kept, Worker& worker) const {
        const int64_t rows = group.vectors * set.lanes, width = widest_panel * set.lanes;
        std::fill_n(worker.best.get(), rows, -infinity);
        if (out.winners) std::fill_n(worker.winners.get(), rows, 0);
        PanelTask task;
        task.steps = steps;
        task.half_step = pairs && p.dimension % 2 != 0;
        for (int64_t first = 0; first < kept; first += chunk_tokens()) {
            task.tokens = std::min(chunk_tokens(), kept - first);
            task.first_position = static_cast<int32_t>(first);
            task.first_row = document.token(first);
            task.row_bytes = document.token_bytes;
            task.rows = document.mask ? worker.rows.get() + first : nullptr;
            if (normalize) {
                const float* all = document.mask ? worker.scales.get() : out.document_scales + document.first_token;
                task.scales = all + first;
            }
            if (decoder) decode_rows(task, document, kept - first, worker);
            for (int64_t row = 0; row < rows; row += width) {
                task.vectors = static_cast<int>(std::min(width, rows - row) / set.lanes);
                task.panel = panels.get() + group.panel_offset + row * steps;
                task.best = worker.best.get() + row;
                task.winners = out.winners ? worker.winners.get() + row : nullptr;
                task.prefetch_bytes = row == 0 && !decoder ? chunk_bytes : 0;
                pairs ? set.maxima_of_pairs(task) : set.maxima(task);
            }
        }
    }

    // Rows of the task's tokens in place of what is stored; `left` tokens remain in the document.
    void decode_rows(PanelTask& task, const Document& document, int64_t left, const Worker& worker) const {
        StoredTokens tokens;
        tokens.first = task.first_row;
        tokens.stride = task.row_bytes;
        tokens.places = task.rows;
        tokens.number = document.first_token + (document.mask ? 0 : task.first_position);
        tokens.kept = document.mask ? worker.kept.get() + task.first_position : nullptr;
        tokens.count = left;
        const DecodedRows rows{reinterpret_cast<char*>(worker.decoded.get()), steps * 4, worker.scales.get(),
                               worker.row.get()};
        decoder->decode(tokens, task.tokens, rows);
        task.first_row = rows.first;
        task.row_bytes = rows.stride;
        task.rows = nullptr;
        if (decoder->has_factors) task.scales = rows.factors;
    }

    // ---------------------------------------------------------------- outputs

    void write(const Group& group, int64_t i, int64_t j, bool has_tokens, bool too_long, const Worker& worker) const {
        const int64_t pair = i * p.documents_per_query + j, begin = row_begin[i], count = row_begin[i + 1] - begin;
        const int64_t in_group = begin - row_begin[group.first];
        const float nothing = too_long ? std::numeric_limits<float>::quiet_NaN() : 0.0f;
        float* best = worker.best.get() + in_group;
        if (has_tokens && !row_factor.empty()) {
            for (int64_t k = 0; k < count; ++k) best[k] *= row_factor[begin + k];
        }
        if (!out.per_token) {
            out.scores[pair] = has_tokens ? sum(best, count) : nothing;
        } else {
            float* maxima = out.scores + pair * p.query_length;
            std::fill_n(maxima, p.query_length, nothing);
            for (int64_t k = 0; has_tokens && k < count; ++k) maxima[row_token[begin + k]] = best[k];
        }
        if (out.winners == nullptr) return;
        const int64_t first = pair * p.query_length;
        switch (out.code.type) {
            case WinnerType::uint8:
                return write_winners(static_cast<uint8_t*>(out.winners) + first, begin, count, in_group, has_tokens,
                                     worker);
            case WinnerType::uint16:
                return write_winners(static_cast<uint16_t*>(out.winners) + first, begin, count, in_group, has_tokens,
                                     worker);
            case WinnerType::int32:
                return write_winners(static_cast<int32_t*>(out.winners) + first, begin, count, in_group, has_tokens,
                                     worker);
        }
    }

    template <class Integer>
    void write_winners(Integer* to, int64_t begin, int64_t count, int64_t in_group, bool has_tokens,
                       const Worker& worker) const {
        const int32_t* found = worker.winners.get() + in_group;
        const int32_t* kept = p.document_mask ? worker.kept.get() : nullptr;
        if (!has_tokens || count < p.query_length) {
            std::fill_n(to, p.query_length, static_cast<Integer>(out.code.marked ? out.code.none : 0));
        }
        if (!has_tokens) return;
        if (count == p.query_length && kept == nullptr) {
            for (int64_t k = 0; k < count; ++k) to[k] = static_cast<Integer>(found[k]);
            return;
        }
        for (int64_t k = 0; k < count; ++k) {
            to[row_token[begin + k]] = static_cast<Integer>(kept ? kept[found[k]] : found[k]);
        }
    }

    static float sum(const float* values, int64_t count) {
        float parts[8] = {0, 0, 0, 0, 0, 0, 0, 0};
        int64_t k = 0;
        for (; k + 8 <= count; k += 8) {
            for (int lane = 0; lane < 8; ++lane) parts[lane] += values[k + lane];
        }
        for (int lane = 0; k < count; ++k, ++lane) parts[lane] += values[k];
        return ((parts[0] + parts[4]) + (parts[2] + parts[6])) + ((parts[1] + parts[5]) + (parts[3] + parts[7]));
    }

    const Problem& p;
    const ForwardOutput& out;
    const Threads& threads;
    const Instructions& set;
    const Widen widen;
    const Decoder* decoder;      // null: stored rows are what the panels meet
    int64_t document_bytes = 0;  // of a stored element
    bool pairs = false;          // bfloat16 as it is
    bool normalize = false;
    bool scales_are_known = false;
    int64_t steps = 0;
    int64_t longest = 0;
    int64_t work = 0;
    int64_t most_vectors = 0;
    std::vector<int64_t> row_begin;  // [Nq + 1] into the kept query tokens of all queries
    std::vector<int32_t> row_token;  // [kept] position within the query
    std::vector<float> row_factor;   // [kept] weight, and scale where the maximum is scaled; empty: all 1
    std::vector<Group> groups;
    std::vector<Task> tasks;
    std::vector<Worker> workers;
    Scratch<uint32_t> panels;
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
    Forward(problem, output, decoder, threads).run();
}

const char* instruction_set() { return instructions().name; }

}  // namespace jmlr::maxsim::cpu
