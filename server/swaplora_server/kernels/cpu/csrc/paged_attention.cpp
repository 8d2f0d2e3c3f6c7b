// PagedAttention (vLLM): causal attention over a paged KV cache, the same code for decode rows and prefill chunks, and for
// an encoder's inputs, whose rows see what comes after them too.
//   out = softmax(softcap(scaling * q K^T), sink) V   over the keys of the row's own sequence, in its sliding window
//
// Shapes: q, out [rows, num_heads, head_dim]; k, v [rows, num_kv_heads, head_dim] (GQA: query heads h * group and on share
// KV head h), all float32. The step's keys and values are written to the cache first, rounded where it is bfloat16.
// Layout: keys [block, kv_head, dims, block_size] with dims = head_dim rounded up to even; values [block, kv_head,
// block_size, head_dim]; position p is in block p / block_size of its sequence's block table. In bfloat16 the keys of
// dimensions 2 i and 2 i + 1 share a 32-bit word, [dims / 2, block_size] words, so that one load and one operation each
// give two vectors.
// Threads: pieces of one KV head by the queries of a tile, taken dynamically; what a thread takes next it knows while it
// works on a piece, whose blocks are prefetched some blocks ahead up to the first of the next piece.
// Every score is the sum of two, over even and over odd dimensions, every output one sum over the positions, all in
// ascending order, and a softmax adds up by position modulo LANES; so a row's result depends on its own sequence and
// position alone: neither on its neighbours nor on how its prompt was cut.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <omp.h>
#include <type_traits>
#include <vector>
#include "abi.h"
#include "vec.h"

