// The losses' row statistics on a CPU: a task owns whole rows.

#include <algorithm>

#include "cpu.h"
#include "loss_rows.h"

namespace jmlr::maxsim::cpu {
namespace {

// All of a row by itself; sums in double precision, which costs nothing beside the exponentials.
struct OneLane {
    using Sum = double;

    int64_t first() const { return 0; }
    int64_t step() const { return 1; }
    template <class T>
    T load(const T* from) const {
        return *from;
    }
    double sum(double own) const { return own; }
    float highest(float own) const { return own; }
    void store(float* to, const float (&values)[6]) const { std::copy(values, values + 6, to); }
};

constexpr int64_t kScoresPerTask = 8192;  // below, a thread costs more than it saves

}  // namespace

void loss_rows(const LossRows& rows, const Threads& threads) {
    const int64_t rows_per_task = std::max<int64_t>(1, kScoresPerTask / std::max<int64_t>(1, rows.documents_per_query));
    const auto task = [&](int64_t number) {
        const int64_t end = std::min(rows.query_count, (number + 1) * rows_per_task);
        for (int64_t query = number * rows_per_task; query < end; ++query) {
            LossRow<OneLane>::run(rows, query, OneLane{});
        }
    };
    const int64_t tasks = (rows.query_count + rows_per_task - 1) / rows_per_task;
    if (tasks == 1) task(0);
    else threads.run(tasks, task);
}

}  // namespace jmlr::maxsim::cpu
