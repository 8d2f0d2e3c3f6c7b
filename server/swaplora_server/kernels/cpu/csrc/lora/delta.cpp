// LoRA deltas of many adapters in one batch in float32; lora/plan.h has the equation.
//
// Shapes: x [rows, in], y [rows, out], float32; A [rank, in], B [out, rank], in float32 or bfloat16, each adapter's in
// its own rank; column_scale (DoRA) and shift (biases) [out], float32. Several modules that share x a call.
// Layout: both factors lie in panels that are read straight through, see lora/panels.h.
#include <type_traits>
#include "lora/plan.h"

namespace {

constexpr int CHAINS = LANES / 2;            // of sums over the inputs, which do not wait for one another
constexpr int SHRUNK = 3, EXPANDED = LANES == 16 ? 6 : 3;  // rows of a tile: its sums fill most of the registers
constexpr int WIDE = 3;                      // vectors of outputs of a tile of expanding

// work(0), work(1), ... with constants
template <int N, typename Work>
[[gnu::always_inline]] inline void unrolled(Work work) {
    if constexpr (N > 0) {
        unrolled<N - 1>(work);
        work(std::integral_constant<int, N - 1>());
    }
}

// halves are added until one is left
template <int N>
[[gnu::always_inline]] inline floats folded(const floats* sums) {
    if constexpr (N == 1) return *sums;
    else return folded<N / 2>(sums) + folded<N / 2>(sums + N / 2);
}

// shrunk[row][0..LANES) = x[row][from..to) . panel[from..to)[column..column + LANES), for R rows
template <int R, typename W>
[[gnu::noinline]] void shrink_tile(const float* x, int64_t in, const Panel<W>& panel, int64_t column, int64_t from, int64_t to,
                                   float* shrunk, int64_t stride) {
    floats sums[R][CHAINS] = {};
    const auto add = [&](int64_t k, int chain, floats w) {
#pragma GCC unroll 8
        for (int row = 0; row < R; row++) sums[row][chain] = mul_add(splat(x[row * in + k]), w, sums[row][chain]);
    };
    int64_t k = from;
    for (; k + CHAINS <= to; k += CHAINS) {
        floats w[CHAINS];
        if (R == 1) panel.template prefetch<CHAINS * RANKS>(k);
#pragma GCC unroll 8
        for (int c = 0; c < CHAINS; c += 2) panel.pair(k + c, column, w + c);
#pragma GCC unroll 8
        for (int c = 0; c < CHAINS; c++) add(k + c, c, w[c]);
    }
    unrolled<CHAINS / 2>([&](auto half) {
        constexpr int c = 2 * half;
        floats w[2];
        if (k + c + 1 < to) {
            panel.pair(k + c, column, w);
            add(k + c, c, w[0]), add(k + c + 1, c + 1, w[1]);
        } else if (k + c < to) {
            add(k + c, c, panel.single(k + c, column));
        }
    });
    unrolled<R>([&](auto row) { store(folded<CHAINS>(sums[row]), shrunk + row * stride); });
}

// y[row][first + column..], V vectors of the panel that starts at `first`, for R rows
template <int R, int V, typename W>
[[gnu::noinline]] void expand_tile(const float* shrunk, int64_t stride, const Panel<W>& panel, int64_t rank, int64_t first, int64_t column,
                 int64_t out, const Finish& finish, float* y) {
    floats sums[R][V] = {};
    const auto add = [&](int64_t j, int v, floats w) {
#pragma GCC unroll 8
        for (int row = 0; row < R; row++) sums[row][v] = mul_add(splat(shrunk[row * stride + j]), w, sums[row][v]);
    };
    int64_t j = 0;
    for (; j + 2 <= rank; j += 2) {
        floats w[V][2];
        if (R == 1) panel.template prefetch<2 * V * LANES>(j);
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) panel.pair(j, column + v * LANES, w[v]);
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++)
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) add(j + i, v, w[v][i]);
    }
    if (j < rank)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) add(j, v, panel.single(j, column + v * LANES));
    alignas(64) float done[R][V * LANES];  // what follows the loop has no hold on its registers so