namespace {

constexpr int ROWS = LANES == 16 ? 6 : 3;  // of a tile in registers: its sums fill most of them
constexpr int64_t TILE_ROWS = 24;          // rows that share what they read of the cache
constexpr int64_t AHEAD = 4;               // blocks by which the cache is prefetched
constexpr float LOWEST = -1e30f;

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// `whole` in as few parts of at most `most` as may be, of one size but for the last
int64_t even_cut(int64_t whole, int64_t most) {
    const int64_t count = (whole + most - 1) / most;
    return (whole + count - 1) / count;
}

template <int R = ROWS, typename Work>
void with_constant(int64_t rows, int64_t row, Work work) {
    if constexpr (R > 1)
        if (rows < R) return with_constant<R - 1>(rows, row, work);
    work(std::integral_constant<int, R>{}, row);
}

// Calls work(std::integral_constant<int, R>, row) for tiles of R <= ROWS rows until all are done.
template <typename Work>
void in_tiles(int64_t rows, Work work) {
    const int64_t cut = even_cut(rows, ROWS);
    for (int64_t row = 0; row < rows; row += cut) with_constant(std::min(cut, rows - row), row, work);
}

// Dimensions 2 i and 2 i + 1 of LANES keys, from where those of one pair of dimensions are.
void get_keys(const float* from, int64_t block_size, floats* even, floats* odd) {
    *even = load(from);
    *odd = load(from + block_size);
}
void get_keys(const bf16* from, int64_t, floats* even, floats* odd) { load_pairs(from, even, odd); }

// 2 LANES dimensions of a value in the order in which they are cheapest to get; put_value brings them back in theirs.
void get_value(const float* from, floats* low, floats* high) {
    *low = load(from);
    *high = load(from + LANES);
}
void get_value(const bf16* from, floats* even, floats* odd) { load_pairs(from, even, odd); }
void put_value(const float*, floats low, floats high, float* to) {
    store(low, to);
    store(high, to + LANES);
}
void put_value(const bf16*, floats even, floats odd, float* to) { store_pairs(even, odd, to); }

// keys of one pair of dimensions that a vector of positions takes, in numbers
constexpr int64_t step_of(const float*) { return 1; }
constexpr int64_t step_of(const bf16*) { return 2; }

// LANES keys of one block, and as many of one that is read later
template <typename T>
struct Keys {
    const T *at, *ahead;
    int64_t score;  // where their scores go
};

// scores[r][keys] = query[r] . keys, for R rows and V vectors of keys. query: [R, dims]. Lanes beyond a block hold nothing
// of meaning until the next block's are there.
template <int R, int V, typename T>
void score(const float* query, int64_t pairs, const Keys<T>* keys, int64_t block_size, float* scores, int64_t stride) {
    floats even[R][V] = {}, odd[R][V] = {};
    for (int64_t i = 0; i < pairs; i++, query += 2) {
        floats evens[V], odds[V];
        for (int v = 0; v < V; v++) {
            get_keys(keys[v].at + 2 * i * block_size, block_size, evens + v, odds + v);
            __builtin_prefetch(keys[v].ahead + 2 * i * block_size, 0, 2);
            if (sizeof(T) == 4) __builtin_prefetch(keys[v].ahead + (2 * i + 1) * block_size, 0, 2);
        }
        for (int r = 0; r < R; r++)
            for (int v = 0; v < V; v++) even[r][v] = mul_add(splat(query[2 * pairs * r]), evens[v], even[r][v]);
        for (int r = 0; r < R; r++)
            for (int v = 0; v < V; v++) odd[r][v] = mul_add(splat(query[2 * pairs * r + 1]), odds[v], odd[r][v]);
    }
    for (int v = 0; v < V; v++)
        for (int r = 0; r < R; r++) store(even[r][v] + odd[r][v], scores + r * stride + keys[v].score);
}

// Positions of one block, and the block that is read later.
template <typename T>
struct Values {
    const T *at, *ahead;
    int64_t count;
};

// out_of(r)[from...] = scales[r] * sum over positions of weights[r][position] * value, for R rows and the up to 2 * V * LANES
// dimensions that the head has there.
template <int R, int V, typename T, typename Out>
void mix(const float* weights, int64_t stride, const Values<T>* blocks, int64_t num_blocks, int64_t from, int64_t dim,
         const float* scales, Out out_of) {
    floats sums[R][2 * V] = {};
    for (const Values<T>* block = blocks; block < blocks + num_blocks; block++) {
        const T *value = block->at + from, *ahead = block->ahead + from;
        for (int64_t i = 0; i < block->count; i++, value += dim, ahead += dim, weights++) {
            floats wide[2 * V];
            for (int v = 0; v < V; v++) {
                get_value(value + 2 * v * LANES, wide + 2 * v, wide + 2 * v + 1);
                for (int64_t line = 0; line < int64_t(2 * LANES * sizeof(T)); line += 64)
                    __builtin_prefetch(reinterpret_cast<const char*>(ahead + 2 * v * LANES) + line, 0, 2);
            }
            for (int r = 0; r < R; r++) {
                const floats weight = splat(weights[r * stride]);
                for (int v = 0; v < 2 * V; v++) sums[r][v] = mul_add(weight, wide[v], sums[r][v]);
            }
        }
    }
    for (int r = 0; r < R; r++) {
        float row[2 * V * LANES];
        for (int v = 0; v < V; v++)
            put_value(static_cast<const T*>(nullptr), sums[r][2 * v] * scales[r], sums[r][2 * v + 1] * scales[r],
                      row + 2 * v * LANES);
        std::memcpy(out_of(r) + from, row, std::min<int64_t>(2 * V * LANES, dim - from) * sizeof(float));
    }
}

// scores[from..to) become e^(score - the largest), the rest of scores[0..count) zero. Returns what makes weights of them:
// one over their sum, and over the share that the sink takes. Sums up by lane, from a multiple of LANES on.
float softmax(float* scores, int64_t from, int64_t to, int64_t count, const float* sink) {
    const int64_t start = from / LANES * LANES, stop = round_up(to, LANES), end = round_up(count, LANES);
    floats most = splat(sink ? *sink : LOWEST);
    for (int64_t i = start; i < stop; i += LANES) {
        const ints at = lane_numbers() + int32_t(i);
        const floats score = load(scores + i);
        most = larger((at < int32_t(from)) | (at >= int32_t(to)) ? most : score, most);
    }
    const float largest = max(most);
    floats sums = {}, none = {};
    for (int64_t i = 0; i < start; i += LANES) store(none, scores + i);
    for (int64_t i = start; i < stop; i += LANES) {
        const ints at = lane_numbers() + int32_t(i);
        const floats e = exp_negative(load(scores + i) - largest);
        const floats seen = (at < int32_t(from)) | (at >= int32_t(to)) ? none : e;
        sums += seen;
        store(seen, scores + i);
    }
    for (int64_t i = stop; i < end; i += LANES) store(none, scores + i);
    return 1.0f / (sum(sums) + (sink ? std::exp(*sink - largest) : 0.0f));
}

// Queries [from, to) of a run.
struct Tile {
    const Run* run;
    int64_t from, to;
};

// Memory for as long as the thread lives.
template <typename T>
struct Scratch {
    std::vector<CacheLine> memory;
    std::vector<Keys<T>> keys;
    std::vector<Values<T>> values;
    float *query, *scores, *scales;

