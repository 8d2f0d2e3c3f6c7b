// All decoder layers of a model of Llama's kind (Llama, Mistral, Qwen2, Qwen3) fused, over one packed step in one call.
//
// Equation, per layer:  h += o(attention(rope(qk_norm(q(n))), rope(qk_norm(k(n))), v(n)))  with n = RMSNorm(h),
//                       h += down(SiLU(gate(n)) * up(n))                                     with n = RMSNorm(h).
// Shapes: h [tokens, hidden_size], float32, read and written; q [tokens, num_heads * head_dim], k and v
// [tokens, num_kv_heads * head_dim] (GQA); cos, sin [tokens, head_dim]. The last layer's second half is computed for the
// rows in `logits_to_keep` alone, which reach the output head: of a prompt, one.
// Layout: linears, LoRA deltas and the KV cache are those of the kernels that serve every other model too (abi.h).
// Threads: each kernel divides its own work; norms, rope, SiLU and residuals are divided by rows, worked off one by one,
// so a row's result does not depend on its neighbours. One call at a time a thread: its buffers are the thread's.
#include <cmath>
#include "fused.h"

namespace {

// RMSNorm: to = from / rms(from) * weight; `to` may be `from`
void rms_norm_row(const float* from, const float* weight, int64_t width, double eps, float* to) {
    floats squares = {};
    const int64_t whole = width - width % LANES;
    for (int64_t i = 0; i < whole; i += LANES) squares = mul_add(load(from + i), load(from + i), squares);
    float total = sum(squares);
    for (int64_t i = whole; i < width; i++) total = mul_add(from[i], from[i], total);
    const float scale = 1.0f / std::sqrt(total / float(width) + float(eps));
    for (int64_t i = 0; i < width; i++) to[i] = from[i] * scale * weight[i];
}

floats silu(floats x) {
    const floats zero = {}, one = zero + 1.0f;
    const floats e = exp_negative(x < zero ? x : -x);  // of -|x|, which cannot overflow
    return x * (x < zero ? e : one) / (one + e);
}

// gate = silu(gate) * up; the last few are worked off among lanes that nobody reads
void silu_and_mul_row(float* gate, const float* up, int64_t width) {
    for (int64_t i = 0; i < width; i += LANES) {
        float g[LANES] = {}, u[LANES] = {};
        const int64_t count = std::min<int64_t>(LANES, width - i);
        if (count == LANES) {
            store(silu(load(gate + i)) * load(up + i), gate + i);
            continue;
        }
        std::memcpy(g, gate + i, count * sizeof(float));
        std::memcpy(u, up + i, count * sizeof(float));
        store(silu(load(g)) * load(u), g);
        std::memcpy(gate + i, g, count * sizeof(float));
    }
}

struct Pass : FusedPass<DecoderLayer> {
    float *normed, *query, *key, *value, *attended, *gate, *up, *delta;

    Pass(const Step& s, const DecoderLayer& like, Buffers& buffers) : FusedPass{s, buffers.prefetch} {
        const auto width = [&](int linear) { return like.linears[linear]->out; };
        const int64_t rows = s.tokens.count;
        buffers.reset(rows * (2 * s.hidden_size + 2 * width(Q) + width(K) + width(V) + width(GATE) + width(UP)), 8);
        normed = buffers.take(rows * s.hidden_size);
        delta = buffers.take(rows * s.hidden_size);
        query = buffers.take(rows * width(Q));
        attended = buffers.take(rows * width(Q));
        key = buffers.take(rows * width(K));
        value = buffers.take(rows * width(V));
        gate = buffers.take(rows * width(GATE));
        up = buffers.take(rows * width(UP));
    }

    void layer(const DecoderLayer& l, bool is_last) const {
        norm(l, s.tokens, INPUT_NORM);
        linears<Q, K, V>(l, s.tokens, normed, s.hidden_size, {query, key, value});
        rope(l);
        paged_attention(&l.cache, s.runs, s.num_runs, query, key, value, attended, int(s.threads));
        if (!is_last) return finish(l, s.tokens);
        for (int64_t i = 0; i < s.head.count; i++) {
            move_row(attended, l.linears[Q]->out, s.logits_to_keep[i], i);
            move_row(s.hidden, s.hidden_size, s.logits_to_keep[i], i);
        }
        finish(l, s.head);
        for (int64_t i = s.head.count; i-- > 0;) move_row(s.hidden, s.hidden_size, i, s.logits_to_keep[i]);
    }

  private:
    // what follows attention
    void finish(const DecoderLayer& l, const Rows& rows) const {
        linears<O>(l, rows, attended, l.linears[Q]->out, {delta});
        add_delta(rows);
        norm(l, rows, POST_NORM);
        linears<GATE, UP>(l, rows, normed, s.hidden_size, {gate, up});
        const int64_t inner = l.linears[GATE]->out;
        each_row(0, rows.count, inner, [&](int64_t row) { silu_and_mul_row(gate + row * inner, up + row * inner, inner); });
        linears<DOWN>(l, rows, gate, inner, {delta});
        add_delta(rows);
    }

    static void move_row(float* rows, int64_t width, int64_t from, int64_t to) {
        std::memmove(rows + to * width, rows + from * width, width * sizeof(float));
    }

    void norm(const DecoderLayer& l, const Rows& rows, int which) const {
        const int64_t width = s.hidden_size;
        each_run(rows, [&](int64_t start, int64_t stop, const ReplacedRows* own) {
            const float* weight = module_of(own, l.norm_numbers[which], l.norms[which]);
            each_row(start, stop, width, [&](int64_t row) {
                rms_norm_row(s.hidden + row * width, weight, width, l.eps, normed + row * width);
            });
        });
    }

    void add_delta(const Rows& rows) const {
        const int64_t width = s.hidden_size;
        each_row(0, rows.count, width, [&](int64_t row) {
            for (int64_t i = row * width; i < (row + 1) * width; i++) s.hidden[i] += delta[i];
        });
    }

    // queries and keys are normed where the model does, and rotated to their positions
    void rope(const DecoderLayer& l) const {
        const int64_t dim = l.cache.head_dim;
        const auto heads = [&](float* rows, int64_t num_heads, const float* weight, int64_t row) {
            for (float* head = rows + row * num_heads * dim; head < rows + (row + 1) * num_heads * dim; head += dim) {
                if (weight) rms_norm_row(head, weight, dim, l.eps, head);
                rope_row(head, s.cos + row * dim, s.sin + row * dim, dim);
            }
        };
        each_run(s.tokens, [&](int64_t start, int64_t stop, const ReplacedRows* own) {
            const float* q_norm = module_of(own, l.norm_numbers[Q_NORM], l.norms[Q_NORM]);
            const float* k_norm = module_of(own, l.norm_numbers[K_NORM], l.norms[K_NORM]);
            each_row(start, stop, l.linears[Q]->out, [&](int64_t row) {
                heads(query, l.cache.num_heads, q_norm, row);
                heads(key, l.cache.num_kv_heads, k_norm, row);
            });
        });
    }
};

}  // namespace

extern "C" void decode(const DecoderLayer* layers, int64_t num_layers, const Step* step) {
    thread_local Buffers buffers;
    const Pass pass(*step, layers[0], buffers);
    for (int64_t i = 0; i < num_layers; i++) pass.layer(layers[i], i + 1 == num_layers);
}
