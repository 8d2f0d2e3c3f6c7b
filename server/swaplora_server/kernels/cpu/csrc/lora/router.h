// Which members of a mixture a row takes, as PEFT's Arrow chooses: shares[member] = softmax(|x . prototype| / temperature)
// over the `top_k` largest, 0 for all others; of equals the first.
//
// Shapes: x [in], prototypes [members][in], shares [members], all float32, whatever the products of the factors are of.
// One row at a time and sums in one order, so a row's shares depend on nothing beside it.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>
#include "abi.h"
#include "vec.h"

inline float likeness(const float* x, const float* prototype, int64_t in) {
    constexpr int CHAINS = 4;
    floats sums[CHAINS] = {};
    int64_t k = 0;
    for (; k + CHAINS * LANES <= in; k += CHAINS * LANES)
#pragma GCC unroll 4
        for (int c = 0; c < CHAINS; c++) sums[c] = mul_add(load(x + k + c * LANES), load(prototype + k + c * LANES), sums[c]);
    for (; k + LANES <= in; k += LANES) sums[0] = mul_add(load(x + k), load(prototype + k), sums[0]);
    float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; k < in; k++) total = mul_add(x[k], prototype[k], total);
    return std::fabs(total);
}

inline void share_row(const Router& router, int64_t module, const float* x, int64_t in, float* shares) {
    thread_local std::vector<float> likenesses;
    const float* const* prototypes = router.prototypes + module * router.members;
    likenesses.resize(router.members);
    for (int64_t m = 0; m < router.members; m++) likenesses[m] = likeness(x, prototypes[m], in);
    const float most = *std::max_element(likenesses.begin(), likenesses.end());
    float total = 0.0f;
    for (int64_t m = 0; m < router.members; m++) {
        int64_t before = 0;
        for (int64_t other = 0; other < router.members; other++)
            before += likenesses[other] > likenesses[m] || (likenesses[other] == likenesses[m] && other < m);
        shares[m] = before < router.top_k ? std::exp((likenesses[m] - most) / float(router.temperature)) : 0.0f;
        total += shares[m];
    }
    for (int64_t m = 0; m < router.members; m++) shares[m] /= total;
}
