// y = x W^T + b in float32, with W kept as codes of 8 or 4 bits and a scale for every block of them.
//
// A few panels of output features at a time are widened to float32 and multiplied by the very code that multiplies
// plain float32 weights: the result is, bit for bit, what that gives for the widened weight.
#include <algorithm>
#include <omp.h>
#include <vector>
#include "packed_linear.h"
#include "vec.h"
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

typedef int32_t i32x8 __attribute__((vector_size(32)));

struct Table {
    f32x8 first, second;  // eight values each
};

constexpr int64_t THREADED = 1 << 16;  // weights below which a second thread costs more than it saves
constexpr int64_t WIDENED = 1 << 16;   // floats at a time, which stay in the second cache

struct QuantisedWeight {
    const uint8_t* codes;  // [panels, in, columns] signed bytes, or two codes a byte: columns c and 8 + c of every 16
    const float* scales;   // [panels, in / block, columns]
    const float* table;    // [16], what the 4-bit codes stand for; null for 8 bits
    const float* bias;     // [out] or null
    int64_t in, out, block, columns;
    void (*multiply)(const float*, int64_t, int64_t, const LinearJob*, int64_t, const Span*, int64_t, int);  // packed_linear.cpp's linear_f32
};

// Eight bytes as numbers, and eight entries of a table. What compilers make of the plain forms is several times slower.
#ifdef __AVX2__
__m128i eight(const void* from) { return _mm_loadl_epi64(static_cast<const __m128i*>(from)); }
i32x8 numbers(const int8_t* from) { return (i32x8)_mm256_cvtepi8_epi32(eight(from)); }
u32x8 numbers(const uint8_t* from) { return (u32x8)_mm256_cvtepu8_epi32(eight(from)); }

f32x8 look_up(const Table& table, u32x8 codes) {
    const __m256i at = (__m256i)codes;  // three bits choose within a half, the fourth chooses the half
    const __m256 first = _mm256_permutevar8x32_ps(table.first, at), second = _mm256_permutevar8x32_ps(table.second, at);
    return _mm256_blendv_ps(first, second, (__m256)(codes << 28));
}
#else
i32x8 numbers(const int8_t* b) { return i32x8{b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]}; }
u32x8 numbers(const uint8_t* b) { return u32x8{b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]}; }

f32x8 look_up(const Table& table, u32x8 codes) {
    f32x8 v;
    for (int c = 0; c < LANES; c++) v[c] = codes[c] < LANES ? table.first[codes[c]] : table.second[codes[c] - LANES];
    return v;
}
#endif

// Sixteen columns of the rows of one block; rows lie `stride` columns apart
void widen_bytes(const uint8_t* codes, const float* scales, int64_t rows, int64_t stride, float* wide) {
    const f32x8 scale = load(scales), next_scale = load(scales + LANES);
    for (int64_t k = 0; k < rows; k++, codes += stride, wide += stride) {
        const int8_t* row = reinterpret_cast<const int8_t*>(codes);
        store(__builtin_convertvector(numbers(row), f32x8) * scale, wide);
        store(__builtin_convertvector(numbers(row + LANES), f32x8) * next_scale, wide + LANES);
    }
}

void widen_nibbles(const uint8_t* codes, const float* entries, const float* scales, int64_t rows, int64_t stride, float* wide) {
    const Table table{load(entries), load(entries + LANES)};
    const f32x8 scale = load(scales), next_scale = load(scales + LANES);
    for (int64_t k = 0; k < rows; k++, codes += stride / 2, wide += stride) {
        const u32x8 both = numbers(codes);
        store(look_up(table, both & 15) * scale, wide);
        store(look_up(table, both >> 4) * next_scale, wide + LANES);
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
