// The most multiplications and additions that this CPU does in a second, in GFLOP/s: chains of fused products in
// registers and nothing else. Prints `float32 pairs` (0 where there is no bfloat16 product), for the given threads.
//
//     g++ -O2 -march=native -pthread cpu_peak.cpp && ./a.out 2

#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

constexpr int chains = 12;  // more than latency times throughput of any processor so far
constexpr long repeats = 1000000;
volatile float sink;

#if defined(__AVX512F__)
constexpr int lanes = 16;
void float32() {
    __m512 sum[chains];
    for (auto& one : sum) one = _mm512_set1_ps(1.0f);
    const __m512 a = _mm512_set1_ps(0.999f), b = _mm512_set1_ps(0.001f);
    for (long i = 0; i < repeats; ++i) {
#pragma GCC unroll 12
        for (int k = 0; k < chains; ++k) sum[k] = _mm512_fmadd_ps(sum[k], a, b);
    }
    for (const auto& one : sum) sink = one[0];
}
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int lanes = 8;
void float32() {
    __m256 sum[chains];
    for (auto& one : sum) one = _mm256_set1_ps(1.0f);
    const __m256 a = _mm256_set1_ps(0.999f), b = _mm256_set1_ps(0.001f);
    for (long i = 0; i < repeats; ++i) {
#pragma GCC unroll 12
        for (int k = 0; k < chains; ++k) sum[k] = _mm256_fmadd_ps(sum[k], a, b);
    }
    for (const auto& one : sum) sink = one[0];
}
#else
#error "no AVX2: this yardstick has nothing to measure"
#endif

#if defined(__AVX512BF16__)
void pairs() {
    __m512 sum[chains];
    for (auto& one : sum) one = _mm512_set1_ps(1.0f);
    const __m512bh a = (__m512bh)_mm512_set1_epi32(0x3f803f80), b = (__m512bh)_mm512_set1_epi32(0x3f80);
    for (long i = 0; i < repeats; ++i) {
#pragma GCC unroll 12
        for (int k = 0; k < chains; ++k) sum[k] = _mm512_dpbf16_ps(sum[k], a, b);
    }
    for (const auto& one : sum) sink = one[0];
}
#endif

double best_rate(void (*loop)(), double flops_of_instruction, int threads) {
    double best = 0;
    for (int round = 0; round < 9; ++round) {
        const auto began = std::chrono::steady_clock::now();
        std::vector<std::thread> others;
        for (int i = 1; i < threads; ++i) others.emplace_back(loop);
        loop();
        for (auto& one : others) one.join();
        const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
        best = std::max(best, threads * repeats * chains * flops_of_instruction / seconds / 1e9);
    }
    return best;
}

int main(int argc, char** argv) {
    const int threads = argc > 1 ? std::atoi(argv[1]) : 1;
    const double plain = best_rate(float32, 2.0 * lanes, threads);
#if defined(__AVX512BF16__)
    std::printf("%.1f %.1f\n", plain, best_rate(pairs, 4.0 * lanes, threads));
#else
    std::printf("%.1f 0\n", plain);
#endif
}
