// What kernels have in common that compute all layers of a model over one packed step: buffers, rows divided among
// threads, linears with what adapters add to them, modules that adapters have in place of the base's.
#pragma once
#include <algorithm>
#include <initializer_list>
#include <omp.h>
#include <vector>
#include "abi.h"
#include "vec.h"

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

// rope: rotary positions as Llama's code has them, dimension i rotated with dimension i + half
inline void rope_row(float* head, const float* cos, const float* sin, int64_t head_dim) {
    const int64_t half = head_dim / 2;
    for (int64_t i = 0; i < half; i++) {
        const float low = head[i], high = head[i + half];
        head[i] = low * cos[i] - high * sin[i];
        head[i + half] = high * cos[i + half] + low * sin[i + half];
    }
}

// The layers' common half. `Layer` has `linears` and their `numbers`.
template <typename Layer>
struct FusedPass {
    static constexpr int64_t THREADED = 1 << 13;  // numbers below which a second thread costs more than it saves
    // Rows for which adapters are prefetched during the base's products: with fewer, these wait for memory themselves,
    // and with more, an adapter's many rows hide it.
    static constexpr int64_t FEWEST_PREFETCHED = 4, MOST_PREFETCHED = 64;

    const Step& s;
    std::vector<Span>& prefetch;

    template <typename Work>
    void each_row(int64_t start, int64_t stop, int64_t width, Work work) const {
#pragma omp parallel for num_threads(s.threads) if ((stop - start) * width >= THREADED) schedule(static)
        for (int64_t row = start; row < stop; row++) work(row);
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

    // linears that share their input, and what adapters add to each
    template <int... L>
    void linears(const Layer& l, const Rows& rows, const float* x, int64_t in, std::initializer_list<float*> ys) const {
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

  private:
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
};
