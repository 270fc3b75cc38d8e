// What a loss needs to know of one query's scores: six numbers, in two passes over the row, the same on a CPU and a
// GPU. What each number is, by rule: jmlr_kernels/maxsim/losses.py.
#pragma once

#include <cmath>

#include "../tiles/platform.h"
#include "problem.h"

namespace jmlr::maxsim {

struct LossRows {
    Rule rule = Rule::labels;  // labels, teacher or margins
    int64_t query_count = 0, documents_per_query = 0;
    const float* scores = nullptr;        // [Nq, N], contiguous as all of these
    const float* teacher = nullptr;       // [Nq, N] for teacher and margins
    const int64_t* labels = nullptr;      // [Nq] for labels; null: no document of these is the labelled one
    const float* temperatures = nullptr;  // [2]: of the scores, of the teacher
    float* statistics = nullptr;          // [Nq, 6]
};

// A row is shared by `Lanes`: each takes documents first(), first() + step(), ..., and sum() and highest() put together
// what they found, in a fixed order. Lanes::Sum is the type that lanes add up in.
template <class Lanes>
struct LossRow {
    using Sum = typename Lanes::Sum;

    struct TopAndMass {
        float top;
        Sum mass;
    };

    // max(row), and log(sum(exp((row - max(row)) / temperature))).
    static JMLR_DEVICE TopAndMass top_and_mass(const Lanes& lanes, const float* row, int64_t count, float temperature) {
        float highest = -INFINITY;
        Sum mass = 0;
        for (int64_t document = lanes.first(); document < count; document += lanes.step()) {
            float value = lanes.load(row + document);
            if (value > highest) {
                mass = mass * Sum(expf((highest - value) / temperature)) + 1;
                highest = value;
            } else if (value != -INFINITY) {  // which adds nothing, also where everything was -inf before
                mass += Sum(expf((value - highest) / temperature));
            }
        }
        float top = lanes.highest(highest);
        // A lane without documents has no difference to the top.
        mass = lanes.sum(mass == 0 ? mass : mass * Sum(expf((highest - top) / temperature)));
        return {top, Sum(logf(float(mass)))};
    }

    static JMLR_DEVICE void run(const LossRows& rows, int64_t query, const Lanes& lanes) {
        const int64_t count = rows.documents_per_query;
        const float* scores = rows.scores + query * count;
        float result[6] = {};
        if (rows.rule == Rule::margins) margins(rows, lanes, scores, query, result);
        else chances(rows, lanes, scores, query, result);
        lanes.store(rows.statistics + query * 6, result);
    }

private:
    static JMLR_DEVICE void margins(const LossRows& rows, const Lanes& lanes, const float* scores, int64_t query,
                                    float (&result)[6]) {
        const int64_t count = rows.documents_per_query;
        const float* teacher = rows.teacher + query * count;
        float first = lanes.load(scores) - lanes.load(teacher);
        Sum sum = 0, squares = 0;
        for (int64_t document = lanes.first(); document < count; document += lanes.step()) {
            float residual = lanes.load(scores + document) - lanes.load(teacher + document);
            sum += residual;
            squares += Sum(first - residual) * Sum(first - residual);
        }
        result[0] = first;
        result[1] = float(lanes.sum(sum));
        result[5] = float(lanes.sum(squares));
    }

    static JMLR_DEVICE void chances(const LossRows& rows, const Lanes& lanes, const float* scores, int64_t query,
                                    float (&result)[6]) {
        const int64_t count = rows.documents_per_query;
        const float temperature = lanes.load(rows.temperatures);
        const TopAndMass own = top_and_mass(lanes, scores, count, temperature);
        const float mass = float(own.mass);
        result[0] = own.top;
        result[1] = mass;
        Sum expected = 0, divergence = 0;
        if (rows.rule == Rule::teacher) {
            const float* teacher = rows.teacher + query * count;
            const float softness = lanes.load(rows.temperatures + 1);
            const TopAndMass wish = top_and_mass(lanes, teacher, count, softness);
            const float wish_mass = float(wish.mass);
            result[2] = wish.top;
            result[3] = wish_mass;
            for (int64_t document = lanes.first(); document < count; document += lanes.step()) {
                float rise = lanes.load(scores + document) - own.top;
                float log_chance = rise / temperature - mass;
                float log_share = (lanes.load(teacher + document) - wish.top) / softness - wish_mass;
                float share = expf(log_share);
                expected += Sum(expf(log_chance) - share) * Sum(rise);
                // A document that the teacher rules out (-inf) has no share, whatever it scores.
                if (share > 0) divergence += Sum(share) * Sum(log_share - log_chance);
            }
            result[5] = float(lanes.sum(divergence));
        } else {
            for (int64_t document = lanes.first(); document < count; document += lanes.step()) {
                float rise = lanes.load(scores + document) - own.top;
                expected += Sum(expf(rise / temperature - mass)) * Sum(rise);
            }
            if (rows.labels != nullptr) {
                const int64_t label = lanes.load(rows.labels + query);
                // No such document: loud, not wrong, in the loss and in its gradient.
                if (label >= 0 && label < count) result[2] = lanes.load(scores + label);
                else result[1] = NAN;
            }
        }
        result[4] = float(lanes.sum(expected));
    }
};

}  // namespace jmlr::maxsim
