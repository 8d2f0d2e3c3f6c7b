// An adapter's factors laid into the panels of lora/panels.h, and taken out of them again.
//
// Shapes: a factor is [rows, depth]: A [rank, in], B [out, rank]; panels are of RANKS rows of A, and of COLUMNS of B.
// One pass over what a file has: each number is widened, multiplied by `scaling` in float32, rounded once and looked at.
// Threads: none; a load is one thread's, beside the steps.
#include "abi.h"
#include "lora/panels.h"

namespace {

enum Kind : int { FROM_FP32, FROM_BF16, FROM_FP16 };  // what a file has
enum Seen : int { NOT_FINITE = 1, NOT_ZERO = 2 };

using ::widen;

constexpr int64_t DEPTH = 256;  // numbers of a row that are worked on at a time

struct half {
    uint16_t bits;
};

// exact: the exponent moves by what its bias differs, and float32's own multiplication makes subnormals normal
inline float widen(half x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = uint32_t(x.bits & 0x7fff) << 13;
    const bool is_special = (x.bits & 0x7c00) == 0x7c00;
    uint32_t bits = is_special ? rest | 0x7f800000 : rest;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    if (!is_special) wide *= 0x1p112f;
    std::memcpy(&bits, &wide, sizeof bits);
    bits |= sign;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

// to[0..count) = from * scaling; the exponents that came out, and all bits but the signs'
template <typename S, typename W>
int convert(const S* from, int64_t count, float scaling, W* to) {
    using Bits = std::conditional_t<sizeof(W) == 2, uint16_t, uint32_t>;
    constexpr Bits exponent = sizeof(W) == 2 ? Bits(0x7f80) : Bits(0x7f800000);
    Bits any = 0;
    int special = 0;
    for (int64_t i = 0; i < count; i++) {
        narrow(widen(from[i]) * scaling, to + i);
        Bits bits;
        std::memcpy(&bits, to + i, sizeof bits);
        any |= bits;
        special |= (bits & exponent) == exponent;
    }
    return (special ? NOT_FINITE : 0) | (Bits(any << 1) ? NOT_ZERO : 0);
}

// LANES rows of LANES words, `stride` bytes apart, into columns `pitch` bytes apart: each round puts the words of the
// second half of the rows between those of the first
inline void turn(const char* from, int64_t stride, char* to, int64_t pitch) {
    floats rows[LANES], turned[LANES];
#pragma GCC unroll 16
    for (int r = 0; r < LANES; r++) std::memcpy(rows + r, from + r * stride, sizeof(floats));
#pragma GCC unroll 4
    for (int round = 1; round < LANES; round *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < LANES / 2; i++)
            store_pairs(rows[i], rows[i + LANES / 2], reinterpret_cast<float*>(turned + 2 * i));
        std::memcpy(rows, turned, sizeof turned);
    }
#pragma GCC unroll 16
    for (int c = 0; c < LANES; c++) std::memcpy(to + c * pitch, rows + c, sizeof(floats));
}

// words [width, count] at `rows`, `stride` bytes apart, into [count][width] at `to`
void lay(const char* rows, int64_t stride, int64_t width, int64_t count, char* to) {
    constexpr int64_t WORD = sizeof(float);
    const int64_t whole = width < LANES ? 0 : count - count % LANES, turned = width - width % LANES;
    for (int64_t k = 0; k < whole; k += LANES)
        for (int64_t n = 0; n < turned; n += LANES)
            turn(rows + n * stride + k * WORD, stride, to + (k * width + n) * WORD, width * WORD);
    for (int64_t k = 0; k < count; k++)
        for (int64_t n = k < whole ? turned : 0; n < width; n++)
            std::memcpy(to + (k * width + n) * WORD, rows + n * stride + k * WORD, WORD);
}

// [width, stride] at `rows` into one panel, `count` numbers of each row from its number `first` on, an even one
template <typename W>
void lay(const W* rows, int64_t stride, int64_t width, int64_t first, int64_t count, W* panel) {
    constexpr int64_t TOGETHER = sizeof(float) / sizeof(W);  // numbers that share a word
    W* to = panel + first * width;
    lay(reinterpret_cast<const char*>(rows), stride * sizeof(W), width, count / TOGETHER, reinterpret_cast<char*>(to));
    if (count % TOGETHER)
        for (int64_t n = 0; n < width; n++) to[(count - 1) * width + n] = rows[n * stride + count - 1];
}

template <typename S, typename W>
int place(const S* from, int64_t rows, int64_t depth, int64_t widest, float scaling, W* to) {
    alignas(64) W buffer[COLUMNS * DEPTH];  // of the widest panels
    int seen = 0;
    for (int64_t first = 0; first < rows; first += widest) {
        const int64_t width = std::min(widest, rows - first);
        const S* panel = from + first * depth;
        for (int64_t k = 0; k < depth; k += DEPTH) {
            const int64_t count = std::min(DEPTH, depth - k);
            if (count == depth) seen |= convert(panel, width * depth, scaling, buffer);  // the rows lie one behind the other
            else for (int64_t n = 0; n < width; n++) seen |= convert(panel + n * depth + k, count, scaling, buffer + n * count);
            lay(buffer, count, width, k, count, to + first * depth);
        }
    }
    return seen;
}

struct Factor {
    const void* from;
    int kind, is_bf16;  // of what it is made, and what
    void* to;

    template <typename S>
    int place(int64_t rows, int64_t depth, int64_t widest, float scaling) const {
        const S* numbers = static_cast<const S*>(from);
        return is_bf16 ? ::place(numbers, rows, depth, widest, scaling, static_cast<bf16*>(to))
                       : ::place(numbers, rows, depth, widest, scaling, static_cast<float*>(to));
    }
    int place(int64_t rows, int64_t depth, int64_t widest, float scaling) const {
        if (kind == FROM_FP32) return place<float>(rows, depth, widest, scaling);
        if (kind == FROM_BF16) return place<bf16>(rows, depth, widest, scaling);
        return place<half>(rows, depth, widest, scaling);
    }
};

}  // namespace

// A [rank, in] and B [out, rank], this times `scaling`, into panels; what was Seen of A, and in the next two bits of B
extern "C" int place_factors(int64_t rank, int64_t in, int64_t out, float scaling, const void* A, int kind_A, int is_bf16_A,
                             void* panels_A, const void* B, int kind_B, int is_bf16_B, void* panels_B) {
    return Factor{A, kind_A, is_bf16_A, panels_A}.place(rank, in, RANKS, 1) |
           Factor{B, kind_B, is_bf16_B, panels_B}.place(out, rank, COLUMNS, scaling) << 2;
}
