// A linear with quantised weights (bitsandbytes' int8, nf4 and fp4):  y = x W^T + b,  W[o, k] = value(code) * scale.
//
// Shapes: x [rows, in], W [out, in], y [rows, out], float32; one scale for every `block` values of a row of W.
// Layout: codes in panels [panel][in][columns] as packed_linear.cpp has them, a byte each, or two 4-bit codes a byte.
// Threads: groups of panels, taken dynamically. A group is dequantised to float32 and multiplied by the very code that
// multiplies plain float32 weights: the result is, bit for bit, what that gives for the dequantised weight.
#include <algorithm>
#include <omp.h>
#include <vector>
#include "packed_linear.h"
#include "vec.h"

namespace {

constexpr int64_t THREADED = 1 << 16;  // weights below which a second thread costs more than it saves
constexpr int64_t WIDENED = 1 << 16;   // floats at a time, which stay in the second cache

struct QuantisedWeight {
    const uint8_t* codes;  // [panels, in, columns] signed bytes, or two codes a byte: columns c and LANES + c of every 2 * LANES
    const float* scales;   // [panels, in / block, columns]
    const float* table;    // [16], what the 4-bit codes stand for; null for 8 bits
    const float* bias;     // [out] or null
    int64_t in, out, block, columns;
    void (*multiply)(const float*, int64_t, int64_t, const LinearJob*, int64_t, const Span*, int64_t, int);  // packed_linear.cpp's linear_f32
};

// LANES bytes as numbers, and as many entries of a table. What compilers make of the plain forms is several times slower.
#if LANES == 16 && defined(__AVX512F__)
__m128i bytes(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
ints numbers(const int8_t* from) { return (ints)_mm512_cvtepi8_epi32(bytes(from)); }
words numbers(const uint8_t* from) { return (words)_mm512_cvtepu8_epi32(bytes(from)); }
floats look_up(const float* entries, words codes) { return _mm512_permutexvar_ps((__m512i)codes, load(entries)); }
#elif LANES == 8 && defined(__AVX2__)
__m128i bytes(const void* from) { return _mm_loadl_epi64(static_cast<const __m128i*>(from)); }
ints numbers(const int8_t* from) { return (ints)_mm256_cvtepi8_epi32(bytes(from)); }
words numbers(const uint8_t* from) { return (words)_mm256_cvtepu8_epi32(bytes(from)); }
floats look_up(const float* entries, words codes) {
    const __m256i at = (__m256i)codes;  // three bits choose within a half, the fourth chooses the half
    const __m256 first = _mm256_permutevar8x32_ps(load(entries), at);
    const __m256 second = _mm256_permutevar8x32_ps(load(entries + LANES), at);
    return _mm256_blendv_ps(first, second, (__m256)(codes << 28));
}
#else
ints numbers(const int8_t* from) {
    ints v;
    for (int c = 0; c < LANES; c++) v[c] = from[c];
    return v;
}
words numbers(const uint8_t* from) {
    words v;
    for (int c = 0; c < LANES; c++) v[c] = from[c];
    return v;
}
floats look_up(const float* entries, words codes) {
    floats v;
    for (int c = 0; c < LANES; c++) v[c] = entries[codes[c]];
    return v;
}
#endif

// 2 * LANES columns of the rows of one block; rows lie `stride` columns apart
void widen_bytes(const uint8_t* codes, const float* scales, int64_t rows, int64_t stride, float* wide) {
    const floats scale = load(scales), next_scale = load(scales + LANES);
    for (int64_t k = 0; k < rows; k++, codes += stride, wide += stride) {
        const int8_t* row = reinterpret_cast<const int8_t*>(codes);
        store(__builtin_convertvector(numbers(row), floats) * scale, wide);
        store(__builtin_convertvector(numbers(row + LANES), floats) * next_scale, wide + LANES);
    }
}

void widen_nibbles(const uint8_t* codes, const float* entries, const float* scales, int64_t rows, int64_t stride, float* wide) {
    const floats scale = load(scales), next_scale = load(scales + LANES);
    for (int64_t k = 0; k < rows; k++, codes += stride / 2, wide += stride) {
        const words both = numbers(codes);
        store(look_up(entries, both & 15) * scale, wide);
        store(look_up(entries, both >> 4) * next_scale, wide + LANES);
    }
}

// wide: [in, columns]
void widen_panel(const QuantisedWeight& w, int64_t p, float* wide) {
    const int64_t row_bytes = w.table ? w.columns / 2 : w.columns;
    const uint8_t* codes = w.codes + p * w.in * row_bytes;
    const float* scales = w.scales + p * (w.in / w.block) * w.columns;
    for (int64_t k = 0; k < w.in; k += w.block, scales += w.columns)
        for (int64_t c = 0; c < w.columns; c += 2 * LANES) {
            const uint8_t* from = codes + k * row_bytes + (w.table ? c / 2 : c);
            float* to = wide + k * w.columns + c;
            if (w.table) widen_nibbles(from, w.table, scales + c, w.block, w.columns, to);
            else widen_bytes(from, scales + c, w.block, w.columns, to);
        }
}

int64_t panels_of(const QuantisedWeight& w) { return (w.out + w.columns - 1) / w.columns; }

}  // namespace

// wide: [panels, in, columns]
extern "C" void widen(const QuantisedWeight* w, float* wide) {
    for (int64_t p = 0; p < panels_of(*w); p++) widen_panel(*w, p, wide + p * w->in * w->columns);
}

// x: [rows, in]; y: [rows, out]
extern "C" void quantised_linear_f32(const QuantisedWeight* w, const float* x, int64_t rows, float* y, int threads) {
    const int64_t panels = panels_of(*w), panel_size = w->in * w->columns;
    const int64_t group = std::clamp<int64_t>(WIDENED / panel_size, 1, (panels + threads - 1) / threads);
#pragma omp parallel num_threads(threads) if (w->in * w->out >= THREADED)
    {
        std::vector<float> wide(group * panel_size), out(rows * group * w->columns);
#pragma omp for schedule(dynamic)
        for (int64_t p = 0; p < panels; p += group) {
            const int64_t first = p * w->columns, width = std::min(group * w->columns, w->out - first);
            for (int64_t g = 0; g < group && p + g < panels; g++) widen_panel(*w, p + g, wide.data() + g * panel_size);
            const LinearWeight part{wide.data(), w->bias ? w->bias + first : nullptr, width, 0};
            const LinearJob job{&part, out.data()};
            w->multiply(x, rows, w->in, &job, 1, nullptr, 0, 1);
            for (int64_t r = 0; r < rows; r++)
                std::memcpy(y + r * w->out + first, out.data() + r * width, width * sizeof(float));
        }
    }
}
