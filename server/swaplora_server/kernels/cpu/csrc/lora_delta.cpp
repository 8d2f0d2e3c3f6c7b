// LoRA deltas of many adapters in one batch, SGMV (Punica), and BGMV where every segment is one row. For each segment:
//   y[rows] = (y[rows] + scale * (x[rows] A^T) B^T) * column_scale + scale * shift
//
// Shapes: x [rows, in], y [rows, out], float32; A [rank, in], B [out, rank], in float32 or bfloat16, each adapter's in
// its own rank; column_scale (DoRA) and shift (biases) [out], float32. Several modules that share x a call.
// Layout: both factors lie in panels that are read straight through, see lora_panels.h.
// Threads: first "shrink", x A^T, then "expand", the rest, in pieces of STRIP rows by some panels or slices of the sum,
// taken dynamically; each adapter's factors are read once. The order of every sum is fixed by the shapes of the factors
// alone, so a row's result does not depend on the other rows of the step, nor on how many threads run.
#include <algorithm>
#include <omp.h>
#include <type_traits>
#include <vector>
#include "abi.h"
#include "lora_panels.h"

namespace {

constexpr int CHAINS = LANES / 2;            // of sums over the inputs, which do not wait for one another
constexpr int SHRUNK = 3, EXPANDED = LANES == 16 ? 6 : 3;  // rows of a tile: its sums fill most of the registers
constexpr int WIDE = 3;                      // vectors of outputs of a tile of expanding
constexpr int64_t STRIP = 24;                // rows of a segment that one thread takes
constexpr int64_t SLICE = 384;               // inputs at most that are summed before their sum is added to the others'
constexpr int64_t PIECE = 4 * COLUMNS;       // outputs of a module that one thread takes when there are few segments
constexpr int64_t THREADED = 1 << 15;        // multiply-adds below which a second thread costs more than it saves

int64_t num_slices(int64_t in) { return std::max<int64_t>(1, (in + SLICE - 1) / SLICE); }

// where slice `i` of the inputs starts: slices are of one length but for the last, whole rounds of the chains
int64_t slice_start(int64_t in, int64_t i) {
    const int64_t count = num_slices(in), length = (in + count - 1) / count;
    return std::min(in, i * ((length + CHAINS - 1) / CHAINS * CHAINS));
}

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

// What becomes of y once the sum over the ranks is known: (y + scale * sum) * column_scale + scale * shift
struct Finish {
    const float *column_scale, *shift;  // [out], or null
    float scale;

    // outputs [c, c + count) of one row
    void row(const float* sums, int64_t c, int64_t count, float* y) const {
        const float *const scales = column_scale + c, *const shifts = shift + c;
        int64_t i = 0;
        for (y += c; i + LANES <= count; i += LANES) {
            floats to = mul_add(splat(scale), load(sums + i), load(y + i));
            if (column_scale) to *= load(scales + i);
            if (shift) to = mul_add(splat(scale), load(shifts + i), to);
            store(to, y + i);
        }
        for (; i < count; i++) {
            y[i] = mul_add(scale, sums[i], y[i]);
            if (column_scale) y[i] *= scales[i];
            if (shift) y[i] = mul_add(scale, shifts[i], y[i]);
        }
    }
};

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

// One segment seen from one module.
struct Pair {
    const Segment* segment;
    const Factors* factors;
    int64_t shrunk;  // where [slices][rows][stride] of it start; in the end the first slice is the sum of all