    void reserve(int64_t query_size, int64_t scores_size, int64_t rows) {
        const int64_t size = lines(query_size) + lines(scores_size) + lines(rows);
        if (int64_t(memory.size()) < size) memory.resize(size);
        query = memory.data()->floats;
        scores = query + 16 * lines(query_size);
        scales = scores + 16 * lines(scores_size);
    }
};

// A tile and the head of a KV head that it is for.
struct Piece {
    const Tile* tile;
    int64_t head;
};

template <typename T>
struct Layer {
    const LayerCache& c;
    const int64_t group = c.num_heads / c.num_kv_heads, dim = c.head_dim, block_size = c.block_size;
    const int64_t dims = round_up(dim, 2);

    T* keys_of(int64_t block, int64_t head) const {
        return static_cast<T*>(c.keys) + (block * c.num_kv_heads + head) * dims * block_size;
    }
    T* values_of(int64_t block, int64_t head) const {
        return static_cast<T*>(c.values) + (block * c.num_kv_heads + head) * dim * block_size;
    }

    // key, value: [rows, num_kv_heads, head_dim]
    void write(const Piece& piece, const float* key, const float* value) const {
        const Run& run = *piece.tile->run;
        for (int64_t i = piece.tile->from; i < piece.tile->to; i++) {
            const int64_t position = run.first + i, offset = position % block_size;
            const int64_t block = run.blocks[position / block_size];
            const int64_t at = ((run.start + i) * c.num_kv_heads + piece.head) * dim;
            put_key(key + at, keys_of(block, piece.head) + offset * step_of(static_cast<T*>(nullptr)));
            narrow(value + at, dim, values_of(block, piece.head) + offset * dim);
        }
    }

    // query, out: [rows, num_heads, head_dim]
    void attend(const Piece& piece, const Piece* next, const float* query, float* out, Scratch<T>& s) const {
        const Tile& tile = *piece.tile;
        const int64_t rows = (tile.to - tile.from) * group;
        const int64_t base = first_position(tile), count = seen_to(*tile.run, tile.to) - base;
        const int64_t stride = round_up(count, LANES) + 2 * LANES;
        s.reserve(rows * dims, rows * stride, rows);
        for (int64_t r = 0; r < rows; r++) {
            const float* from = query + row_at(piece, r);
            for (int64_t d = 0; d < dim; d++) s.query[r * dims + d] = from[d] * float(c.scaling);
            if (dim < dims) s.query[r * dims + dim] = 0.0f;
        }
        score_blocks(piece, next, base, count, rows, stride, s);
        for (int64_t r = 0; r < rows; r++) {
            const int64_t row = tile.from + r / group, end = tile.run->first + row + 1;
            const int64_t from = c.window ? std::max<int64_t>(0, end - c.window - base) : 0;
            s.scales[r] = weigh(s.scores + r * stride, from, seen_to(*tile.run, row + 1) - base, count,
                                c.sinks ? c.sinks + piece.head * group + r % group : nullptr);
        }
        mix_blocks(piece, next, base, count, rows, stride, out, s);
    }

