// How an adapter's factors lie in memory: in panels that are read straight through.
//
// A factor is [rows, depth]: A [rank, in], B [out, rank]. A panel has RANKS rows of A, or COLUMNS of B, as
// [depth][width]; in bfloat16 two numbers along the depth share a word, [depth / 2][width][2], and the last of an odd
// number is alone, [width]. The last panel is as narrow as what is left. Nothing is filled up, so a vector that is loaded
// may reach into what lies behind, up to 64 bytes, in lanes that nobody looks at.
#pragma once
#include <algorithm>
#include <type_traits>
#include "vec.h"

constexpr int64_t RANKS = 16, COLUMNS = 48;
constexpr int64_t AHEAD = 4096;  // bytes by which a panel is prefetched before it is read

template <typename W>
struct Panel {
    const W* start;
    int64_t width;

    // of a factor's row `first` on
    Panel(const void* factor, int64_t rows, int64_t depth, int64_t first, int64_t widest)
        : start(static_cast<const W*>(factor) + first * depth), width(std::min(widest, rows - first)) {}

    // of bfloat16, two numbers each, from number k on, an even one
    const uint32_t* pairs(int64_t k) const { return reinterpret_cast<const uint32_t*>(start + k * width); }

    // numbers k and k + 1 of the rows from `row` on, for an even k
    void pair(int64_t k, int64_t row, floats* both) const {
        const W* from = start + k * width;
        if constexpr (std::is_same_v<W, float>) {
            both[0] = load(from + row);
            both[1] = load(from + width + row);
        } else {
            words two;
            std::memcpy(&two, from + 2 * row, sizeof two);
            both[0] = (floats)(two << 16);
            both[1] = (floats)(two & 0xffff0000u);
        }
    }
    // number k, the last of an odd number
    floats single(int64_t k, int64_t row) const { return load(start + k * width + row); }

    // COUNT numbers from k on
    template <int64_t COUNT>
    void prefetch(int64_t k) const {
        const char* from = reinterpret_cast<const char*>(start + k * width) + AHEAD;
#pragma GCC unroll 16
        for (int64_t at = 0; at < COUNT * int64_t(sizeof(W)); at += 64) __builtin_prefetch(from + at);
    }
};
