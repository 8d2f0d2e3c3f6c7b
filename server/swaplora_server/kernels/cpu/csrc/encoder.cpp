// All encoder layers of a model of BERT's kind (BERT, RoBERTa, XLM-R, DistilBERT) fused, over one packed step in one call.
//
// Equation, per layer:  h = LayerNorm(h + o(attention(q(h), k(h), v(h)))),  h = LayerNorm(h + down(GELU(up(h)))).
// Shapes: h [tokens, hidden_size], float32, read and written; q, k, v [tokens, num_heads * head_dim].
// Layout, threads: as in decoder.cpp; norms and GELU are divided by rows, worked off one by one, so a row's result does not
// depend on its neighbours.
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

// h = LayerNorm(h + delta)
void add_and_norm_row(float* h, const float* delta, const NormWeight& norm, int64_t width, double eps) {
    const int64_t whole = width - width % LANES;
    floats sums = {};
    float total = 0.0f;
    for (int64_t i = 0; i < whole; i += LANES) {
        const floats both = load(h + i) + load(delta + i);
        store(both, h + i);
        sums += both;
    }
    for (int64_t i = whole; i < width; i++) total += h[i] += delta[i];
    const float mean = (total + sum(sums)) / float(width);
    floats squares = {};
    float rest = 0.0f;
    for (int64_t i = 0; i < whole; i += LANES) {
        const floats off = load(h + i) - mean;
        squares = mul_add(off, off, squares);
    }
    for (int64_t i = whole; i < width; i++) rest = mul_add(h[i] - mean, h[i] - mean, rest);
    const float scale = 1.0f / std::sqrt((rest + sum(squares)) / float(width) + float(eps));
    for (int64_t i = 0; i < whole; i += LANES)
        store(mul_add((load(h + i) - mean) * scale, load(norm.weight + i), load(norm.bias + i)), h + i);
    for (int64_t i = whole; i < width; i++) h[i] = mul_add((h[i] - mean) * scale, norm.weight[i], norm.bias[i]);
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
                add_and_norm_row(s.hidden + row * width, delta + row * width, *norm, width, l.eps);
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
