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
#include "tiles.h"

namespace {

constexpr int VECTORS = 3, COLUMNS = 16 * VECTORS;  // of a panel
constexpr int64_t DEPTH = AMX_PRODUCTS ? 8 : 18;  // blocks of a panel at a time
constexpr int64_t STRIP = 64;          // rows that one thread takes of a panel at a time
constexpr int64_t THREADED = 1 << 16;  // multiply-adds below which a second thread costs more than it saves
constexpr int64_t SHARES = 8;          // pieces a thread takes of its work, so that a core that is busy elsewhere takes fewer
constexpr int64_t ROUNDED = 32;        // rows from which on threads share rounding them

int64_t panels_of(int64_t out) { return (out + COLUMNS - 1) / COLUMNS; }
int64_t panel_words(int64_t in) { return blocks_of(in) * BLOCK * COLUMNS; }

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
            multiply<VECTORS>(std::min<int64_t>(ROWS, rows - r), x.pairs + (first + r) * x.row + b * BLOCK, x.row, panel + b * BLOCK * COLUMNS,
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
