// Torch's own threads, for the CPU path.

#pragma once

#include <torch/csrc/stable/ops.h>

#include "cpu.h"

namespace jmlr::maxsim {

inline cpu::Threads torch_threads() {
    cpu::Threads threads;
    threads.count = torch::stable::get_num_threads();
    threads.run = [](int64_t count, const std::function<void(int64_t)>& function) {
        torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
            for (int64_t index = begin; index < end; ++index) function(index);
        });
    };
    return threads;
}

}  // namespace jmlr::maxsim
