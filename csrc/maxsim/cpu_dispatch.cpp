// Which instruction set the CPU path runs with.

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu_instructions.h"

namespace jmlr::maxsim::cpu {
namespace {

#if defined(__x86_64__)
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#else
bool has_avx2() { return false; }
bool has_avx512() { return false; }
bool has_avx512bf16() { return false; }
#endif

const Instructions& choose() {
    struct Choice {
        const char* name;
        const Instructions* (*set)();
        bool runs;
    };
    const Choice choices[] = {  // the best first
        {"avx512bf16", avx512bf16_instructions, has_avx512bf16()},
        {"avx512", avx512_instructions, has_avx512()},
        {"avx2", avx2_instructions, has_avx2()},
        {"portable", portable_instructions, true},
    };
    const char* asked = std::getenv("JMLR_CPU_ISA");
    const bool any = asked == nullptr || *asked == '\0';
    for (const Choice& choice : choices) {
        const bool named = !any && std::string(asked) == choice.name;
        if (named && !(choice.runs && choice.set() != nullptr)) {
            throw std::runtime_error(std::string("JMLR_CPU_ISA=") + asked + ": this processor has no such instructions");
        }
        if (named || (any && choice.runs && choice.set() != nullptr)) return *choice.set();
    }
    throw std::runtime_error(std::string("JMLR_CPU_ISA=") + asked + ": choose portable, avx2, avx512 or avx512bf16");
}

}  // namespace

const Instructions& instructions() {
    static const Instructions& chosen = choose();
    return chosen;
}

}  // namespace jmlr::maxsim::cpu
