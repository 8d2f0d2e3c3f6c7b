// A linear of bfloat16 products (GEMM, and GEMV while decoding):  y = x W^T + b, x rounded to bfloat16, sums in float32.
//
// Shapes: x [rows, in], W [out, in], b [out], y [rows, out], float32 but for W; several linears that share x in one call.
// Layout: W is packed once into panels of COLUMNS output features, [panel][pair of k][COLUMNS], a word (w[k], w[k + 1]) a
// column, k filled up to whole blocks with zeros: vdpbf16ps reads it vector by vector, and tdpbf16ps as tiles of 16 pairs.
// Threads: pieces of STRIP rows by one panel, taken dynamically. Every output is one sum in the order that products.h says,
// whatever the number of rows, so a row's result is the same, bit for bit, alone and among any others.
#include <algorithm>
#include <omp.h>
#include <vector>
#include "abi.h"
#include "prefetch.h"
#include "products.h"

#define UNROLL _Pragma("GCC unroll 32")

namespace {

constexpr int VECTORS = 3, COLUMNS = 16 * VECTORS;  // of a panel
constexpr int64_t DEPTH = AMX_PRODUCTS ? 8 : 18;  // blocks of a panel at a time
constexpr int64_t STRIP = 64;          // rows that one thread takes of a panel at a time
constexpr int64_t THREADED = 1 << 16;  // multiply-adds below which a second thread costs more than it saves
constexpr int64_t SHARES = 8;          // pieces a thread takes of its work, so that a core that is busy elsewhere takes fewer
constexpr int64_t ROUNDED = 32;        // rows from which on threads share rounding them
constexpr int64_t AHEAD = 1536;        // words of a panel by which it is prefetched before it is needed

int64_t blocks_of(int64_t in) { return (in + 2 * BLOCK - 1) / (2 * BLOCK); }
int64_t panels_of(int64_t out) { return (out + COLUMNS - 1) / COLUMNS; }
int64_t panel_words(int64_t in) { return blocks_of(in) * BLOCK * COLUMNS; }
// of a row of x: a line more than whole lines, so that rows do not fall into the same sets of the first cache
int64_t row_words(int64_t in) { return blocks_of(in) * BLOCK + LINE / 4; }

// to: pairs of x [in], filled up to whole blocks with zeros
void round_row(const float* x, int64_t in, uint32_t* to) {
    int64_t k = 0;
#if LANES == 16 && defined(__AVX512BF16__) && !defined(PLAIN)
    for (; k + 32 <= in; k += 32)
        _mm512_storeu_si512(to + k / 2, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + k + 16), _mm512_loadu_ps(x + k)));
#endif
    for (; k + 1 < in; k += 2) to[k / 2] = rounded(x[k]) | rounded(x[k + 1]) << 16;
    if (k < in) to[k / 2] = rounded(x[k]), k += 2;
    std::fill(to + k / 2, to + blocks_of(in) * BLOCK, 0u);
}

#if AMX_PRODUCTS

constexpr int64_t ROWS = 16;  // of a tile

// What a thread sets up before its first tile, and gives back after its last.
struct Products {
    Products() { configure_tiles(); }
    ~Products() { release_tiles(); }
    Products(const Products&) = delete;
};

// sums [ROWS][COLUMNS], of ROWS rows of x that lie `row` words apart: what starts `from` floats apart, and products with
// blocks of a panel
void tile(const uint32_t* x, int64_t row, const uint32_t* panel, int64_t blocks, const float* start, int64_t from, float* sums,
          bool is_first) {
    const int64_t ahead = is_first ? BLOCK * COLUMNS : 0;  // words: the tiles after the first find a panel in the cache
    _tile_loadd(0, start, from * 4);
    _tile_loadd(1, start + 16, from * 4);
    _tile_loadd(2, start + 32, from * 4);
    for (int64_t b = 0; b < blocks; b++, x += BLOCK, panel += BLOCK * COLUMNS) {
        for (int64_t i = 0; i < ahead; i += LINE / 4) __builtin_prefetch(panel + AHEAD + i, 0, 2);
        _tile_loadd(6, x, row * 4);
        _tile_loadd(3, panel, COLUMNS * 4);
        _tile_dpbf16ps(0, 6, 3);
        _tile_loadd(4, panel + 16, COLUMNS * 4);
        _tile_dpbf16ps(1, 6, 4);
        _tile_loadd(5, panel + 32, COLUMNS * 4);
        _tile_dpbf16ps(2, 6, 5);
    }
    _tile_stored(0, sums, COLUMNS * 4);
    _tile_stored(1, sums + 16, COLUMNS * 4);
    _tile_stored(2, sums + 32, COLUMNS * 4);
}

