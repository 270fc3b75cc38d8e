// The backward pass of shifted sparse attention as the CUDA path launches it at compute capability 9.0.
#include "../../csrc/shifted_attention/sm90.h"
#include "attention_problem.h"

namespace host_build {
namespace {

using jmlr::shifted_attention::BackwardProblem;

void backward(const py::object& grad_out_, const py::object& q_, const py::object& k_, const py::object& v_,
              const py::object& out_, const py::object& lse_, const py::object& delta_, const py::object& dq_,
              const py::object& dk_, const py::object& dv_, int64_t group_size, const py::object& cu_seqlens_,
              const py::object& seq_lens_, double scale, int processors, uint64_t seed) {
    Tensors tensors(seed);
    TensorArgument grad_out = tensors.input(grad_out_, "grad_out");
    TensorArgument q = tensors.input(q_, "q"), k = tensors.input(k_, "k"), v = tensors.input(v_, "v");
    TensorArgument out = tensors.input(out_, "out"), lse = tensors.input(lse_, "lse");
    TensorArgument cu_seqlens = tensors.input(cu_seqlens_, "cu_seqlens"),
                   seq_lens = tensors.input(seq_lens_, "seq_lens");
    TensorArgument delta = tensors.output(delta_, "delta"), dq = tensors.output(dq_, "dq");
    TensorArgument dk = tensors.output(dk_, "dk"), dv = tensors.output(dv_, "dv");
    BackwardProblem problem{problem_of(q, k, v, group_size, cu_seqlens, seq_lens, false, scale),
                            input_of(grad_out),
                            out.data,
                            lse.as<const float>(),
                            delta.as<float>(),
                            dq.data,
                            dk.data,
                            dv.data};
    if (!jmlr::shifted_attention::sm90::serves(problem)) throw std::invalid_argument("not served");
    jmlr::shifted_attention::sm90::backward(problem, processors, nullptr);
}

}  // namespace

void bind_shifted_attention_sm90_backward(py::module_& module) {
    module.def("shifted_attention_sm90_backward", &backward);
}

}  // namespace host_build
