// PagedAttention (vLLM): causal attention over a paged KV cache, the same code for decode rows and prefill chunks.
//   out = softmax(softcap(scaling * q K^T), sink) V   over the keys of the row's own sequence, in its sliding window
//
// Shapes: q, out [rows, num_heads, head_dim]; k, v [rows, num_kv_heads, head_dim] (GQA: query heads h * group and on share
// KV head h); float32 or bfloat16, sums in float32. The step's keys and values are written to the cache first.
// Layout: keys [block, kv_head, head_dim, block_size], values [block, kv_head, block_size, head_dim], found through each
// sequence's block table; position p is in block p / block_size.
// Threads: pieces of one KV head by the queries of a tile, taken dynamically; a tile is worked off against one block of
// keys after the other. Every score is one sum over the head's dimensions, every softmax and every output one sum over
// the positions, in ascending order; so a row's result depends on its own sequence and position alone: neither on its
// neighbours nor on how its prompt was cut.
#include <algorithm>
#include <cmath>
#include <omp.h>
#include <type_traits>
#include <vector>
#include "abi.h"
#include "vec.h"

namespace {

constexpr int ROWS = 6;                // of a tile: its sums fill most of the registers
constexpr int64_t TILE_ROWS = 4 * ROWS;  // rows that share what they read of the cache

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Calls work(std::integral_constant<int, R>, row) for tiles of R <= ROWS rows until all are done.
template <typename Work>
void in_tiles(int64_t rows, Work work) {
    for (int64_t row = 0; row < rows; row += ROWS) switch (rows - row) {
            case 1: work(std::integral_constant<int, 1>{}, row); break;
            case 2: work(std::integral_constant<int, 2>{}, row); break;
            case 3: work(std::integral_constant<int, 3>{}, row); break;
            case 4: work(std::integral_constant<int, 4>{}, row); break;
            case 5: work(std::integral_constant<int, 5>{}, row); break;
            default: work(std::integral_constant<int, ROWS>{}, row);
        }
}

// What is read after a block's keys, prefetched meanwhile. Both are as large as the keys.
template <typename T>
struct Next {
    const T *keys, *values;
};

// scores[r][0..V * LANES) = query[r] . keys[0..V * LANES), for R rows. Lanes beyond the block hold nothing of meaning.
template <int R, int V, typename T>
void score(const float* query, int64_t dim, const T* keys, int64_t block_size, Next<T> next, float* scores, int64_t stride) {
    floats sums[R][V] = {};
    for (int64_t d = 0; d < dim; d++) {
        floats key[V];
        __builtin_prefetch(next.keys + d * block_size);
        __builtin_prefetch(next.values + d * block_size);
        for (int v = 0; v < V; v++) key[v] = load(keys + d * block_size + v * LANES);
        for (int r = 0; r < R; r++)
            for (int v = 0; v < V; v++) sums[r][v] = mul_add(splat(query[r * dim + d]), key[v], sums[r][v]);
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) store(sums[r][v], scores + r * stride + v * LANES);
}

// out[r][0..V * LANES) = sum over positions of weights[r][position] * values[position], for R rows. Lanes beyond the head hold
// nothing of meaning.
template <int R, int V, typename T>
void mix(const float* weights, int64_t stride, const T* const* values, int64_t count, int64_t block_size, int64_t dim,
         float* out, int64_t out_stride) {
    floats sums[R][V] = {};
    for (int64_t first = 0; first < count; first += block_size) {
        const T* value = *values++;
        const int64_t stop = std::min(first + block_size, count);
        for (int64_t at = first; at < stop; at++, value += dim)
            for (int v = 0; v < V; v++) {
                const floats wide = load(value + v * LANES);
                for (int r = 0; r < R; r++) sums[r][v] = mul_add(splat(weights[r * stride + at]), wide, sums[r][v]);
            }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) store(sums[r][v], out + r * out_stride + v * LANES);
}

// scores[from..to) become their softmax, over themselves and one more that only takes its share, the sink; the rest of
// scores[0..count) becomes zero
void softmax(float* scores, int64_t from, int64_t to, int64_t count, const float* sink) {
    const int64_t padded = round_up(to, LANES);
    std::fill(scores, scores + from, -1e30f);
    std::fill(scores + to, scores + padded, -1e30f);
    float largest = sink ? *sink : scores[from];
    for (int64_t i = from; i < to; i++) largest = std::max(largest, scores[i]);
    floats sums = {};
    for (int64_t i = 0; i < padded; i += LANES) {
        const floats e = exp_negative(load(scores + i) - largest);
        sums += e;
        store(e, scores + i);
    }
    const float scale = 1.0f / (sum(sums) + (sink ? std::exp(*sink - largest) : 0.0f));
    for (int64_t i = from; i < to; i++) scores[i] *= scale;
    std::fill(scores, scores + from, 0.0f);
    std::fill(scores + to, scores + count, 0.0f);
}

// Queries [from, to) of a run.
struct Tile {
    const Run* run;
    int64_t from, to;
};

template <typename T>
struct Scratch {
    std::vector<float> query, scores, out;
    std::vector<const T*> values;
};

template <typename T>
struct Layer {
    const LayerCache& c;
    const int64_t group = c.num_heads / c.num_kv_heads, dim = c.head_dim, block_size = c.block_size;
    const int64_t out_stride = round_up(dim, LANES);

