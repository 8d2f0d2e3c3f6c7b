// A linear with quantised weights (bitsandbytes' int8, nf4 and fp4):  y = x W^T + b,  W[o, k] = value(code) * scale.
//
// Shapes: x [rows, in], W [out, in], y [rows, out], float32; one scale for every `block` values of a row of W.
// Layout: codes in panels [panel][in][COLUMNS] as linear_fp32.cpp has them, a signed byte each, or two 4-bit codes a byte:
// columns c and LANES + c. Scales in panels [panel][in / block][COLUMNS].
// Threads: groups of panels, taken dynamically. A group is dequantised to float32 and multiplied by the very code that
// multiplies plain float32 weights: the result is, bit for bit, what that gives for the dequantised weight.
#include <algorithm>
#include <omp.h>
#include <vector>
#include "abi.h"
#include "vec.h"

namespace {

constexpr int64_t THREADED = 1 << 16;  // weights below which a second thread costs more than it saves
constexpr int64_t WIDENED = 1 << 16;   // floats at a time, which stay in the second cache

constexpr int64_t COLUMNS = 2 * LANES;  // of a panel, as linear_fp32.cpp has them

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
void widen_panel(const LinearWeight& w, int64_t p, float* wide) {
    const int64_t row_bytes = w.table ? COLUMNS / 2 : COLUMNS;
    const uint8_t* codes = static_cast<const uint8_t*>(w.panels) + p * w.in * row_bytes;
    const float* scales = w.scales + p * (w.in / w.block) * COLUMNS;
    for (int64_t k = 0; k < w.in; k += w.block, scales += COLUMNS)
        for (int64_t c = 0; c < COLUMNS; c += 2 * LANES) {
            const uint8_t* from = codes + k * row_bytes + (w.table ? c / 2 : c);
            float* to = wide + k * COLUMNS + c;
            if (w.table) widen_nibbles(from, w.table, scales + c, w.block, COLUMNS, to);
            else widen_bytes(from, scales + c, w.block, COLUMNS, to);
        }
}

int64_t panels_of(const LinearWeight& w) { return (w.out + COLUMNS - 1) / COLUMNS; }

// x: [rows, in]; y: [rows, out]
void multiply(const LinearWeight& w, const float* x, int64_t rows, int64_t in, float* y, int threads) {
    const int64_t panels = panels_of(w), panel_size = in * COLUMNS;
    const int64_t group = std::clamp<int64_t>(WIDENED / panel_size, 1, (panels + threads - 1) / threads);
#pragma omp parallel num_threads(threads) if (in * w.out >= THREADED)
    {
        std::vector<float> wide(group * panel_size), out(rows * group * COLUMNS);
#pragma omp for schedule(dynamic)
        for (int64_t p = 0; p < panels; p += group) {
            const int64_t first = p * COLUMNS, width = std::min(group * COLUMNS, w.out - first);
            for (int64_t g = 0; g < group && p + g < panels; g++) widen_panel(w, p + g, wide.data() + g * panel_size);
            const LinearWeight part{wide.data(), w.bias ? w.bias + first : nullptr, nullptr, nullptr, in, width, FP32, 0};
            const LinearJob job{&part, out.data()};
            linear_fp32(x, rows, in, &job, 1, nullptr, 0, 1);
            for (int64_t r = 0; r < rows; r++)
                std::memcpy(y + r * w.out + first, out.data() + r * width, width * sizeof(float));
        }
    }
}

}  // namespace

// wide: [panels, in, columns]
extern "C" void widen(const LinearWeight* w, float* wide) {
    for (int64_t p = 0; p < panels_of(*w); p++) widen_panel(*w, p, wide + p * w->in * COLUMNS);
}

void linear_quantised(const float* x, int64_t rows, int64_t in, const LinearJob* jobs, int64_t count, const Span*, int64_t,
                      int threads) {
    for (const LinearJob* job = jobs; job < jobs + count; job++) multiply(*job->weight, x, rows, in, job->y, threads);
}
