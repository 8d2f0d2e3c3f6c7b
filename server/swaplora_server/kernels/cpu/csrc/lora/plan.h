// What one call of the LoRA operation (SGMV, BGMV; Punica) does, in pieces that threads take in any order:
//   y[rows] = (y[rows] + scale * (x[rows] A^T) B^T) * column_scale + scale * shift,   segment by segment,
// and in a mixture each row of x A^T times the row's share of that member (lora/router.h).
//
// First, where there are mixtures, "route", then "shrink", x A^T, then "expand", the rest, in pieces of some rows by some panels or slices of the sum; each
// adapter's factors are read once. The order of every sum is fixed by the shapes of the factors alone, so a row's result
// does not depend on the other rows of the step, nor on how many threads run. How a piece is computed is a `Kernel`'s.
#pragma once
#include <algorithm>
#include <omp.h>
#include <vector>
#include "abi.h"
#include "lora/panels.h"
#include "lora/router.h"

constexpr int64_t SLICE = 384;         // inputs at most that are summed before their sum is added to the others'
constexpr int64_t SLICE_UNIT = 32;     // slices are whole numbers of these, but for the last
constexpr int64_t PIECE = 4 * COLUMNS; // outputs of a module that one thread takes when there are few segments
constexpr int64_t THREADED = 1 << 15;  // multiply-adds below which a second thread costs more than it saves

inline int64_t num_slices(int64_t in) { return std::max<int64_t>(1, (in + SLICE - 1) / SLICE); }

// where slice `i` of the inputs starts: slices are of one length but for the last
inline int64_t slice_start(int64_t in, int64_t i) {
    const int64_t count = num_slices(in), length = (in + count - 1) / count;
    return std::min(in, i * ((length + SLICE_UNIT - 1) / SLICE_UNIT * SLICE_UNIT));
}

// What becomes of y once the sum over the ranks is known: (y + scale * sum) * column_scale + scale * shift
struct Finish {
    const float *column_scale, *shift;  // [out], or null
    float scale;

    // outputs [c, c + count) of one row
    void row(const float* sums, int64_t c, int64_t count, float* y) const {
        const float *const scales = column_scale + c, *const shifts = shift + c;
        int64_t i = 0;
        for (y += c; i + LANES <= count; i += LANES) {
            floats to = mul_add(splat(scale), load(sums + i), load(y + i));
            if (column_scale) to *= load(scales + i);
            if (shift) to = mul_add(splat(scale), load(shifts + i), to);
            store(to, y + i);
        }
        for (; i < count; i++) {
            y[i] = mul_add(scale, sums[i], y[i]);
            if (column_scale) y[i] *= scales[i];
            if (shift) y[i] = mul_add(scale, shifts[i], y[i]);
        }
    }
};

// One segment seen from one module.
struct Pair {
    const Segment* segment;
    const Factors* factors;
    int64_t shrunk;  // where [slices][rows][stride] of it start; in the end the first slice is the sum of all
    int64_t shares;  // where [rows][members] of its mixture start

    int64_t rows() const { return segment->stop - segment->start; }
    int64_t stride() const { return (factors->rank + RANKS - 1) / RANKS * RANKS; }
    Finish finish() const { return {factors->column_scale, factors->shift, float(segment->scale)}; }
};

// Rows [start, stop) of a step, which are a mixture's, at one module.
struct Routing {
    const Segment* segment;  // its first member's
    int64_t module, start, stop;
    int64_t shares;  // where [rows][members] of the segment start
};

// Rows [start, stop) of a step, slices [from, to) of the ranks of one panel.
struct Shrink {
    int64_t pair, start, stop, panel, from, to;
    int64_t group;  // of those that differ in their slices alone
};

// Rows [start, stop) of a step, outputs [from, to) of pairs that share rows, which follow one another and are one
// thread's, in order.
struct Expand {
    const LoraModule* module;
    int64_t first, last;  // pairs
    int64_t start, stop, from, to;