    T* keys_of(int64_t block, int64_t head) const {
        return static_cast<T*>(c.keys) + (block * c.num_kv_heads + head) * dim * block_size;
    }
    T* values_of(int64_t block, int64_t head) const {
        return static_cast<T*>(c.values) + (block * c.num_kv_heads + head) * dim * block_size;
    }

    // key, value: [rows, num_kv_heads, head_dim]
    void write(const Tile& tile, int64_t head, const T* key, const T* value) const {
        for (int64_t i = tile.from; i < tile.to; i++) {
            const int64_t position = tile.run->first + i, offset = position % block_size;
            const int64_t block = tile.run->blocks[position / block_size];
            const int64_t at = ((tile.run->start + i) * c.num_kv_heads + head) * dim;
            T* keys = keys_of(block, head) + offset;
            for (int64_t d = 0; d < dim; d++) keys[d * block_size] = key[at + d];
            std::memcpy(values_of(block, head) + offset * dim, value + at, dim * sizeof(T));
        }
    }

    // query, out: [rows, num_heads, head_dim]
    void attend(const Tile& tile, int64_t head, const T* query, T* out, Scratch<T>& s) const {
        const int64_t rows = (tile.to - tile.from) * group, length = tile.run->first + tile.to;
        const int64_t base = first_position(tile.run->first + tile.from);
        const int64_t count = length - base, stride = round_up(count, LANES) + 2 * LANES;
        s.query.resize(rows * dim);
        s.out.resize(rows * out_stride);
        s.scores.resize(rows * stride);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t d = 0; d < dim; d++)
                s.query[r * dim + d] = widen(query[row_at(tile, head, r) + d]) * float(c.scaling);
        score_blocks(tile, head, base, length, rows, stride, s);
        for (int64_t r = 0; r < rows; r++)
            weigh(s.scores.data() + r * stride, tile.run->first + tile.from + r / group + 1 - base, count,
                  c.sinks ? c.sinks + head * group + r % group : nullptr);
        mix_columns(count, rows, stride, s);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t d = 0; d < dim; d++) narrow(s.out[r * out_stride + d], out + row_at(tile, head, r) + d);
    }

  private:
    int64_t row_at(const Tile& tile, int64_t head, int64_t r) const {
        return ((tile.run->start + tile.from + r / group) * c.num_heads + head * group + r % group) * dim;
    }

    // The start of a block at or before all that the row at `position` may see, where lanes begin anew: which lane a
    // position falls to must not depend on the tile.
    int64_t first_position(int64_t position) const {
        int64_t block = c.window ? std::max<int64_t>(0, position + 1 - c.window) / block_size : 0;
        while (block * block_size % LANES) block--;
        return block * block_size;
    }

    void score_blocks(const Tile& tile, int64_t head, int64_t base, int64_t length, int64_t rows, int64_t stride,
                      Scratch<T>& s) const {
        s.values.clear();
        for (int64_t first = base; first < length; first += block_size) {
            const int64_t block = tile.run->blocks[first / block_size], used = std::min(block_size, length - first);
            s.values.push_back(values_of(block, head));
            const bool is_last = first + block_size >= length;
            const Next<T> next = {keys_of(tile.run->blocks[first / block_size + !is_last], head), s.values.back()};
            for (int64_t k = 0; k < used; k += 2 * LANES)
                in_tiles(rows, [&](auto tile_rows, int64_t row) {
                    constexpr int R = decltype(tile_rows)::value;
                    const T* keys = keys_of(block, head) + k;
                    float* to = s.scores.data() + row * stride + first - base + k;
                    if (used - k > LANES) score<R, 2>(s.query.data() + row * dim, dim, keys, block_size, next, to, stride);
                    else score<R, 1>(s.query.data() + row * dim, dim, keys, block_size, next, to, stride);
                });
        }
    }

    // One row's scores, of which it may see up to `to`, become weights.
    void weigh(float* scores, int64_t to, int64_t count, const float* sink) const {
        const int64_t from = c.window ? std::max<int64_t>(0, to - c.window) : 0;
        if (c.softcap)
            for (int64_t i = from; i < to; i++)
                scores[i] = std::tanh(scores[i] / float(c.softcap)) * float(c.softcap);
        softmax(scores, from, to, count, sink);
    }

    void mix_columns(int64_t count, int64_t rows, int64_t stride, Scratch<T>& s) const {
        std::vector<const T*>& values = s.values;
        for (int64_t d = 0; d < dim; d += 2 * LANES) {
            in_tiles(rows, [&](auto tile_rows, int64_t row) {
                constexpr int R = decltype(tile_rows)::value;
                const float* weights = s.scores.data() + row * stride;
                float* to = s.out.data() + row * out_stride + d;
                if (dim - d > LANES) mix<R, 2>(weights, stride, values.data(), count, block_size, dim, to, out_stride);
                else mix<R, 1>(weights, stride, values.data(), count, block_size, dim, to, out_stride);
            });
            for (const T*& value : values) value += 2 * LANES;
        }
    }
};

