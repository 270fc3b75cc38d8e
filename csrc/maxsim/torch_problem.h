// MaxSim's operations on torch's tensors, less what computes: checks, allocation, and the structs of problem.h.
// torch_cpu.cpp and torch_cuda.cpp add the kernels.
#pragma once

#include <limits>
#include <tuple>

#include "../tensors.h"
#include "loss_rows.h"
#include "problem.h"

namespace jmlr::maxsim {

using torch::headeronly::IntHeaderOnlyArrayRef;

inline ScalarType dtype_of(WinnerType type) {
    return type == WinnerType::uint8    ? ScalarType::Byte
           : type == WinnerType::uint16 ? ScalarType::UInt16
                                        : ScalarType::Int;
}

inline Tensor contiguous_as(const Tensor& tensor, ScalarType type) {
    return torch::stable::contiguous(tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type));
}

// Memory for one operation, which torch gives to the next one on the same stream.
inline Tensor scratch_memory(const Tensor& like, int64_t bytes) { return new_tensor(like, {bytes}, ScalarType::Byte); }

// One problem, and the copies that it points into.
struct Checked {
    Problem problem;
    Tensor queries, documents;
    OptionalTensor query_mask, document_mask, query_weights, cu_seqlens;
};

// The elements that `tensor` holds for each token.
inline void check_width(const char* name, const Tensor& tensor, int64_t width) {
    const int64_t found = tensor.size(tensor.dim() - 1);
    check(found == width, name, " must have ", width, " elements in their last dimension, but have ", found);
}

// Everything but the documents' dtype and width; `name` is what the operation calls them.
inline Checked check_layout(const char* name, const Tensor& queries, const Tensor& documents,
                            const OptionalTensor& query_mask, const OptionalTensor& document_mask,
                            const OptionalTensor& query_weights, const OptionalTensor& cu_seqlens, bool candidates,
                            int64_t max_length) {
    check_dim("queries", queries, 3);
    check_dim(name, documents, cu_seqlens ? 2 : candidates ? 4 : 3);
    Checked checked{{}, with_unit_stride(queries), with_unit_stride(documents), query_mask, document_mask, {}, {}};
    Problem& p = checked.problem;
    const Tensor &q = checked.queries, &d = checked.documents;
    p.type = type_of<Type>(queries);
    p.query_count = q.size(0);
    p.query_length = q.size(1);
    p.dimension = q.size(2);
    p.candidates = candidates;
    p.max_length = max_length;
    p.queries = q.const_data_ptr();
    p.query_stride = q.stride(0);
    p.query_token_stride = q.stride(1);
    p.documents = d.const_data_ptr();
    const int64_t last = d.dim() - 1;
    p.document_token_stride = d.stride(last - 1);
    if (cu_seqlens) {
        check_dim("cu_seqlens", *cu_seqlens, 1);
        check_dtype("cu_seqlens", *cu_seqlens, ScalarType::Int);
        check(cu_seqlens->size(0) > 0, "cu_seqlens must be one longer than there are documents, but is empty");
        checked.cu_seqlens = torch::stable::contiguous(*cu_seqlens);
        p.cu_seqlens = static_cast<const int32_t*>(checked.cu_seqlens->const_data_ptr());
        p.packed_tokens = d.size(0);
        const int64_t count = cu_seqlens->size(0) - 1, owners = candidates ? p.query_count : 1;
        p.documents_per_query = owners ? count / owners : 0;
        check(p.documents_per_query * owners == count, "cu_seqlens holds ", count, " documents, which ", p.query_count,
              " queries cannot share evenly");
    } else {
        check(!candidates || d.size(0) == p.query_count, name, " holds candidates for ", d.size(0),
              " queries, but there are ", p.query_count);
        p.documents_per_query = d.size(last - 2);
        p.document_length = d.size(last - 1);
        p.document_stride = d.stride(last - 2);
        p.document_query_stride = candidates ? d.stride(0) : 0;
    }
    const int64_t longest = std::numeric_limits<int32_t>::max();
    check(p.document_length <= longest && p.query_length <= longest, "more than 2**31 - 1 tokens in a text");
    if (query_mask) {
        check_shape("query_mask", *query_mask, {p.query_count, p.query_length});
        check_dtype("query_mask", *query_mask, ScalarType::Bool);
        p.query_mask = static_cast<const uint8_t*>(query_mask->const_data_ptr());
        p.query_mask_stride = query_mask->stride(0);
        p.query_mask_token_stride = query_mask->stride(1);
    }
    if (document_mask) {
        const Tensor& mask = *document_mask;
        std::vector<int64_t> shape;
        for (int64_t i = 0; i < last; ++i) shape.push_back(d.size(i));
        check_shape("document_mask", mask, shape);
        check_dtype("document_mask", mask, ScalarType::Bool);
        p.document_mask = static_cast<const uint8_t*>(mask.const_data_ptr());
        p.document_mask_token_stride = mask.stride(last - 1);
        p.document_mask_stride = last > 1 ? mask.stride(last - 2) : 0;
        p.document_mask_query_stride = last > 2 ? mask.stride(0) : 0;
    }
    if (query_weights) {
        check_shape("query_weights", *query_weights, {p.query_count, p.query_length});
        checked.query_weights = query_weights->scalar_type() == ScalarType::Float
                                    ? *query_weights
                                    : torch::stable::to(*query_weights, ScalarType::Float);
        p.query_weights = static_cast<const float*>(checked.query_weights->const_data_ptr());
        p.query_weights_stride = checked.query_weights->stride(0);
        p.query_weights_token_stride = checked.query_weights->stride(1);
    }
    for (const auto& [other, tensor] : {std::pair<const char*, OptionalTensor>{name, documents},
                                        {"query_mask", query_mask},
                                        {"document_mask", document_mask},
                                        {"query_weights", query_weights},
                                        {"cu_seqlens", cu_seqlens}}) {
        if (tensor) check_device(other, *tensor, queries);
    }
    return checked;
}

