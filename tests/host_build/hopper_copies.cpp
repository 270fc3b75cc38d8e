// Copies of boxes and of plain bytes, and stores of boxes.
#include <algorithm>
#include <cstring>

#include "../../csrc/tiles/hopper.h"
#include "hopper_block.h"

namespace emulator {

std::vector<BoxCopy> copies;

int TensorMap::box_bytes() const {
    int bytes = element_bytes;
    for (int i = 0; i < axes; ++i) bytes *= box[i];
    return bytes;
}

namespace {

constexpr int kRow = 128;  // bytes of a box's innermost axis, which is what the swizzle permutes
constexpr int kBoxAlignment = 1024;

// The part of a box's row that lies inside of the tensor.
struct Row {
    char* global;  // of its first byte inside
    int first, bytes;
};

Row row_of(const TensorMap& map, const Coordinates& corner, int row) {
    int64_t inner = corner.at[0], begin = std::max<int64_t>(inner, 0);
    int64_t end = std::min<int64_t>(inner + map.box[0], map.sizes[0]);
    int64_t at = begin * map.element_bytes;
    bool inside = begin < end;
    for (int axis = 1, rest = row; axis < map.axes; rest /= map.box[axis], ++axis) {
        int64_t coordinate = int64_t(corner.at[axis]) + rest % map.box[axis];
        inside = inside && coordinate >= 0 && coordinate < map.sizes[axis];
        at += coordinate * int64_t(map.stride_bytes[axis]);
    }
    if (!inside) return Row{nullptr, 0, 0};
    return Row{const_cast<char*>(map.data) + at, int(begin - inner) * map.element_bytes,
               int(end - begin) * map.element_bytes};
}

// The swizzle of 128 bytes: three bits of the address of a 16-byte chunk are those of its row.
int swizzled(int offset) { return offset ^ int(shared_address(offset) >> 7 & 7) << 4; }

void check_box(const TensorMap& map, int offset, const Coordinates& corner) {
    if (map.data == nullptr) fail("a copy of a box without a map of its tensor");
    if (corner.count != map.axes) {
        fail("a box of " + std::to_string(map.axes) + " axes is named by " + std::to_string(corner.count) +
             " coordinates");
    }
    if (offset % kBoxAlignment != 0) fail("misaligned: a box lies on 1024 bytes, not at " + place(offset));
    check_shared_place(offset, map.box_bytes(), kBoxAlignment, block->running);
}

void issue(const BoxCopy& copy) {
    Block* own = block;
    int thread = own->running;
    Mark by = now();
    const Clock& known = heard();
    if (copy.into != own) usable_from_afar(*copy.into, copy.barrier);
    block = copy.into;
    for (int i = copy.offset / 2; i < (copy.offset + copy.bytes) / 2; ++i) {
        Cell& cell = block->cells[i];
        if (cell.copying != kNobody) fail("two asynchronous copies to " + place(i * 2) + " are under way", thread);
        block->hopper->accesses.write(i, by, known);
        cell.copying = thread;
    }
    std::memset(block->shared.data() + copy.offset, 0xff, copy.bytes);
    copies.push_back(copy);
    block = own;
}

void deliver(size_t number) {
    BoxCopy copy = copies[number];
    copies[number] = copies.back();
    copies.pop_back();
    block = copy.into;
    if (block->ended()) fail("a block ends with a copy to " + place(copy.offset) + " under way", copy.thread);
    char* shared = block->shared.data();
    if (copy.plain != nullptr) {
        std::memcpy(shared + copy.offset, copy.plain, copy.bytes);
    } else {
        for (int row = 0; row < copy.bytes / kRow; ++row) {
            char bytes[kRow] = {};
            Row inside = row_of(copy.map, copy.from, row);
            if (inside.bytes > 0) std::memcpy(bytes + inside.first, inside.global, inside.bytes);
            for (int chunk = 0; chunk < kRow; chunk += 16)
                std::memcpy(shared + swizzled(copy.offset + row * kRow + chunk), bytes + chunk, 16);
        }
    }
    Mark by = phase_mark(copy.barrier, copy.thread);
    for (int i = copy.offset / 2; i < (copy.offset + copy.bytes) / 2; ++i) {
        Cell& cell = block->cells[i];
        cell.copying = kNobody;
        cell.write.thread = copy.thread;
        block->hopper->accesses.arrived(i, by);
    }
    complete_bytes(copy.barrier, copy.bytes, copy.thread);
}

template <class Visit>
void each_chunk(const Store& store, Visit visit) {
    for (int row = 0; row < store.map.box_bytes() / kRow; ++row) {
        if (row_of(store.map, store.to, row).bytes == 0) continue;
        for (int chunk = 0; chunk < kRow; chunk += 16) visit(swizzled(store.offset + row * kRow + chunk));
    }
}

void hold(const Store& store, Accesses::Held held) {
    each_chunk(store, [held](int offset) {
        for (int i = offset / 2; i < (offset + 16) / 2; ++i) block->hopper->accesses.hold(i, held);
    });
}

void write(const Store& store) {
    hold(store, Accesses::kFree);
    for (int row = 0; row < store.map.box_bytes() / kRow; ++row) {
        Row inside = row_of(store.map, store.to, row);
        if (inside.bytes == 0) continue;
        check_global_write(inside.global, inside.bytes, store.map.element_bytes);
        char bytes[kRow];
        for (int chunk = 0; chunk < kRow; chunk += 16)
            std::memcpy(bytes + chunk, shared_read(swizzled(store.offset + row * kRow + chunk), 16), 16);
        std::memcpy(inside.global, bytes + inside.first, inside.bytes);
    }
}

}  // namespace

void copy_box(unsigned blocks, int offset, const TensorMap& map, int barrier, const Coordinates& from) {
    hopper();
    check_box(map, offset, from);
    for (int row = 0; row < map.box_bytes() / kRow; ++row) {
        Row inside = row_of(map, from, row);
        if (inside.bytes > 0) check_global_read(inside.global, inside.bytes, map.element_bytes);
    }
    if (blocks == 0) blocks = 1u << block->rank;
    if (blocks >> cluster.size() != 0) fail("a copy into a block that the cluster does not have");
    for (const auto& each : cluster) {
        if (blocks >> each->rank & 1)
            issue(BoxCopy{each.get(), offset, map.box_bytes(), barrier, block->running, map, from, nullptr});
    }
}

void copy_bytes(int offset, const void* from, int bytes, int barrier) {
    hopper();
    if (bytes <= 0 || bytes % 16 != 0) fail("misaligned: a copy of " + std::to_string(bytes) + " bytes");
    check_shared_place(offset, bytes, 16, block->running);
    check_global_read(from, size_t(bytes), 16);
    issue(BoxCopy{block, offset, bytes, barrier, block->running, TensorMap{}, {}, static_cast<const char*>(from)});
}

void store_box(const TensorMap& map, int offset, const Coordinates& to) {
    check_box(map, offset, to);
    Store store{map, offset, to};
    hopper().threads[block->running].open_stores.push_back(store);
    each_chunk(store, [](int at) { read_fenced(at, 16, now(), heard()); });
    hold(store, Accesses::kStored);
}

void commit_stores() {
    ThreadState& thread = hopper().threads[block->running];
    thread.stores.push_back(std::exchange(thread.open_stores, {}));
}

void wait_stores(int groups_under_way) {
    ThreadState& thread = hopper().threads[block->running];
    while (int(thread.stores.size()) > groups_under_way) {
        for (const Store& store : thread.stores.front()) write(store);
        thread.stores.erase(thread.stores.begin());
    }
}

void early_copies(std::mt19937_64& random) {
    if (!copies.empty() && random() % 8 == 0) deliver(random() % copies.size());
}

bool late_copy(std::mt19937_64& random) {
    if (copies.empty()) return false;
    deliver(random() % copies.size());
    return true;
}

}  // namespace emulator

