// The arguments of packed_linear.cpp, filled in from Python field by field (kernels/cpu/linear.py), and by other kernels.
#pragma once
#include <cstdint>

struct LinearWeight {
    const void* panels;  // as `pack` wrote them
    const float* bias;   // [out] or null
    int64_t out;
    int64_t is_bf16;
};

// Memory that is read soon after a call. It is prefetched during the call, when products keep the processor busy and
// memory is idle.
struct Span {
    const void* start;
    int64_t bytes;
};

struct LinearJob {
    const LinearWeight* weight;
    float* y;  // [rows, out]
};
