// All encoder layers of a model of BERT's kind (BERT, RoBERTa, XLM-R, DistilBERT) fused, over one packed step in one call,
// and a layer of ModernBERT's kind in one.
//
// Equation, per layer:  h = LayerNorm(h + o(attention(q(h), k(h), v(h)))),  h = LayerNorm(h + down(GELU(up(h)))).
// ModernBERT's:         h += o(attention(rope(q), rope(k), v))  with q, k, v = qkv(LayerNorm(h)),
//                       h += down(GELU(a) * b)                  with a, b = up(LayerNorm(h)).
// Shapes: h [tokens, hidden_size], float32, read and written; q, k, v [tokens, num_heads * head_dim]; cos, sin
// [tokens, head_dim].
// Layout, threads: as in decoder.cpp; norms, rope and GELU are divided by rows, worked off one by one, so a row's result does
// not depend on its neighbours.
#include <cmath>
#include "fused.h"

namespace {

// y = GELU(x) = x / 2 (1 + erf(x / sqrt 2)); erf by Abramowitz and Stegun 7.1.26, to 1.5e-7
floats gelu(floats x) {
    const floats zero = {}, size = (x < zero ? -x : x) * 0.707106781f, t = 1.0f / mul_add(size, splat(0.3275911f), splat(1.0f));
    floats p = zero + 1.061405429f;
    p = mul_add(p, t, splat(-1.453152027f));
    p = mul_add(p, t, splat(1.421413741f));
    p = mul_add(p, t, splat(-0.284496736f));
    p = mul_add(p, t, splat(0.254829592f));
    const floats rest = p * t * exp_negative(-size * size), half = x * 0.5f;  // rest = 1 - erf(size)
    return half * (x < zero ? rest : 2.0f - rest);
}

void gelu_row(float* x, int64_t width) {
    const int64_t whole = width - width % LANES;
    for (int64_t i = 0; i < whole; i += LANES) store(gelu(load(x + i)), x + i);
    if (whole == width) return;
    float last[LANES] = {};
    std::memcpy(last, x + whole, (width - whole) * sizeof(float));
    store(gelu(load(last)), last);
    std::memcpy(x + whole, last, (width - whole) * sizeof(float));
}

// to = GELU(both) * (both + width), which is [2 * width]; the last few are worked off among lanes that nobody reads
void gelu_and_mul_row(const float* both, int64_t width, float* to) {
    for (int64_t i = 0; i < width; i += LANES) {
        const int64_t count = std::min<int64_t>(LANES, width - i);
        if (count == LANES) {
            store(gelu(load(both + i)) * load(both + width + i), to + i);
            continue;
        }
        float a[LANES] = {}, b[LANES] = {};
        std::memcpy(a, both + i, count * sizeof(float));
        std::memcpy(b, both + width + i, count * sizeof(float));
        store(gelu(load(a)) * load(b), a);
        std::memcpy(to + i, a, count * sizeof(float));
    }
}

// h += delta
void add_row(float* h, const float* delta, int64_t width) {
    const int64_t whole = width - width % LANES;
    for (int64_t i = 0; i < whole; i += LANES) store(load(h + i) + load(delta + i), h + i);
    for (int64_t i = whole; i < width; i++) h[i] += delta[i];
}

// to = LayerNorm(from), without a bias if that is null; `to` may be `from`
void layer_norm_row(const float* from, const float* weight, const float* bias, int64_t width, double eps, float* to) {
    const int64_t whole = width - width % LANES;
    floats sums = {}, squares = {};
    float total = 0.0f, rest = 0.0f;
    for (int64_t i = 0; i < whole; i += LANES) sums += load(from + i);
    for (int64_t i = whole; i < width; i++) total += from[i];
    const float mean = (total + sum(sums)) / float(width);
    for (int64_t i = 0; i < whole; i += LANES) {
        const floats off = load(from + i) - mean;
        squares = mul_add(off, off, squares);
    }
    for (int64_t i = whole; i < width; i++) rest = mul_add(from[i] - mean, from[i] - mean, rest);
    const float scale = 1.0f / std::sqrt((rest + sum(squares)) / float(width) + float(eps));
    for (int64_t i = 0; i < whole; i += LANES) {
        const floats off = (load(from + i) - mean) * scale;
        store(bias ? mul_add(off, load(weight + i), load(bias + i)) : off * load(weight + i), to + i);
    }
    for (int64_t i = whole; i < width; i++) {
        const float off = (from[i] - mean) * scale;
        to[i] = bias ? mul_add(off, weight[i], bias[i]) : off * weight[i];
    }
}

struct Pass : FusedPass<EncoderLayer> {
    float *query, *key, *value, *attended, *inner, *delta;

    Pass(const Step& s, const EncoderLayer& like, Buffers& buffers) : FusedPass{s, buffers.prefetch} {
        const int64_t rows = s.tokens.count, width = like.linears[E_Q]->out;
        buffers.reset(rows * (4 * width + s.hidden_size + like.linears[E_UP]->out), 6);
        query = buffers.take(rows * width);
        key = buffers.take(rows * width);
        value = buffers.take(rows * width);
        attended = buffers.take(rows * width);
        delta = buffers.take(rows * s.hidden_size);
        inner = buffers.take(rows * like.linears[E_UP]->out);
    }