template <typename T>
void run(const LayerCache& cache, const Run* runs, int64_t num_runs, const T* query, const T* key, const T* value, T* out,
         int threads) {
    const Layer<T> layer{cache};
    const int64_t queries = std::max<int64_t>(1, TILE_ROWS / layer.group);
    std::vector<Tile> tiles;
    for (const Run* run = runs; run < runs + num_runs; run++)
        for (int64_t from = 0; from < run->stop - run->start; from += queries)
            tiles.push_back({run, from, std::min(from + queries, run->stop - run->start)});
    const int64_t pieces = int64_t(tiles.size()) * cache.num_kv_heads;
#pragma omp parallel num_threads(threads) if (pieces > 1)
    {
        thread_local Scratch<T> scratch;
#pragma omp for schedule(static)
        for (int64_t piece = 0; piece < pieces; piece++)
            layer.write(tiles[piece / cache.num_kv_heads], piece % cache.num_kv_heads, key, value);
        // a tile reads what the tiles before it have written
#pragma omp for schedule(dynamic, 1)
        for (int64_t piece = 0; piece < pieces; piece++)
            layer.attend(tiles[piece / cache.num_kv_heads], piece % cache.num_kv_heads, query, out, scratch);
    }
}

}  // namespace

#define EXPORT(NAME, T)                                                                                            \
    extern "C" void NAME(const LayerCache* cache, const Run* runs, int64_t num_runs, const T* query, const T* key, \
                         const T* value, T* out, int threads) {                                                    \
        run(*cache, runs, num_runs, query, key, value, out, threads);                                              \
    }

EXPORT(paged_attention_f32, float)
EXPORT(paged_attention_bf16, bf16)
