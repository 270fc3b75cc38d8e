// Every operation of the native library: schemas here, one function per family and device in csrc/<family>/torch_*.cpp.
//
// The schemas are those of jmlr_kernels/ops.py less the backend's name; tests/native/test_library.py compares them.
// A family registers what it has with STABLE_TORCH_LIBRARY_IMPL in its own file, so that a build without CUDA simply
// lacks those files. There is no autograd here: the stable ABI has none, and jmlr_kernels adds it in Python.

#include <torch/csrc/stable/library.h>

#include <string>

STABLE_TORCH_LIBRARY(JMLR_NAMESPACE, library) {
    library.def("build_info() -> str");
    library.def("cpu_instructions() -> str");        // what the CPU path of MaxSim runs with: avx2, avx512, ...
    library.def("cuda_kernels(str choice) -> str");  // see kernel_choice_cuda.cpp
    library.def(
        "shifted_attention_forward(Tensor q, Tensor k, Tensor v, int group_size, Tensor? cu_seqlens,"
        " Tensor? seq_lens, bool wrap, float scale) -> (Tensor, Tensor)");
    library.def(
        "shifted_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
        " int group_size, Tensor? cu_seqlens, Tensor? seq_lens, bool wrap, float scale) -> (Tensor, Tensor, Tensor)");
    library.def("shifted_attention_tile_sizes(int element_bytes, int head_dim, int shared_bytes) -> int[]");
    library.def("shifted_attention_hopper_tiles(int head_dim) -> int[]");
    library.def(
        "maxsim_forward(Tensor queries, Tensor documents, Tensor? query_mask, Tensor? document_mask,"
        " Tensor? query_weights, Tensor? cu_seqlens, bool candidates, bool normalize, bool per_token,"
        " bool need_winners, int max_length) -> (Tensor, Tensor, Tensor, Tensor)");
    library.def(
        "maxsim_backward(Tensor[] rule_tensors, Tensor queries, Tensor documents, Tensor winners,"
        " Tensor? query_mask, Tensor? document_mask, Tensor? query_weights, Tensor? cu_seqlens,"
        " Tensor? query_scales, Tensor? document_scales, str rule, bool candidates, int max_length)"
        " -> (Tensor, Tensor, Tensor)");
    library.def("maxsim_loss_rows(Tensor scores, Tensor? target, Tensor temperatures, str rule) -> Tensor");
    library.def(
        "maxsim_quantized_forward(Tensor queries, Tensor values, Tensor scales, Tensor? query_mask,"
        " Tensor? document_mask, Tensor? query_weights, Tensor? cu_seqlens, bool candidates) -> Tensor");
    library.def(
        "maxsim_residual_forward(Tensor queries, Tensor codes, Tensor residuals, Tensor centroids,"
        " Tensor field_weights, Tensor? query_mask, Tensor? document_mask, Tensor? query_weights,"
        " Tensor? cu_seqlens, bool normalize, bool candidates) -> Tensor");
    library.def(
        "maxsim_smooth_forward(Tensor queries, Tensor documents, Tensor? query_mask, Tensor? document_mask,"
        " Tensor? query_weights, Tensor? cu_seqlens, bool candidates, float temperature, bool need_maxima)"
        " -> (Tensor, Tensor)");
    library.def(
        "maxsim_smooth_backward(Tensor grad_scores, Tensor queries, Tensor documents, Tensor maxima,"
        " Tensor? document_mask, Tensor? query_weights, Tensor? cu_seqlens, bool candidates, float temperature)"
        " -> (Tensor, Tensor, Tensor)");
}

namespace {

#ifndef JMLR_CUDA_TARGETS  // a build without CUDA
#define JMLR_CUDA_TARGETS ""
#define JMLR_CUDA_VERSION ""
#endif

// JSON. The CUDA targets are those of the machine code (80, 90a) and of the PTX (80+PTX).
std::string build_info() {
    return "{\"compiler\": \"" __VERSION__ "\", \"cuda\": \"" JMLR_CUDA_VERSION
           "\", \"cuda_targets\": \"" JMLR_CUDA_TARGETS "\"}";
}

}  // namespace

// Without a tensor argument there is no device to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(JMLR_NAMESPACE, CompositeExplicitAutograd, library) {
    library.impl("build_info", TORCH_BOX(&build_info));
}
