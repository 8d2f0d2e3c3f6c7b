// The arguments of paged_attention.cpp, filled in from Python field by field (kernels/cpu/attention.py).
#pragma once
#include <cstdint>

// One layer's attention. Its cache is `keys` [blocks, num_kv_heads, head_dim, block_size], so that the keys of a block
// lie side by side for every dimension, and `values` [blocks, num_kv_heads, block_size, head_dim].
struct LayerCache {
    void* keys;
    void* values;
    const float* sinks;  // [num_heads] or null
    int64_t num_heads, num_kv_heads, head_dim, block_size;
    int64_t window;           // keys a row may look back on, itself included; 0: all
    double scaling, softcap;  // softcap 0: none
};

// Rows [start, stop) of the step are the tokens of one sequence from position `first` on.
struct Run {
    int64_t start, stop, first;
    const int64_t* blocks;  // the sequence's block table
};