namespace tiles::host {

TensorMap tensor_map(const void* data, int element_bytes, int count, const int64_t* sizes, const uint64_t* stride_bytes,
                     const int* box) {
    TensorMap map{};
    map.data = static_cast<const char*>(data);
    map.element_bytes = element_bytes;
    map.axes = count;
    auto demand = [](bool met, const char* what) {
        if (!met) throw emulator::Violation(std::string("a map of a tensor: ") + what);
    };
    demand(count >= 2 && count <= TensorMap::kMostAxes, "2 to 4 axes");
    demand(reinterpret_cast<uintptr_t>(data) % 16 == 0, "misaligned, its first element lies on 16 bytes");
    demand(box[0] * element_bytes == emulator::kRow, "a box has 128 bytes of the innermost axis");
    for (int i = 0; i < count; ++i) {
        map.sizes[i] = sizes[i];
        map.box[i] = box[i];
        map.stride_bytes[i] = i == 0 ? uint64_t(element_bytes) : stride_bytes[i - 1];
        demand(sizes[i] >= 1 && sizes[i] <= int64_t(1) << 32, "sizes of 1 to 2**32");
        demand(box[i] >= 1 && box[i] <= 256, "boxes of 1 to 256");
        demand(i == 0 || (map.stride_bytes[i] % 16 == 0 && map.stride_bytes[i] < uint64_t(1) << 40),
               "strides are multiples of 16 bytes, below 2**40");
    }
    return map;
}

}  // namespace tiles::host
