// What packed_linear.cpp offers to native code; filled in from Python, field by field.
#pragma once
#include <cstdint>

struct LinearWeight {
    const void* panels;  // as `pack` wrote them
    const float* bias;   // [out] or null
    int64_t out;
    int64_t is_bf16;
};

struct LinearJob {
    const LinearWeight* weight;
    float* y;  // [rows, out]
};