inline Checked check_problem(const Tensor& queries, const Tensor& documents, const OptionalTensor& query_mask,
                             const OptionalTensor& document_mask, const OptionalTensor& query_weights,
                             const OptionalTensor& cu_seqlens, bool candidates, int64_t max_length) {
    check_dtype("documents", documents, queries.scalar_type());
    Checked checked = check_layout("documents", queries, documents, query_mask, document_mask, query_weights,
                                   cu_seqlens, candidates, max_length);
    const int64_t width = documents.size(documents.dim() - 1), dimension = checked.problem.dimension;
    check(width == dimension, "documents have D=", width, " and queries D=", dimension);
    return checked;
}

// jmlr_kernels/maxsim/layout.py: the smallest integer that holds a position. Packed documents keep one value for
// nobody.
inline WinnerCode code_of(const Problem& p) {
    int64_t longest = p.document_length;
    if (p.packed()) {
        longest = 1 + (p.max_length > 0 && p.max_length < p.packed_tokens ? p.max_length : p.packed_tokens);
    }
    if (longest <= 256) return {WinnerType::uint8, 255, longest < 256 || p.packed()};
    if (longest <= 65536) return {WinnerType::uint16, 65535, longest < 65536 || p.packed()};
    return {WinnerType::int32, -1, true};
}

inline std::vector<int64_t> leading_sizes(const Tensor& tensor) {
    std::vector<int64_t> sizes;
    for (int64_t i = 0; i + 1 < tensor.dim(); ++i) sizes.push_back(tensor.size(i));
    return sizes;
}

inline std::vector<int64_t> all_sizes(const Tensor& tensor) {
    std::vector<int64_t> sizes = leading_sizes(tensor);
    sizes.push_back(tensor.size(tensor.dim() - 1));
    return sizes;
}

// The operation maxsim_forward; `run` takes its problem and the outputs to fill.
template <class Run>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward_with(Run run, Tensor queries, Tensor documents,
                                                        OptionalTensor query_mask, OptionalTensor document_mask,
                                                        OptionalTensor query_weights, OptionalTensor cu_seqlens,
                                                        bool candidates, bool normalize, bool per_token,
                                                        bool need_winners, int64_t max_length) {
    const Checked checked =
        check_problem(queries, documents, query_mask, document_mask, query_weights, cu_seqlens, candidates, max_length);
    const Problem& p = checked.problem;
    ForwardOutput out;
    out.code = code_of(p);
    out.per_token = per_token;
    const std::vector<int64_t> pairs = {p.query_count, p.documents_per_query};
    const std::vector<int64_t> maxima = {p.query_count, p.documents_per_query, p.query_length}, none = {0};
    Tensor scores = new_tensor(queries, per_token ? maxima : pairs, ScalarType::Float);
    Tensor winners = new_tensor(queries, need_winners ? maxima : none, dtype_of(out.code.type));
    Tensor query_scales = new_tensor(queries, normalize ? leading_sizes(queries) : none, ScalarType::Float);
    Tensor document_scales = new_tensor(queries, normalize ? leading_sizes(documents) : none, ScalarType::Float);
    out.scores = static_cast<float*>(scores.mutable_data_ptr());
    out.winners = need_winners ? winners.mutable_data_ptr() : nullptr;
    out.query_scales = normalize ? static_cast<float*>(query_scales.mutable_data_ptr()) : nullptr;
    out.document_scales = normalize ? static_cast<float*>(document_scales.mutable_data_ptr()) : nullptr;
    out.normalize = normalize;
    run(p, out);
    return {scores, winners, query_scales, document_scales};
}

