// LoRA deltas of many adapters in one batch, SGMV (Punica), and BGMV where every segment is one row. For each segment:
//   y[rows] = (y[rows] + scale * (x[rows] A^T) B^T) * column_scale + scale * shift
//
// Shapes: x [rows, in], y [rows, out], float32 or bfloat16; A [rank, in], B [out, rank], in float32 or bfloat16, each
// adapter's in its own rank; column_scale (DoRA) and shift (biases) [out], float32. Several modules that share x a call.
// Layout: both factors lie along the rank, so B is stored as B^T [rank, out]. "Shrink" is x A^T, "expand" the rest.
// Threads: first the shrinks, then the expands, in pieces of STRIP rows by some ranks or columns, taken dynamically; each
// adapter's factors are read once. The order of every sum is fixed by the shapes of the factors alone, so a row's result
// does not depend on the other rows of the step, nor on how many threads run. Sums are float32 whatever tensors hold.
#include <algorithm>
#include <omp.h>
#include <type_traits>
#include <vector>
#include "abi.h"
#include "vec.h"

namespace {

constexpr int ROWS = 3, RANKS = 4;     // of a tile of shrinking: its sums fill most of the registers
constexpr int WIDE = 4;                // vectors of B's columns of a tile of expanding
constexpr int64_t PIECE = 4 * WIDE * LANES;  // columns of a module that one thread takes when there are few segments
constexpr int64_t STRIP = 8 * ROWS;    // rows of a segment that one thread takes
constexpr int64_t THREADED = 1 << 15;  // multiply-adds below which a second thread costs more than it saves

// Prefetches what the next tile reads, once a cache line of it
template <typename W>
void prefetch(const W* from, int64_t at) {
    if (at % int64_t(64 / sizeof(W)) == 0) __builtin_prefetch(from);
}

// shrunk[row][0..ranks) = x[row] . A[0..ranks), for R rows
template <int R, typename T, typename W>
void shrink_block(const T* x, const W* a, int64_t in, int ranks, float* shrunk, int64_t stride) {
    floats sums[R][RANKS] = {};
    const W* factors[RANKS];
    for (int j = 0; j < RANKS; j++) factors[j] = a + std::min(j, ranks - 1) * in;
    const int64_t whole = in - in % LANES;
    for (int64_t k = 0; k < whole; k += LANES) {
        floats xs[R];
        for (int row = 0; row < R; row++) xs[row] = load(x + row * in + k);
        for (int j = 0; j < RANKS; j++) {
            if (R == 1) prefetch(factors[j] + RANKS * in + k, k);
            const floats av = load(factors[j] + k);
            for (int row = 0; row < R; row++) sums[row][j] = mul_add(xs[row], av, sums[row][j]);
        }
    }
    for (int row = 0; row < R; row++)
        for (int j = 0; j < ranks; j++) {
            float total = sum(sums[row][j]);
            for (int64_t k = whole; k < in; k++) total = mul_add(widen(x[row * in + k]), widen(a[j * in + k]), total);
            shrunk[row * stride + j] = total;
        }
}

// What becomes of y once the sum over the ranks is known: (y + scale * sum) * column_scale + scale * shift
struct Finish {
    const float *column_scale, *shift;  // [out], or null
    float scale;

