// What multiplies bytes and halves: AMX's tiles, and products of bfloat16 pairs with sums in float32, sixteen columns at a
// time: by the processor's own instruction, or in plain C++ that gives the same bits on any processor (the build's PLAIN
// asks for it where there is an instruction).
//
// Processors know two orders of summing, and the build says which a machine uses, for a row must come out the same
// whatever kernel computes it:
//   PAIRS (vdpbf16ps):  s = fma(w.high, x.high, s), then s = fma(w.low, x.low, s), pair after pair
//   TILES (tdpbf16ps):  for every BLOCK of pairs low = fma(w.low, x.low, low) and high likewise, each from zero;
//                       then s = s + (low + high)
// Every step is rounded once, to nearest even, and denormal numbers are zero. Sources: Intel's Software Developer's Manual.
#pragma once
#if defined(__x86_64__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include "vec.h"

#ifndef TILES
#error "the build gives TILES, 0 or 1"
#endif

#if TILES && defined(__AMX_BF16__) && !defined(PLAIN)
#define AMX_PRODUCTS 1
#else
#define AMX_PRODUCTS 0
#endif
#if !TILES && LANES == 16 && defined(__AVX512BF16__) && !defined(PLAIN)
#define AVX512_PRODUCTS 1
#else
#define AVX512_PRODUCTS 0
#endif
constexpr bool HAS_BF16_INSTRUCTION = AMX_PRODUCTS || AVX512_PRODUCTS;

constexpr int64_t BLOCK = 16;  // pairs; K is filled up to whole blocks with zeros

// AMX: tiles of 16 rows of 64 bytes, where the processor has them and the system lets us use them.
#if defined(__AMX_INT8__) && !defined(PLAIN)
#define HAS_TILES 1

// Asks the system once a process
inline bool may_use_tiles() {
    static const bool is_permitted = !syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */);
    return is_permitted;
}

// All eight tiles of this thread, whole
inline void configure_tiles() {
    struct {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } const config;
    static_assert(sizeof config == 64, "as the instruction reads it");
    _tile_loadconfig(&config);
}
inline void release_tiles() { _tile_release(); }
#else
inline bool may_use_tiles() { return false; }
inline void configure_tiles() {}
inline void release_tiles() {}
#endif

// Sixteen columns, as one vector or two.
constexpr int PARTS = 16 / LANES;
struct Sixteen {
    floats part[PARTS];
};
struct SixteenWords {
    words part[PARTS];
};

inline Sixteen load16(const float* from) {
    Sixteen v;
    for (int i = 0; i < PARTS; i++) v.part[i] = load(from + i * LANES);
    return v;
}
inline void store16(const Sixteen& v, float* to) {
    for (int i = 0; i < PARTS; i++) store(v.part[i], to + i * LANES);
}
inline SixteenWords load16(const uint32_t* from) {
    SixteenWords v;
    for (int i = 0; i < PARTS; i++) std::memcpy(&v.part[i], from + i * LANES, sizeof(words));
    return v;
}
inline SixteenWords splat16(uint32_t pair) {
    SixteenWords v;
    for (int i = 0; i < PARTS; i++) v.part[i] = words{} + pair;
    return v;
}

inline floats low_of(words pairs) { return (floats)(pairs << 16); }
inline floats high_of(words pairs) { return (floats)(pairs & 0xffff0000u); }

// sums + w . x, in the order PAIRS
#if AVX512_PRODUCTS
inline Sixteen add_pairs(Sixteen sums, SixteenWords w, SixteenWords x) {
    return {{(floats)_mm512_dpbf16_ps((__m512)sums.part[0], (__m512bh)w.part[0], (__m512bh)x.part[0])}};
}
#else
inline Sixteen add_pairs(Sixteen sums, SixteenWords w, SixteenWords x) {
    for (int i = 0; i < PARTS; i++) {
        sums.part[i] = mul_add(high_of(w.part[i]), high_of(x.part[i]), sums.part[i]);
        sums.part[i] = mul_add(low_of(w.part[i]), low_of(x.part[i]), sums.part[i]);
    }
    return sums;
}
#endif

// low + w.low * x.low and high + w.high * x.high, in the order TILES
inline void add_each(uint32_t x, SixteenWords w, Sixteen& low, Sixteen& high) {
    for (int i = 0; i < PARTS; i++) {
        low.part[i] = mul_add(low_of(w.part[i]), low_of(words{} + x), low.part[i]);
        high.part[i] = mul_add(high_of(w.part[i]), high_of(words{} + x), high.part[i]);
    }
}

// Has the thread's float32 arithmetic take denormal numbers for zero, as the instructions do, for as long as it lives.
struct NoDenormals {
#if defined(__x86_64__)
    const unsigned before = _mm_getcsr();
    NoDenormals() { _mm_setcsr(before | 0x8040); }
    ~NoDenormals() { _mm_setcsr(before); }
#else
    NoDenormals() {}
#endif
    NoDenormals(const NoDenormals&) = delete;
};

// To nearest even; denormals become zero, NaN stays NaN.
inline uint32_t rounded(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (!(bits & 0x7f800000u)) return bits >> 16 & 0x8000u;
    if ((bits & 0x7fffffffu) > 0x7f800000u) return bits >> 16 | 0x40u;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
