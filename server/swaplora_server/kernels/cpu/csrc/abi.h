// The structures that Python fills in field by field (kernels/cpu/abi.py, which mirrors this file), and the kernels that
// call each other. `struct_bytes` in abi.cpp lets Python compare sizes when it loads the library.
#pragma once
#include <cstdint>

// How a linear's weight W [out, in] is stored and multiplied.
enum Format : int64_t {
    FP32,          // linear_fp32.cpp
    FP32_OF_BF16,  // the same arithmetic over weights that bfloat16 holds without loss
    BF16,          // linear_bf16.cpp: x rounded to bfloat16, products of pairs, sums in float32
    INT8,          // linear_int8.cpp: a byte a weight, a scale a row of W
    FOUR_BIT,      // linear_four_bit.cpp: codes of 4 bits, which `table` turns into numbers
};

struct LinearWeight {
    const void* panels;  // as the format's kernel lays them out
    const float* bias;   // [out] or null
    const float* scales; // of the quantised formats, in panels too
    const float* table;  // [16], of FOUR_BIT
    int64_t in, out, format;
    int64_t block;       // of FOUR_BIT: weights of a row that share a scale
};

struct LinearJob {
    const LinearWeight* weight;
    float* y;  // [rows, out]
};

// Memory that is read soon after a call. It is prefetched during the call, when products keep the processor busy and
// memory is idle.
struct Span {
    const void* start;
    int64_t bytes;
};

// What an adapter does to one module's output: y = (y + scale * (x A^T) B^T) * column_scale + scale * shift.
// Both factors lie as lora/panels.h says.
struct Factors {
    const void* a;              // [rank, in_features]
    const void* b;              // [out_features, rank]
    const float* column_scale;  // [out_features], or null: 1
    const float* shift;         // [out_features], or null: 0
    int64_t rank;               // 0: there are no A and B
    int32_t a_is_bf16, b_is_bf16;
    int64_t is_targeted;        // 0: nothing, and the rest is not filled in
};

// How a mixture's rows choose among its members, see lora/router.h.
struct Router {
    const float* const* prototypes;  // [modules][members]: each [in_features]
    int64_t members, top_k;
    double temperature;
    float* shares;  // null, or where what the rows take is noted: [modules][rows][members]
};

// Rows [start, stop) of a step use one adapter at `scale`, or as much of it as each takes in a mixture. Those of its
// members follow one another, in order, over the same rows.
struct Segment {
    const Factors* factors;  // by module number
    int64_t start, stop;
    double scale;
    const Router* router;  // null: of no mixture
    int64_t member;
};

// A module whose input is the x of the call.
struct LoraModule {
    int64_t number, out;
    void* y;  // [rows, out]
};

// One layer's attention, and its cache as paged_attention.cpp lays it out.
struct LayerCache {
    void* keys;
    void* values;
    const float* sinks;  // [num_heads] or null
    int64_t num_heads, num_kv_heads, head_dim, block_size;
    int64_t window;           // keys a row may look back on, itself included; 0: all
    double scaling, softcap;  // softcap 0: none
    int64_t is_bf16;          // the cache; else it is float32
    int64_t is_whole;         // runs are whole inputs, in which rows look forward as far as they look back
};

// Rows [start, stop) of the step are the tokens of one sequence from position `first` on.
struct Run {
    int64_t start, stop, first;
    const int64_t* blocks;  // the sequence's block table
};

enum { Q, K, V, O, GATE, UP, DOWN, NUM_LINEARS };
enum { INPUT_NORM, POST_NORM, Q_NORM, K_NORM, NUM_NORMS };

// A decoder layer of Llama's kind.
struct DecoderLayer {
    const LinearWeight* linears[NUM_LINEARS];
    int64_t numbers[NUM_LINEARS];   // of the linears, as adapters know them
    const float* norms[NUM_NORMS];  // [hidden_size], and [head_dim] or null for Q_NORM and K_NORM
    int64_t norm_numbers[NUM_NORMS];
    double eps;
    LayerCache cache;
};

// Of a LayerNorm; both [hidden_size].
struct NormWeight {
    const float *weight, *bias;
};

enum { E_Q, E_K, E_V, E_O, E_UP, E_DOWN, NUM_ENCODER_LINEARS };

// An encoder layer of BERT's kind.
struct EncoderLayer {
    const LinearWeight* linears[NUM_ENCODER_LINEARS];
    int64_t numbers[NUM_ENCODER_LINEARS];  // of the linears, as adapters know them
    NormWeight norms[2];                   // after attention, after the MLP
    int64_t norm_numbers[2];
    double eps;
    LayerCache cache;
};

enum { M_QKV, M_O, M_UP, M_DOWN, NUM_MODERN_LINEARS };

// An encoder layer of ModernBERT's kind.
struct ModernLayer {
    const LinearWeight* linears[NUM_MODERN_LINEARS];
    int64_t numbers[NUM_MODERN_LINEARS];  // of the linears, as adapters know them
    NormWeight norms[2];                  // before attention, or null: none; before the MLP. A bias may be null
    int64_t norm_numbers[2];
    double eps;
    LayerCache cache;
};

// Rows [start, stop) have modules of their adapter's own (modules_to_save) in place of the base's: by number a
// LinearWeight, a NormWeight or the weight of an RMSNorm, null where the base's is at work.
struct ReplacedRows {
    int64_t start, stop;
    const void* const* modules;
};

struct Rows {
    int64_t count;
    const Segment* segments;  // null: the base alone
    int64_t num_segments;
    const ReplacedRows* replaced;  // in the order of their rows, which do not overlap
    int64_t num_replaced;
};

struct Step {
    Rows tokens, head;
    const int64_t* logits_to_keep;  // [head.count]: the rows of `tokens` that `head` has, ascending
    int64_t hidden_size;
    float* hidden;            // [tokens, hidden_size], read and written; of the last layer those that reach the head
    const float *cos, *sin;   // [tokens, head_dim]
    const Run* runs;
    int64_t num_runs;
    int64_t threads;
    int64_t is_bf16;  // the products of the LoRA operation; else they are of float32
};

// The LoRA operation over modules that share x [rows, in]: in float32, whatever the factors are stored in, or in products
// of bfloat16, for factors that all are.
using LoraKernel = void(const Segment* segments, int64_t count, const LoraModule* modules, int64_t num_modules, int64_t in,
                        const float* x, int threads);

extern "C" {
// x: [rows, in]; each job's y: [rows, out]. All jobs of a call share x and the threads.
void linear(const float* x, int64_t rows, int64_t in, const LinearJob* jobs, int64_t count, const Span* prefetch,
            int64_t num_prefetch, int threads);
LoraKernel lora_delta_fp32, lora_delta_bf16;
void paged_attention(const LayerCache* cache, const Run* runs, int64_t num_runs, const float* query, const float* key,
                     const float* value, float* out, int threads);
}

// `linear` for jobs of one format
using LinearKernel = void(const float* x, int64_t rows, int64_t in, const LinearJob* jobs, int64_t count,
                          const Span* prefetch, int64_t num_prefetch, int threads);
LinearKernel linear_fp32, linear_bf16, linear_int8, linear_four_bit;
