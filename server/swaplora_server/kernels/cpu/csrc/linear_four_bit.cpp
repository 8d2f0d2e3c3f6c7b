// A linear with codes of 4 bits for weights (bitsandbytes' nf4 and fp4):  y = x W^T + b,  W[o, k] = table[code] * scale.
//
// Shapes: x [rows, in], W [out, in], y [rows, out], float32; several linears that share x in one call.
// Numbers: within a block, whose weights share a scale, x times the table's entries is summed in float32 in ascending order;
// a block's sum times its scale is added to those before it. A row's result is the same, bit for bit, among any others.
// Layout: panels [panel][blocks][block / 8, rounded up][COLUMNS] of words, which hold a column's codes of eight k; scales
// [panel][blocks][COLUMNS]. Where eight does not divide a block, codes beyond its end meet zeros in x.
// Threads: pieces of STRIP rows by one panel, taken dynamically.
#include <algorithm>
#include <omp.h>
#include <vector>
#include "abi.h"
#include "prefetch.h"
#include "vec.h"

namespace {

constexpr int64_t COLUMNS = 64, CODES = 8;         // of a panel, and of a word
constexpr int ROWS = LANES == 16 ? 10 : 4;         // of a tile: its sums fill most of the registers
constexpr int FEW = LANES == 16 ? 4 : 1;           // rows up to which a tile has four vectors of columns, not two
constexpr int64_t STRIP = 8 * ROWS;                // rows whose sums are held at a time
constexpr int64_t AHEAD = 1 << 14;                 // bytes by which a panel is asked of memory before it is needed
constexpr int64_t THREADED = 1 << 16;              // multiply-adds below which a second thread costs more than it saves
constexpr int64_t SHARES = 8;                      // pieces a thread takes of its work

// Entries of the table by the lowest four bits of each code
#if LANES == 16 && defined(__AVX512F__) && !defined(PLAIN)
struct Table {
    __m512 entries;
    explicit Table(const float* from) : entries(load(from)) {}
    floats operator[](words codes) const { return _mm512_permutexvar_ps((__m512i)codes, entries); }
};
#elif LANES == 8 && defined(__AVX2__) && !defined(PLAIN)
struct Table {
    __m256 first, second;
    explicit Table(const float* from) : first(load(from)), second(load(from + LANES)) {}
    floats operator[](words codes) const {  // three bits choose within a half, the fourth chooses the half
        const __m256i at = (__m256i)codes;
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(first, at), _mm256_permutevar8x32_ps(second, at), (__m256)(codes << 28));
    }
};
#else
struct Table {
    const float* entries;
    explicit Table(const float* from) : entries(from) {}
    floats operator[](words codes) const {
        floats v;
        for (int c = 0; c < LANES; c++) v[c] = entries[codes[c] & 15];
        return v;
    }
};
#endif

// Where a tile has its weights from, eight k of V vectors at a time: a panel's codes, or numbers that were looked up before
struct Codes {
    const uint32_t* panel;
    Table table;
    int64_t ahead;  // words by which it is prefetched

    Codes from(int64_t column) const { return {panel + column, table, ahead}; }
    template <int V>
    void load_eight(int64_t k, words* codes) const {
        const uint32_t* at = panel + k / CODES * COLUMNS;
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) {
            __builtin_prefetch(at + v * LANES + ahead, 0, 2);
            std::memcpy(codes + v, at + v * LANES, sizeof *codes);
        }
    }
    floats take(int64_t, int j, words codes, int) const { return table[codes >> uint32_t(4 * j)]; }
};
struct Numbers {
    const float* numbers;  // [block][COLUMNS]

    Numbers from(int64_t column) const { return {numbers + column}; }
    template <int V>
    void load_eight(int64_t, words*) const {}
    floats take(int64_t k, int j, words, int v) const { return load(numbers + (k + j) * COLUMNS + v * LANES); }
};

// sums[row] += (x[row] . weights) * scales over one block, R rows of V * LANES columns
template <int R, int V, typename Weights>
[[gnu::noinline]] void tile(const float* x, int64_t stride, const Weights& weights, int64_t block, const float* scales, float* sums) {
    floats acc[R][V];
#pragma GCC unroll 32
    for (int r = 0; r < R; r++)
#pragma GCC unroll 32
        for (int v = 0; v < V; v++) acc[r][v] = floats{};
    for (int64_t k = 0; k < block; k += CODES) {
        words codes[V];
        weights.template load_eight<V>(k, codes);
#pragma GCC unroll 8
        for (int j = 0; j < CODES; j++) {
            floats w[V];
#pragma GCC unroll 32
            for (int v = 0; v < V; v++) w[v] = weights.take(k, j, codes[v], v);
#pragma GCC unroll 32
            for (int r = 0; r < R; r++) {
                const floats scalar = splat(x[r * stride + k + j]);
#pragma GCC unroll 32
                for (int v = 0; v < V; v++) acc[r][v] = mul_add(scalar, w[v], acc[r][v]);
            }
        }
    }
#pragma GCC unroll 32
    for (int r = 0; r < R; r++)
#pragma GCC unroll 32
        for (int v = 0; v < V; v++) {
            float* sum = sums + r * COLUMNS + v * LANES;
            store(mul_add(acc[r][v], load(scales + v * LANES), load(sum)), sum);
        }
}