// all ROWS of them, whatever `rows` says: each is computed apart from the others
void tile_any(int64_t, const uint32_t* x, int64_t row, const uint32_t* panel, int64_t blocks, const float* start, int64_t from,
              float* sums, bool is_first) {
    tile(x, row, panel, blocks, start, from, sums, is_first);
}

#else

using Products = NoDenormals;

#if TILES
constexpr int ROWS = 2, WIDE = 1;  // rows and vectors whose sums are in registers: low and high apart
#elif LANES == 16
constexpr int ROWS = 8, WIDE = VECTORS;
#else
constexpr int ROWS = 4, WIDE = 1;
#endif

// of R rows and WIDE vectors of columns
template <int R>
void tile(const uint32_t* x, int64_t row, const uint32_t* panel, int64_t blocks, const float* start, int64_t from,
          float* sums) {
    Sixteen all[R][WIDE];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < WIDE; v++) all[r][v] = load16(start + r * from + v * 16);
#if TILES
    for (int64_t b = 0; b < blocks; b++, x += BLOCK, panel += BLOCK * COLUMNS) {
        Sixteen low[R] = {}, high[R] = {};
        for (int64_t k = 0; k < BLOCK; k++) {
            const SixteenWords w = load16(panel + k * COLUMNS);
            UNROLL for (int r = 0; r < R; r++) add_each(x[r * row + k], w, low[r], high[r]);
        }
        UNROLL for (int r = 0; r < R; r++)
            for (int i = 0; i < PARTS; i++) all[r][0].part[i] += low[r].part[i] + high[r].part[i];
    }
#else
    for (int64_t k = 0; k < blocks * BLOCK; k++, panel += COLUMNS) {
        SixteenWords w[WIDE];
        UNROLL for (int v = 0; v < WIDE; v++) w[v] = load16(panel + v * 16);
        UNROLL for (int v = 0; v < WIDE; v++) __builtin_prefetch(panel + AHEAD + v * 16, 0, 2);
        UNROLL for (int r = 0; r < R; r++) {
            const SixteenWords pair = splat16(x[r * row + k]);
            UNROLL for (int v = 0; v < WIDE; v++) all[r][v] = add_pairs(all[r][v], w[v], pair);
        }
    }
#endif
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < WIDE; v++) store16(all[r][v], sums + r * COLUMNS + v * 16);
}

template <int R = ROWS>
void tile_any(int64_t rows, const uint32_t* x, int64_t row, const uint32_t* panel, int64_t blocks, const float* start,
              int64_t from, float* sums, bool is_first) {
    if constexpr (R > 1) {
        if (rows < R) return tile_any<R - 1>(rows, x, row, panel, blocks, start, from, sums, is_first);
    }
    for (int v = 0; v < VECTORS; v += WIDE) tile<R>(x, row, panel + v * 16, blocks, start + v * 16, from, sums + v * 16);
}

#endif

// x in pairs: [rows][row_words], and room for a whole tile's rows
struct Rounded {
    const uint32_t* pairs;
    int64_t row, blocks;
};

