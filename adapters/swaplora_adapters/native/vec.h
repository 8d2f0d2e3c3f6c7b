// Eight floats at a time, from float32 or bfloat16 memory. Plain vector extensions: the compiler picks the instructions.
#pragma once
#include <cstdint>
#include <cstring>

typedef float f32x8 __attribute__((vector_size(32)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));
typedef uint16_t bf16;

constexpr int LANES = 8;

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
    return (f32x8)(__builtin_convertvector(half, u32x8) << 16);
}

inline float sum(f32x8 v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }
