// y = x W^T + b in float32, with W laid out once in panels of COLUMNS output features.
//
// Every output is one sum over k in ascending order, whatever the number of rows, so a row's result is the same, bit for
// bit, alone and among any others.
#include <algorithm>
#include <omp.h>
#include "vec.h"

namespace {

#ifdef __AVX512F__
constexpr int WIDTH = 16;
#else
constexpr int WIDTH = 8;
#endif
typedef float lanes __attribute__((vector_size(WIDTH * 4)));
typedef float unaligned_lanes __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));
constexpr int VECTORS = 2, COLUMNS = VECTORS * WIDTH, ROWS = 6;  // of a tile: its sums fill most of the registers
constexpr int64_t DEPTH = 256;          // of a panel at a time, so that it stays in the first cache for all rows
constexpr int64_t THREADED = 1 << 16;   // multiply-adds below which a second thread costs more than it saves

lanes get(const float* from) { return *reinterpret_cast<const unaligned_lanes*>(from); }
void put(lanes v, float* to) { *reinterpret_cast<unaligned_lanes*>(to) = v; }

// sums[row] += x[row][0..depth) . panel[0..depth), ROWS rows of COLUMNS outputs held in registers throughout
template <int R>
void tile(const float* x, int64_t in, const float* panel, int64_t depth, float* sums) {
    lanes acc[R][VECTORS];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < VECTORS; v++) acc[r][v] = get(sums + r * COLUMNS + v * WIDTH);
    for (int64_t k = 0; k < depth; k++) {
        lanes w[VECTORS];
        for (int v = 0; v < VECTORS; v++) w[v] = get(panel + k * COLUMNS + v * WIDTH);
        for (int r = 0; r < R; r++) {
            const float scalar = x[r * in + k];
            for (int v = 0; v < VECTORS; v++) acc[r][v] += scalar * w[v];
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < VECTORS; v++) put(acc[r][v], sums + r * COLUMNS + v * WIDTH);
}

void tile_rows(int64_t rows, const float* x, int64_t in, const float* panel, int64_t depth, float* sums) {
    switch (rows) {
        case 1: return tile<1>(x, in, panel, depth, sums);
        case 2: return tile<2>(x, in, panel, depth, sums);
        case 3: return tile<3>(x, in, panel, depth, sums);
        case 4: return tile<4>(x, in, panel, depth, sums);
        case 5: return tile<5>(x, in, panel, depth, sums);
        default: return tile<ROWS>(x, in, panel, depth, sums);
    }
}

constexpr int64_t STRIP = 11 * ROWS;  // rows whose sums are held at a time

void panel_strip(int64_t rows, const float* x, int64_t in, const float* panel, const float* bias, int64_t width,
                 float* y, int64_t out) {
    alignas(64) float sums[STRIP * COLUMNS];
    for (int64_t r = 0; r < rows; r++)
        for (int c = 0; c < COLUMNS; c++) sums[r * COLUMNS + c] = bias && c < width ? bias[c] : 0.0f;
    for (int64_t k = 0; k < in; k += DEPTH)
        for (int64_t r = 0; r < rows; r += ROWS)
            tile_rows(std::min<int64_t>(ROWS, rows - r), x + r * in + k, in, panel + k * COLUMNS,
                      std::min(DEPTH, in - k), sums + r * COLUMNS);
    for (int64_t r = 0; r < rows; r++) std::memcpy(y + r * out, sums + r * COLUMNS, width * sizeof(float));
}

}  // namespace

extern "C" int64_t packed_size(int64_t in, int64_t out) { return (out + COLUMNS - 1) / COLUMNS * COLUMNS * in; }

// weight: [out, in] → packed: panels [in, COLUMNS], the last one filled up with zeros
extern "C" void pack(const float* weight, int64_t in, int64_t out, float* packed) {
#pragma omp parallel for
    for (int64_t first = 0; first < out; first += COLUMNS)
        for (int64_t k = 0; k < in; k++)
            for (int64_t c = 0; c < COLUMNS; c++)
                packed[first * in + k * COLUMNS + c] = first + c < out ? weight[(first + c) * in + k] : 0.0f;
}

// x: [rows, in], y: [rows, out], bias: [out] or null
extern "C" void linear(const float* x, int64_t rows, int64_t in, int64_t out, const float* packed, const float* bias,
                       float* y, int threads) {
    const int64_t panels = (out + COLUMNS - 1) / COLUMNS;
#pragma omp parallel num_threads(threads) if (rows * in * out >= THREADED)
    {
        const int64_t team = omp_get_num_threads(), thread = omp_get_thread_num();
        for (int64_t strip = 0; strip < rows; strip += STRIP)
            for (int64_t p = panels * thread / team; p < panels * (thread + 1) / team; p++)
                panel_strip(std::min(STRIP, rows - strip), x + strip * in, in, packed + p * COLUMNS * in,
                            bias ? bias + p * COLUMNS : nullptr, std::min<int64_t>(COLUMNS, out - p * COLUMNS),
                            y + strip * out + p * COLUMNS, out);
    }
}