// The rule's tensors by role, in `kept` as contiguous float32.
inline RuleInput rule_of(const std::string& name, const std::vector<Tensor>& tensors, const Problem& p,
                         std::vector<Tensor>& kept) {
    static const struct {
        const char* name;
        Rule rule;
        size_t least, most;
    } rules[] = {{"scores", Rule::scores, 1, 1},
                 {"tokens", Rule::tokens, 1, 1},
                 {"labels", Rule::labels, 4, 5},
                 {"teacher", Rule::teacher, 6, 6},
                 {"margins", Rule::margins, 4, 4}};
    RuleInput input;
    bool known = false;
    for (const auto& one : rules) {
        if (name != one.name) continue;
        known = true;
        input.rule = one.rule;
        check(tensors.size() >= one.least && tensors.size() <= one.most, "rule '", name, "' takes ", one.least,
              " tensors, but got ", tensors.size());
    }
    check(known, "rule '", name, "' is not one of scores, tokens, labels, teacher, margins");
    const std::vector<int64_t> pairs = {p.query_count, p.documents_per_query}, rows = {p.query_count, 2};
    const auto floats = [&](size_t i, const char* role, const std::vector<int64_t>& shape) {
        check_shape(role, tensors[i], shape);
        kept.push_back(contiguous_as(tensors[i], ScalarType::Float));
        return static_cast<const float*>(kept.back().const_data_ptr());
    };
    if (input.rule == Rule::scores) {
        input.grad = floats(0, "the scores' gradient", pairs);
        return input;
    }
    if (input.rule == Rule::tokens) {
        input.grad = floats(0, "the maxima's gradient", {p.query_count, p.documents_per_query, p.query_length});
        return input;
    }
    input.grad = floats(0, "the losses' gradient", {p.query_count});
    input.scores = floats(1, "scores", pairs);
    input.row = floats(2, "the scores' row statistics", rows);
    if (input.rule == Rule::margins) {
        input.teacher = floats(3, "teacher", pairs);
        return input;
    }
    input.temperatures = floats(3, "temperatures", {2});
    if (input.rule == Rule::teacher) {
        input.teacher = floats(4, "teacher", pairs);
        input.teacher_row = floats(5, "the teacher's row statistics", rows);
    } else if (tensors.size() == 5) {
        check_shape("labels", tensors[4], {p.query_count});
        check_dtype("labels", tensors[4], ScalarType::Long);
        kept.push_back(torch::stable::contiguous(tensors[4]));
        input.labels = static_cast<const int64_t*>(kept.back().const_data_ptr());
    }
    return input;
}

// d(queries), d(documents) and d(weights), which `fill` writes through an Output's pointers. Without weights the last
// one is empty.
template <class Output, class Fill>
std::tuple<Tensor, Tensor, Tensor> fill_gradients(const Tensor& queries, const Tensor& documents,
                                                  const OptionalTensor& query_weights, Fill fill) {
    Tensor grad_queries = new_tensor(queries, all_sizes(queries), queries.scalar_type());
    Tensor grad_documents = new_tensor(queries, all_sizes(documents), documents.scalar_type());
    Tensor grad_weights = new_tensor(queries, query_weights ? all_sizes(*query_weights) : std::vector<int64_t>{0},
                                     query_weights ? ScalarType::Float : queries.scalar_type());
    Output out;
    out.grad_queries = grad_queries.mutable_data_ptr();
    out.grad_documents = grad_documents.mutable_data_ptr();
    out.grad_weights = query_weights ? static_cast<float*>(grad_weights.mutable_data_ptr()) : nullptr;
    fill(out);
    if (query_weights && query_weights->scalar_type() != ScalarType::Float) {
        grad_weights = torch::stable::to(grad_weights, query_weights->scalar_type());
    }
    return {grad_queries, grad_documents, grad_weights};
}

