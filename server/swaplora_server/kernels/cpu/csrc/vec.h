// Vectors for the kernels: LANES floats at a time, from float32 or bfloat16 memory. Plain vector extensions: the compiler
// picks the instructions, except for mul_add: whether a product is rounded before it is added must not depend on what the
// compiler makes of a loop.
//
// The build says how many LANES there are, 8 or 16. Any processor runs either: what is too wide for it is done in parts.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__FMA__) || defined(__AVX__)
#include <immintrin.h>
#endif

static_assert(LANES == 8 || LANES == 16, "the build gives LANES");

typedef float floats __attribute__((vector_size(LANES * 4)));
typedef uint32_t words __attribute__((vector_size(LANES * 4)));
typedef int32_t ints __attribute__((vector_size(LANES * 4)));
typedef uint16_t halves __attribute__((vector_size(LANES * 2)));
typedef uint16_t bf16;

// What buffers are made of: a vector that lies across two lines takes twice as long to load.
struct alignas(64) CacheLine {
    float floats[16];
};
inline int64_t lines(int64_t floats) { return (floats + 15) / 16; }

inline float widen(float x) { return x; }
inline float widen(bf16 x) {
    const uint32_t bits = uint32_t(x) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

inline void narrow(float x, float* to) { *to = x; }
inline void narrow(float x, bf16* to) {  // round to nearest even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    *to = x != x ? bf16(0x7fc0) : bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline floats load(const float* from) {
    floats v;
    std::memcpy(&v, from, sizeof v);
    return v;
}
inline floats load(const bf16* from) {
    halves half;
    std::memcpy(&half, from, sizeof half);
#if LANES == 16 && defined(__AVX512F__)
    return (floats)((words)_mm512_cvtepu16_epi32((__m256i)half) << 16);  // one instruction less than the compiler finds
#elif LANES == 8 && defined(__AVX2__)
    return (floats)((words)_mm256_cvtepu16_epi32((__m128i)half) << 16);
#else
    return (floats)(__builtin_convertvector(half, words) << 16);
#endif
}

// Numbers 2 i and 2 i + 1 of 2 LANES
inline void load_pairs(const bf16* from, floats* even, floats* odd) {
    words both;
    std::memcpy(&both, from, sizeof both);
    *even = (floats)(both << 16);
    *odd = (floats)(both & 0xffff0000u);
}

// a * b + c, rounded once where the processor can
#ifdef __FMA__
inline float mul_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#else
inline float mul_add(float a, float b, float c) { return a * b + c; }
#endif
inline floats mul_add(floats a, floats b, floats c) {
#if LANES == 16 && defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif LANES == 8 && defined(__FMA__)
    return _mm256_fmadd_ps(a, b, c);
#elif defined(__FMA__)
    __m256 as[2], bs[2], cs[2];
    std::memcpy(as, &a, sizeof a), std::memcpy(bs, &b, sizeof b), std::memcpy(cs, &c, sizeof c);
    for (int i = 0; i < 2; i++) cs[i] = _mm256_fmadd_ps(as[i], bs[i], cs[i]);
    std::memcpy(&c, cs, sizeof c);
    return c;
#else
    return a * b + c;
#endif
}
inline floats splat(float x) {
#if LANES == 16 && defined(__AVX512F__)
    return _mm512_set1_ps(x);
#elif LANES == 8 && defined(__AVX__)
    return _mm256_set1_ps(x);
#else
    floats v = {};
    for (int i = 0; i < LANES; i++) v[i] = x;
    return v;
#endif
}

inline void store(floats v, float* to) { std::memcpy(to, &v, sizeof v); }
inline void store(floats v, bf16* to) {  // each as `narrow` has it
    const words bits = (words)v, quiet = words{} + 0x7fc0, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const halves half = __builtin_convertvector(v == v ? rounded : quiet, halves);
    std::memcpy(to, &half, sizeof half);
}

// What load_pairs has taken apart. (A shuffle for either width: out of arrays, compilers move one number at a time.)
inline void store_pairs(floats even, floats odd, float* to) {
#if LANES == 16 && defined(__AVX512F__)
    const ints low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    store(_mm512_permutex2var_ps(even, (__m512i)low, odd), to);
    store(_mm512_permutex2var_ps(even, (__m512i)(low + 8), odd), to + LANES);
#elif LANES == 8 && defined(__AVX__)
    const __m256 low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
    store(_mm256_permute2f128_ps(low, high, 0x20), to);
    store(_mm256_permute2f128_ps(low, high, 0x31), to + LANES);
#else
    for (int i = 0; i < LANES; i++) to[2 * i] = even[i], to[2 * i + 1] = odd[i];
#endif
}

// to[0..count) = from[0..count)
inline void narrow(const float* from, int64_t count, float* to) { std::memcpy(to, from, count * sizeof(float)); }
inline void narrow(const float* from, int64_t count, bf16* to) {
    const int64_t whole = count - count % LANES;
    for (int64_t i = 0; i < whole; i += LANES) store(load(from + i), to + i);
    for (int64_t i = whole; i < count; i++) narrow(from[i], to + i);
}

inline ints lane_numbers() {
    ints v;
    for (int i = 0; i < LANES; i++) v[i] = i;
    return v;
}

inline floats larger(floats a, floats b) { return a > b ? a : b; }
// halves are worked on until one number is left
template <typename Op>
float fold(floats v, Op op) {
#ifdef __AVX__
#if LANES == 16 && defined(__AVX512F__)
    const __m256 half = op(_mm512_castps512_ps256(v), (__m256)_mm512_extractf64x4_pd((__m512d)v, 1));
#elif LANES == 16
    __m256 parts[2];
    std::memcpy(parts, &v, sizeof v);
    const __m256 half = op(parts[0], parts[1]);
#else
    const __m256 half = v;
#endif
    const __m128 quarter = op(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    const __m128 eighth = op(quarter, _mm_movehl_ps(quarter, quarter));
    return op(eighth[0], eighth[1]);
#else
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) v[i] = op(v[i], v[i + width]);
    return v[0];
#endif
}
inline float sum(floats v) {
    return fold(v, [](auto a, auto b) { return a + b; });
}
inline float max(floats v) {
    return fold(v, [](auto a, auto b) { return a > b ? a : b; });
}

// e^x for x <= 0, to about 2 ulp: 2^n by the exponent's bits, 2^f by a polynomial on [-0.5, 0.5]
inline floats exp_negative(floats x) {
    const floats lowest = floats{} - 87.0f;
    x = x < lowest ? lowest : x;
    const floats scaled = x * 1.44269504f;
    const ints n = __builtin_convertvector(scaled - 0.5f, ints);  // truncates, and x <= 0: rounds to nearest
    const floats f = scaled - __builtin_convertvector(n, floats);
    floats p = floats{} + 1.5403530e-4f;
    p = mul_add(p, f, splat(1.33335581e-3f));
    p = mul_add(p, f, splat(9.61812911e-3f));
    p = mul_add(p, f, splat(5.55041087e-2f));
    p = mul_add(p, f, splat(2.40226507e-1f));
    p = mul_add(p, f, splat(6.93147181e-1f));
    p = mul_add(p, f, splat(1.0f));
    return p * (floats)((n + 127) << 23);
}

// to about 2 ulp: a polynomial near zero (Cephes), and (1 - e^-2|x|) / (1 + e^-2|x|)
inline floats tanh(floats x) {
    const floats zero = {}, size = x < zero ? -x : x, e = exp_negative(size * -2.0f), far = (1.0f - e) / (1.0f + e), z = x * x;
    floats p = floats{} - 5.70498872745e-3f;
    p = mul_add(p, z, splat(2.06390887954e-2f));
    p = mul_add(p, z, splat(-5.37397155531e-2f));
    p = mul_add(p, z, splat(1.33314422036e-1f));
    p = mul_add(p, z, splat(-3.33332819422e-1f));
    const floats near = mul_add(p * z, x, x);
    return size < 0.625f ? near : x < zero ? -far : far;
}
