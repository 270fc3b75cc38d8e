// jmlr_native::shifted_attention_forward and _backward on CUDA tensors: on their device, on its current stream.

#include <tuple>

#include "../kernel_choice.h"
#include "../tensors.h"
#include "sm80.h"
#ifdef JMLR_SM90
#include "sm90.h"
#endif

namespace jmlr::shifted_attention {
namespace {

std::vector<int64_t> shape_like(const Tensor& tensor) {
    std::vector<int64_t> shape;
    for (int64_t i = 0; i < tensor.dim(); ++i) shape.push_back(tensor.size(i));
    return shape;
}

Input input_of(const Tensor& tensor) {
    const bool packed = tensor.dim() == 3;
    return {tensor.const_data_ptr(), packed ? 0 : tensor.stride(0), tensor.stride(packed ? 0 : 1),
            tensor.stride(packed ? 1 : 2)};
}

void check_input(const char* name, const Tensor& tensor, const Tensor& q, int64_t heads) {
    std::vector<int64_t> shape = shape_like(q);
    shape[shape.size() - 2] = heads;
    check_shape(name, tensor, shape);
    check_dtype(name, tensor, q.scalar_type());
    check_device(name, tensor, q);
}

void check_lengths(const char* name, const Tensor& lengths, const Tensor& q) {
    check_dim(name, lengths, 1);
    check_dtype(name, lengths, ScalarType::Int);
    check_device(name, lengths, q);
}

// One problem, and the tensors that it points into.
struct Checked {
    Problem problem;
    Tensor q, k, v;
    OptionalTensor cu_seqlens, seq_lens;
};

Checked check_problem(const Tensor& q, const Tensor& k, const Tensor& v, int64_t group_size,
                      const OptionalTensor& cu_seqlens, const OptionalTensor& seq_lens, bool wrap, double scale) {
    const bool packed = cu_seqlens.has_value();
    check(!packed || !seq_lens, "cu_seqlens and seq_lens exclude each other: packed rows have no padding");
    check_dim("q", q, packed ? 3 : 4);
    check_dim("k", k, packed ? 3 : 4);
    const int64_t head_axis = q.dim() - 2, heads = q.size(head_axis), kv_heads = k.size(head_axis);
    check(heads > 0 && kv_heads > 0 && heads % kv_heads == 0, heads, " query heads over ", kv_heads,
          " kv heads: give a multiple of the kv heads");
    check_input("k", k, q, kv_heads);
    check_input("v", v, q, kv_heads);
    check(group_size >= 2, "group_size is ", group_size, ": give at least 2 tokens");
    const int64_t head_dim = q.size(head_axis + 1);
    check(head_dim >= 1 && head_dim <= kWidestHead, "the compiled kernels take heads of 1 to ", kWidestHead,
          " dimensions, not ", head_dim, "; use backend='torch'");

    Checked checked{{}, with_unit_stride(q), with_unit_stride(k), with_unit_stride(v), {}, {}};
    Problem& problem = checked.problem;
    problem.type = type_of<Type>(q);
    problem.batches = packed ? 1 : q.size(0);
    problem.rows = q.size(packed ? 0 : 1);
    problem.heads = heads;
    problem.kv_heads = kv_heads;
    problem.head_dim = head_dim;
    problem.group_size = group_size;
    if (packed) {
        check_lengths("cu_seqlens", *cu_seqlens, q);
        check(cu_seqlens->size(0) > 0, "cu_seqlens must be one longer than there are documents, but is empty");
        checked.cu_seqlens = torch::stable::contiguous(*cu_seqlens);
        problem.documents = cu_seqlens->size(0) - 1;
    }
    if (seq_lens) {
        check_lengths("seq_lens", *seq_lens, q);
        check_shape("seq_lens", *seq_lens, {problem.batches});
        checked.seq_lens = torch::stable::contiguous(*seq_lens);
    }
    problem.cu_seqlens = data_or_null<int32_t>(checked.cu_seqlens);
    problem.seq_lens = data_or_null<int32_t>(checked.seq_lens);
    problem.wrap = wrap;
    problem.scale = scale;
    problem.q = input_of(checked.q);
    problem.k = input_of(checked.k);
    problem.v = input_of(checked.v);
    return checked;
}

Tensor unwritten_like(const Tensor& tensor) { return new_tensor(tensor, shape_like(tensor), tensor.scalar_type()); }

std::vector<int64_t> statistics_shape(const Problem& problem, bool packed) {
    if (packed) return {problem.heads, problem.rows};
    return {problem.batches, problem.heads, problem.rows};
}

void run(const ForwardProblem& problem, void* stream) {
#ifdef JMLR_SM90
    if (use_hopper("shifted_sparse_attention", sm90::serves(problem))) {
        return sm90::forward(problem, multiprocessors(), stream);
    }
#else
    use_hopper("shifted_sparse_attention", false);
#endif
    sm80::forward(problem, stream);
}

void run(const BackwardProblem& problem, void* stream) {
#ifdef JMLR_SM90
    if (use_hopper("shifted_sparse_attention", sm90::serves(problem))) {
        return sm90::backward(problem, multiprocessors(), stream);
    }
#else
    use_hopper("shifted_sparse_attention", false);
#endif
    sm80::backward(problem, stream);
}

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, int64_t group_size, OptionalTensor cu_seqlens,
                                   OptionalTensor seq_lens, bool wrap, double scale) {
    const OnDeviceOf device(q);
    const Checked checked = check_problem(q, k, v, group_size, cu_seqlens, seq_lens, wrap, scale);
    Tensor out = unwritten_like(q);
    Tensor lse = new_tensor(q, statistics_shape(checked.problem, cu_seqlens.has_value()), ScalarType::Float);
    if (q.numel() > 0) {
        run(ForwardProblem{checked.problem, out.mutable_data_ptr(), static_cast<float*>(lse.mutable_data_ptr())},
            current_cuda_stream(q));
    }
    return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
                                            int64_t group_size, OptionalTensor cu_seqlens, OptionalTensor seq_lens,
                                            bool wrap, double scale) {
    const OnDeviceOf device(q);
    const Checked checked = check_problem(q, k, v, group_size, cu_seqlens, seq_lens, wrap, scale);
    const std::vector<int64_t> statistics = statistics_shape(checked.problem, cu_seqlens.has_value());
    check_input("grad_out", grad_out, q, checked.problem.heads);
    check_input("out", out, q, checked.problem.heads);
    check_shape("lse", lse, statistics);
    check_dtype("lse", lse, ScalarType::Float);
    check_device("lse", lse, q);
    Tensor dq = unwritten_like(q), dk = unwritten_like(k), dv = unwritten_like(v);
    if (q.numel() > 0) {
        Tensor grads = with_unit_stride(grad_out), delta = new_tensor(q, statistics, ScalarType::Float);
        out = torch::stable::contiguous(out);
        lse = torch::stable::contiguous(lse);
        run(BackwardProblem{checked.problem, input_of(grads), out.const_data_ptr(),
                            static_cast<const float*>(lse.const_data_ptr()),
                            static_cast<float*>(delta.mutable_data_ptr()), dq.mutable_data_ptr(), dk.mutable_data_ptr(),
                            dv.mutable_data_ptr()},
            current_cuda_stream(q));
    }
    return {dq, dk, dv};
}

}  // namespace
}  // namespace jmlr::shifted_attention

STABLE_TORCH_LIBRARY_IMPL(JMLR_NAMESPACE, CUDA, library) {
    library.impl("shifted_attention_forward", TORCH_BOX(&jmlr::shifted_attention::forward));
    library.impl("shifted_attention_backward", TORCH_BOX(&jmlr::shifted_attention::backward));
}
