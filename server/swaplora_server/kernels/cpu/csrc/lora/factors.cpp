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

// [rows, depth] at `from` into one panel, `count` numbers of each row from `first` on; `first` is even
void lay(const bf16* rows, int64_t stride, int64_t width, int64_t first, int64_t count, bf16* panel) {
    bf16* to = panel + first * width;
    for (int64_t k = 0; k + 2 <= count; k += 2, to += 2 * width)
        for (int64_t n = 0; n < width; n++) std::memcpy(to + 2 * n, rows + n * stride + k, sizeof(uint32_t));
    if (count % 2)
        for (int64_t n = 0; n < width; n++) to[n] = rows[n * stride + count - 1];
}
void lay(const float* rows, int64_t stride, int64_t width, int64_t first, int64_t count, float* panel) {
    float* to = panel + first * width;
    for (int64_t k = 0; k < count; k++, to += width)
        for (int64_t n = 0; n < width; n++) to[n] = rows[n * stride + k];
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

template <typename S>
int place(const S* from, int64_t rows, int64_t depth, int64_t widest, float scaling, int is_bf16, void* to) {
    return is_bf16 ? place(from, rows, depth, widest, scaling, static_cast<bf16*>(to))
                   : place(from, rows, depth, widest, scaling, static_cast<float*>(to));
}

}  // namespace

// [rows, depth] of `kind` times `scaling` into panels of `widest` rows; what was Seen
extern "C" int place_factor(const void* from, int kind, int64_t rows, int64_t depth, int64_t widest, float scaling, int is_bf16,
                            void* to) {
    if (kind == FROM_FP32) return place(static_cast<const float*>(from), rows, depth, widest, scaling, is_bf16, to);
    if (kind == FROM_BF16) return place(static_cast<const bf16*>(from), rows, depth, widest, scaling, is_bf16, to);
    return place(static_cast<const half*>(from), rows, depth, widest, scaling, is_bf16, to);
}
