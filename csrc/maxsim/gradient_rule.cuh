// A score's gradient inside a kernel, by the rules of jmlr_kernels/maxsim/gradient_rule.py.
#pragma once

#include "rows.cuh"

namespace jmlr::maxsim {

// d(loss)/d(maximum) of one query token, for Rule::tokens.
JMLR_DEVICE float maximum_gradient(const RuleInput& rule, const Problem& p, int64_t query, int64_t document,
                                   int64_t token) {
    return tiles::load(rule.grad + (query * p.documents_per_query + document) * p.query_length + token);
}

// d(loss)/d(score) of a query and a document, or with Rule::tokens d(loss)/d(maximum) of one query token.
JMLR_DEVICE float score_gradient(const RuleInput& rule, const Problem& p, int64_t query, int64_t document,
                                 int64_t token) {
    using tiles::load;
    int64_t pair = query * p.documents_per_query + document;
    if (rule.rule == Rule::scores) return load(rule.grad + pair);
    if (rule.rule == Rule::tokens) return maximum_gradient(rule, p, query, document, token);
    float up = load(rule.grad + query), score = load(rule.scores + pair);
    float top = load(rule.row + 2 * query), mass = load(rule.row + 2 * query + 1);
    if (rule.rule == Rule::margins) {
        float residual = score - load(rule.teacher + pair);
        return up * (document == 0 ? float(p.documents_per_query) * top - mass : residual - top);
    }
    float inverse = 1.0f / load(rule.temperatures);
    float probability = expf((score - top) * inverse - mass), target = 0.0f;
    if (rule.rule == Rule::labels) {
        if (rule.labels != nullptr) target = load(rule.labels + query) == document ? 1.0f : 0.0f;
    } else {
        float teacher_top = load(rule.teacher_row + 2 * query), teacher_mass = load(rule.teacher_row + 2 * query + 1);
        float inverse_target = 1.0f / load(rule.temperatures + 1);
        target = expf((load(rule.teacher + pair) - teacher_top) * inverse_target - teacher_mass);
    }
    return up * inverse * (probability - target);
}

}  // namespace jmlr::maxsim
