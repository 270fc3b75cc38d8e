// Shifted sparse attention as the CUDA path launches it.
#include "../../csrc/shifted_attention/sm80.h"
#include "tensor_argument.h"

namespace host_build {
namespace {

using jmlr::shifted_attention::Input;
using jmlr::shifted_attention::Problem;
using jmlr::shifted_attention::Type;

Input input_of(const TensorArgument& x) {
    if (x.sizes.size() == 3) return {x.data, 0, x.strides[0], x.strides[1]};
    return {x.data, x.strides[0], x.strides[1], x.strides[2]};
}

Problem problem_of(const TensorArgument& q, const TensorArgument& k, const TensorArgument& v, int64_t group_size,
                   const TensorArgument& cu_seqlens, const TensorArgument& seq_lens, bool wrap, double scale) {
    bool packed = q.sizes.size() == 3;
    Problem problem{};
    problem.type = q.dtype == "float32" ? Type::float32 : q.dtype == "float16" ? Type::float16 : Type::bfloat16;
    problem.batches = packed ? 1 : q.sizes[0];
    problem.rows = q.sizes[packed ? 0 : 1];
    problem.heads = q.sizes[packed ? 1 : 2];
    problem.kv_heads = k.sizes[packed ? 1 : 2];
    problem.head_dim = q.sizes.back();
    problem.group_size = group_size;
    problem.documents = packed ? cu_seqlens.sizes[0] - 1 : 0;
    problem.cu_seqlens = cu_seqlens.as<const int32_t>();
    problem.seq_lens = seq_lens.as<const int32_t>();
    problem.wrap = wrap;
    problem.scale = scale;
    problem.q = input_of(q), problem.k = input_of(k), problem.v = input_of(v);
    return problem;
}

void forward(const py::object& q_, const py::object& k_, const py::object& v_, const py::object& out_,
             const py::object& lse_, int64_t group_size, const py::object& cu_seqlens_, const py::object& seq_lens_,
             bool wrap, double scale, uint64_t seed) {
    Tensors tensors(seed);
    TensorArgument q = tensors.input(q_, "q"), k = tensors.input(k_, "k"), v = tensors.input(v_, "v");
    TensorArgument cu_seqlens = tensors.input(cu_seqlens_, "cu_seqlens"),
                   seq_lens = tensors.input(seq_lens_, "seq_lens");
    TensorArgument out = tensors.output(out_, "out"), lse = tensors.output(lse_, "lse");
    jmlr::shifted_attention::ForwardProblem problem{problem_of(q, k, v, group_size, cu_seqlens, seq_lens, wrap, scale),
                                                    out.data, lse.as<float>()};
    jmlr::shifted_attention::sm80::forward(problem, nullptr);
}

void backward(const py::object& grad_out_, const py::object& q_, const py::object& k_, const py::object& v_,
              const py::object& out_, const py::object& lse_, const py::object& delta_, const py::object& dq_,
              const py::object& dk_, const py::object& dv_, int64_t group_size, const py::object& cu_seqlens_,
              const py::object& seq_lens_, bool wrap, double scale, uint64_t seed) {
    Tensors tensors(seed);
    TensorArgument grad_out = tensors.input(grad_out_, "grad_out");
    TensorArgument q = tensors.input(q_, "q"), k = tensors.input(k_, "k"), v = tensors.input(v_, "v");
    TensorArgument out = tensors.input(out_, "out"), lse = tensors.input(lse_, "lse");
    TensorArgument cu_seqlens = tensors.input(cu_seqlens_, "cu_seqlens"),
                   seq_lens = tensors.input(seq_lens_, "seq_lens");
    TensorArgument delta = tensors.output(delta_, "delta"), dq = tensors.output(dq_, "dq");
    TensorArgument dk = tensors.output(dk_, "dk"), dv = tensors.output(dv_, "dv");
    jmlr::shifted_attention::BackwardProblem problem{problem_of(q, k, v, group_size, cu_seqlens, seq_lens, wrap, scale),
                                                     input_of(grad_out),
                                                     out.data,
                                                     lse.as<const float>(),
                                                     delta.as<float>(),
                                                     dq.data,
                                                     dk.data,
                                                     dv.data};
    jmlr::shifted_attention::sm80::backward(problem, nullptr);
}

}  // namespace

void bind_shifted_attention(py::module_& module) {
    module.def("shifted_attention_forward", &forward);
    module.def("shifted_attention_backward", &backward);
}

}  // namespace host_build
