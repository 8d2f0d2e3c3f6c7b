// y[rows] += scale * (x[rows] A^T) B^T for every segment of a packed step, each adapter's factors read once.
//
// The order of every sum is fixed by the shapes of the factors alone, so a row's result does not depend on which other
// rows are in the step, nor on how many threads run. Sums are float32 whatever the tensors hold.
#include <algorithm>
#include <omp.h>
#include <vector>
#include "lora_delta.h"
#include "vec.h"

namespace {

constexpr int RANKS = 4;               // rows of A at a time
constexpr int WIDE = 4;                // vectors of B's columns at a time
constexpr int64_t PIECE = 4 * WIDE * LANES;  // columns of a module that one thread takes when there are few segments
constexpr int64_t THREADED = 1 << 15;  // multiply-adds below which a second thread costs more than it saves

// shrunk[row][0..ranks) = x[row] . A[0..ranks), for ROWS rows
template <int ROWS, typename T, typename W>
void shrink_block(const T* x, const W* a, int64_t in, int ranks, float* shrunk, int64_t stride) {
    f32x8 sums[ROWS][RANKS] = {};
    const int64_t whole = in - in % LANES;
    for (int64_t k = 0; k < whole; k += LANES) {
        f32x8 xs[ROWS];
        for (int row = 0; row < ROWS; row++) xs[row] = load(x + row * in + k);
        for (int j = 0; j < RANKS; j++) {
            const f32x8 av = load(a + std::min(j, ranks - 1) * in + k);
            for (int row = 0; row < ROWS; row++) sums[row][j] = mul_add(xs[row], av, sums[row][j]);
        }
    }
    for (int row = 0; row < ROWS; row++)
        for (int j = 0; j < ranks; j++) {
            float total = sum(sums[row][j]);
            for (int64_t k = whole; k < in; k++) total = mul_add(widen(x[row * in + k]), widen(a[j * in + k]), total);
            shrunk[row * stride + j] = total;
        }
}

// y[row][0..V * LANES) += scale * shrunk[row] . B[0..rank)[0..V * LANES), for ROWS rows
template <int ROWS, int V, typename T, typename W>
void expand_block(const float* shrunk, const W* b_t, int64_t rank, int64_t out, float scale, T* y) {
    f32x8 sums[ROWS][V] = {};
    for (int64_t j = 0; j < rank; j++)
        for (int v = 0; v < V; v++) {
            const f32x8 bv = load(b_t + j * out + v * LANES);
            for (int row = 0; row < ROWS; row++) sums[row][v] = mul_add(splat(shrunk[row * rank + j]), bv, sums[row][v]);
        }
    for (int row = 0; row < ROWS; row++)
        for (int c = 0; c < V * LANES; c++) {
            T* to = y + row * out + c;
            narrow(mul_add(scale, sums[row][c / LANES][c % LANES], widen(*to)), to);
        }
}

// V vectors of columns for every row of a segment
template <int V, typename T, typename W>
void expand_rows(const Segment& s, int64_t rank, const float* shrunk, const W* b_t, int64_t out, T* y) {
    const int64_t rows = s.stop - s.start;
    int64_t row = 0;
    for (; row + 2 <= rows; row += 2)
        expand_block<2, V>(shrunk + row * rank, b_t, rank, out, float(s.scale), y + (s.start + row) * out);
    if (row < rows) expand_block<1, V>(shrunk + row * rank, b_t, rank, out, float(s.scale), y + (s.start + row) * out);
}

template <typename T, typename W>
void expand_column(const Segment& s, int64_t rank, const float* shrunk, const W* b_t, int64_t out, T* y) {
    for (int64_t row = 0; row < s.stop - s.start; row++) {
        float total = 0;
        for (int64_t j = 0; j < rank; j++) total = mul_add(shrunk[row * rank + j], widen(b_t[j * out]), total);
        T* to = y + (s.start + row) * out;
        narrow(mul_add(float(s.scale), total, widen(*to)), to);
    }
}

// Ranks [from, to) of a segment: shrunk[row][rank] = x[row] . A[rank]
template <typename T, typename W>
void shrink(const Segment& s, const Factors& f, const W* a, const T* x, int64_t in, int64_t from, int64_t to, float* shrunk) {
    const int64_t rows = s.stop - s.start;
    const int ranks = int(to - from);
    int64_t row = 0;
    for (; row + 2 <= rows; row += 2)
        shrink_block<2>(x + (s.start + row) * in, a + from * in, in, ranks, shrunk + row * f.rank + from, f.rank);
    if (row < rows)
        shrink_block<1>(x + (s.start + row) * in, a + from * in, in, ranks, shrunk + row * f.rank + from, f.rank);
}

// Columns [from, to) of a segment's output; `from` is a multiple of PIECE, so that a column is always summed the same way
template <typename T, typename W>
void expand(const Segment& s, const Factors& f, const W* b_t, T* y, int64_t out, int64_t from, int64_t to, const float* shrunk) {
    int64_t c = from;
    for (; c + WIDE * LANES <= to; c += WIDE * LANES) expand_rows<WIDE>(s, f.rank, shrunk, b_t + c, out, y + c);
    for (; c + LANES <= to; c += LANES) expand_rows<1>(s, f.rank, shrunk, b_t + c, out, y + c);
    for (; c < to; c++) expand_column(s, f.rank, shrunk, b_t + c, out, y + c);
}

// One segment seen from one module.
struct Pair {
    const Segment* segment;
    const Factors* factors;
    float* shrunk;  // [rows, rank]
};

struct Shrink {
    const Pair* pair;
    int64_t from, to;  // ranks
};

// Pairs that share rows follow one another and are one thread's, in order.
struct Expand {
    const LoraModule* module;
    int64_t first, last;  // pairs
    int64_t from, to;     // columns
};

// What one call does, in pieces that threads may take in any order.
struct Plan {
    std::vector<Pair> pairs;
    std::vector<Shrink> shrinks;
    std::vector<Expand> expands;
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
            for (int64_t j = 0; j < pair.factors->rank; j += RANKS)
                shrinks.push_back({&pair, j, std::min(j + RANKS, pair.factors->rank)});
        }
    }

  private:
    void add(const Segment* segments, int64_t count, const LoraModule& module, int64_t num_modules, int64_t in, int threads,
             int64_t* size) {
        const int64_t piece = count * num_modules < 4 * threads ? PIECE : module.out;
        int64_t first = pairs.size(), reached = 0;  // the chain's first pair, and the row that it reaches to
        const auto end_chain = [&] {
            if (first < int64_t(pairs.size()))
                for (int64_t c = 0; c < module.out; c += piece)
                    expands.push_back({&module, first, int64_t(pairs.size()), c, std::min(c + piece, module.out)});
            first = pairs.size();
        };
        for (const Segment* s = segments; s < segments + count; s++) {
            const Factors* factors = s->factors + module.number;
            if (!factors->a) continue;
            if (s->start >= reached) end_chain();
            reached = std::max(reached, s->stop);
            pairs.push_back({s, factors, nullptr});
            *size += factors->rank * (s->stop - s->start);
            work += factors->rank * (s->stop - s->start) * (in + module.out);
        }
        end_chain();
    }
};

template <typename T>
void run_shrink(const Shrink& s, const T* x, int64_t in) {
    const Factors& f = *s.pair->factors;
    if (f.a_is_bf16) shrink(*s.pair->segment, f, static_cast<const bf16*>(f.a), x, in, s.from, s.to, s.pair->shrunk);
    else shrink(*s.pair->segment, f, static_cast<const float*>(f.a), x, in, s.from, s.to, s.pair->shrunk);
}

template <typename T>
void run_expand(const Expand& e, const Pair* pairs) {
    T* y = static_cast<T*>(e.module->y);
    for (const Pair* pair = pairs + e.first; pair < pairs + e.last; pair++) {
        const Factors& f = *pair->factors;
        if (f.b_is_bf16) expand(*pair->segment, f, static_cast<const bf16*>(f.b_t), y, e.module->out, e.from, e.to, pair->shrunk);
        else expand(*pair->segment, f, static_cast<const float*>(f.b_t), y, e.module->out, e.from, e.to, pair->shrunk);
    }
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
        for (int64_t i = 0; i < num_shrinks; i++) run_shrink(plan.shrinks[i], x, in);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < num_expands; i++) run_expand<T>(plan.expands[i], plan.pairs.data());
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
