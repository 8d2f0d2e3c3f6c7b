// Eight floats at a time, from float32 or bfloat16 memory. Plain vector extensions: the compiler picks the instructions,
// except for mul_add: whether a product is rounded before it is added must not depend on what the compiler makes of a loop.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__FMA__) || defined(__AVX2__)
#include <immintrin.h>
#endif

typedef float f32x8 __attribute__((vector_size(32)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));
typedef uint16_t bf16;

constexpr int LANES = 8;

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

inline f32x8 load(const float* from) {
    f32x8 v;
    std::memcpy(&v, from, sizeof v);
    return v;
}
inline f32x8 load(const bf16* from) {
    u16x8 half;
    std::memcpy(&half, from, sizeof half);
#ifdef __AVX2__
    return (f32x8)((u32x8)_mm256_cvtepu16_epi32((__m128i)half) << 16);  // one instruction less than the compiler finds
#else
    return (f32x8)(__builtin_convertvector(half, u32x8) << 16);
#endif
}

// a * b + c, rounded once where the processor can
#ifdef __FMA__
inline f32x8 mul_add(f32x8 a, f32x8 b, f32x8 c) { return _mm256_fmadd_ps(a, b, c); }
inline float mul_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#else
inline f32x8 mul_add(f32x8 a, f32x8 b, f32x8 c) { return a * b + c; }
inline float mul_add(float a, float b, float c) { return a * b + c; }
#endif
inline f32x8 splat(float x) { return f32x8{x, x, x, x, x, x, x, x}; }

inline void store(f32x8 v, float* to) { std::memcpy(to, &v, sizeof v); }
inline void store(f32x8 v, bf16* to) {
    for (int i = 0; i < LANES; i++) narrow(v[i], to + i);
}

inline float sum(f32x8 v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

// e^x for x <= 0, to about 2 ulp: 2^n by the exponent's bits, 2^f by a polynomial on [-0.5, 0.5]
inline f32x8 exp_negative(f32x8 x) {
    typedef int32_t i32x8 __attribute__((vector_size(32)));
    const f32x8 lowest = f32x8{} - 87.0f;
    x = x < lowest ? lowest : x;
    const f32x8 scaled = x * 1.44269504f;
    const i32x8 n = __builtin_convertvector(scaled - 0.5f, i32x8);  // truncates, and x <= 0: rounds to nearest
    const f32x8 f = scaled - __builtin_convertvector(n, f32x8);
    f32x8 p = f32x8{} + 1.5403530e-4f;
    p = mul_add(p, f, splat(1.33335581e-3f));
    p = mul_add(p, f, splat(9.61812911e-3f));
    p = mul_add(p, f, splat(5.55041087e-2f));
    p = mul_add(p, f, splat(2.40226507e-1f));
    p = mul_add(p, f, splat(6.93147181e-1f));
    p = mul_add(p, f, splat(1.0f));
    return p * (f32x8)((n + 127) << 23);
}
