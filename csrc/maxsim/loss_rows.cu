// The losses' row statistics on a GPU: a block owns a query's row.
#include "../tiles/launch.h"
#include "loss_rows.h"
#include "rows.cuh"
#include "sm80.h"

namespace jmlr::maxsim::sm80 {
namespace {

struct LossRowsKernel {
    static constexpr int kThreads = 256;
    static constexpr int kMinBlocks = 1;
    static constexpr int kWarps = kThreads / tiles::kWarp;
    using Params = LossRows;

    struct Lanes {
        using Sum = float;

        JMLR_DEVICE int64_t first() const { return tiles::thread_index(); }
        JMLR_DEVICE int64_t step() const { return kThreads; }
        template <class T>
        JMLR_DEVICE T load(const T* from) const {
            return tiles::load(from);
        }
        JMLR_DEVICE float sum(float own) const {
            float total = 0.0f;
            for_each_warp(warp_sum(own), [&total](float one) { total += one; });
            return total;
        }
        JMLR_DEVICE float highest(float own) const {
            JMLR_UNROLL
            for (int mask = 1; mask < tiles::kWarp; mask *= 2) {
                own = tiles::larger(own, tiles::shuffle_xor(own, mask));
            }
            float top = own;
            for_each_warp(own, [&top](float one) { top = tiles::larger(top, one); });
            return top;
        }
        JMLR_DEVICE void store(float* to, const float (&values)[6]) const {
            if (tiles::thread_index() != 0) return;
            JMLR_UNROLL
            for (int i = 0; i < 6; ++i) tiles::store(to + i, values[i]);
        }

    private:
        // Every thread sees the warps' values in their order.
        template <class Take>
        static JMLR_DEVICE void for_each_warp(float own, Take take) {
            const tiles::Shared<float> values = tiles::shared_memory<float>(0);
            const int place = tiles::warp();
            tiles::sync_block();  // the last ones were read
            if (tiles::lane() == 0) values.write(place, own);
            tiles::sync_block();
            JMLR_UNROLL
            for (int warp = 0; warp < kWarps; ++warp) take(values.read(warp));
        }
    };

    static JMLR_DEVICE void run(const Params& rows) { LossRow<Lanes>::run(rows, tiles::block_index(), Lanes{}); }
};

}  // namespace

void loss_rows(const LossRows& rows, void* stream) {
    tiles::launch<LossRowsKernel>(rows, rows.query_count, LossRowsKernel::kWarps * int(sizeof(float)), stream);
}

}  // namespace jmlr::maxsim::sm80
