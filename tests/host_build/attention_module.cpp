// Shifted sparse attention as the CUDA path launches it.
#include "../../csrc/shifted_attention/sm80.h"
#include "attention_problem.h"

namespace host_build {
namespace {

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