    Finish from(int64_t column) const {
        return {column_scale ? column_scale + column : nullptr, shift ? shift + column : nullptr, scale};
    }
    floats vector(floats y, floats sum, int64_t c) const {
        y = mul_add(splat(scale), sum, y);
        if (column_scale) y *= load(column_scale + c);
        return shift ? mul_add(splat(scale), load(shift + c), y) : y;
    }
    float column(float y, float sum) const {
        y = mul_add(scale, sum, y);
        if (column_scale) y *= *column_scale;
        return shift ? mul_add(scale, *shift, y) : y;
    }
};

// y[row][0..V * LANES), for R rows
template <int R, int V, typename T, typename W>
void expand_block(const float* shrunk, const W* b_t, int64_t rank, int64_t out, const Finish& finish, T* y) {
    floats sums[R][V] = {};
    for (int64_t j = 0; j < rank; j++) {
        if (R == 1) __builtin_prefetch(b_t + j * out + V * LANES);
        for (int v = 0; v < V; v++) {
            const floats bv = load(b_t + j * out + v * LANES);
            for (int row = 0; row < R; row++) sums[row][v] = mul_add(splat(shrunk[row * rank + j]), bv, sums[row][v]);
        }
    }
    for (int row = 0; row < R; row++)
        for (int v = 0; v < V; v++) {
            T* to = y + row * out + v * LANES;
            store(finish.vector(load(to), sums[row][v], v * LANES), to);
        }
}

template <typename T, typename W>
void expand_column(const float* shrunk, const W* b_t, int64_t rank, int64_t out, const Finish& finish, T* y) {
    float total = 0;
    for (int64_t j = 0; j < rank; j++) total = mul_add(shrunk[j], widen(b_t[j * out]), total);
    narrow(finish.column(widen(*y), total), y);
}

// Columns [from, to) of R rows; `from` is a multiple of PIECE, so that a column is always summed the same way
template <int R, typename T, typename W>
void expand_rows(const float* shrunk, const W* b_t, int64_t rank, int64_t out, int64_t from, int64_t to, const Finish& all, T* y) {
    int64_t c = from;
    for (; c + WIDE * LANES <= to; c += WIDE * LANES) expand_block<R, WIDE>(shrunk, b_t + c, rank, out, all.from(c), y + c);
    for (; c + LANES <= to; c += LANES) expand_block<R, 1>(shrunk, b_t + c, rank, out, all.from(c), y + c);
    for (; c < to; c++)
        for (int row = 0; row < R; row++) expand_column(shrunk + row * rank, b_t + c, rank, out, all.from(c), y + row * out + c);
}

// work(rows, first row) for the rows [start, stop), as many at a time as a tile takes
template <typename Work>
void by_tiles(int64_t start, int64_t stop, Work work) {
    for (; start + ROWS <= stop; start += ROWS) work(std::integral_constant<int, ROWS>(), start);
    for (; start < stop; start++) work(std::integral_constant<int, 1>(), start);
}

// One segment seen from one module.
struct Pair {
    const Segment* segment;
    const Factors* factors;
    float* shrunk;  // [rows, rank]
};

// Rows [start, stop) of a step, columns [from, to): of the ranks of one pair, or of the output of pairs that share rows,
// which follow one another and are one thread's, in order.
struct Piece {
    const LoraModule* module;
    int64_t first, last;  // pairs
    int64_t start, stop, from, to;
};

// What one call does, in pieces that threads may take in any order.
struct Plan {
    std::vector<Pair> pairs;
    std::vector<Piece> shrinks, expands;
    std::vector<float> shrunk;
    int64_t work;  // multiply-adds

    void make(const Segment* segments, int64_t count, const LoraModule* modules, int64_t num_modules, int64_t in, int threads) {
        pairs.clear(), shrinks.clear(), expands.clear();
        work = 0;
        int64_t size = 0;
        for (const LoraModule* module = modules; module < modules + num_modules; module++)
            add(segments, count, *module, num_modules, in, threads, &size);
        if (int64_t(shrunk.size()) < size) shrunk.resize(size);
        float* at = shrunk.data();
        for (Pair& pair : pairs) {
            pair.shrunk = at;
            at += pair.factors->rank * (pair.segment->stop - pair.segment->start);
        }
    }

  private:
    void add(const Segment* segments, int64_t count, const LoraModule& module, int64_t num_modules, int64_t in, int threads,
             int64_t* size) {
        const int64_t columns = count * num_modules < 4 * threads ? PIECE : module.out;
        int64_t first = pairs.size(), start = 0, reached = 0;  // the chain's first pair, and the rows that it spans
        const auto end_chain = [&] {
            if (first < int64_t(pairs.size())) cut(expands, {&module, first, int64_t(pairs.size()), start, reached, 0, module.out}, columns);
            first = pairs.size(), start = reached;
        };
        for (const Segment* s = segments; s < segments + count; s++) {
            const Factors* factors = s->factors + module.number;
            if (!factors->is_targeted) continue;
            if (s->start >= reached) end_chain(), start = s->start;
            reached = std::max(reached, s->stop);
            const int64_t rank = factors->rank, rows = s->stop - s->start, pair = pairs.size();
            cut(shrinks, {&module, pair, pair + 1, s->start, s->stop, 0, rank}, rows < ROWS ? RANKS : rank);
            pairs.push_back({s, factors, nullptr});
            *size += rank * rows;
            work += rank * rows * (in + module.out);
        }
        end_chain();
    }

