// A linear with weights of 8 bits and a scale for each row of W (bitsandbytes' int8):  y = x W^T + b,  W[o, k] = code * scale.
//
// Shapes: x [rows, in], W [out, in], y [rows, out]; several linears that share x in one call.
// Numbers: a row of x is rounded to integers of 23 bits with one scale, TOP for its largest. What they give with the codes
// is summed exactly, in 32 bits for each of their three bytes, so a row's result is the same, bit for bit, among any others
// and with any instructions. (In 16 bits, the outliers of real activations leave too little for the rest of a row.)
// Layout: panels [panel][in / 4, padded to DEPTH][COLUMNS] of four bytes, code + 128 each: dot products take one operand
// unsigned, and 128 times the sum of x's bytes is taken off again. 16 columns of 16 such rows are a tile of AMX.
// Threads: pieces of a strip of rows by one panel, taken dynamically.
#include <algorithm>
#include <omp.h>
#include <vector>
#include "abi.h"
#include "prefetch.h"
#include "products.h"
#include "vec.h"

#define UNROLL _Pragma("GCC unroll 32")

namespace {

constexpr int64_t COLUMNS = 32, DEPTH = 64;         // of a panel, and what `in` is padded to
constexpr int BYTES = 3;                            // of a rounded x, the highest first
constexpr int VECTORS = 2, ROWS = LANES == 16 ? 4 : 1; // of a tile without AMX: its sums fill most of the registers
constexpr int64_t SLICE = 1 << 16;                  // of `in` at a time: its sums fit in 32 bits
constexpr int64_t TILE = 16;                        // rows of a tile of AMX
constexpr int64_t FEWEST_TILED = 7;                 // rows from which on AMX is faster
constexpr int64_t AHEAD = 1 << 14;                  // bytes by which a panel is asked of memory before it is needed
constexpr int64_t STRIP_BYTES = 1 << 19;            // of x at a time, which stay in the second cache
constexpr int64_t MOST_TILES = 16;                  // of a strip
constexpr int64_t THREADED = 1 << 16;               // multiply-adds below which a second thread costs more than it saves
constexpr int64_t ROUNDED = 1 << 13;                // numbers of x below which it does so too
constexpr int64_t SHARES = 8;                       // pieces a thread takes of its work
constexpr float TOP = 63 << 16;                     // below 2^22: beyond, floats have no room to round in

typedef int8_t quarters __attribute__((vector_size(LANES)));

// acc + the four products of the unsigned bytes of `u` and the signed bytes of `s`, word by word. Wraps.
words dot4(words acc, words u, words s) {
#if !defined(PLAIN) && LANES == 16 && defined(__AVX512VNNI__)
    return (words)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)u, (__m512i)s);
#elif !defined(PLAIN) && LANES == 8 && defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return (words)_mm256_dpbusd_epi32((__m256i)acc, (__m256i)u, (__m256i)s);
#elif !defined(PLAIN) && LANES == 16 && defined(__AVX512BW__)
    // two products of 16 bits each fit in 32; those of bytes, in the instruction for bytes, would not in 16
    const __m512i even = _mm512_madd_epi16((__m512i)(u & 0x00ff00ff), _mm512_srai_epi16(_mm512_slli_epi16((__m512i)s, 8), 8));
    const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16((__m512i)u, 8), _mm512_srai_epi16((__m512i)s, 8));
    return acc + (words)even + (words)odd;
