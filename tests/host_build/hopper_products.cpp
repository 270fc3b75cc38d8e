// Products of warpgroups: descriptors as the PTX manual defines them, and accumulators that nobody may touch.
#pragma GCC optimize("O3")  // loops over arrays of many numbers, in vectors

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../../csrc/tiles/hopper.h"
#include "hopper_block.h"

namespace emulator {
namespace {

constexpr int kRows = 64, kMostColumns = 256, kMostDepth = 32;
constexpr uint32_t kPoison = 0x7fadbeef;  // a signalling NaN: arithmetic makes another one of it

int bytes_of(Number number) { return number == Number::float8 ? 1 : 2; }
int depth_of(Number number) { return 32 / bytes_of(number); }

float float8_value(uint8_t bits) {
    int exponent = bits >> 3 & 15, mantissa = bits & 7;
    float magnitude = exponent == 0 ? std::ldexp(float(mantissa), -9) : std::ldexp(float(8 + mantissa), exponent - 10);
    if (exponent == 15 && mantissa == 7) magnitude = std::nanf("");
    return bits >> 7 ? -magnitude : magnitude;
}

float value_of(Number number, const char* at) {
    if (number == Number::float8) return float8_value(uint8_t(*at));
    uint16_t bits;
    std::memcpy(&bits, at, 2);
    return number == Number::half ? tiles::to_float(tiles::Half{bits}) : tiles::to_float(tiles::BFloat16{bits});
}

// The manual's "Matrix descriptor format": all in units of 16 bytes.
struct Descriptor {
    uint32_t start, leading, stride;
    int width;  // of a swizzled row, in bytes; 16: no swizzle

    explicit Descriptor(uint64_t bits) {
        constexpr int kWidths[4] = {16, 128, 64, 32};
        start = uint32_t(bits & 0x3fff) * 16;
        leading = uint32_t(bits >> 16 & 0x3fff) * 16;
        stride = uint32_t(bits >> 32 & 0x3fff) * 16;
        width = kWidths[bits >> 62];
        constexpr uint64_t kNamed = 0xc0003fff3fff3fff;
        if ((bits & ~kNamed) != 0) fail("a matrix descriptor with a base offset, or bits that mean nothing");
    }

    // Rows of 128 bytes take three bits of their number, of 64 bytes two, of 32 bytes one.
    uint32_t swizzled(uint32_t address) const {
        uint32_t mask = uint32_t(width / 16 - 1) << 4;
        return address ^ (address >> 3 & mask);
    }

