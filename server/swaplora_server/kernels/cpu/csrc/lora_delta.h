// The arguments of lora_delta.cpp, filled in from Python field by field (kernels/cpu/lora.py), and by decoder.cpp.
#pragma once
#include <cstdint>

// What an adapter does to one module's output: y = (y + scale * (x A^T) B^T) * column_scale + scale * shift.
struct Factors {
    const void* a;              // [rank, in_features]
    const void* b_t;            // [rank, out_features]: B transposed
    const float* column_scale;  // [out_features], or null: 1
    const float* shift;         // [out_features], or null: 0
    int64_t rank;               // 0: there are no A and B
    int32_t a_is_bf16, b_is_bf16;
    int64_t is_targeted;        // 0: nothing, and the rest is not filled in
};

// Rows [start, stop) of a step use one adapter at `scale`.
struct Segment {
    const Factors* factors;  // by module number
    int64_t start, stop;
    double scale;
};

// A module whose input is the x of the call.
struct LoraModule {
    int64_t number, out;
    void* y;  // [rows, out]
};