  private:
    int64_t row_at(const Piece& piece, int64_t r) const {
        const Tile& tile = *piece.tile;
        return ((tile.run->start + tile.from + r / group) * c.num_heads + piece.head * group + r % group) * dim;
    }

    void put_key(const float* key, float* to) const {
        for (int64_t d = 0; d < dim; d++) to[d * block_size] = key[d];
        if (dim < dims) to[dim * block_size] = 0.0f;
    }
    void put_key(const float* key, bf16* to) const {
        bf16 half[256];
        for (int64_t from = 0; from < dim; from += 256) {
            const int64_t size = std::min<int64_t>(256, dim - from);
            narrow(key + from, size, half);
            if (size % 2) half[size] = 0;
            for (int64_t d = 0; d < size; d += 2) std::memcpy(to + (from + d) * block_size, half + d, 2 * sizeof(bf16));
        }
    }

    // The end of what rows up to `to` may see.
    int64_t seen_to(const Run& run, int64_t to) const {
        const int64_t length = run.first + to;
        if (!c.is_whole) return length;
        return c.window ? std::min(run.stop - run.start, length + c.window - 1) : run.stop - run.start;
    }

    // The start of a block at or before all that the tile's first row may see, where lanes begin anew: which lane a
    // position falls to must not depend on the tile.
    int64_t first_position(const Tile& tile) const {
        int64_t block = c.window ? std::max<int64_t>(0, tile.run->first + tile.from + 1 - c.window) / block_size : 0;
        while (block * block_size % LANES) block--;
        return block * block_size;
    }

    // What is read after `blocks` blocks: the keys of a piece, its values, the keys of the next.
    const T* ahead(const Piece& piece, const Piece* next, int64_t base, int64_t count, int64_t blocks) const {
        const int64_t first = base / block_size, num_blocks = (count + block_size - 1) / block_size;
        if (blocks < num_blocks) return keys_of(piece.tile->run->blocks[first + blocks], piece.head);
        blocks -= num_blocks;
        if (blocks < num_blocks) return values_of(piece.tile->run->blocks[first + blocks], piece.head);
        if (!next) return values_of(piece.tile->run->blocks[first + num_blocks - 1], piece.head);
        const Tile& tile = *next->tile;
        const int64_t start = first_position(tile) / block_size, last = (seen_to(*tile.run, tile.to) - 1) / block_size;
        return keys_of(tile.run->blocks[std::min(start + blocks - num_blocks, last)], next->head);
    }

    void score_blocks(const Piece& piece, const Piece* next, int64_t base, int64_t count, int64_t rows, int64_t stride,
                      Scratch<T>& s) const {
        s.keys.clear();
        const int64_t* block = piece.tile->run->blocks + base / block_size;
        for (int64_t first = 0; first < count; first += block_size, block++) {
            const T* at = keys_of(*block, piece.head);
            const T* later = ahead(piece, next, base, count, first / block_size + AHEAD);
            for (int64_t k = 0; k < std::min(block_size, count - first); k += LANES)
                s.keys.push_back({at + k * step_of(at), later + k * step_of(at), first + k});
        }
        for (const Keys<T>*keys = s.keys.data(), *end = keys + s.keys.size(); keys < end; keys += 2)
            in_tiles(rows, [&](auto tile_rows, int64_t row) {
                constexpr int R = decltype(tile_rows)::value;
                float* to = s.scores + row * stride;
                if (keys + 1 < end) score<R, 2>(s.query + row * dims, dims / 2, keys, block_size, to, stride);
                else score<R, 1>(s.query + row * dims, dims / 2, keys, block_size, to, stride);
            });
    }