// The operation maxsim_backward; `run` takes its problem, what the forward pass saved and the gradients to fill.
template <class Run>
std::tuple<Tensor, Tensor, Tensor> backward_with(Run run, std::vector<Tensor> rule_tensors, Tensor queries,
                                                 Tensor documents, Tensor winners, OptionalTensor query_mask,
                                                 OptionalTensor document_mask, OptionalTensor query_weights,
                                                 OptionalTensor cu_seqlens, OptionalTensor query_scales,
                                                 OptionalTensor document_scales, std::string rule, bool candidates,
                                                 int64_t max_length) {
    const Checked checked =
        check_problem(queries, documents, query_mask, document_mask, query_weights, cu_seqlens, candidates, max_length);
    const Problem& p = checked.problem;
    std::vector<Tensor> kept;
    kept.reserve(8);
    BackwardInput in;
    in.rule = rule_of(rule, rule_tensors, p, kept);
    in.code = code_of(p);
    check_shape("winners", winners, {p.query_count, p.documents_per_query, p.query_length});
    check_dtype("winners", winners, dtype_of(in.code.type));
    const Tensor contiguous_winners = torch::stable::contiguous(winners);
    in.winners = contiguous_winners.const_data_ptr();
    check(query_scales.has_value() == document_scales.has_value(), "give both inverse norms or neither");
    if (query_scales) {
        check_shape("query_scales", *query_scales, leading_sizes(queries));
        check_shape("document_scales", *document_scales, leading_sizes(documents));
        kept.push_back(contiguous_as(*query_scales, ScalarType::Float));
        in.query_scales = static_cast<const float*>(kept.back().const_data_ptr());
        kept.push_back(contiguous_as(*document_scales, ScalarType::Float));
        in.document_scales = static_cast<const float*>(kept.back().const_data_ptr());
    }
    return fill_gradients<BackwardOutput>(queries, documents, query_weights, [&](const auto& out) { run(p, in, out); });
}

// The operation maxsim_loss_rows; `run` takes the rows.
template <class Run>
Tensor loss_rows_with(Run run, Tensor scores, OptionalTensor target, Tensor temperatures, std::string rule) {
    check_dim("scores", scores, 2);
    check_dtype("scores", scores, ScalarType::Float);
    check_shape("temperatures", temperatures, {2});
    check_dtype("temperatures", temperatures, ScalarType::Float);
    check_device("temperatures", temperatures, scores);
    check(rule == "labels" || rule == "teacher" || rule == "margins", "rule '", rule,
          "' is not one of labels, teacher, margins");
    LossRows rows;
    rows.rule = rule == "labels" ? Rule::labels : rule == "teacher" ? Rule::teacher : Rule::margins;
    check(target.has_value() || rows.rule == Rule::labels, "rule '", rule, "' needs the teacher's scores as target");
    rows.query_count = scores.size(0);
    rows.documents_per_query = scores.size(1);
    check(rows.documents_per_query > 0 || rows.query_count == 0, "scores [", rows.query_count,
          ", 0] are of no document: a loss needs one at least");
    const Tensor own = torch::stable::contiguous(scores), factors = torch::stable::contiguous(temperatures);
    OptionalTensor aim;
    if (target) {
        const bool labels = rows.rule == Rule::labels;
        check_shape(labels ? "labels" : "the teacher's scores", *target,
                    labels ? std::vector<int64_t>{rows.query_count} : all_sizes(scores));
        check_dtype(labels ? "labels" : "the teacher's scores", *target, labels ? ScalarType::Long : ScalarType::Float);
        check_device("target", *target, scores);
        aim = torch::stable::contiguous(*target);
        if (labels) rows.labels = static_cast<const int64_t*>(aim->const_data_ptr());
        else rows.teacher = static_cast<const float*>(aim->const_data_ptr());
    }
    Tensor statistics = new_tensor(scores, {rows.query_count, 6}, ScalarType::Float);
    rows.scores = static_cast<const float*>(own.const_data_ptr());
    rows.temperatures = static_cast<const float*>(factors.const_data_ptr());
    rows.statistics = static_cast<float*>(statistics.mutable_data_ptr());
    run(rows);
    return statistics;
}

}  // namespace jmlr::maxsim
