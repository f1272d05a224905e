// bfloat16 in 12 bits without loss: steps of few rows wait for their weights, and a quarter less to read makes them faster
// (1.30 times at 1 row, 1.25 at 8; at 16, bound by arithmetic, 0.98).
//
// Of the 16 bits, sign and mantissa are noise, but the 8 of the exponent take few values: in a panel 15 of them and 0
// are given codes of 4 bits. The few weights with another exponent stand as 0 and are multiplied apart, last (Rest).
// A panel is [64 bytes: the 16 exponents, in their place in a bfloat16, twice][width / 4][192 bytes]. These 192 hold
// four vectors of 16 rows by 2 neighbouring inputs: rows 0-15 and 16-31 for the first two inputs, then for the others.
// Line 0 has sign and mantissa of the first vector where a bfloat16 has them, those of the second in the bits between,
// line 1 those of the third and fourth, and line 2 four codes in each 16 bits, the first vector's lowest.
// inference/native/compact.py writes this.
#pragma once
#include "vector.h"

// A weight that is multiplied apart: a step in which all others are 0.
struct Rest {
    int32_t step, row;  // row: of its panel
    uint32_t pair;      // the weight and, in the other half, 0
    __m512i of_rows(int first) const {  // the step's vector of 16 rows
        return _mm512_maskz_set1_epi32(row >= first && row < first + 16 ? 1 << (row - first) : 0, (int)pair);
    }
};

constexpr long compact_bytes(long width) { return 64 + width / 4 * 192; }  // of a panel

struct Exponents {  // of a panel
    __m512i table;
    explicit Exponents(const char *panel) : table(_mm512_load_si512(panel)) {}
    // A vector of bfloat16: sign and mantissa from `bits`, exponents by the lowest 4 bits of `codes` (5 count; hence twice).
    __m512i join(__m512i bits, __m512i codes) const {
        return _mm512_ternarylogic_epi32(_mm512_set1_epi16((short)0x807f), bits, _mm512_permutexvar_epi16(codes, table), 0xca);
    }
    // The four vectors of 192 bytes.
    void unpack(const char *from, __m512i (&to)[4]) const {
        const __m512i swap = _mm512_set4_epi32(0x0e0f0c0d, 0x0a0b0809, 0x06070405, 0x02030001);  // bytes of each 16 bits
        const __m512i codes = _mm512_load_si512(from + 128);
        for (int i = 0; i < 2; i++) {
            const __m512i bits = _mm512_load_si512(from + 64 * i);
            to[2 * i] = join(bits, _mm512_srli_epi16(codes, 8 * i));
            to[2 * i + 1] = join(_mm512_shuffle_epi8(bits, swap), _mm512_srli_epi16(codes, 8 * i + 4));
        }
    }
};