    int64_t rows() const { return segment->stop - segment->start; }
    int64_t stride() const { return (factors->rank + RANKS - 1) / RANKS * RANKS; }
};

// Rows [start, stop) of a step, slices [from, to) of the ranks of one panel.
struct Shrink {
    int64_t pair, start, stop, panel, from, to;
    int64_t group;  // of those that differ in their slices alone
};

// Rows [start, stop) of a step, outputs [from, to) of pairs that share rows, which follow one another and are one
// thread's, in order.
struct Expand {
    const LoraModule* module;
    int64_t first, last;  // pairs
    int64_t start, stop, from, to;
};

template <typename W>
void shrink_piece(const Shrink& p, const Pair& pair, const float* x, int64_t in, float* all) {
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

// the slices of one group added to its first one, in order
void add_slices(const Shrink& p, const Pair& pair, int64_t slices, float* all) {
    const int64_t stride = pair.stride(), slice = pair.rows() * stride;
    for (int64_t row = p.start; row < p.stop; row++)
        for (int64_t c = p.panel; c < p.panel + RANKS; c += LANES) {
            float* to = all + (row - pair.segment->start) * stride + c;
            floats total = load(to);
            for (int64_t i = 1; i < slices; i++) total += load(to + i * slice);
            store(total, to);
        }
}

template <typename W>
void expand_piece(const Expand& p, const Pair& pair, const float* all) {
    const Factors& f = *pair.factors;
    const Segment& s = *pair.segment;
    const int64_t out = p.module->out, stride = pair.stride();
    float* y = static_cast<float*>(p.module->y);
    const Finish finish = {f.column_scale, f.shift, float(s.scale)};
    for (int64_t c = p.from; c < p.to; c += COLUMNS) {
        const Panel<W> panel(f.b, out, f.rank, c, COLUMNS);
        by_tiles<EXPANDED>(std::max(p.start, s.start), std::min(p.stop, s.stop), [&](auto rows, int64_t row) {
            const float* shrunk = all + (row - s.start) * stride;
            expand_panel<rows.value>(shrunk, stride, panel, f.rank, c, out, finish, y + row * out);
        });
    }
}

// What one call does, in pieces that threads may take in any order.
struct Plan {
    std::vector<Pair> pairs;
    std::vector<Shrink> shrinks;
    std::vector<Expand> expands;
    std::vector<int64_t> missing;  // slices of a group that are not summed yet
    std::vector<CacheLine> memory;
    int64_t work;  // multiply-adds

    void make(const Segment* segments, int64_t count, const LoraModule* modules, int64_t num_modules, int64_t in, int threads) {
        pairs.clear(), shrinks.clear(), expands.clear(), missing.clear();
        work = 0;
        const bool are_few = count * num_modules < 4 * threads;
        int64_t size = 0;
        for (const LoraModule* module = modules; module < modules + num_modules; module++)
            add(segments, count, *module, in, are_few, &size);
        if (int64_t(memory.size()) < lines(size)) memory.resize(lines(size));
    }

    void shrink(int64_t i, const float* x, int64_t in) {
        const Shrink& piece = shrinks[i];
        const Pair& pair = pairs[piece.pair];
        float* shrunk = memory.data()->floats + pair.shrunk;
        if (pair.factors->a_is_bf16) shrink_piece<bf16>(piece, pair, x, in, shrunk);
        else shrink_piece<float>(piece, pair, x, in, shrunk);
        const int64_t left = __atomic_sub_fetch(&missing[piece.group], piece.to - piece.from, __ATOMIC_ACQ_REL);
        if (left == 0) add_slices(piece, pair, num_slices(in), shrunk);
    }

    void expand(int64_t i) const {
        const Expand& piece = expands[i];
        for (const Pair* pair = &pairs[piece.first]; pair < pairs.data() + piece.last; pair++) {
            const float* shrunk = memory.data()->floats + pair->shrunk;
            if (pair->factors->b_is_bf16) expand_piece<bf16>(piece, *pair, shrunk);
            else expand_piece<float>(piece, *pair, shrunk);
        }
    }

  private:
    void add(const Segment* segments, int64_t count, const LoraModule& module, int64_t in, bool are_few, int64_t* size) {
        int64_t first = pairs.size(), start = 0, reached = 0;  // the chain's first pair, and the rows that it spans
        const auto end_chain = [&] {
            if (first < int64_t(pairs.size())) cut_expand({&module, first, int64_t(pairs.size()), start, reached, 0, module.out}, are_few);
            first = pairs.size(), start = reached;
        };
        for (const Segment* s = segments; s < segments + count; s++) {
            const Factors* factors = s->factors + module.number;
            if (!factors->is_targeted) continue;
            if (s->start >= reached) end_chain(), start = s->start;
            reached = std::max(reached, s->stop);
            const Pair pair = {s, factors, *size};
            cut_shrink(pair, num_slices(in), are_few);
            pairs.push_back(pair);
            *size += num_slices(in) * pair.rows() * pair.stride();
            work += factors->rank * pair.rows() * (in + module.out);
        }
        end_chain();
    }

    void cut_shrink(const Pair& pair, int64_t slices, bool are_few) {
        const int64_t at_a_time = are_few ? 1 : slices;
        for (int64_t row = pair.segment->start; row < pair.segment->stop; row += STRIP)
            for (int64_t panel = 0; panel < pair.factors->rank; panel += RANKS) {
                for (int64_t i = 0; i < slices; i += at_a_time)
                    shrinks.push_back({int64_t(pairs.size()), row, std::min(row + STRIP, pair.segment->stop), panel, i,
                                       i + at_a_time, int64_t(missing.size())});
                missing.push_back(slices);
            }
    }

    void cut_expand(const Expand& whole, bool are_few) {
        const int64_t columns = are_few ? PIECE : whole.to;
        for (int64_t row = whole.start; row < whole.stop; row += STRIP)
            for (int64_t c = 0; c < whole.to; c += columns)
                expands.push_back({whole.module, whole.first, whole.last, row, std::min(row + STRIP, whole.stop), c,
                                   std::min(c + columns, whole.to)});
    }
};

void run(const Segment* segments, int64_t count, const LoraModule* modules, int64_t num_modules, int64_t in, const float* x,
         int threads) {
    thread_local Plan mine;
    Plan& plan = mine;  // the threads of the team see the caller's, not their own
    plan.make(segments, count, modules, num_modules, in, threads);
    const int64_t num_shrinks = plan.shrinks.size(), num_expands = plan.expands.size();
    const int64_t share = std::max<int64_t>(1, num_shrinks / (8 * threads));
    if (threads == 1 || plan.work < THREADED) {
        for (int64_t i = 0; i < num_shrinks; i++) plan.shrink(i, x, in);
        for (int64_t i = 0; i < num_expands; i++) plan.expand(i);
        return;
    }
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic, share)
        for (int64_t i = 0; i < num_shrinks; i++) plan.shrink(i, x, in);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < num_expands; i++) plan.expand(i);
    }
}

}  // namespace

extern "C" void lora_delta_f32(const Segment* segments, int64_t count, const LoraModule* modules, int64_t num_modules,
                               int64_t in, const float* x, int threads) {
    run(segments, count, modules, num_modules, in, x, threads);
}
