// What lora_delta.cpp offers to native code; filled in from Python, field by field.
#pragma once
#include <cstdint>

// An adapter's factors of one module; `a` null: it does not target the module.
struct Factors {
    const void* a;    // [rank, in_features]
    const void* b_t;  // [rank, out_features]: B transposed
    int64_t rank;
    int32_t a_is_bf16, b_is_bf16;
};

// Rows [start, stop) of a step add `scale` times the delta of one adapter.
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