    // a piece in strips of rows and of `columns`
    static void cut(std::vector<Piece>& pieces, const Piece& whole, int64_t columns) {
        for (int64_t row = whole.start; row < whole.stop; row += STRIP)
            for (int64_t c = 0; c < whole.to; c += columns) {
                const int64_t stop = std::min(row + STRIP, whole.stop), to = std::min(c + columns, whole.to);
                pieces.push_back({whole.module, whole.first, whole.last, row, stop, c, to});
            }
    }
};

template <typename T, typename W>
void shrink(const Piece& p, const Pair& pair, const W* a, const T* x, int64_t in) {
    const int64_t rank = pair.factors->rank;
    by_tiles(p.start, p.stop, [&](auto rows, int64_t row) {
        float* shrunk = pair.shrunk + (row - pair.segment->start) * rank;
        for (int64_t j = p.from; j < p.to; j += RANKS)
            shrink_block<rows.value>(x + row * in, a + j * in, in, int(std::min<int64_t>(RANKS, p.to - j)), shrunk + j, rank);
    });
}

template <typename T, typename W>
void expand(const Piece& p, const Pair& pair, const W* b_t, T* y) {
    const Factors& f = *pair.factors;
    const Segment& s = *pair.segment;
    const Finish finish = {f.column_scale, f.shift, float(s.scale)};
    by_tiles(std::max(p.start, s.start), std::min(p.stop, s.stop), [&](auto rows, int64_t row) {
        const float* shrunk = pair.shrunk + (row - s.start) * f.rank;
        expand_rows<rows.value>(shrunk, b_t, f.rank, p.module->out, p.from, p.to, finish, y + row * p.module->out);
    });
}

template <typename T>
void run(const Segment* segments, int64_t count, const LoraModule* modules, int64_t num_modules, int64_t in, const T* x,
         int threads) {
    thread_local Plan mine;
    Plan& plan = mine;  // the threads of the team see the caller's, not their own
    plan.make(segments, count, modules, num_modules, in, threads);
    const int64_t num_shrinks = plan.shrinks.size(), num_expands = plan.expands.size();
    const int64_t share = std::max<int64_t>(1, num_shrinks / (8 * threads));
#pragma omp parallel num_threads(threads) if (plan.work >= THREADED)
    {
#pragma omp for schedule(dynamic, share)
        for (int64_t i = 0; i < num_shrinks; i++) {
            const Piece& piece = plan.shrinks[i];
            const Pair& pair = plan.pairs[piece.first];
            if (pair.factors->a_is_bf16) shrink(piece, pair, static_cast<const bf16*>(pair.factors->a), x, in);
            else shrink(piece, pair, static_cast<const float*>(pair.factors->a), x, in);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < num_expands; i++) {
            const Piece& piece = plan.expands[i];
            for (const Pair* pair = &plan.pairs[piece.first]; pair < plan.pairs.data() + piece.last; pair++) {
                const Factors& f = *pair->factors;
                if (f.b_is_bf16) expand(piece, *pair, static_cast<const bf16*>(f.b_t), static_cast<T*>(piece.module->y));
                else expand(piece, *pair, static_cast<const float*>(f.b_t), static_cast<T*>(piece.module->y));
            }
        }
    }
}

}  // namespace

#define EXPORT(NAME, T)                                                                                           \
    extern "C" void NAME(const Segment* segments, int64_t count, const LoraModule* modules, int64_t num_modules,  \
                         int64_t in, const T* x, int threads) {                                                   \
        run(segments, count, modules, num_modules, in, x, threads);                                               \
    }

EXPORT(lora_delta_f32, float)
EXPORT(lora_delta_bf16, bf16)
