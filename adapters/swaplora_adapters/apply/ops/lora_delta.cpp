// y[rows] += scale * (x[rows] A^T) B^T for every segment of a packed step, each adapter's factors read once.
//
// The order of every sum is fixed by the shapes of the factors alone, so a row's result does not depend on which other
// rows are in the step, nor on how many threads run. Sums are float32 whatever the tensors hold.
#include <algorithm>
#include <omp.h>
#include <vector>
#include "vec.h"

struct Segment {
    const void* a;    // [rank, in_features]
    const void* b_t;  // [rank, out_features]: B transposed
    int64_t rank, start, stop;
    double scale;
};

namespace {

constexpr int RANKS = 4;             // rows of A at a time
constexpr int COLUMNS = 4 * LANES;   // columns of B at a time
constexpr int64_t THREADED = 1 << 15;  // multiply-adds below which a second thread costs more than it saves

// shrunk[row][0..RANKS) = x[row] . A[j + 0..RANKS), for ROWS rows
template <int ROWS, typename T>
void shrink_block(const T* x, const T* a, int64_t in, int ranks, float* shrunk, int64_t stride) {
    f32x8 sums[ROWS][RANKS] = {};
    const int64_t whole = in - in % LANES;
    for (int64_t k = 0; k < whole; k += LANES) {
        f32x8 xs[ROWS];
        for (int row = 0; row < ROWS; row++) xs[row] = load(x + row * in + k);
        for (int j = 0; j < RANKS; j++) {
            const f32x8 av = load(a + std::min(j, ranks - 1) * in + k);
            for (int row = 0; row < ROWS; row++) sums[row][j] += xs[row] * av;
        }
    }
    for (int row = 0; row < ROWS; row++)
        for (int j = 0; j < ranks; j++) {
            float total = sum(sums[row][j]);
            for (int64_t k = whole; k < in; k++) total += widen(x[row * in + k]) * widen(a[j * in + k]);
            shrunk[row * stride + j] = total;
        }
}

// y[row][c + 0..COLUMNS) += scale * shrunk[row] . B[0..rank)[c + 0..COLUMNS), for ROWS rows
template <int ROWS, typename T>
void expand_block(const float* shrunk, const T* b_t, int64_t rank, int64_t out, float scale, T* y) {
    f32x8 sums[ROWS][COLUMNS / LANES] = {};
    for (int64_t j = 0; j < rank; j++)
        for (int c = 0; c < COLUMNS / LANES; c++) {
            const f32x8 bv = load(b_t + j * out + c * LANES);
            for (int row = 0; row < ROWS; row++) sums[row][c] += shrunk[row * rank + j] * bv;
        }
    for (int row = 0; row < ROWS; row++)
        for (int c = 0; c < COLUMNS; c++) {
            T* to = y + row * out + c;
            narrow(widen(*to) + scale * sums[row][c / LANES][c % LANES], to);
        }
}

template <typename T>
void expand_column(const float* shrunk, const T* b_t, int64_t rank, int64_t out, float scale, T* y) {
    float total = 0;
    for (int64_t j = 0; j < rank; j++) total += shrunk[j] * widen(b_t[j * out]);
    narrow(widen(*y) + scale * total, y);
}

template <typename T>
void shrink(const Segment& s, const T* x, int64_t in, int64_t from, int64_t to, float* shrunk) {
    const int64_t rows = s.stop - s.start;
    for (int64_t j = from; j < to; j += RANKS) {
        const int ranks = int(std::min<int64_t>(RANKS, to - j));
        const T* a = static_cast<const T*>(s.a) + j * in;
        int64_t row = 0;
        for (; row + 2 <= rows; row += 2)
            shrink_block<2>(x + (s.start + row) * in, a, in, ranks, shrunk + row * s.rank + j, s.rank);
        if (row < rows) shrink_block<1>(x + (s.start + row) * in, a, in, ranks, shrunk + row * s.rank + j, s.rank);
    }
}

template <typename T>
void expand(const Segment& s, T* y, int64_t out, int64_t from, int64_t to, const float* shrunk) {
    const int64_t rows = s.stop - s.start;
    const T* b_t = static_cast<const T*>(s.b_t);
    const float scale = float(s.scale);
    int64_t c = from;
    for (; c + COLUMNS <= to; c += COLUMNS) {
        int64_t row = 0;
        for (; row + 2 <= rows; row += 2)
            expand_block<2>(shrunk + row * s.rank, b_t + c, s.rank, out, scale, y + (s.start + row) * out + c);
        if (row < rows) expand_block<1>(shrunk + row * s.rank, b_t + c, s.rank, out, scale, y + (s.start + row) * out + c);
    }
    for (; c < to; c++)
        for (int64_t row = 0; row < rows; row++)
            expand_column(shrunk + row * s.rank, b_t + c, s.rank, out, scale, y + (s.start + row) * out + c);
}

int64_t blocks(int64_t length, int64_t block) { return (length + block - 1) / block; }

// Calls work(segment, from, to) over this thread's share of every segment's `length(segment)`, cut at multiples of `block`.
template <typename Length, typename Work>
void share(const Segment* segments, int64_t count, int64_t block, int thread, int threads, Length length, Work work) {
    for (int64_t i = 0; i < count; i++) {
        // neighbours start with different threads, so that many short segments spread as evenly as one long one
        const int64_t n = blocks(length(segments[i]), block), turn = (thread + i) % threads;
        const int64_t from = n * turn / threads, to = n * (turn + 1) / threads;
        if (from < to) work(i, from * block, std::min(to * block, length(segments[i])));
    }
}

template <typename T>
void run(const Segment* segments, int64_t count, int64_t in, int64_t out, const T* x, T* y, int threads) {
    thread_local std::vector<float> scratch;
    thread_local std::vector<int64_t> offsets;
    int64_t size = 0, work = 0;
    offsets.clear();
    for (int64_t i = 0; i < count; i++) {
        offsets.push_back(size);
        size += segments[i].rank * (segments[i].stop - segments[i].start);
    }
    work = size * (in + out);
    if (int64_t(scratch.size()) < size) scratch.resize(size);
    float* shrunk = scratch.data();
    const int64_t* offset = offsets.data();
#pragma omp parallel num_threads(threads) if (work >= THREADED)
    {
        const int team = omp_get_num_threads(), thread = omp_get_thread_num();
        share(segments, count, RANKS, thread, team, [](const Segment& s) { return s.rank; },
              [&](int64_t i, int64_t from, int64_t to) { shrink(segments[i], x, in, from, to, shrunk + offset[i]); });
#pragma omp barrier
        // one row may be in several segments: a thread owns the same columns in all of them only if the shares are equal
        for (int64_t i = 0; i < count; i++) {
            const int64_t n = blocks(out, COLUMNS);
            const int64_t from = n * thread / team * COLUMNS, to = std::min(n * (thread + 1) / team * COLUMNS, out);
            if (from < to) expand(segments[i], y, out, from, to, shrunk + offset[i]);
        }
    }
}

}  // namespace

extern "C" void lora_delta_f32(const Segment* s, int64_t n, int64_t in, int64_t out, const float* x, float* y, int threads) {
    run(s, n, in, out, x, y, threads);
}

extern "C" void lora_delta_bf16(const Segment* s, int64_t n, int64_t in, int64_t out, const bf16* x, bf16* y, int threads) {
    run(s, n, in, out, x, y, threads);
}
