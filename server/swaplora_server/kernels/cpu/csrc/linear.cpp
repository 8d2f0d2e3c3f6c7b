// The one linear that all others call:  y = x W^T + b, by the kernel of each weight's format.
//
// Several linears that share x (q, k, v; gate, up) go in one call. Neighbours of one format go to its kernel together.
#include "abi.h"
#include "team/cores.h"

namespace {

constexpr int64_t SHARED = 1 << 16;  // multiply-adds from which on a team shares them

LinearKernel* kernel_of(const LinearJob& job) {
    switch (job.weight->format) {
        case BF16: return linear_bf16;
        case INT8: return linear_int8;
        case FOUR_BIT: return linear_four_bit;
        default: return linear_fp32;
    }
}

}  // namespace

extern "C" void linear(const float* x, int64_t rows, int64_t in, const LinearJob* jobs, int64_t count, const Span* prefetch,
                       int64_t num_prefetch, int threads) {
    if (rows * in * jobs->weight->out >= SHARED) keep_apart(threads);
    for (const LinearJob *job = jobs, *end = jobs + count; job < end;) {
        LinearKernel* kernel = kernel_of(*job);
        const LinearJob* next = job + 1;
        while (next < end && kernel_of(*next) == kernel) next++;
        kernel(x, rows, in, job, next - job, prefetch, num_prefetch, threads);
        job = next, num_prefetch = 0;
    }
}