    // One row's scores, of which it may see [from, to), become weights but for the factor that is returned.
    float weigh(float* scores, int64_t from, int64_t to, int64_t count, const float* sink) const {
        if (c.softcap)
            for (int64_t i = from / LANES * LANES; i < to; i += LANES)
                store(tanh(load(scores + i) / float(c.softcap)) * float(c.softcap), scores + i);
        return softmax(scores, from, to, count, sink);
    }

    void mix_blocks(const Piece& piece, const Piece* next, int64_t base, int64_t count, int64_t rows, int64_t stride,
                    float* out, Scratch<T>& s) const {
        const int64_t num_blocks = (count + block_size - 1) / block_size;
        s.values.clear();
        for (int64_t i = 0; i < num_blocks; i++)
            s.values.push_back({values_of(piece.tile->run->blocks[base / block_size + i], piece.head),
                                ahead(piece, next, base, count, num_blocks + i + AHEAD),
                                std::min(block_size, count - i * block_size)});
        in_tiles(rows, [&](auto tile_rows, int64_t row) {
            constexpr int R = decltype(tile_rows)::value;
            const float *weights = s.scores + row * stride, *scales = s.scales + row;
            const auto out_of = [&](int r) { return out + row_at(piece, row + r); };
            for (int64_t d = 0; d < dim; d += 4 * LANES) {
                if (dim - d > 2 * LANES) mix<R, 2>(weights, stride, s.values.data(), num_blocks, d, dim, scales, out_of);
                else mix<R, 1>(weights, stride, s.values.data(), num_blocks, d, dim, scales, out_of);
            }
        });
    }
};

template <typename T>
void run(const LayerCache& cache, const Run* runs, int64_t num_runs, const float* query, const float* key,
         const float* value, float* out, int threads) {
    const Layer<T> layer{cache};
    const int64_t queries = std::max<int64_t>(1, TILE_ROWS / layer.group);
    thread_local std::vector<Tile> tiles;
    tiles.clear();
    bool reads_others = false;  // whether a tile reads what another has written: only tiles of one run do
    for (const Run* run = runs; run < runs + num_runs; run++) {
        for (int64_t from = 0; from < run->stop - run->start; from += queries)
            tiles.push_back({run, from, std::min(from + queries, run->stop - run->start)});
        reads_others |= run->stop - run->start > queries;
    }
    const Tile* first = tiles.data();
    const int64_t pieces = int64_t(tiles.size()) * cache.num_kv_heads;
    const auto piece_of = [&](int64_t piece) { return Piece{first + piece / cache.num_kv_heads, piece % cache.num_kv_heads}; };
    std::atomic<int64_t> taken{0};
#pragma omp parallel num_threads(threads) if (pieces > 1)
    {
        thread_local Scratch<T> scratch;
        if (reads_others) {
#pragma omp for schedule(static)
            for (int64_t piece = 0; piece < pieces; piece++) layer.write(piece_of(piece), key, value);
        }
        int64_t next = taken++;
        while (next < pieces) {
            const Piece piece = piece_of(next);
            next = taken++;
            const Piece following = next < pieces ? piece_of(next) : piece;
            if (!reads_others) layer.write(piece, key, value);
            layer.attend(piece, next < pieces ? &following : nullptr, query, out, scratch);
        }
    }
}

}  // namespace

extern "C" void paged_attention(const LayerCache* cache, const Run* runs, int64_t num_runs, const float* query,
                                const float* key, const float* value, float* out, int threads) {
    if (cache->is_bf16) run<bf16>(*cache, runs, num_runs, query, key, value, out, threads);
    else run<float>(*cache, runs, num_runs, query, key, value, out, threads);
}