#pragma GCC unroll 8
    for (int row = 0; row < R; row++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) store(sums[row][v], done[row] + v * LANES);
    const int64_t count = std::min<int64_t>(V * LANES, panel.width - column);
    for (int row = 0; row < R; row++) finish.row(done[row], first + column, count, y + row * out);
}

template <int R, typename W>
void expand_panel(const float* shrunk, int64_t stride, const Panel<W>& panel, int64_t rank, int64_t first, int64_t out,
                  const Finish& finish, float* y) {
    int64_t c = 0;
    for (; c + WIDE * LANES <= panel.width; c += WIDE * LANES)
        expand_tile<R, WIDE>(shrunk, stride, panel, rank, first, c, out, finish, y);
    for (; c < panel.width; c += LANES) expand_tile<R, 1>(shrunk, stride, panel, rank, first, c, out, finish, y);
}

// work(rows, first row) for the rows [start, stop), as many at a time as a tile takes
template <int R, typename Work>
void by_tiles(int64_t start, int64_t stop, Work work) {
    for (; start + R <= stop; start += R) work(std::integral_constant<int, R>(), start);
    if constexpr (R > 1) by_tiles<R / 2>(start, stop, work);
}

struct Fp32Kernel {
    static constexpr int64_t STRIP = 24;
    struct Thread {};

    static void shrink(const Shrink& p, const Pair& pair, const float* x, int64_t in, float* all) {
        if (pair.factors->a_is_bf16) shrink_by<bf16>(p, pair, x, in, all);
        else shrink_by<float>(p, pair, x, in, all);
    }
    static void expand(const Expand& p, const Pair& pair, const float* all) {
        if (pair.factors->b_is_bf16) expand_by<bf16>(p, pair, all);
        else expand_by<float>(p, pair, all);
    }

  private:
    template <typename W>
    static void shrink_by(const Shrink& p, const Pair& pair, const float* x, int64_t in, float* all) {
        const Panel<W> panel(pair.factors->a, pair.factors->rank, in, p.panel, RANKS);
        const int64_t stride = pair.stride();
        for (int64_t i = p.from; i < p.to; i++) {
            float* shrunk = all + i * pair.rows() * stride + p.panel;
            for (int64_t c = 0; c < panel.width; c += LANES)
                by_tiles<SHRUNK>(p.start, p.stop, [&](auto rows, int64_t row) {
                    float* to = shrunk + (row - pair.segment->start) * stride + c;
                    shrink_tile<rows.value>(x + row * in, in, panel, c, slice_start(in, i), slice_start(in, i + 1), to, stride);
                });
        }
    }

    template <typename W>
    static void expand_by(const Expand& p, const Pair& pair, const float* all) {
        const int64_t out = p.module->out, stride = pair.stride(), rank = pair.factors->rank;
        float* y = static_cast<float*>(p.module->y);
        const Finish finish = pair.finish();
        for (int64_t c = p.from; c < p.to; c += COLUMNS) {
            const Panel<W> panel(pair.factors->b, out, rank, c, COLUMNS);
            by_tiles<EXPANDED>(p.start_of(pair), p.stop_of(pair), [&](auto rows, int64_t row) {
                const float* shrunk = all + (row - pair.segment->start) * stride;
                expand_panel<rows.value>(shrunk, stride, panel, rank, c, out, finish, y + row * out);
            });
        }
    }
};

}  // namespace

extern "C" void lora_delta_fp32(const Segment* segments, int64_t count, const LoraModule* modules, int64_t num_modules,
                                int64_t in, const float* x, int threads) {
    run_lora<Fp32Kernel>(segments, count, modules, num_modules, in, x, threads);
}
