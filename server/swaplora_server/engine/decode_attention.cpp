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

// e^x for x <= 0, to about 2 ulp: 2^n by the exponent's bits, 2^f by a polynomial on [-0.5, 0.5]
f32x8 exp_negative(f32x8 x) {
    typedef int32_t i32x8 __attribute__((vector_size(32)));
    const f32x8 lowest = f32x8{} - 87.0f;
    x = x < lowest ? lowest : x;
    const f32x8 scaled = x * 1.44269504f;
    const i32x8 n = __builtin_convertvector(scaled - 0.5f, i32x8);  // truncates, and x <= 0: rounds to nearest
    const f32x8 f = scaled - __builtin_convertvector(n, f32x8);
    f32x8 p = f32x8{} + 1.5403530e-4f;
    p = p * f + 1.33335581e-3f;
    p = p * f + 9.61812911e-3f;
    p = p * f + 5.55041087e-2f;
    p = p * f + 2.40226507e-1f;
    p = p * f + 6.93147181e-1f;
    p = p * f + 1.0f;
    return p * (f32x8)((n + 127) << 23);
}

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

// scores[0..count) become their softmax, over `count` and one more that only takes its share, the sink
void softmax(float* scores, int64_t count, const float* sink) {
    float largest = sink ? *sink : scores[0];
    for (int64_t i = 0; i < count; i++) largest = std::max(largest, scores[i]);
    f32x8 sums = {};
    for (int64_t i = 0; i < count; i += LANES) {  // the row is padded to whole lanes, with scores that vanish
        const f32x8 e = exp_negative(load(scores + i) - largest);
        sums += e;
        std::memcpy(scores + i, &e, sizeof e);
    }
    const float scale = 1.0f / (sum(sums) + (sink ? std::exp(*sink - largest) : 0.0f));
    for (int64_t i = 0; i < count; i++) scores[i] *= scale;
}

// out[0..WIDE * LANES) = sum over i of weights[i] * values[slots[i]], the sums held in registers throughout
template <int WIDE, typename T>
void mix(const float* weights, const T* values, const int64_t* slots, int64_t count, int64_t stride, T* out) {
    f32x8 sums[WIDE] = {};
    for (int64_t i = 0; i < count; i++) {
        const T* value = values + slots[i] * stride;
        for (int w = 0; w < WIDE; w++) sums[w] += weights[i] * load(value + w * LANES);
    }
    for (int w = 0; w < WIDE; w++)
        for (int lane = 0; lane < LANES; lane++) narrow(sums[w][lane], out + w * LANES + lane);
}

template <typename T>
void attend(const Shape& s, const T* query, const T* keys, const T* values, const int64_t* slots, int64_t length,
            const float* sinks, T* out, float* scores) {
    const int64_t group = s.num_heads / s.num_kv_heads, stride = s.num_kv_heads * s.head_dim, dim = s.head_dim;
    const int64_t first = s.window && length > s.window ? length - s.window : 0, count = length - first;
    const int64_t padded = (count + LANES - 1) / LANES * LANES;
    slots += first;
    for (int64_t i = 0; i < count; i++) {
        const T* key = keys + slots[i] * stride;
        for (int64_t g = 0; g < group; g++) {
            float score = dot(query + g * dim, key, dim) * float(s.scaling);
            if (s.softcap) score = std::tanh(score / float(s.softcap)) * float(s.softcap);
            scores[g * padded + i] = score;
        }
    }
    for (int64_t g = 0; g < group; g++) {
        float* row = scores + g * padded;
        std::fill(row + count, row + padded, -1e30f);
        softmax(row, count, sinks ? sinks + g : nullptr);
        int64_t k = 0;
        for (; k + 8 * LANES <= dim; k += 8 * LANES) mix<8>(row, values + k, slots, count, stride, out + g * dim + k);
        for (; k < dim; k += LANES) mix<1>(row, values + k, slots, count, stride, out + g * dim + k);
    }
}

// query, out: [rows of the step, num_heads, head_dim], of which `rows` decode; keys, values: [slots, num_kv_heads, head_dim]
template <typename T>
void run(const Shape& s, const int64_t* rows, const T* query, const T* keys, const T* values, const int64_t* slots,
         const int64_t* lengths, const float* sinks, T* out, int threads) {
    const int64_t group = s.num_heads / s.num_kv_heads, items = s.num_rows * s.num_kv_heads;
#pragma omp parallel num_threads(threads) if (items > 1)
    {
        thread_local std::vector<float> scratch;
        scratch.resize(group * (s.max_length + LANES));
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < items; item++) {
            const int64_t row = item / s.num_kv_heads, head = item % s.num_kv_heads;
            const int64_t at = (rows[row] * s.num_heads + head * group) * s.head_dim;
            attend(s, query + at, keys + head * s.head_dim, values + head * s.head_dim, slots + row * s.max_length,
                   lengths[row], sinks ? sinks + head * group : nullptr, out + at, scratch.data());
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
