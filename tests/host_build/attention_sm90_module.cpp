// Shifted sparse attention as the CUDA path launches it at compute capability 9.0.
#include "../../csrc/shifted_attention/sm90.h"
#include "attention_problem.h"

namespace host_build {
namespace {

void forward(const py::object& q_, const py::object& k_, const py::object& v_, const py::object& out_,
             const py::object& lse_, int64_t group_size, const py::object& cu_seqlens_, const py::object& seq_lens_,
             double scale, int processors, uint64_t seed) {
    Tensors tensors(seed);
    TensorArgument q = tensors.input(q_, "q"), k = tensors.input(k_, "k"), v = tensors.input(v_, "v");
    TensorArgument cu_seqlens = tensors.input(cu_seqlens_, "cu_seqlens"),
                   seq_lens = tensors.input(seq_lens_, "seq_lens");
    TensorArgument out = tensors.output(out_, "out"), lse = tensors.output(lse_, "lse");
    jmlr::shifted_attention::ForwardProblem problem{problem_of(q, k, v, group_size, cu_seqlens, seq_lens, false, scale),
                                                    out.data, lse.as<float>()};
    jmlr::shifted_attention::sm90::forward(problem, processors, nullptr);
}

bool serves(const py::object& q_, const py::object& k_, const py::object& v_, const py::object& cu_seqlens_,
            bool wrap) {
    Tensors tensors(0);
    TensorArgument q = tensors.input(q_, "q"), k = tensors.input(k_, "k"), v = tensors.input(v_, "v");
    TensorArgument cu_seqlens = tensors.input(cu_seqlens_, "cu_seqlens");
    return jmlr::shifted_attention::sm90::serves(
        problem_of(q, k, v, 1, cu_seqlens, TensorArgument(py::none(), "", false), wrap, 1));
}

}  // namespace

void bind_shifted_attention_sm90(py::module_& module) {
    module.def("shifted_attention_sm90_forward", &forward);
    module.def("shifted_attention_sm90_serves", &serves);
}

}  // namespace host_build
