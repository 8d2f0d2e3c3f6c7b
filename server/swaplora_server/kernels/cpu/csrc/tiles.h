// Products of rows in bfloat16 with a panel of a weight, summed in the order that products.h says, whatever the number of
// rows: so a row's sums are the same, bit for bit, alone and among any others.
//
// Layout: a row of x is words (x[k], x[k + 1]), filled up to whole blocks with zeros; a panel is [pair of k][16 V columns]
// of such words, which vdpbf16ps reads vector by vector, and tdpbf16ps as tiles of 16 pairs.
#pragma once
#include <algorithm>
#include "prefetch.h"
#include "products.h"

#define UNROLL _Pragma("GCC unroll 32")

namespace {

constexpr int64_t AHEAD = 1536;  // words of a panel by which it is prefetched before it is needed

inline int64_t blocks_of(int64_t in) { return (in + 2 * BLOCK - 1) / (2 * BLOCK); }
// of a row of x: a line more than whole lines, so that rows do not fall into the same sets of the first cache
inline int64_t row_words(int64_t in) { return blocks_of(in) * BLOCK + LINE / 4; }

// to: pairs of x [in], filled up to whole blocks with zeros
inline void round_row(const float* x, int64_t in, uint32_t* to) {
    int64_t k = 0;
#if LANES == 16 && defined(__AVX512BF16__) && !defined(PLAIN)
    for (; k + 32 <= in; k += 32)
        _mm512_storeu_si512(to + k / 2, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + k + 16), _mm512_loadu_ps(x + k)));
#endif
    for (; k + 1 < in; k += 2) to[k / 2] = rounded(x[k]) | rounded(x[k + 1]) << 16;
    if (k < in) to[k / 2] = rounded(x[k]), k += 2;
    std::fill(to + k / 2, to + blocks_of(in) * BLOCK, 0u);
}

// sums [R][16 N] that lie `to` floats apart, of R rows of x that lie `row` words apart: what starts `from` floats apart, and
// products with N vectors of some pairs of a panel that is `width` words wide
template <int R, int N>
[[gnu::always_inline]] inline void tile(const uint32_t* x, int64_t row, const uint32_t* panel, int64_t width, int64_t pairs,
                                        const float* start, int64_t from, float* sums, int64_t to) {
    Sixteen all[R][N];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int n = 0; n < N; n++) all[r][n] = load16(start + r * from + n * 16);
#if TILES
    for (int64_t first = 0; first < pairs; first += BLOCK) {
        Sixteen low[R][N] = {}, high[R][N] = {};
        for (int64_t k = first; k < std::min(first + BLOCK, pairs); k++, panel += width) {
            UNROLL for (int n = 0; n < N; n++) {
                __builtin_prefetch(panel + AHEAD + n * 16, 0, 2);
                const SixteenWords w = load16(panel + n * 16);
                UNROLL for (int r = 0; r < R; r++) add_each(x[r * row + k], w, low[r][n], high[r][n]);
            }
        }
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int n = 0; n < N; n++)
                for (int i = 0; i < PARTS; i++) all[r][n].part[i] += low[r][n].part[i] + high[r][n].part[i];
    }
#else
    for (int64_t k = 0; k < pairs; k++, panel += width) {
        SixteenWords w[N];
        UNROLL for (int n = 0; n < N; n++) w[n] = load16(panel + n * 16);
        UNROLL for (int n = 0; n < N; n++) __builtin_prefetch(panel + AHEAD + n * 16, 0, 2);
        UNROLL for (int r = 0; r < R; r++) {
            const SixteenWords pair = splat16(x[r * row + k]);
            UNROLL for (int n = 0; n < N; n++) all[r][n] = add_pairs(all[r][n], w[n], pair);
        }
    }
#endif
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int n = 0; n < N; n++) store16(all[r][n], sums + r * to + n * 16);
}

// What a thread sets up before its first product, and gives back after its last.
struct Products {
    const NoDenormals no_denormals;
    Products() {
        if (AMX_PRODUCTS) configure_tiles();
    }
    ~Products() {
        if (AMX_PRODUCTS) release_tiles();
    }
    Products(const Products&) = delete;
};

#if AMX_PRODUCTS

constexpr int64_t ROWS = 16;  // of a tile

// sums [ROWS][16 V], of ROWS rows of x that lie `row` words apart: what starts `from` floats apart, and products with
// blocks of a panel. All ROWS of them, whatever `rows` says: each is computed apart from the others.
template <int V>
inline void multiply(int64_t, const uint32_t* x, int64_t row, const uint32_t* panel, int64_t blocks, const float* start, int64_t from,
                     float* sums, bool is_first) {
    static_assert(V == 1 || V == 3);
    constexpr int64_t WIDTH = 16 * V;
    const int64_t ahead = is_first ? BLOCK * WIDTH : 0;  // words: the tiles after the first find a panel in the cache
    _tile_loadd(0, start, from * 4);
    if (V == 3) {
        _tile_loadd(1, start + 16, from * 4);
        _tile_loadd(2, start + 32, from * 4);
    }
    for (int64_t b = 0; b < blocks; b++, x += BLOCK, panel += BLOCK * WIDTH) {
        for (int64_t i = 0; i < ahead; i += LINE / 4) __builtin_prefetch(panel + AHEAD + i, 0, 2);
        _tile_loadd(6, x, row * 4);
        _tile_loadd(3, panel, WIDTH * 4);
        _tile_dpbf16ps(0, 6, 3);
        if (V == 3) {
            _tile_loadd(4, panel + 16, WIDTH * 4);
            _tile_dpbf16ps(1, 6, 4);
            _tile_loadd(5, panel + 32, WIDTH * 4);
            _tile_dpbf16ps(2, 6, 5);
        }
    }
    _tile_stored(0, sums, WIDTH * 4);
    if (V == 3) {
        _tile_stored(1, sums + 16, WIDTH * 4);
        _tile_stored(2, sums + 32, WIDTH * 4);
    }
}

#else

#if TILES
constexpr int ROWS = 2, WIDE = 1;  // rows and vectors whose sums are in registers: low and high apart
#elif LANES == 16
constexpr int ROWS = 8, WIDE = 3;
#else
constexpr int ROWS = 4, WIDE = 1;
#endif

// sums [rows][16 V], of up to ROWS rows of x that lie `row` words apart: what starts `from` floats apart, and products
// with blocks of a panel
template <int V, int R = ROWS>
void multiply(int64_t rows, const uint32_t* x, int64_t row, const uint32_t* panel, int64_t blocks, const float* start,
              int64_t from, float* sums, bool is_first) {
    if constexpr (R > 1) {
        if (rows < R) return multiply<V, R - 1>(rows, x, row, panel, blocks, start, from, sums, is_first);
    }
    constexpr int N = std::min(V, WIDE);
    for (int v = 0; v < V; v += N)
        tile<R, N>(x, row, panel + v * 16, 16 * V, blocks * BLOCK, start + v * 16, from, sums + v * 16, 16 * V);
}

#endif

}  // namespace
