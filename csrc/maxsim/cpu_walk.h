// The walk that forward passes share: queries are packed once into panels, whose vectors hold one embedding dimension
// of as many query tokens as a vector has lanes; documents are read where they lie. What is made of the similarities,
// in registers or in a cache, is the subclass's own.
//
// Queries that share documents form groups whose panels fit a core's second cache. A task is one group and a run of
// documents. Derivation and measurements: docs/maxsim-cpu.md.

#pragma once

#include <vector>

#include "cpu_forward.h"
#include "cpu_panels.h"

namespace jmlr::maxsim::cpu {

class Walk {
public:
    virtual ~Walk() = default;
    void run();

protected:
    // What the walk fills beside the subclass's own outputs; null unless both sides are normalised.
    struct Scales {
        float* queries = nullptr;    // [Nq, Lq]
        float* documents = nullptr;  // as documents less D
    };

    // Without a decoder documents are of the problem's type.
    Walk(const Problem& problem, const Scales& scales, const Decoder* stored, const Threads& threads);

    virtual void make_workers(int64_t count) = 0;
    // A group's rows, rounded up to whole vectors, start on a document.
    virtual void start(int64_t worker, int64_t rows) = 0;
    // The panel that starts with `row` of the group meets some of the document's kept tokens.
    virtual void meet(int64_t worker, const PanelTask& task, int64_t row) = 0;
    // Outputs of query i, whose first row in the group is `in_group`, and document j. `kept`: positions of its kept
    // tokens, null when all of them are.
    struct Pair {
        int64_t i = 0;
        int64_t j = 0;
        int64_t in_group = 0;
        bool has_tokens = false;
        bool too_long = false;
        const int32_t* kept = nullptr;
    };
    virtual void write(int64_t worker, const Pair& pair) = 0;

    const Problem& p;
    const Instructions& set;
    QueryPanels queries;
    bool fixed_chunks = false;      // results depend on where chunks end, which threads must not move then
    std::vector<float> row_factor;  // [kept] weight, and scale where the maximum is scaled; empty: all 1

private:
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
    };

    int64_t queries_per_group() const;
    void pack_queries();
    void pack_row(const Group& group, int64_t at, int64_t i, int64_t r, float* row);
    float inverse_norm(const float* row) const;
    void compute_scales(const Document& document, float* row) const;
    void compute_document_scales();
    void make_tasks();
    Worker make_worker() const;
    int64_t chunk_tokens() const;
    void run_task(int64_t worker, const Task& task);
    int64_t keep_tokens(const Document& document, Worker& worker) const;
    void pass(int64_t worker, const Group& group, const Document& document, int64_t kept);
    void decode_rows(PanelTask& task, const Document& document, int64_t left, const Worker& worker) const;
    Document at(int64_t i, int64_t j) const { return document_at(p, i, j, document_bytes); }

    const Scales scales;
    const Threads& threads;
    const bool normalize;
    const Widen widen;
    const Decoder* decoder;      // null: stored rows are what the panels meet
    int64_t document_bytes = 0;  // of a stored element
    bool scales_are_known = false;
    int64_t longest = 0;
    int64_t work = 0;
    std::vector<Task> tasks;
    std::vector<Worker> workers;
};

// In eight chains, whatever the instruction set.
float sum_of(const float* values, int64_t count);

}  // namespace jmlr::maxsim::cpu
