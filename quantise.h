/* quantise.h - weights of one byte (--weights): a row of a matrix (an output) is code * scale, the codes int8 or e4m3 (one sign bit, four of
 * exponent, three of fraction), the scale that which makes the row's largest weight the largest code. The CPU engine and the kernels
 * share it, so both round to the same numbers.
 */
#ifndef QUANTISE_H
#define QUANTISE_H

#include "nla.h"

#include <math.h>
#include <string.h>

#ifdef __CUDACC__
#define ANYWHERE __host__ __device__ static inline
#else
#define ANYWHERE static inline
#endif

ANYWHERE float largest_code(WeightFormat format) { return format == WEIGHTS_INT8 ? 127.0f : 448.0f; }

/* The code nearest to x, ties to even; |x| is at most largest_code, give or take a rounding. */
ANYWHERE uint8_t code_of(float x, WeightFormat format) {
    uint32_t bits, sign;
    float size = fabsf(x);
    if (format == WEIGHTS_INT8) {
        return (uint8_t)(int8_t)rintf(x);
    }
    memcpy(&bits, &x, sizeof bits);
    sign = bits >> 24 & 0x80;
    if (size < 0.015625f) { /* below 2^-6, the least normal number: multiples of 2^-9; the eighth of them is 2^-6 itself */
        return (uint8_t)(sign | (uint32_t)rintf(size * 512.0f));
    }
    bits = (bits & 0x7fffffff) + 0x7ffff + (bits >> 20 & 1); /* 3 of 23 bits of fraction stay */
    return (uint8_t)(sign | ((bits >> 20) - (120 << 3)));     /* exponents are counted from 7 there, from 127 here */
}

ANYWHERE float number_of(uint8_t code, WeightFormat format) {
    uint32_t bits = (uint32_t)(code & 0x7f) << 20;
    float x;
    if (format == WEIGHTS_INT8) {
        return (float)(int8_t)code;
    }
    memcpy(&x, &bits, sizeof x);
    x *= 0x1p120f;
    return code & 0x80 ? -x : x;
}

/* What a row whose largest weight is `largest` is multiplied by to give codes; its inverse is the scale. */
ANYWHERE float to_codes(float largest, WeightFormat format) { return largest > 0 ? largest_code(format) / largest : 0.0f; }
ANYWHERE float from_codes(float largest, WeightFormat format) { return largest / largest_code(format); }

#endif
