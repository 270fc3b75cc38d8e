#include "cpu_walk.h"

#include <algorithm>
#include <cmath>

namespace jmlr::maxsim::cpu {
namespace {

constexpr int64_t panels_bytes = 512 * 1024;  // of a group, in half of a second cache
constexpr int64_t chunk_bytes = 128 * 1024;   // of a document that is kept there while all panels meet it
constexpr int64_t burst_bytes = 12 * 1024;    // of one that is decoded for a single panel, in the first cache
constexpr int64_t chunk_step = 12;            // every instruction set's tiles divide this many tokens
constexpr int64_t tasks_per_thread = 16;

}  // namespace

Walk::Walk(const Problem& problem, const Scales& scales, const Decoder* stored, const Threads& threads)
    : p(problem),
      set(instructions()),
      queries(problem, set),
      scales(scales),
      threads(threads),
      normalize(scales.queries != nullptr),
      widen(problem),
      decoder(stored) {
    if (decoder == nullptr && p.type != Type::float32 && !queries.pairs) decoder = &widen;
    document_bytes = decoder ? decoder->element_bytes : element_bytes(p.type);
    longest = longest_document(p);
}

void Walk::run() {
    queries.make_groups(queries_per_group(), [&](int64_t i, int64_t r) {
        return p.query_mask == nullptr || p.query_mask[i * p.query_mask_stride + r * p.query_mask_token_stride] != 0;
    });
    pack_queries();
    if (normalize && queries.groups.size() > 1 && !p.candidates) compute_document_scales();
    make_tasks();
    Tasks parallel(threads, static_cast<int64_t>(tasks.size()), work);
    for (int64_t w = 0; w < parallel.workers; ++w) workers.push_back(make_worker());
    make_workers(parallel.workers);
    parallel.run([&](int64_t worker, int64_t task) { run_task(worker, tasks[task]); });
}

// -------------------------------------------------------------------- queries

int64_t Walk::queries_per_group() const {
    if (p.candidates) return 1;
    const int64_t query_bytes = std::max<int64_t>(1, p.query_length * queries.steps * 4);
    int64_t count = std::max<int64_t>(1, panels_bytes / query_bytes);
    // Few documents: smaller groups, so that every thread has some.
    const int64_t groups_wanted = (4 * threads.count + p.documents_per_query - 1) / p.documents_per_query;
    const int64_t vectors_kept = std::max<int64_t>(1, queries.panel_rows() / std::max<int64_t>(1, p.query_length));
    count = std::min(count, std::max(vectors_kept, p.query_count / groups_wanted));
    return std::min(count, p.query_count);
}

void Walk::pack_queries() {
    const bool factors = p.query_weights != nullptr || (queries.pairs && normalize);
    if (factors) row_factor.resize(queries.row_token.size());
    const int64_t per_group = queries.groups[0].last - queries.groups[0].first;
    Tasks parallel(threads, p.query_count, p.query_count * p.query_length * p.dimension);
    Scratch<float> rows(parallel.workers * p.dimension);
    parallel.run([&](int64_t worker, int64_t i) {
        const Group& group = queries.groups[i / per_group];
        const int64_t begin = queries.row_begin[group.first];
        if (normalize) std::fill_n(scales.queries + i * p.query_length, p.query_length, 0.0f);
        for (int64_t k = queries.row_begin[i]; k < queries.row_begin[i + 1]; ++k) {
            pack_row(group, k - begin, i, queries.row_token[k], rows.get() + worker * p.dimension);
        }
        if (i + 1 == group.last) queries.clear_rest(group);
    });
}

void Walk::pack_row(const Group& group, int64_t at, int64_t i, int64_t r, float* row) {
    const char* source = query_row(p, i, r);
    const bool pairs = queries.pairs;
    float factor = 1.0f;
    if (!pairs || normalize) set.widen(p.type, source, p.dimension, row);
    if (normalize) {
        const float scale = inverse_norm(row);
        scales.queries[i * p.query_length + r] = scale;
        if (pairs) {
            factor = scale;  // the pairs stay as they are: their maximum is scaled
        } else {
            for (int64_t d = 0; d < p.dimension; ++d) row[d] *= scale;
        }
    }
    factor *= query_weight(p, i, r);
    if (!row_factor.empty()) row_factor[queries.row_begin[group.first] + at] = factor;
    queries.put(group, at, pairs ? source : reinterpret_cast<const char*>(row));
}

float Walk::inverse_norm(const float* row) const {
    const float norm = std::sqrt(set.dot(row, row, p.dimension));
    return 1.0f / (norm < norm_floor ? norm_floor : norm);  // NaN stays NaN
}

// ------------------------------------------------------------------ documents

// Inverse norms of a document's kept tokens, 0 for the others.
void Walk::compute_scales(const Document& document, float* row) const {
    float* found = scales.documents + document.first_token;
    for (int64_t t = 0; t < document.length; ++t) {
        found[t] = 0;
        if (!document.keeps(t)) continue;
        const auto floats = reinterpret_cast<const float*>(document.token(t));
        if (p.type != Type::float32) set.widen(p.type, document.token(t), p.dimension, row);
        found[t] = inverse_norm(p.type == Type::float32 ? floats : row);
    }
}

// Several groups meet every document: its norms come before all of them.
void Walk::compute_document_scales() {
    const int64_t count = p.document_count();
    Tasks parallel(threads, count, count * std::max<int64_t>(longest, 1) * p.dimension);
    Scratch<float> rows(parallel.workers * p.dimension);
    parallel.run([&](int64_t worker, int64_t n) { compute_scales(at(0, n), rows.get() + worker * p.dimension); });
    scales_are_known = true;
}

void Walk::make_tasks() {
    const int64_t count = p.documents_per_query, groups = static_cast<int64_t>(queries.groups.size());
    const auto cost = [&](const Group& group, int64_t j) {
        const Document document = at(group.first, j);
        return (document.length + chunk_step) * std::max<int64_t>(group.vectors, 1) * queries.steps * set.lanes;
    };
    for (const Group& group : queries.groups) {
        for (int64_t j = 0; j < count; ++j) work += cost(group, j);
    }
    const int64_t share = std::max(work / (threads.count * tasks_per_thread), int64_t{1} << 18);
    for (int64_t g = 0; g < groups; ++g) {
        for (int64_t first = 0; first < count;) {
            int64_t last = first, sum = 0;
            while (last < count && sum < share) sum += cost(queries.groups[g], last++);
            tasks.push_back({g, first, last});
            first = last;
        }
    }
}

Walk::Worker Walk::make_worker() const {
    Worker worker;
    worker.kept = Scratch<int32_t>(p.document_mask ? longest : 0);
    worker.rows = Scratch<const char*>(p.document_mask ? longest : 0);
    const int64_t chunk = std::min(longest, chunk_tokens());
    const bool factors = decoder && decoder->has_factors;
    worker.scales = Scratch<float>(normalize && p.document_mask ? longest : factors ? chunk : 0);
    worker.decoded = Scratch<float>(decoder ? chunk * queries.steps : 0);
    worker.row = Scratch<float>(p.dimension);
    return worker;
}

int64_t Walk::chunk_tokens() const {
    const bool single = decoder && !fixed_chunks && queries.most_vectors <= widest_panel;
    const int64_t tokens =
        (single ? burst_bytes : chunk_bytes) / std::max<int64_t>(4, queries.steps * 4) / chunk_step * chunk_step;
    return std::max(tokens, chunk_step);
}

void Walk::run_task(int64_t worker, const Task& task) {
    const Group& group = queries.groups[task.group];
    for (int64_t j = task.first_document; j < task.last_document; ++j) {
        const Document document = at(group.first, j);
        Pair pair;
        pair.j = j;
        pair.too_long = is_too_long(p, document.length);
        if (normalize && !scales_are_known) compute_scales(document, workers[worker].row.get());
        const int64_t kept = pair.too_long ? 0 : keep_tokens(document, workers[worker]);
        if (kept > 0) pass(worker, group, document, kept);
        pair.has_tokens = kept > 0;
        pair.kept = p.document_mask ? workers[worker].kept.get() : nullptr;
        for (pair.i = group.first; pair.i < group.last; ++pair.i) {
            pair.in_group = queries.row_begin[pair.i] - queries.row_begin[group.first];
            write(worker, pair);
        }
    }
}

int64_t Walk::keep_tokens(const Document& document, Worker& worker) const {
    if (document.mask == nullptr) return document.length;
    int64_t kept = 0;
    for (int64_t t = 0; t < document.length; ++t) {
        if (!document.keeps(t)) continue;
        worker.kept[kept] = static_cast<int32_t>(t);
        worker.rows[kept] = document.token(t);
        if (normalize) worker.scales[kept] = scales.documents[document.first_token + t];
        ++kept;
    }
    return kept;
}

// All panels of the group meet the document, chunk by chunk.
void Walk::pass(int64_t worker, const Group& group, const Document& document, int64_t kept) {
    const Worker& own = workers[worker];
    const int64_t rows = group.vectors * set.lanes;
    start(worker, rows);
    PanelTask task;
    task.steps = queries.steps;
    task.half_step = queries.half_step();
    for (int64_t first = 0; first < kept; first += chunk_tokens()) {
        task.tokens = std::min(chunk_tokens(), kept - first);
        task.first_position = static_cast<int32_t>(first);
        task.first_row = document.token(first);
        task.row_bytes = document.token_bytes;
        task.rows = document.mask ? own.rows.get() + first : nullptr;
        if (decoder) decode_rows(task, document, kept - first, own);
        if (normalize) {
            const float* all = document.mask ? own.scales.get() : scales.documents + document.first_token;
            task.scales = all + first;
        }
        for (int64_t row = 0; row < rows; row += queries.panel_rows()) {
            task.vectors = queries.vectors(group, row);
            task.panel = queries.panel(group, row);
            task.prefetch_bytes = row == 0 && !decoder ? chunk_bytes : 0;
            meet(worker, task, row);
        }
    }
}

// Rows of the task's tokens in place of what is stored; `left` tokens remain in the document.
void Walk::decode_rows(PanelTask& task, const Document& document, int64_t left, const Worker& worker) const {
    StoredTokens tokens;
    tokens.first = task.first_row;
    tokens.stride = task.row_bytes;
    tokens.places = task.rows;
    tokens.number = document.first_token + (document.mask ? 0 : task.first_position);
    tokens.kept = document.mask ? worker.kept.get() + task.first_position : nullptr;
    tokens.count = left;
    const DecodedRows rows{reinterpret_cast<char*>(worker.decoded.get()), queries.steps * 4, worker.scales.get(),
                           worker.row.get()};
    decoder->decode(tokens, task.tokens, rows);
    task.first_row = rows.first;
    task.row_bytes = rows.stride;
    task.rows = nullptr;
    if (decoder->has_factors) task.scales = rows.factors;
}

float sum_of(const float* values, int64_t count) {
    float parts[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    int64_t k = 0;
    for (; k + 8 <= count; k += 8) {
        for (int lane = 0; lane < 8; ++lane) parts[lane] += values[k + lane];
    }
    for (int lane = 0; k < count; ++k, ++lane) parts[lane] += values[k];
    return ((parts[0] + parts[4]) + (parts[2] + parts[6])) + ((parts[1] + parts[5]) + (parts[3] + parts[7]));
}

}  // namespace jmlr::maxsim::cpu
