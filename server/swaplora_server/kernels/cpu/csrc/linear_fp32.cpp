// A float32 linear (GEMM, and GEMV while decoding):  y = x W^T + b.
//
// Shapes: x [rows, in], W [out, in], b [out], y [rows, out]; several linears that share x (q, k, v; gate, up) in one call.
// Layout: W is packed once into panels [panel][in][COLUMNS] of COLUMNS output features, as float32, or as bfloat16 where
// that loses nothing, which halves what a step reads: then columns c and LANES + c of a row share a 32-bit word.
// Threads: pieces of STRIP rows by one panel, taken dynamically. Every output is one sum over k in ascending order,
// whatever the number of rows, so a row's result is the same, bit for bit, alone and among any others.
#include <algorithm>
#include <omp.h>
#include "abi.h"
#include "prefetch.h"
#include "vec.h"

namespace {

constexpr int VECTORS = 2, COLUMNS = VECTORS * LANES, ROWS = 6;  // of a tile: its sums fill most of the registers
constexpr int64_t DEPTH = 288;         // of a panel at most at a time, so that it stays in the first cache for all rows
constexpr int64_t AHEAD = 128;         // rows of a panel by which it is prefetched before it is needed
constexpr int64_t STRIP = 22 * ROWS;   // rows whose sums are held at a time
constexpr int64_t UNPACKED = 4 * ROWS; // rows from which on widening a panel once is cheaper than once a tile
constexpr int64_t THREADED = 1 << 16;  // multiply-adds below which a second thread costs more than it saves
constexpr int64_t SHARES = 8;          // pieces a thread takes of its work, so that a core that is busy elsewhere takes fewer

// Row k of a panel. A bfloat16 panel holds columns c and LANES + c as the halves of one word.
void get_row(const float* panel, int64_t k, floats* w) {
    for (int v = 0; v < VECTORS; v++) w[v] = load(panel + k * COLUMNS + v * LANES);
}
void get_row(const uint32_t* panel, int64_t k, floats* w) {
    words both;
    std::memcpy(&both, panel + k * LANES, sizeof both);
    w[0] = (floats)(both << 16);
    w[1] = (floats)(both & 0xffff0000u);
}

constexpr int64_t row_words(const float*) { return COLUMNS; }
constexpr int64_t row_words(const uint32_t*) { return LANES; }
constexpr int64_t row_words(bool is_bf16) { return is_bf16 ? LANES : COLUMNS; }

// sums[row] += x[row][0..depth) . panel[0..depth), R rows of COLUMNS outputs held in registers throughout
template <int R, typename P>
void tile(const float* x, int64_t in, const P* panel, int64_t depth, float* sums, Prefetch& prefetch) {
    int64_t next_lines = depth / 2;
    const char* next = prefetch.take(&next_lines);
    floats acc[R][VECTORS];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < VECTORS; v++) acc[r][v] = load(sums + r * COLUMNS + v * LANES);
    for (int64_t k = 0; k < depth; k++) {
        floats w[VECTORS];
        get_row(panel, k, w);
        if (k % 2 && k / 2 < next_lines) __builtin_prefetch(next + k / 2 * LINE, 0, 2);
        else __builtin_prefetch(panel + (k + AHEAD) * row_words(panel));
        for (int r = 0; r < R; r++) {
            const floats scalar = splat(x[r * in + k]);
            for (int v = 0; v < VECTORS; v++) acc[r][v] = mul_add(scalar, w[v], acc[r][v]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < VECTORS; v++) store(acc[r][v], sums + r * COLUMNS + v * LANES);
}

template <typename P>
void tiles(int64_t rows, const float* x, int64_t in, const P* panel, int64_t depth, float* sums, Prefetch& prefetch) {
    for (int64_t r = 0; r < rows; r += ROWS, x += ROWS * in, sums += ROWS * COLUMNS) switch (rows - r) {
            case 1: tile<1>(x, in, panel, depth, sums, prefetch); break;
            case 2: tile<2>(x, in, panel, depth, sums, prefetch); break;
            case 3: tile<3>(x, in, panel, depth, sums, prefetch); break;
            case 4: tile<4>(x, in, panel, depth, sums, prefetch); break;
            case 5: tile<5>(x, in, panel, depth, sums, prefetch); break;
            default: tile<ROWS>(x, in, panel, depth, sums, prefetch);
        }
}

void widen_panel(const uint32_t* panel, int64_t depth, float* wide) {
    for (int64_t k = 0; k < depth; k++) {
        floats w[VECTORS];
        get_row(panel, k, w);
        for (int v = 0; v < VECTORS; v++) store(w[v], wide + k * COLUMNS + v * LANES);
    }
}

// `whole` in as few parts of at most `most` as may be, of one size but for the last
int64_t even_cut(int64_t whole, int64_t most) {
    const int64_t count = (whole + most - 1) / most;
    return (whole + count - 1) / count;
}

// y[0..rows) of one panel
void panel_strip(const LinearWeight& w, int64_t p, const float* x, int64_t rows, int64_t in, float* y, Prefetch prefetch) {
    alignas(64) float sums[STRIP * COLUMNS], wide[DEPTH * COLUMNS];
    const int64_t first = p * COLUMNS, width = std::min<int64_t>(COLUMNS, w.out - first);
    for (int64_t r = 0; r < rows; r++)
        for (int c = 0; c < COLUMNS; c++) sums[r * COLUMNS + c] = w.bias && c < width ? w.bias[first + c] : 0.0f;
    const bool is_bf16 = w.format == FP32_OF_BF16;
    const bool is_narrow = is_bf16 && rows <= UNPACKED;
    const int64_t cut = even_cut(in, is_narrow ? 2 * DEPTH : DEPTH);
    for (int64_t k = 0; k < in; k += cut) {
        const int64_t depth = std::min(cut, in - k), at = (p * in + k) * row_words(is_bf16);
        const uint32_t* narrow = static_cast<const uint32_t*>(w.panels) + at;
        const float* panel = static_cast<const float*>(w.panels) + at;
        if (is_narrow) {
            tiles(rows, x + k, in, narrow, depth, sums, prefetch);
            continue;
        }
        if (is_bf16) widen_panel(narrow, depth, wide);
        tiles(rows, x + k, in, is_bf16 ? wide : panel, depth, sums, prefetch);
    }
    for (int64_t r = 0; r < rows; r++) {
        const float* from = sums + r * COLUMNS;
        float* to = y + r * w.out + first;
        if (width < COLUMNS) std::memcpy(to, from, width * sizeof(float));
        else for (int v = 0; v < VECTORS; v++) store(load(from + v * LANES), to + v * LANES);
    }
}

int64_t panels_of(int64_t out) { return (out + COLUMNS - 1) / COLUMNS; }

uint32_t narrowed(float x) {
    bf16 half;
    narrow(x, &half);
    return half;
}

}  // namespace

// floats, or words of two bfloat16, that the panels of a weight take
extern "C" int64_t fp32_words(int64_t in, int64_t out, int is_bf16) { return panels_of(out) * in * row_words(is_bf16 != 0); }

// weight: [out, in] → panels of [in, COLUMNS], the last one filled up with zeros
extern "C" void fp32_pack(const float* weight, int64_t in, int64_t out, int is_bf16, uint32_t* panels) {
    const auto at = [&](int64_t k, int64_t column) { return column < out ? weight[column * in + k] : 0.0f; };
#pragma omp parallel for
    for (int64_t p = 0; p < panels_of(out); p++)
        for (int64_t k = 0; k < in; k++) {
            uint32_t* row = panels + (p * in + k) * row_words(is_bf16 != 0);
            const int64_t first = p * COLUMNS;
            for (int c = 0; c < row_words(is_bf16 != 0); c++) {
                const float value = at(k, first + c);
                if (is_bf16) row[c] = narrowed(value) | narrowed(at(k, first + LANES + c)) << 16;
                else std::memcpy(row + c, &value, sizeof value);
            }
        }
}

void linear_fp32(const float* x, int64_t rows, int64_t in, const LinearJob* jobs, int64_t count, const Span* prefetch,
                 int64_t num_prefetch, int threads) {
    int64_t panels = 0, work = 0, lines = 0;
    for (const Span* span = prefetch; span < prefetch + num_prefetch; span++) lines += lines_of(*span);
    for (int64_t j = 0; j < count; j++) {
        panels += panels_of(jobs[j].weight->out);
        work += rows * in * jobs[j].weight->out;
    }
    const int64_t strips = (rows + STRIP - 1) / STRIP, share = std::max<int64_t>(1, panels / (threads * SHARES));
    const int64_t pieces = strips * panels;
#pragma omp parallel for num_threads(threads) if (work >= THREADED) schedule(dynamic, share)
    for (int64_t piece = 0; piece < pieces; piece++) {
        const int64_t first = piece / panels * STRIP;
        int64_t p = piece % panels;
        const LinearJob* job = jobs;
        for (; p >= panels_of(job->weight->out); job++) p -= panels_of(job->weight->out);
        panel_strip(*job->weight, p, x + first * in, std::min(STRIP, rows - first), in, job->y + first * job->weight->out,
                    {prefetch, lines * piece / pieces, lines * (piece + 1) / pieces});
    }
}
