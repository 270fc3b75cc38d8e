// MaxSim's CUDA kernels for compressed documents over tensors of torch, as csrc/maxsim/torch_compressed_cuda.cpp calls
// them.
#include "../../csrc/maxsim/compressed_decode.cuh"
#include "../../csrc/maxsim/sm80_compressed.h"
#include "maxsim_problem.h"

namespace host_build {
namespace {

void quantized_call(const py::dict& arguments, bool float8, const py::object& scale, const py::object& result,
                    int processors, uint64_t seed) {
    Tensors tensors(seed);
    Problem p = problem_of(tensors, arguments);
    QuantizedDocuments documents;
    documents.type = float8 ? ValueType::float8_e4m3fn : ValueType::int8;
    documents.scales = tensors.input(scale, "scales").as<float>();
    float* scores = tensors.output(result, "scores").as<float>();
    ScratchMemory scratch(sm80::compressed_scratch_bytes(p, processors));
    sm80::quantized_forward(p, documents, scores, scratch.data(), processors, nullptr);
}

void residual_call(const py::dict& arguments, const py::dict& beside, bool normalize, const py::object& result,
                   int processors, uint64_t seed) {
    Tensors tensors(seed);
    Problem p = problem_of(tensors, arguments);
    auto get = [&](const char* name) { return tensors.input(beside[name], name); };
    TensorArgument centroids = get("centroids"), weights = get("field_weights");
    ResidualDocuments documents;
    while (int64_t(1) << documents.bits < weights.sizes[0]) ++documents.bits;
    documents.normalize = normalize;
    documents.codes = get("codes").as<int32_t>();
    documents.centroids = centroids.data;
    documents.centroid_type = type_of(centroids);
    documents.centroid_count = centroids.sizes[0];
    documents.centroid_stride = centroids.strides[0];
    documents.field_weights = weights.as<float>();
    float* scores = tensors.output(result, "scores").as<float>();
    ScratchMemory scratch(sm80::compressed_scratch_bytes(p, processors));
    sm80::residual_forward(p, documents, scores, scratch.data(), processors, nullptr);
}

}  // namespace

void bind_maxsim_compressed(py::module_& module) {
    module.def("maxsim_quantized_forward", &quantized_call);
    module.def("maxsim_residual_forward", &residual_call);
    module.def("from_int8", &from_int8);
    module.def("from_float8", &from_float8);
}

}  // namespace host_build