    // Of the 16 bytes that begin at (outer, inner), both in elements; `inner` is the dimension that is summed over.
    uint32_t chunk(int outer, int inner, bool outer_major, int element) const {
        uint32_t o = uint32_t(outer), k = uint32_t(inner), per_row = uint32_t(width / element);
        uint32_t at = start;
        if (!outer_major) {
            at += o / 8 * stride + o % 8 * uint32_t(width);
            at += width == 16 ? k * element / 16 * leading : k * element;
        } else if (width == 16) {
            at += o / per_row * stride + k / 8 * leading + k % 8 * 16;
        } else {
            at += o / per_row * leading + o % per_row * element + k / 8 * stride + k % 8 * uint32_t(width);
        }
        return swizzled(at);
    }
};

// Who reads a chunk, and what all of them have heard.
struct Reader {
    Mark by;
    const Clock* heard;
};

// matrix[inner][outer]; `reader_of` knows who reads at a place of the outer dimension.
template <int kOuter, class ReaderOf>
void read_operand(uint64_t bits, int outer, bool outer_major, Number number, double (&matrix)[kMostDepth][kOuter],
                  ReaderOf reader_of) {
    Descriptor descriptor(bits);
    int element = bytes_of(number), depth = depth_of(number), per_chunk = 16 / element;
    int steps_outer = outer_major ? per_chunk : 1, steps_inner = outer_major ? 1 : per_chunk;
    for (int o = 0; o < outer; o += steps_outer) {
        Reader reader = reader_of(o);
        for (int k = 0; k < depth; k += steps_inner) {
            int offset = int(descriptor.chunk(o, k, outer_major, element)) - int(shared_address(0));
            const char* from = static_cast<const char*>(read_fenced(offset, 16, reader.by, *reader.heard));
            for (int i = 0; i < per_chunk; ++i)
                matrix[outer_major ? k : k + i][outer_major ? o + i : o] = value_of(number, from + i * element);
        }
    }
}

// A warp holds 16 rows, in the layout of mma.m16n8k16's (for single bytes, m16n8k32's) first operand.
void read_registers(const std::array<const Product*, kWarpgroup>& all, Number number, double (&a)[kMostDepth][kRows]) {
    int per_register = 4 / bytes_of(number);
    for (int thread = 0; thread < kWarpgroup; ++thread) {
        for (int i = 0; i < 4; ++i) {
            int row = thread / kWarp * 16 + thread % kWarp / 4 + i % 2 * 8;
            for (int j = 0; j < per_register; ++j) {
                const char* at = reinterpret_cast<const char*>(all[thread]->a_registers + i) + j * bytes_of(number);
                a[thread % 4 * per_register + j + i / 2 * 4 * per_register][row] = value_of(number, at);
            }
        }
    }
}

UnderWay* find(ThreadState& thread, const float* c) {
    for (UnderWay& each : thread.under_way) {
        if (each.c == c) return &each;
    }
    return nullptr;
}

bool poisoned(const UnderWay& of) {
    for (size_t i = 0; i < of.values.size(); ++i) {
        if (tiles::bit_cast<uint32_t>(of.c[i]) != kPoison) return false;
    }
    return true;
}

void check_same(const Product& x, const Product& y) {
    bool same = x.number == y.number && x.columns == y.columns && x.outer_a == y.outer_a && x.outer_b == y.outer_b &&
                x.accumulate == y.accumulate && (x.a_registers == nullptr) == (y.a_registers == nullptr) &&
                x.a == y.a && x.b == y.b;
    if (!same) fail("threads of a warpgroup make different products");
}

void compute(int warpgroup, const std::array<const Product*, kWarpgroup>& all) {
    static double a[kMostDepth][kRows], b[kMostDepth][kMostColumns], sum[kRows][kMostColumns];
    const Product& product = *all[0];
    for (const Product* each : all) check_same(product, *each);
    int depth = depth_of(product.number), columns = product.columns;
    Hopper& own = hopper();
    // A warp reads its own rows of a and all of b.
    uint32_t group = uint32_t(own.warps[warpgroup * 4].closed + 1);
    auto of_warp = [&](int row) {
        int warp = warpgroup * 4 + row / 16;
        if (own.warps[warp].closed + 1 != group) fail("warps of a warpgroup have closed different numbers of groups");
        return Reader{Mark{own.actors.warp(block->rank, warp), group},
                      &own.actors.common(block->rank, warp * kWarp, kWarp)};
    };
    Reader of_all{Mark{own.actors.warpgroup(block->rank, warpgroup), group},
                  &own.actors.common(block->rank, warpgroup * kWarpgroup, kWarpgroup)};
    if (product.a_registers != nullptr) read_registers(all, product.number, a);
    else read_operand(product.a, kRows, product.outer_a, product.number, a, of_warp);
    read_operand(product.b, columns, product.outer_b, product.number, b, [&](int) { return of_all; });
    ThreadState* threads = &hopper().threads[warpgroup * kWarpgroup];
    auto each_element = [&](auto visit) {
        for (int thread = 0; thread < kWarpgroup; ++thread) {
            std::vector<float>& c = find(threads[thread], all[thread]->c)->values;
            for (int i = 0; i < columns / 2; ++i) {
                int row = thread / kWarp * 16 + thread % kWarp / 4 + i % 4 / 2 * 8;
                visit(sum[row][i / 4 * 8 + thread % 4 * 2 + i % 2], c[i]);
            }
        }
    };
    each_element([&](double& total, float& c) { total = product.accumulate ? c : 0.0f; });
    for (int row = 0; row < kRows; ++row) {
        double* to = sum[row];
        for (int k = 0; k < depth; ++k) {
            double left = a[k][row];
            const double* right = b[k];
            for (int n = 0; n < columns; ++n) to[n] += left * right[n];
        }
    }
    each_element([&](double& total, float& c) { c = tiles::host::toward_zero(total); });
    products.back() += int64_t(kRows / 16) * (columns / 8) * (depth / 16);
}

// The calling thread's part, before the warpgroup meets: the accumulator becomes unreadable.
void hide(const Product& product) {
    ThreadState& thread = hopper().threads[block->running];
    WarpState& warp = hopper().warps[block->running / kWarp];
    UnderWay* under_way = find(thread, product.c);
    size_t size = size_t(product.columns / 2);
    if (under_way == nullptr) {
        if (std::count(thread.opened.begin(), thread.opened.end(), product.c) == 0)
            fail("a product into an accumulator that no open_products() names since its threads had it");
        thread.under_way.push_back(UnderWay{product.c, 0, std::vector<float>(product.c, product.c + size)});
        under_way = &thread.under_way.back();
    } else {
        if (under_way->values.size() != size) fail("products of different widths into one accumulator");
        if (!poisoned(*under_way)) fail("a thread touches an accumulator while products into it are under way");
    }
    under_way->group = warp.closed + 1;
    std::fill_n(product.c, size, tiles::bit_cast<float>(kPoison));
    if (product.a_registers == nullptr) return;
    std::array<uint32_t, 4> a;
    std::copy_n(product.a_registers, 4, a.begin());
    for (const auto& [at, held] : thread.a_registers) {
        if (at == product.a_registers && held != a)
            fail("a product's registers a have been written since the last open_products()");
    }
    thread.a_registers.emplace_back(product.a_registers, a);
}

}  // namespace

void open_products(const Accumulator* c, int count) {
    ThreadState& thread = hopper().threads[block->running];
    for (int i = 0; i < count; ++i) {
        UnderWay* under_way = find(thread, c[i].c);
        if (under_way != nullptr && !poisoned(*under_way))
            fail("a thread touches an accumulator while products into it are under way");
        if (std::count(thread.opened.begin(), thread.opened.end(), c[i].c) == 0) thread.opened.push_back(c[i].c);
    }
    thread.a_registers.clear();
    meet(Meeting::open_products, nullptr, [](void**) {});
}

void multiply_async(const Product& product) {
    if (product.columns % 8 != 0 || product.columns < 8 || product.columns > kMostColumns)
        fail("a product of " + std::to_string(product.columns) + " columns");
    if (block->running / kWarpgroup * kWarpgroup + kWarpgroup > block->grid.threads)
        fail("a product by less than a warpgroup");
    hide(product);
    int number = block->running / kWarpgroup;
    Gathering& warpgroup = hopper().warpgroups[number];
    warpgroup.products[block->running % kWarpgroup] = &product;
    if (++warpgroup.arrived < kWarpgroup) {
        leave(State::meeting);
        return;
    }
    warpgroup.arrived = 0;
    compute(number, warpgroup.products);
    for (int i = 0; i < kWarpgroup; ++i) block->fibers[number * kWarpgroup + i].state = State::ready;
}

void close_products() {
    WarpState& warp = hopper().warps[block->running / kWarp];
    meet(Meeting::close_products, nullptr, [&warp](void**) { ++warp.closed; });
}

void wait_products(int groups_under_way, const Accumulator* c, int count) {
    WarpState& warp = hopper().warps[block->running / kWarp];
    meet(Meeting::wait_products, nullptr, [&warp, groups_under_way](void**) {
        warp.completed = std::max(warp.completed, warp.closed - groups_under_way);
    });
    Actors& actors = hopper().actors;
    actors.hear(block->rank, block->running,
                Mark{actors.warp(block->rank, block->running / kWarp), uint32_t(warp.completed)});
    ThreadState& thread = hopper().threads[block->running];
    auto named = [&](const float* at) {
        return std::any_of(c, c + count, [at](const Accumulator& each) { return each.c == at; });
    };
    for (size_t i = thread.under_way.size(); i-- > 0;) {
        UnderWay& each = thread.under_way[i];
        bool ready = each.group <= warp.completed;
        if (!ready && named(each.c)) fail("a wait names an accumulator whose products are still under way");
        if (ready && !named(each.c)) fail("a wait completes products into an accumulator that it does not name");
        if (!ready) continue;
        if (!poisoned(each)) fail("a thread touches an accumulator while products into it are under way");
        std::copy(each.values.begin(), each.values.end(), each.c);
        thread.opened.erase(std::remove(thread.opened.begin(), thread.opened.end(), each.c), thread.opened.end());
        thread.under_way.erase(thread.under_way.begin() + int64_t(i));
    }
}

}  // namespace emulator
