// LoRA deltas of many adapters in one batch, in products of bfloat16; lora/plan.h has the equation.
//
// Shapes: x [rows, in], y [rows, out], float32; A [rank, in], B [out, rank], bfloat16, each adapter's in its own rank;
// column_scale (DoRA) and shift (biases) [out], float32. Several modules that share x a call.
// x and x A^T are rounded to bfloat16, every sum is in float32 and in the order that products.h says.
// Layout: panels as lora/panels.h has them are what tiles.h multiplies, but for what they lack: one that is not as wide as
// it may be, or not of whole blocks, is copied with zeros for what is not there.
#include "lora/plan.h"
#include "tiles.h"

namespace {

constexpr float ZEROS[COLUMNS] = {};
constexpr int64_t FEW = 2;  // rows up to which a panel is read as it lies: more pay for a copy, and fill tiles

// [blocks][BLOCK][16 V] words of the panel's numbers [from, from + depth), an even number on
template <int V>
const uint32_t* whole(const Panel<bf16>& panel, int64_t from, int64_t depth, std::vector<CacheLine>& copy) {
    constexpr int64_t WIDTH = 16 * V;
    const int64_t width = panel.width, pairs = blocks_of(depth) * BLOCK;
    const uint32_t* words = panel.pairs(from);
    if (width == WIDTH && depth == 2 * pairs) return words;
    if (int64_t(copy.size()) < lines(pairs * WIDTH)) copy.resize(lines(pairs * WIDTH));
    uint32_t* to = reinterpret_cast<uint32_t*>(copy.data());
    for (int64_t pair = 0; pair < depth / 2; pair++, words += width) {
        std::memcpy(to + pair * WIDTH, words, width * 4);
        std::fill(to + pair * WIDTH + width, to + (pair + 1) * WIDTH, 0u);
    }
    std::fill(to + depth / 2 * WIDTH, to + pairs * WIDTH, 0u);
    if (depth % 2) {
        const bf16* last = reinterpret_cast<const bf16*>(words);
        for (int64_t column = 0; column < width; column++) to[depth / 2 * WIDTH + column] = last[column];
    }
    return to;
}

// Rows of x in pairs, `row` words apart, and one panel of a factor
template <int V>
struct Product {
    const Panel<bf16>& panel;
    int64_t from, depth;  // numbers of the panel
    int64_t rows, row;
    const uint32_t* x;

    // work(r, count, sums [count][16 V]) for all rows, some at a time
    template <typename Work>
    void each(Work work) const {
        alignas(64) float sums[ROWS * 16 * V];
        if (rows <= FEW && depth % 2 == 0 && (V == 1 || panel.width == 16 * V)) {
            few(sums);
            return work(0, rows, sums);
        }
        thread_local std::vector<CacheLine> copy;
        const uint32_t* words = whole<V>(panel, from, depth, copy);
        for (int64_t r = 0; r < rows; r += ROWS) {
            const int64_t count = std::min<int64_t>(ROWS, rows - r);
            multiply<V>(count, x + r * row, row, words, blocks_of(depth), ZEROS, 0, sums, r == 0);
            work(r, count, sums);
        }
    }

  private:
    template <int R = FEW>
    void few(float* sums) const {
        if constexpr (R > 1) {
            if (rows < R) return few<R - 1>(sums);
        }
        constexpr int N = LANES == 16 ? V : 1;  // vectors whose sums are in registers
        for (int v = 0; v < V; v += N)
            tile<R, N>(x, row, panel.pairs(from) + 16 * v, panel.width, depth / 2, ZEROS, 0, sums + 16 * v, 16 * V);
    }
};

struct Bf16Kernel {
    static constexpr int64_t STRIP = 32;
    using Thread = Products;

    static void shrink(const Shrink& p, const Pair& pair, const float* x, int64_t in, float* all) {
        constexpr int64_t ROW = (SLICE + SLICE_UNIT) / 2 + LINE / 4;  // words: slices are no longer
        alignas(64) uint32_t pairs[STRIP * ROW];
        const Panel<bf16> panel(pair.factors->a, pair.factors->rank, in, p.panel, RANKS);
        const int64_t stride = pair.stride(), rows = p.stop - p.start;
        for (int64_t i = p.from; i < p.to; i++) {
            const int64_t from = slice_start(in, i), depth = slice_start(in, i + 1) - from;
            for (int64_t r = 0; r < rows; r++) round_row(x + (p.start + r) * in + from, depth, pairs + r * ROW);
            float* shrunk = all + (i * pair.rows() + p.start - pair.segment->start) * stride + p.panel;
            Product<1>{panel, from, depth, rows, ROW, pairs}.each([&](int64_t first, int64_t count, const float* sums) {
                for (int64_t r = 0; r < count; r++) std::copy_n(sums + r * RANKS, RANKS, shrunk + (first + r) * stride);
            });
        }
    }

    static void expand(const Expand& p, const Pair& pair, const float* all) {
        thread_local std::vector<CacheLine> memory;
        const int64_t out = p.module->out, rank = pair.factors->rank, row = row_words(rank);
        const int64_t start = p.start_of(pair), rows = p.stop_of(pair) - start;
        if (rows <= 0) return;
        if (int64_t(memory.size()) < lines(STRIP * row)) memory.resize(lines(STRIP * row));
        uint32_t* pairs = reinterpret_cast<uint32_t*>(memory.data());
        for (int64_t r = 0; r < rows; r++)
            round_row(all + (start + r - pair.segment->start) * pair.stride(), rank, pairs + r * row);
        float* y = static_cast<float*>(p.module->y) + start * out;
        const Finish finish = pair.finish();
        for (int64_t c = p.from; c < p.to; c += COLUMNS) {
            const Panel<bf16> panel(pair.factors->b, out, rank, c, COLUMNS);
            Product<3>{panel, 0, rank, rows, row, pairs}.each([&](int64_t first, int64_t count, const float* sums) {
                for (int64_t r = 0; r < count; r++) finish.row(sums + r * COLUMNS, c, panel.width, y + (first + r) * out);
            });
        }
    }
};

}  // namespace

extern "C" void lora_delta_bf16(const Segment* segments, int64_t count, const LoraModule* modules, int64_t num_modules,
                                int64_t in, const float* x, int threads) {
    run_lora<Bf16Kernel>(segments, count, modules, num_modules, in, x, threads);
}
