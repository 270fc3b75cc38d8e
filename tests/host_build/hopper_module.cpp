// The primitives of compute capability 9.0 on their own.
#include "../../csrc/tiles/tensor_map.h"
#include "hopper_cluster.cuh"
#include "hopper_product.cuh"
#include "tensor_argument.h"

namespace host_build {
namespace {

struct Arguments {
    TensorArgument a, b, c;
    HopperFault fault;
    int64_t blocks;
};

// [batch, rows, columns] in boxes of `box` rows by 128 bytes.
template <class Element>
tiles::TensorMap map_of(const TensorArgument& x, int box) {
    tiles::Axes axes{
        3, {x.sizes[2], x.sizes[1], x.sizes[0]}, {1, x.strides[1], x.strides[0]}, {128 / int(sizeof(Element)), box, 1}};
    return tiles::tensor_map(x.as<const Element>(), axes);
}

template <class Element, tiles::Major kA, tiles::Major kB, int kN, bool kFromRegisters>
void run(const Arguments& x) {
    using Kernel = HopperProduct<Element, kA, kB, kN, kFromRegisters>;
    bool inner_a = kA == tiles::Major::inner;
    int64_t depth = x.a.sizes[inner_a ? 2 : 1], rows = x.a.sizes[inner_a ? 1 : 2];
    tiles::launch<Kernel>({map_of<Element>(x.a, Kernel::TileA::kRows), map_of<Element>(x.b, Kernel::TileB::kRows),
                           map_of<float>(x.c, 64), rows, x.c.sizes[2], depth, x.a.sizes[0], x.fault},
                          x.blocks, nullptr);
}

template <class Element, tiles::Major kA, tiles::Major kB, bool kFromRegisters>
void choose_columns(const Arguments& x, int columns) {
    if (columns == 8) run<Element, kA, kB, 8, kFromRegisters>(x);
    else if (columns == 48) run<Element, kA, kB, 48, kFromRegisters>(x);
    else if (columns == 128) run<Element, kA, kB, 128, kFromRegisters>(x);
    else if (columns == 256) run<Element, kA, kB, 256, kFromRegisters>(x);
    else throw std::runtime_error("8, 48, 128 or 256 columns");
}

template <class Element>
void choose_majors(const Arguments& x, bool outer_a, bool outer_b, bool from_registers, int columns) {
    constexpr auto kInner = tiles::Major::inner, kOuter = tiles::Major::outer;
    if constexpr (sizeof(Element) == 2) {
        if (outer_a && outer_b) return choose_columns<Element, kOuter, kOuter, false>(x, columns);
        if (outer_a) return choose_columns<Element, kOuter, kInner, false>(x, columns);
        if (outer_b && from_registers) return choose_columns<Element, kInner, kOuter, true>(x, columns);
        if (outer_b) return choose_columns<Element, kInner, kOuter, false>(x, columns);
    }
    if (from_registers) return choose_columns<Element, kInner, kInner, true>(x, columns);
    choose_columns<Element, kInner, kInner, false>(x, columns);
}

}  // namespace

void bind_hopper(py::module_& module) {
    module.def(
        "hopper_product",
        [](const py::object& a, const py::object& b, const py::object& c, bool outer_a, bool outer_b,
           bool from_registers, int columns, int fault, uint64_t seed, int64_t blocks) {
            Tensors tensors(seed);
            Arguments x{tensors.input(a, "a"), tensors.input(b, "b"), tensors.output(c, "c"), HopperFault(fault),
                        blocks};
            if (x.a.dtype == "float16") choose_majors<tiles::Half>(x, outer_a, outer_b, from_registers, columns);
            else if (x.a.dtype == "bfloat16")
                choose_majors<tiles::BFloat16>(x, outer_a, outer_b, from_registers, columns);
            else choose_majors<tiles::Float8>(x, outer_a, outer_b, from_registers, columns);
        },
        py::arg("a"), py::arg("b"), py::arg("c"), py::arg("outer_a") = false, py::arg("outer_b") = false,
        py::arg("from_registers") = false, py::arg("columns") = 128, py::arg("fault") = 0, py::arg("seed") = 0,
        py::arg("blocks") = 2);
    module.def(
        "hopper_cluster",
        [](const py::object& a, const py::object& b, const py::object& c, int fault, uint64_t seed) {
            Tensors tensors(seed);
            TensorArgument left = tensors.input(a, "a"), right = tensors.input(b, "b"), out = tensors.output(c, "c");
            int64_t rows = left.sizes[1], blocks = tiles::ceil_div<int64_t>(rows, 64 * HopperCluster::kCluster);
            tiles::launch<HopperCluster>({map_of<tiles::BFloat16>(left, 64), map_of<tiles::BFloat16>(right, 32),
                                          out.as<float>(), rows, left.sizes[2], ClusterFault(fault)},
                                         blocks * HopperCluster::kCluster, nullptr);
        },
        py::arg("a"), py::arg("b"), py::arg("c"), py::arg("fault") = 0, py::arg("seed") = 0);
}

}  // namespace host_build