    // the rows that a pair has among these
    int64_t start_of(const Pair& pair) const { return std::max(start, pair.segment->start); }
    int64_t stop_of(const Pair& pair) const { return std::min(stop, pair.segment->stop); }
};

// A `Kernel` has STRIP, the rows of a segment that one thread takes; `Thread`, what each thread sets up; and
//   static void shrink(const Shrink&, const Pair&, const float* x, int64_t in, float* shrunk);
//   static void expand(const Expand&, const Pair&, const float* shrunk);
template <typename Kernel>
struct Plan {
    std::vector<Pair> pairs;
    std::vector<Routing> routings;
    std::vector<Shrink> shrinks;
    std::vector<Expand> expands;
    std::vector<int64_t> missing;  // slices of a group that are not summed yet
    std::vector<CacheLine> memory;
    int64_t work;  // multiply-adds

    void make(const Segment* segments, int64_t count, const LoraModule* modules, int64_t num_modules, int64_t in, int threads) {
        pairs.clear(), routings.clear(), shrinks.clear(), expands.clear(), missing.clear();
        work = 0;
        const bool are_few = count * num_modules < 4 * threads;
        int64_t size = 0;
        for (const LoraModule* module = modules; module < modules + num_modules; module++)
            add(segments, count, *module, in, are_few, &size);
        if (int64_t(memory.size()) < lines(size)) memory.resize(lines(size));
    }

    void route(int64_t i, const float* x, int64_t in) {
        const Routing& piece = routings[i];
        const Segment& segment = *piece.segment;
        const Router& router = *segment.router;
        for (int64_t row = piece.start; row < piece.stop; row++) {
            float* shares = memory.data()->floats + piece.shares + (row - segment.start) * router.members;
            share_row(router, piece.module, x + row * in, in, shares);
            const int64_t noted = piece.module * (segment.stop - segment.start) + row - segment.start;
            if (router.shares) std::copy_n(shares, router.members, router.shares + noted * router.members);
        }
    }

    void shrink(int64_t i, const float* x, int64_t in) {
        const Shrink& piece = shrinks[i];
        const Pair& pair = pairs[piece.pair];
        float* shrunk = memory.data()->floats + pair.shrunk;
        Kernel::shrink(piece, pair, x, in, shrunk);
        const int64_t left = __atomic_sub_fetch(&missing[piece.group], piece.to - piece.from, __ATOMIC_ACQ_REL);
        if (left != 0) return;
        add_slices(piece, pair, num_slices(in), shrunk);
        if (pair.segment->router) take_shares(piece, pair, memory.data()->floats + pair.shares, shrunk);
    }

    void expand(int64_t i) const {
        const Expand& piece = expands[i];
        for (const Pair* pair = &pairs[piece.first]; pair < pairs.data() + piece.last; pair++)
            Kernel::expand(piece, *pair, memory.data()->floats + pair->shrunk);
    }

  private:
    // the slices of one group added to its first one, in order
    static void add_slices(const Shrink& p, const Pair& pair, int64_t slices, float* all) {
        const int64_t stride = pair.stride(), slice = pair.rows() * stride;
        for (int64_t row = p.start; row < p.stop; row++)
            for (int64_t c = p.panel; c < p.panel + RANKS; c += LANES) {
                float* to = all + (row - pair.segment->start) * stride + c;
                floats total = load(to);
                for (int64_t i = 1; i < slices; i++) total += load(to + i * slice);
                store(total, to);
            }
    }

    // each row times its share of the pair's member
    static void take_shares(const Shrink& p, const Pair& pair, const float* shares, float* shrunk) {
        const Segment& segment = *pair.segment;
        for (int64_t row = p.start - segment.start; row < p.stop - segment.start; row++)
            for (int64_t c = p.panel; c < p.panel + RANKS; c += LANES) {
                float* to = shrunk + row * pair.stride() + c;
                store(load(to) * splat(shares[row * segment.router->members + segment.member]), to);
            }
    }

