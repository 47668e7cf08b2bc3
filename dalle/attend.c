// One new state of each of B sequences: its key and value go into the cache, and its query attends to those it reads.
//
// For a single query torch multiplies a matrix for each head, and so reads keys and values half as fast as the memory
// gives them. Here every head is one pass over its keys and one over its values. dalle/native.py compiles this file.

#include <math.h>
#include <stdint.h>
#include <string.h>

#define ALWAYS static inline __attribute__((always_inline))

// e^x for x <= 0, to 4e-6 of itself: a power of two, and a series for what is left. C's own takes one number at a time.
// NaN stays NaN by the series, whatever its power is.
ALWAYS float exponential(float x) {
    x = x < -87 ? -87 : x;
    float power = __builtin_rintf(x * 1.442695041f), rest = x - power * 0.693147181f, series = 1;
    for (int n = 6; n > 0; n--) series = 1 + series * rest * (1.f / n);
    union { uint32_t bits; float number; } scale = {(uint32_t) ((int32_t) power + 127) << 23};
    return series * scale.number;
}

ALWAYS float product(const float *x, const float *y, int64_t D) {
    float sum = 0;
    #pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < D; j++) sum += x[j] * y[j];
    return sum;
}

ALWAYS void add(float *restrict sum, float weight, const float *restrict x, int64_t D) {
    #pragma omp simd
    for (int64_t j = 0; j < D; j++) sum[j] += weight * x[j];
}

// One head of one sequence: q and out (D,), keys and values (slots, D). It reads the slots below `first`, and then the
// `more` of them whose numbers stand in `others`; `weights` has room for all.
ALWAYS void one_head(
    const float *restrict q, const float *restrict keys, const float *restrict values, float *restrict out,
    float *restrict weights, int64_t first, const int64_t *restrict others, int64_t more, int64_t D
) {
    float scale = 1 / sqrtf(D), largest = -INFINITY, sum = 0, mixed[D];
    for (int64_t i = 0; i < first; i++) weights[i] = scale * product(q, keys + i * D, D);
    for (int64_t i = 0; i < more; i++) weights[first + i] = scale * product(q, keys + others[i] * D, D);
    #pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < first + more; i++) largest = weights[i] > largest ? weights[i] : largest;
    #pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < first + more; i++) sum += weights[i] = exponential(weights[i] - largest);
    memset(mixed, 0, sizeof mixed);
    for (int64_t i = 0; i < first; i++) add(mixed, weights[i], values + i * D, D);
    for (int64_t i = 0; i < more; i++) add(mixed, weights[first + i], values + others[i] * D, D);
    for (int64_t j = 0; j < D; j++) out[j] = mixed[j] / sum;
}

// qkv (B, 3, H, D) and out (B, H, D) are without gaps. stored is (2, B, H, slots, D), keys and then values, with `apart`
// numbers from a key to its value, `row` from a sequence to the next and `head` from a head to the next. The state's own
// key and value go into the slot `at`. What is read, see one_head.
void attend(
    const float *qkv, float *stored, float *out, int64_t B, int64_t H, int64_t D, int64_t apart, int64_t row,
    int64_t head, int64_t at, int64_t first, const int64_t *others, int64_t more
) {
    #pragma omp parallel for
    for (int64_t i = 0; i < B * H; i++) {
        const float *q = qkv + (i / H * 3 * H + i % H) * D;
        float *k = stored + i / H * row + i % H * head, *v = k + apart, *y = out + i * D, weights[first + more];
        memcpy(k + at * D, q + H * D, D * sizeof(float));
        memcpy(v + at * D, q + 2 * H * D, D * sizeof(float));
        switch (D) {  // numbers known beforehand stay in registers
            case 32: one_head(q, k, v, y, weights, first, others, more, 32); break;
            case 64: one_head(q, k, v, y, weights, first, others, more, 64); break;
            case 128: one_head(q, k, v, y, weights, first, others, more, 128); break;
            default: one_head(q, k, v, y, weights, first, others, more, D);
        }
    }
}