// y[0..rows) of one panel. Where it serves more than one tile, blocks that stay in the first cache serve all of them in turn.
void panel_strip(const LinearWeight& w, int64_t p, const Rounded& x, int64_t first, int64_t rows, float* y) {
    alignas(64) float bias[COLUMNS] = {}, sums[STRIP * COLUMNS];
    const int64_t column = p * COLUMNS, width = std::min<int64_t>(COLUMNS, w.out - column);
    if (w.bias) std::copy_n(w.bias + column, width, bias);
    const uint32_t* panel = static_cast<const uint32_t*>(w.panels) + p * x.blocks * BLOCK * COLUMNS;
    const int64_t depth = rows > ROWS ? DEPTH : x.blocks;
    for (int64_t b = 0; b < x.blocks; b += depth)
        for (int64_t r = 0; r < rows; r += ROWS) {
            float* tile_sums = sums + r * COLUMNS;
            tile_any(std::min<int64_t>(ROWS, rows - r), x.pairs + (first + r) * x.row + b * BLOCK, x.row, panel + b * BLOCK * COLUMNS,
                     std::min(depth, x.blocks - b), b ? tile_sums : bias, b ? COLUMNS : 0, tile_sums, r == 0);
        }
    for (int64_t r = 0; r < rows; r++) {
        float* to = y + (first + r) * w.out + column;
        if (width == COLUMNS) std::memcpy(to, sums + r * COLUMNS, COLUMNS * sizeof(float));
        else std::copy_n(sums + r * COLUMNS, width, to);
    }
}

// One panel of one of the jobs.
struct Panel {
    const LinearJob* job;
    int64_t number;

    Panel(const LinearJob* jobs, int64_t p) : job(jobs), number(p) {
        for (; number >= panels_of(job->weight->out); job++) number -= panels_of(job->weight->out);
    }
};

}  // namespace

// words that the panels of a weight take
extern "C" int64_t bf16_words(int64_t in, int64_t out) { return panels_of(out) * panel_words(in); }

// weight: [out, in] → panels, the last one filled up with zeros
extern "C" void bf16_pack(const float* weight, int64_t in, int64_t out, uint32_t* panels) {
    const auto at = [&](int64_t k, int64_t c) { return k < in && c < out ? rounded(weight[c * in + k]) : 0; };
#pragma omp parallel for
    for (int64_t p = 0; p < panels_of(out); p++)
        for (int64_t pair = 0; pair < blocks_of(in) * BLOCK; pair++)
            for (int64_t c = 0; c < COLUMNS; c++)
                panels[p * panel_words(in) + pair * COLUMNS + c] =
                    at(2 * pair, p * COLUMNS + c) | at(2 * pair + 1, p * COLUMNS + c) << 16;
}

void linear_bf16(const float* x, int64_t rows, int64_t in, const LinearJob* jobs, int64_t count, const Span* prefetch,
                 int64_t num_prefetch, int threads) {
    thread_local std::vector<CacheLine> mine;  // the threads of the team see the caller's, not their own
    const int64_t row = row_words(in), room = (rows + ROWS) * row / (LINE / 4) + 1;
    if (int64_t(mine.size()) < room) mine.resize(room);
    uint32_t* pairs = reinterpret_cast<uint32_t*>(mine.data());
    const Rounded rounded_x = {pairs, row, blocks_of(in)};
    int64_t panels = 0, work = 0, lines = 0;
    for (const Span* span = prefetch; span < prefetch + num_prefetch; span++) lines += lines_of(*span);
    for (const LinearJob* job = jobs; job < jobs + count; job++) {
        panels += panels_of(job->weight->out);
        work += rows * in * job->weight->out;
    }
    const int64_t strips = (rows + STRIP - 1) / STRIP, pieces = strips * panels;
    const int64_t share = std::max<int64_t>(1, pieces / (threads * SHARES));
    if (rows < ROUNDED)
        for (int64_t r = 0; r < rows; r++) round_row(x + r * in, in, pairs + r * row);
#pragma omp parallel num_threads(threads) if (work >= THREADED)
    {
        const Products products;
        if (rows >= ROUNDED) {
#pragma omp for schedule(static)
            for (int64_t r = 0; r < rows; r++) round_row(x + r * in, in, pairs + r * row);
        }
#pragma omp for schedule(dynamic, share)
        for (int64_t piece = 0; piece < pieces; piece++) {
            const Panel panel(jobs, piece / strips);
            const int64_t first = piece % strips * STRIP;
            Prefetch(prefetch, lines * piece / pieces, lines * (piece + 1) / pieces).take_all();
            panel_strip(*panel.job->weight, panel.number, rounded_x, first, std::min(STRIP, rows - first), panel.job->y);
        }
    }
}
