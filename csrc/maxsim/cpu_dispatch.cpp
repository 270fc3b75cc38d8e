// Which instruction set the CPU path runs with.

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu_instructions.h"

namespace jmlr::maxsim::cpu {
namespace {

struct Choice {
    const char* name;
    const Instructions& (*set)();
    bool runs;
};

const Instructions& choose() {
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool avx512bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    const Choice choices[] = {
        // the best first
        {"avx512bf16", avx512bf16_instructions, avx512bf16},
        {"avx512", avx512_instructions, avx512},
        {"avx2", avx2_instructions, avx2},
        {"portable", portable_instructions, true},
    };
#else
    const Choice choices[] = {{"portable", portable_instructions, true}};
#endif
    const char* asked = std::getenv("JMLR_CPU_ISA");
    const bool any = asked == nullptr || *asked == '\0';
    for (const Choice& choice : choices) {
        const bool named = !any && std::string(asked) == choice.name;
        if (named && !choice.runs) {
            throw std::runtime_error(std::string("JMLR_CPU_ISA=") + asked +
                                     ": this processor has no such instructions");
        }
        if (named || (any && choice.runs)) return choice.set();
    }
    throw std::runtime_error(std::string("JMLR_CPU_ISA=") + asked + ": choose portable, avx2, avx512 or avx512bf16");
}

}  // namespace

const Instructions& instructions() {
    static const Instructions& chosen = choose();
    return chosen;
}

}  // namespace jmlr::maxsim::cpu