    void layer(const EncoderLayer& l) const {
        linears<E_Q, E_K, E_V>(l, s.tokens, s.hidden, s.hidden_size, {query, key, value});
        paged_attention(&l.cache, s.runs, s.num_runs, query, key, value, attended, int(s.threads));
        linears<E_O>(l, s.tokens, attended, l.linears[E_Q]->out, {delta});
        add_and_norm(l, 0);
        const int64_t width = l.linears[E_UP]->out;
        linears<E_UP>(l, s.tokens, s.hidden, s.hidden_size, {inner});
        each_row(0, s.tokens.count, width, [&](int64_t row) { gelu_row(inner + row * width, width); });
        linears<E_DOWN>(l, s.tokens, inner, width, {delta});
        add_and_norm(l, 1);
    }

  private:
    void add_and_norm(const EncoderLayer& l, int which) const {
        const int64_t width = s.hidden_size;
        each_run(s.tokens, [&](int64_t start, int64_t stop, const ReplacedRows* own) {
            const NormWeight* norm = module_of(own, l.norm_numbers[which], &l.norms[which]);
            each_row(start, stop, width, [&](int64_t row) {
                float* const h = s.hidden + row * width;
                add_row(h, delta + row * width, width);
                layer_norm_row(h, norm->weight, norm->bias, width, l.eps, h);
            });
        });
    }
};

struct ModernPass : FusedPass<ModernLayer> {
    float *normed, *qkv, *query, *key, *value, *attended, *both, *inner, *delta;

    ModernPass(const Step& s, const ModernLayer& like, Buffers& buffers) : FusedPass{s, buffers.prefetch} {
        const int64_t rows = s.tokens.count, width = like.linears[M_O]->in, inner_width = like.linears[M_DOWN]->in;
        const int64_t widest = 3 * std::max(2 * width, inner_width);
        buffers.reset(rows * (2 * s.hidden_size + widest), 3);
        normed = buffers.take(rows * s.hidden_size);
        delta = buffers.take(rows * s.hidden_size);
        // the rest is of one half of a layer alone, and inputs may be long: the halves share their memory
        qkv = attended = both = buffers.take(rows * widest);  // qkv is done with when attention begins
        query = qkv + rows * 3 * width;
        key = query + rows * width;
        value = key + rows * width;
        inner = both + rows * 2 * inner_width;
    }

    void layer(const ModernLayer& l) const {
        norm(l, 0);
        linears<M_QKV>(l, s.tokens, normed, s.hidden_size, {qkv});
        each_row(0, s.tokens.count, l.linears[M_QKV]->out, [&](int64_t row) { split_row(l, row); });
        paged_attention(&l.cache, s.runs, s.num_runs, query, key, value, attended, int(s.threads));
        linears<M_O>(l, s.tokens, attended, l.linears[M_O]->in, {delta});
        add_delta();
        norm(l, 1);
        linears<M_UP>(l, s.tokens, normed, s.hidden_size, {both});
        const int64_t width = l.linears[M_DOWN]->in;
        each_row(0, s.tokens.count, width, [&](int64_t row) {
            gelu_and_mul_row(both + row * 2 * width, width, inner + row * width);
        });
        linears<M_DOWN>(l, s.tokens, inner, width, {delta});
        add_delta();
    }

  private:
    // to queries and keys, rotated to their positions, and values
    void split_row(const ModernLayer& l, int64_t row) const {
        const int64_t dim = l.cache.head_dim, width = l.linears[M_O]->in;
        float* const to[] = {query + row * width, key + row * width, value + row * width};
        for (int i = 0; i < 3; i++) std::memcpy(to[i], qkv + (3 * row + i) * width, width * sizeof(float));
        for (int i = 0; i < 2; i++)
            for (float* head = to[i]; head < to[i] + width; head += dim) rope_row(head, s.cos + row * dim, s.sin + row * dim, dim);
    }

    void add_delta() const {
        const int64_t width = s.hidden_size;
        each_row(0, s.tokens.count, width, [&](int64_t row) { add_row(s.hidden + row * width, delta + row * width, width); });
    }

    // an adapter's own norm is a NormWeight, or without a bias its weight
    void norm(const ModernLayer& l, int which) const {
        const int64_t width = s.hidden_size;
        const NormWeight& base = l.norms[which];
        if (!base.weight) return void(std::memcpy(normed, s.hidden, s.tokens.count * width * sizeof(float)));
        each_run(s.tokens, [&](int64_t start, int64_t stop, const ReplacedRows* own) {
            const int64_t number = l.norm_numbers[which];
            const NormWeight weights =
                base.bias ? *module_of(own, number, &base) : NormWeight{module_of(own, number, base.weight), nullptr};
            each_row(start, stop, width, [&](int64_t row) {
                layer_norm_row(s.hidden + row * width, weights.weight, weights.bias, width, l.eps, normed + row * width);
            });
        });
    }
};

}  // namespace

extern "C" void encode(const EncoderLayer* layers, int64_t num_layers, const Step* step) {
    thread_local Buffers buffers;
    const Pass pass(*step, layers[0], buffers);
    for (int64_t i = 0; i < num_layers; i++) pass.layer(layers[i]);
}

extern "C" void encode_modern(const ModernLayer* layer, const Step* step) {
    thread_local Buffers buffers;
    ModernPass(*step, *layer, buffers).layer(*layer);
}
