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
#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <omp.h>
#include <vector>
#include "abi.h"
#include "vec.h"

namespace {

constexpr int64_t THREADED = 1 << 13;  // numbers below which a second thread costs more than it saves
// Rows for which adapters are prefetched during the base's products: with fewer, these wait for memory themselves,
// and with more, an adapter's many rows hide it.
constexpr int64_t FEWEST_PREFETCHED = 4, MOST_PREFETCHED = 64;

template <typename Work>
void each_row(const Step& s, int64_t start, int64_t stop, int64_t width, Work work) {
#pragma omp parallel for num_threads(s.threads) if ((stop - start) * width >= THREADED) schedule(static)
    for (int64_t row = start; row < stop; row++) work(row);
}

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

// rope: rotary positions as Llama's code has them, dimension i rotated with dimension i + half
void rope_row(float* head, const float* cos, const float* sin, int64_t head_dim) {
    const int64_t half = head_dim / 2;
    for (int64_t i = 0; i < half; i++) {
        const float low = head[i], high = head[i + half];
        head[i] = low * cos[i] - high * sin[i];
        head[i + half] = high * cos[i + half] + low * sin[i + half];
    }
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

// One buffer after the other, for as long as the thread lives: a step's are the last one's.
struct Buffers {
    std::vector<CacheLine> memory;
    CacheLine* at = nullptr;
    std::vector<Span> prefetch;

    // for `floats` in `count` buffers
    void reset(int64_t floats, int64_t count) {
        if (int64_t(memory.size()) < lines(floats) + count) memory.resize(lines(floats) + count);
        at = memory.data();
    }
    float* take(int64_t floats) {
        float* taken = at->floats;
        at += lines(floats);
        return taken;
    }
};

struct Pass {
    const Step& s;
    std::vector<Span>& prefetch;
    float *normed, *query, *key, *value, *attended, *gate, *up, *delta;

    Pass(const Step& s, const DecoderLayer& like, Buffers& buffers)
        : s(s), prefetch(buffers.prefetch) {
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
        each_row(s, 0, rows.count, inner, [&](int64_t row) { silu_and_mul_row(gate + row * inner, up + row * inner, inner); });
        linears<DOWN>(l, rows, gate, inner, {delta});
        add_delta(rows);
    }

    static void move_row(float* rows, int64_t width, int64_t from, int64_t to) {
        std::memmove(rows + to * width, rows + from * width, width * sizeof(float));
    }

    // linears that share their input, and what adapters add to each
    template <int... L>
    void linears(const DecoderLayer& l, const Rows& rows, const float* x, int64_t in, std::initializer_list<float*> ys) const {
        constexpr int64_t count = sizeof...(L);
        const int which[] = {L...};
        LoraModule modules[count];
        for (int i = 0; i < count; i++) modules[i] = {l.numbers[which[i]], l.linears[which[i]]->out, ys.begin()[i]};
        prefetch.clear();
        if (FEWEST_PREFETCHED <= rows.count && rows.count <= MOST_PREFETCHED) prefetch_factors(rows, modules, count, in);
        each_run(rows, [&](int64_t start, int64_t stop, const ReplacedRows* own) {
            LinearJob jobs[count];
            for (int i = 0; i < count; i++) {
                const LinearWeight* weight = module_of(own, modules[i].number, l.linears[which[i]]);
                jobs[i] = {weight, ys.begin()[i] + start * weight->out};
            }
            linear(x + start * in, stop - start, in, jobs, count, prefetch.data(), prefetch.size(), int(s.threads));
        });
        if (!rows.segments) return;
        LoraKernel* const lora = s.is_bf16 ? lora_delta_bf16 : lora_delta_fp32;
        lora(rows.segments, rows.num_segments, modules, count, in, x, int(s.threads));
    }

    // the factors that adapters have for these modules, to `prefetch`
    void prefetch_factors(const Rows& rows, const LoraModule* modules, int count, int64_t in) const {
        const auto add = [&](const void* factor, int64_t size, bool is_bf16) {
            const char* start = static_cast<const char*>(factor);
            const int64_t bytes = size * (is_bf16 ? 2 : 4);
            if (!prefetch.empty()) {  // what an adapter has for one module after the other mostly lies so
                Span& last = prefetch.back();
                const int64_t gap = start - static_cast<const char*>(last.start) - last.bytes;
                if (0 <= gap && gap < 64) return void(last.bytes += gap + bytes);
            }
            prefetch.push_back({start, bytes});
        };
        for (const Segment* segment = rows.segments; segment < rows.segments + rows.num_segments; segment++)
            for (const LoraModule* module = modules; module < modules + count; module++) {
                const Factors& f = segment->factors[module->number];
                if (!f.is_targeted) continue;
                add(f.a, f.rank * in, f.a_is_bf16);
                add(f.b, f.rank * module->out, f.b_is_bf16);
            }
    }

    void norm(const DecoderLayer& l, const Rows& rows, int which) const {
        const int64_t width = s.hidden_size;
        each_run(rows, [&](int64_t start, int64_t stop, const ReplacedRows* own) {
            const float* weight = module_of(own, l.norm_numbers[which], l.norms[which]);
            each_row(s, start, stop, width, [&](int64_t row) {
                rms_norm_row(s.hidden + row * width, weight, width, l.eps, normed + row * width);
            });
        });
    }

    // work(start, stop, own or null) for every run of rows that go through the same modules
    template <typename Work>
    void each_run(const Rows& rows, Work work) const {
        int64_t reached = 0;
        for (const ReplacedRows* own = rows.replaced; own < rows.replaced + rows.num_replaced; own++) {
            if (reached < own->start) work(reached, own->start, nullptr);
            work(own->start, own->stop, own);
            reached = own->stop;
        }
        if (reached < rows.count) work(reached, rows.count, nullptr);
    }

    template <typename Module>
    static const Module* module_of(const ReplacedRows* own, int64_t number, const Module* base) {
        const void* module = own && base ? own->modules[number] : nullptr;
        return module ? static_cast<const Module*>(module) : base;
    }

    void add_delta(const Rows& rows) const {
        const int64_t width = s.hidden_size;
        each_row(s, 0, rows.count, width, [&](int64_t row) {
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
            each_row(s, start, stop, l.linears[Q]->out, [&](int64_t row) {
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