#elif !defined(PLAIN) && LANES == 8 && defined(__AVX2__)
    const __m256i even = _mm256_madd_epi16((__m256i)(u & 0x00ff00ff), _mm256_srai_epi16(_mm256_slli_epi16((__m256i)s, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16((__m256i)u, 8), _mm256_srai_epi16((__m256i)s, 8));
    return acc + (words)even + (words)odd;
#else
    const ints t = (ints)s;
    acc += (u & 255) * (words)(t << 24 >> 24) + (u >> 8 & 255) * (words)(t << 16 >> 24);
    return acc + (u >> 16 & 255) * (words)(t << 8 >> 24) + (u >> 24) * (words)(t >> 24);
#endif
}

int64_t padded(int64_t size, int64_t to) { return (size + to - 1) / to * to; }

// Rows of x in integers: for each, one byte after the other of all `depth`, and a line, lest rows fall into the same sets of
// a cache.
struct Planes {
    std::vector<int8_t> bytes;     // [rows padded to TILE][stride]
    std::vector<float> scales;     // [rows]
    std::vector<uint32_t> starts;  // [rows][slices][BYTES]: what sums start from
    int64_t depth, stride, slices;

    void make_room(int64_t rows, int64_t in) {
        depth = padded(in, DEPTH), stride = BYTES * depth + 64, slices = (depth + SLICE - 1) / SLICE;
        if (int64_t(bytes.size()) < padded(rows, TILE) * stride) bytes.resize(padded(rows, TILE) * stride);
        if (int64_t(scales.size()) < rows) scales.resize(rows);
        if (int64_t(starts.size()) < rows * slices * BYTES) starts.resize(rows * slices * BYTES);
    }
    const int8_t* row(int64_t r) const { return bytes.data() + r * stride; }
    const uint32_t* start(int64_t r, int64_t slice) const { return starts.data() + (r * slices + slice) * BYTES; }
};

// The largest |x|, by its bits: of infinity or NaN where there is one
uint32_t largest(const float* x, int64_t in) {
    uint32_t top = 0;
    for (int64_t k = 0; k < in; k++) {
        uint32_t bits;
        std::memcpy(&bits, x + k, sizeof bits);
        top = std::max(top, bits & 0x7fffffff);
    }
    return top;
}

// LANES values into bytes that lie `depth` apart, which are added to the sums
void split(floats x, float inverse, int8_t* bytes, int64_t depth, ints* sums) {
    const floats magic = floats{} + 12582912.0f;  // 1.5 * 2^23: a sum with it is whole
    ints whole = (ints)(x * inverse + magic) - (ints)magic;
    for (int b = BYTES - 1; b >= 0; b--) {
        const ints lowest = whole << 24 >> 24;
        const quarters narrow = __builtin_convertvector(lowest, quarters);
        std::memcpy(bytes + b * depth, &narrow, sizeof narrow);
        sums[b] += lowest;
        whole = (whole - lowest) >> 8;
    }
}

uint32_t start_of(const ints& sums) {
    int32_t total = 0;
    for (int i = 0; i < LANES; i++) total += sums[i];
    return -128u * uint32_t(total);
}

void round_row(const float* x, int64_t in, int64_t r, Planes& planes) {
    const uint32_t bits = std::max(largest(x, in), 0x0da24260u);  // 1e-30: smaller ones keep its step
    float top;
    std::memcpy(&top, &bits, sizeof top);
    const bool is_finite = bits < 0x7f800000;
    planes.scales[r] = is_finite ? top / TOP : __builtin_nanf("");
    const float inverse = is_finite ? TOP / top : 0.0f;
    int8_t* bytes = planes.bytes.data() + r * planes.stride;
    for (int64_t k = 0, slice = 0; k < planes.depth; slice++) {
        ints sums[BYTES] = {};
        for (const int64_t end = std::min(k + SLICE, planes.depth); k < end; k += LANES) {
            floats v = {};
            if (k + LANES <= in) v = load(x + k);
            else if (k < in) std::memcpy(&v, x + k, (in - k) * sizeof(float));
            split(is_finite ? v : floats{}, inverse, bytes + k, planes.depth, sums);
        }
        for (int b = 0; b < BYTES; b++) planes.starts[(r * planes.slices + slice) * BYTES + b] = start_of(sums[b]);
    }
}

// Sums of one tile's rows, for each byte of x
struct alignas(64) Sums {
    uint32_t of[BYTES][TILE][COLUMNS];
};

template <int R>
[[gnu::noinline]] void tile(const int8_t* x, const Planes& planes, int64_t depth, const uint32_t* panel, Sums& sums, int64_t first,
                           int64_t ahead) {
    for (int64_t c = 0; c < COLUMNS; c += VECTORS * LANES) {
        words acc[BYTES][R][VECTORS];
        UNROLL for (int b = 0; b < BYTES; b++)
            UNROLL for (int r = 0; r < R; r++)
                UNROLL for (int v = 0; v < VECTORS; v++) acc[b][r][v] = words{};
        for (int64_t k = 0; k < depth; k += 4) {
            const uint32_t* at = panel + k / 4 * COLUMNS + c;
            words w[VECTORS];
            UNROLL for (int v = 0; v < VECTORS; v++) __builtin_prefetch(at + v * LANES + ahead, 0, 2);
            UNROLL for (int v = 0; v < VECTORS; v++) std::memcpy(&w[v], at + v * LANES, sizeof w[v]);
            UNROLL for (int r = 0; r < R; r++)
                UNROLL for (int b = 0; b < BYTES; b++) {
                    uint32_t four;
                    std::memcpy(&four, x + r * planes.stride + b * planes.depth + k, sizeof four);
                    UNROLL for (int v = 0; v < VECTORS; v++) acc[b][r][v] = dot4(acc[b][r][v], w[v], words{} + four);
                }
        }
        UNROLL for (int b = 0; b < BYTES; b++)
            UNROLL for (int r = 0; r < R; r++)
                UNROLL for (int v = 0; v < VECTORS; v++)
                    std::memcpy(&sums.of[b][first + r][c + v * LANES], &acc[b][r][v], sizeof(words));
    }
    asm volatile("" ::: "memory");  // lest the sums live on the stack throughout, for the sake of what comes after
}

void vector_tiles(int64_t rows, const int8_t* x, const Planes& planes, int64_t depth, const uint32_t* panel, Sums& sums, int64_t ahead) {
    for (int64_t r = 0; r < rows; r += ROWS, x += ROWS * planes.stride, ahead = 0) switch (std::min<int64_t>(ROWS, rows - r)) {
            case 1: tile<1>(x, planes, depth, panel, sums, r, ahead); break;
#if LANES == 16
            case 2: tile<2>(x, planes, depth, panel, sums, r, ahead); break;
            case 3: tile<3>(x, planes, depth, panel, sums, r, ahead); break;
            case 4: tile<4>(x, planes, depth, panel, sums, r, ahead); break;
#endif
        }
}

// The same for TILE rows. `ahead`: whether what follows is asked of memory, into the second cache
template <bool ahead>
[[gnu::noinline]] void amx_tile(const int8_t* x, const Planes& planes, int64_t depth, const uint32_t* panel, Sums& sums) {
#ifdef HAS_TILES
    constexpr int64_t line = COLUMNS * 4, step = DEPTH * COLUMNS;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    const char* w = reinterpret_cast<const char*>(panel);
    for (int64_t k = 0; k < depth; k += DEPTH, x += DEPTH, w += step) {
        if (ahead)
            UNROLL for (int64_t at = 0; at < step; at += 64) __builtin_prefetch(w + AHEAD + at, 0, 2);
        _tile_loadd(7, w, line);
        _tile_loadd(6, x, planes.stride);
        _tile_dpbsud(0, 6, 7);
        _tile_loadd(6, x + planes.depth, planes.stride);
        _tile_dpbsud(2, 6, 7);
        _tile_loadd(6, x + 2 * planes.depth, planes.stride);
        _tile_dpbsud(4, 6, 7);
        _tile_loadd(7, w + 64, line);
        _tile_dpbsud(5, 6, 7);
        _tile_loadd(6, x + planes.depth, planes.stride);
        _tile_dpbsud(3, 6, 7);
        _tile_loadd(6, x, planes.stride);
        _tile_dpbsud(1, 6, 7);
    }
    _tile_stored(0, sums.of[0][0], line);
    _tile_stored(1, sums.of[0][0] + 16, line);
    _tile_stored(2, sums.of[1][0], line);
    _tile_stored(3, sums.of[1][0] + 16, line);
    _tile_stored(4, sums.of[2][0], line);
    _tile_stored(5, sums.of[2][0] + 16, line);
#endif
}

// y[0..rows) of one panel, TILE rows at most
void panel_tile(const LinearWeight& w, int64_t p, const Planes& planes, int64_t first_row, int64_t rows, bool with_amx, bool is_first, float* y) {
    Sums sums;
    alignas(64) float totals[TILE][COLUMNS], bias[COLUMNS] = {};
    const int64_t first = p * COLUMNS, width = std::min(COLUMNS, w.out - first);
    if (w.bias) std::memcpy(bias, w.bias + first, width * sizeof(float));
    for (int64_t slice = 0; slice < planes.slices; slice++) {
        const int64_t k = slice * SLICE, depth = std::min(SLICE, planes.depth - k);
        const uint32_t* panel = static_cast<const uint32_t*>(w.panels) + (p * planes.depth + k) / 4 * COLUMNS;
        const int8_t* x = planes.row(first_row) + k;
        if (!with_amx) vector_tiles(rows, x, planes, depth, panel, sums, is_first ? AHEAD / 4 : 0);
        else if (is_first) amx_tile<true>(x, planes, depth, panel, sums);
        else amx_tile<false>(x, planes, depth, panel, sums);
        for (int64_t r = 0; r < rows; r++) {
            const uint32_t* start = planes.start(first_row + r, slice);
            for (int64_t c = 0; c < COLUMNS; c += LANES) {
                floats sum = {};
                for (int b = 0; b < BYTES; b++) {
                    words part;
                    std::memcpy(&part, &sums.of[b][r][c], sizeof part);
                    sum = mul_add(sum, splat(256.0f), __builtin_convertvector((ints)(part + start[b]), floats));
                }
                store(slice ? load(totals[r] + c) + sum : sum, totals[r] + c);
            }
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        const floats scale = splat(planes.scales[first_row + r]);
        float* to = width == COLUMNS ? y + r * w.out + first : totals[r];
        for (int64_t c = 0; c < COLUMNS; c += LANES)
            store(load(totals[r] + c) * scale * load(w.scales + first + c) + load(bias + c), to + c);
        if (width < COLUMNS) std::memcpy(y + r * w.out + first, to, width * sizeof(float));
    }
}

int64_t panels_of(int64_t out) { return (out + COLUMNS - 1) / COLUMNS; }

}  // namespace

void linear_int8(const float* x, int64_t rows, int64_t in, const LinearJob* jobs, int64_t count, const Span* prefetch,
                 int64_t num_prefetch, int threads) {
    thread_local Planes planes_;
    Planes& planes = planes_;  // of this thread, for all
    planes.make_room(rows, in);
    int64_t panels = 0, work = 0, lines = 0;
    for (const Span* span = prefetch; span < prefetch + num_prefetch; span++) lines += lines_of(*span);
    for (int64_t j = 0; j < count; j++) {
        panels += panels_of(jobs[j].weight->out);
        work += rows * in * jobs[j].weight->out;
    }
    const int64_t strip = std::clamp<int64_t>(STRIP_BYTES / planes.stride / TILE, 1, MOST_TILES) * TILE;
    const int64_t pieces = (rows + strip - 1) / strip * panels;
    const int64_t share = std::max<int64_t>(1, panels / (threads * SHARES));
    const bool with_amx = rows >= FEWEST_TILED && may_use_tiles();
    const bool round_apart = rows * in < ROUNDED;
    if (round_apart) for (int64_t r = 0; r < rows; r++) round_row(x + r * in, in, r, planes);
#pragma omp parallel num_threads(threads) if (work >= THREADED && threads > 1)
    {
        if (!round_apart) {
#pragma omp for schedule(static)
            for (int64_t r = 0; r < rows; r++) round_row(x + r * in, in, r, planes);
        }
        if (with_amx) configure_tiles();
#pragma omp for schedule(dynamic, share) nowait
        for (int64_t piece = 0; piece < pieces; piece++) {
            const int64_t first = piece / panels * strip, stop = std::min(first + strip, rows);
            int64_t p = piece % panels;
            Prefetch(prefetch, lines * piece / pieces, lines * (piece + 1) / pieces).take_all();
            const LinearJob* job = jobs;
            for (; p >= panels_of(job->weight->out); job++) p -= panels_of(job->weight->out);
            for (int64_t r = first; r < stop; r += TILE)
                panel_tile(*job->weight, p, planes, r, std::min(TILE, stop - r), with_amx, r == first, job->y + r * job->weight->out);
        }
        if (with_amx) release_tiles();
    }
}