    void add(const Segment* segments, int64_t count, const LoraModule& module, int64_t in, bool are_few, int64_t* size) {
        int64_t first = pairs.size(), start = 0, reached = 0;  // the chain's first pair, and the rows that it spans
        int64_t shares = 0;                                    // of the mixture whose members follow
        const auto end_chain = [&] {
            if (first < int64_t(pairs.size())) cut_expand({&module, first, int64_t(pairs.size()), start, reached, 0, module.out}, are_few);
            first = pairs.size(), start = reached;
        };
        for (const Segment* s = segments; s < segments + count; s++) {
            const Factors* factors = s->factors + module.number;
            if (!factors->is_targeted) continue;
            if (s->start >= reached) end_chain(), start = s->start;
            reached = std::max(reached, s->stop);
            if (s->router && s->member == 0) shares = cut_routing(*s, module.number, in, size);
            const Pair pair = {s, factors, *size, shares};
            cut_shrink(pair, num_slices(in), are_few);
            pairs.push_back(pair);
            *size += num_slices(in) * pair.rows() * pair.stride();
            work += factors->rank * pair.rows() * (in + module.out);
        }
        end_chain();
    }

    // where the shares of its rows will be
    int64_t cut_routing(const Segment& segment, int64_t module, int64_t in, int64_t* size) {
        const int64_t rows = segment.stop - segment.start, shares = *size;
        for (int64_t row = segment.start; row < segment.stop; row += Kernel::STRIP)
            routings.push_back({&segment, module, row, std::min(row + Kernel::STRIP, segment.stop), shares});
        *size += lines(rows * segment.router->members) * 16;
        work += rows * segment.router->members * in;
        return shares;
    }

    void cut_shrink(const Pair& pair, int64_t slices, bool are_few) {
        const int64_t at_a_time = are_few ? 1 : slices;
        for (int64_t row = pair.segment->start; row < pair.segment->stop; row += Kernel::STRIP)
            for (int64_t panel = 0; panel < pair.factors->rank; panel += RANKS) {
                for (int64_t i = 0; i < slices; i += at_a_time)
                    shrinks.push_back({int64_t(pairs.size()), row, std::min(row + Kernel::STRIP, pair.segment->stop), panel, i,
                                       i + at_a_time, int64_t(missing.size())});
                missing.push_back(slices);
            }
    }

    void cut_expand(const Expand& whole, bool are_few) {
        const int64_t columns = are_few ? PIECE : whole.to;
        for (int64_t row = whole.start; row < whole.stop; row += Kernel::STRIP)
            for (int64_t c = 0; c < whole.to; c += columns)
                expands.push_back({whole.module, whole.first, whole.last, row, std::min(row + Kernel::STRIP, whole.stop), c,
                                   std::min(c + columns, whole.to)});
    }
};

template <typename Kernel>
void run_lora(const Segment* segments, int64_t count, const LoraModule* modules, int64_t num_modules, int64_t in, const float* x,
              int threads) {
    thread_local Plan<Kernel> mine;
    Plan<Kernel>& plan = mine;  // the threads of the team see the caller's, not their own
    plan.make(segments, count, modules, num_modules, in, threads);
    const int64_t num_routings = plan.routings.size(), num_shrinks = plan.shrinks.size(), num_expands = plan.expands.size();
    const int64_t share = std::max<int64_t>(1, num_shrinks / (8 * threads));
#pragma omp parallel num_threads(threads) if (plan.work >= THREADED)
    {
        [[maybe_unused]] const typename Kernel::Thread thread;
        if (num_routings > 0) {
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < num_routings; i++) plan.route(i, x, in);
        }
#pragma omp for schedule(dynamic, share)
        for (int64_t i = 0; i < num_shrinks; i++) plan.shrink(i, x, in);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < num_expands; i++) plan.expand(i);
    }
}
