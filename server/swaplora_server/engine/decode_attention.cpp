// One query row a sequence against its paged keys and values, straight from the cache.
//
// A (sequence, KV head) pair is one piece of work; its query heads share every key and value that is read. The order of
// every sum is fixed by the sequence's own length, so a row's result does not depend on its neighbours.
#include <algorithm>
#include <cmath>
#include <omp.h>
#include <vector>
#include "vec.h"

struct Shape {
    int64_t num_rows, num_heads, num_kv_heads, head_dim;
    int64_t max_length;    // columns of `slots`
    int64_t window;        // keys a row may look back on, itself included; 0: all
    double scaling, softcap;  // softcap 0: none
};

namespace {

template <typename T>
float dot(const T* a, const T* b, int64_t n) {
    f32x8 sums[2] = {};
    int64_t k = 0;
    for (; k + 2 * LANES <= n; k += 2 * LANES) {
        sums[0] += load(a + k) * load(b + k);
        sums[1] += load(a + k + LANES) * load(b + k + LANES);
    }
    if (k < n) sums[0] += load(a + k) * load(b + k);
    return sum(sums[0] + sums[1]);
}

template <typename T>
void attend(const Shape& s, const T* query, const T* keys, const T* values, const int64_t* slots, int64_t length,
            const float* sinks, T* out, float* scores, float* acc) {
    const int64_t group = s.num_heads / s.num_kv_heads, kv_stride = s.num_kv_heads * s.head_dim, dim = s.head_dim;
    const int64_t first = s.window && length > s.window ? length - s.window : 0, count = length - first;
    for (int64_t i = 0; i < count; i++) {
        const T* key = keys + slots[first + i] * kv_stride;
        for (int64_t g = 0; g < group; g++) {
            float score = dot(query + g * dim, key, dim) * float(s.scaling);
            if (s.softcap) score = std::tanh(score / float(s.softcap)) * float(s.softcap);
            scores[g * count + i] = score;
        }
    }
    for (int64_t g = 0; g < group; g++) {
        float* row = scores + g * count;
        float largest = sinks ? sinks[g] : row[0];
        for (int64_t i = 0; i < count; i++) largest = std::max(largest, row[i]);
        float total = sinks ? std::exp(sinks[g] - largest) : 0.0f;
        for (int64_t i = 0; i < count; i++) total += row[i] = std::exp(row[i] - largest);
        for (int64_t i = 0; i < count; i++) row[i] /= total;
    }
    std::fill(acc, acc + group * dim, 0.0f);
    for (int64_t i = 0; i < count; i++) {
        const T* value = values + slots[first + i] * kv_stride;
        for (int64_t g = 0; g < group; g++) {
            const float weight = scores[g * count + i];
            float* to = acc + g * dim;
            for (int64_t k = 0; k < dim; k += LANES) {
                const f32x8 added = load(to + k) + weight * load(value + k);
                std::memcpy(to + k, &added, sizeof added);
            }
        }
    }
    for (int64_t k = 0; k < group * dim; k++) narrow(acc[k], out + k);
}

// query, out: [rows of the step, num_heads, head_dim], of which `rows` decode; keys, values: [slots, num_kv_heads, head_dim]
template <typename T>
void run(const Shape& s, const int64_t* rows, const T* query, const T* keys, const T* values, const int64_t* slots,
         const int64_t* lengths, const float* sinks, T* out, int threads) {
    const int64_t group = s.num_heads / s.num_kv_heads, items = s.num_rows * s.num_kv_heads;
#pragma omp parallel num_threads(threads) if (items > 1)
    {
        thread_local std::vector<float> scratch;
        scratch.resize(group * (s.max_length + s.head_dim));
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < items; item++) {
            const int64_t row = item / s.num_kv_heads, head = item % s.num_kv_heads;
            const int64_t at = (rows[row] * s.num_heads + head * group) * s.head_dim;
            attend(s, query + at, keys + head * s.head_dim, values + head * s.head_dim, slots + row * s.max_length,
                   lengths[row], sinks ? sinks + head * group : nullptr, out + at, scratch.data() + group * s.head_dim,
                   scratch.data());
        }
    }
}

}  // namespace

#define EXPORT(NAME, T)                                                                                           \
    extern "C" void NAME(const Shape* s, const int64_t* rows, const T* query, const T* keys, const T* values,     \
                         const int64_t* slots, const int64_t* lengths, const float* sinks, T* out, int threads) { \
        run(*s, rows, query, keys, values, slots, lengths, sinks, out, threads);                                  \
    }

EXPORT(decode_attention_f32, float)
EXPORT(decode_attention_bf16, bf16)