template <typename Weights, int R = ROWS>
void tile_of(int64_t rows, const float* x, int64_t stride, const Weights& weights, int64_t block, const float* scales, float* sums) {
    constexpr int V = R <= FEW ? 4 : 2;
    if constexpr (R > 0) {
        if (rows < R) return tile_of<Weights, R - 1>(rows, x, stride, weights, block, scales, sums);
        for (int64_t c = 0; c < COLUMNS; c += V * LANES) tile<R, V>(x, stride, weights.from(c), block, scales + c, sums + c);
    }
}

// `whole` in as few parts of at most `most` as may be, of one size but for the last
int64_t even_cut(int64_t whole, int64_t most) {
    const int64_t count = (whole + most - 1) / most;
    return (whole + count - 1) / count;
}

// A block of a panel, without its scales
void look_up(const uint32_t* panel, const Table& table, int64_t block, float* numbers) {
    for (int64_t k = 0; k < block; k += CODES, panel += COLUMNS)
        for (int64_t c = 0; c < COLUMNS; c += LANES) {
            words codes;
            __builtin_prefetch(panel + c + AHEAD / 4, 0, 2);
            std::memcpy(&codes, panel + c, sizeof codes);
            for (int j = 0; j < CODES; j++) store(table[codes >> uint32_t(4 * j)], numbers + (k + j) * COLUMNS + c);
        }
}

// y[0..rows) of one panel; x [rows, in] has blocks of `block`, which eight divides
void panel_strip(const LinearWeight& w, int64_t p, const float* x, int64_t rows, int64_t in, int64_t block, float* y) {
    alignas(64) float sums[STRIP * COLUMNS];
    thread_local std::vector<float> numbers;
    const int64_t first = p * COLUMNS, width = std::min(COLUMNS, w.out - first), height = even_cut(rows, ROWS);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < COLUMNS; c++) sums[r * COLUMNS + c] = w.bias && c < width ? w.bias[first + c] : 0.0f;
    const uint32_t* panel = static_cast<const uint32_t*>(w.panels) + p * in / CODES * COLUMNS;
    const float* scales = w.scales + p * (in / block) * COLUMNS;
    const Table table(w.table);
    const bool is_one_tile = rows <= ROWS;
    if (!is_one_tile && int64_t(numbers.size()) < block * COLUMNS) numbers.resize(block * COLUMNS);
    for (int64_t k = 0; k < in; k += block, panel += block / CODES * COLUMNS, scales += COLUMNS) {
        if (is_one_tile) {
            tile_of(rows, x + k, in, Codes{panel, table, AHEAD / 4}, block, scales, sums);
            continue;
        }
        look_up(panel, table, block, numbers.data());
        for (int64_t r = 0; r < rows; r += height)
            tile_of(std::min(height, rows - r), x + r * in + k, in, Numbers{numbers.data()}, block, scales, sums + r * COLUMNS);
    }
    for (int64_t r = 0; r < rows; r++) std::memcpy(y + r * w.out + first, sums + r * COLUMNS, width * sizeof(float));
}

int64_t panels_of(int64_t out) { return (out + COLUMNS - 1) / COLUMNS; }

// Jobs whose blocks are of one size, which eight divides
void multiply(const float* x, int64_t rows, int64_t in, int64_t block, const LinearJob* jobs, int64_t count, const Span* prefetch,
              int64_t num_prefetch, int threads) {
    int64_t panels = 0, work = 0, lines = 0;
    for (const Span* span = prefetch; span < prefetch + num_prefetch; span++) lines += lines_of(*span);
    for (int64_t j = 0; j < count; j++) {
        panels += panels_of(jobs[j].weight->out);
        work += rows * in * jobs[j].weight->out;
    }
    const int64_t pieces = (rows + STRIP - 1) / STRIP * panels, share = std::max<int64_t>(1, panels / (threads * SHARES));
#pragma omp parallel for num_threads(threads) if (work >= THREADED && threads > 1) schedule(dynamic, share)
    for (int64_t piece = 0; piece < pieces; piece++) {
        const int64_t first = piece / panels * STRIP;
        int64_t p = piece % panels;
        Prefetch(prefetch, lines * piece / pieces, lines * (piece + 1) / pieces).take_all();
        const LinearJob* job = jobs;
        for (; p >= panels_of(job->weight->out); job++) p -= panels_of(job->weight->out);
        panel_strip(*job->weight, p, x + first * in, std::min(STRIP, rows - first), in, block, job->y + first * job->weight->out);
    }
}

}  // namespace

void linear_four_bit(const float* x, int64_t rows, int64_t in, const LinearJob* jobs, int64_t count, const Span* prefetch,
                     int64_t num_prefetch, int threads) {
    thread_local std::vector<float> wide;
    for (const LinearJob *job = jobs, *end = jobs + count; job < end; num_prefetch = 0) {
        const int64_t block = job->weight->block, whole = (block + CODES - 1) / CODES * CODES, blocks = in / block;
        const LinearJob* next = job + 1;
        while (next < end && next->weight->block == block) next++;
        if (whole > block) {
            wide.assign(rows * blocks * whole, 0.0f);
            for (int64_t b = 0; b < rows * blocks; b++) std::memcpy(wide.data() + b * whole, x + b * block, block * sizeof(float));
        }
        multiply(whole > block ? wide.data() : x, rows, blocks * whole, whole, job, next - job, prefetch, num_prefetch, threads);
        job = next;
    }
}
