// bfloat16 in 12 bits without loss: steps of few rows wait for their weights, and a quarter less to read makes them faster
// (1.30 times at 1 row, 1.25 at 8).
//
// Of the 16 bits, the low byte is noise (the last bit of the exponent, and the mantissa), but the high one, the sign and the
// rest of the exponent, takes few values: in a panel 15 of them and 0 are given codes of 4 bits. The few weights with
// another one stand as 0 and are multiplied apart, last (Rest).
// A panel is [64 bytes: the 16 high bytes, four times][width / 4][192 bytes]. These 192 hold four vectors of 16 rows by 2
// neighbouring inputs: rows 0-15 and 16-31 for the first two inputs, then for the others. Line 0 has the low bytes of the
// first two vectors, by turns 8 of each, line 1 those of the others, and line 2 the codes in the same order, line 0's in the
// lower 4 bits. inference/native/compact.py writes this.
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

struct HighBytes {  // of a panel
    __m512i table;
    explicit HighBytes(const char *panel) : table(_mm512_load_si512(panel)) {}
    // High bytes by the lowest 4 bits of each byte of `codes`.
    __m512i find(__m512i codes) const {
#ifdef __AVX512VBMI__
        return _mm512_permutexvar_epi8(codes, table);  // by 6 bits, hence the table four times
#else
        return _mm512_shuffle_epi8(table, _mm512_and_si512(codes, _mm512_set1_epi8(15)));
#endif
    }
    // The four vectors of 192 bytes.
    void unpack(const char *from, __m512i (&to)[4]) const {
        const __m512i codes = _mm512_load_si512(from + 128);
        for (int i = 0; i < 2; i++) {
            const __m512i low = _mm512_load_si512(from + 64 * i), high = find(i ? _mm512_srli_epi16(codes, 4) : codes);
            to[2 * i] = _mm512_unpacklo_epi8(low, high), to[2 * i + 1] = _mm512_unpackhi_epi8(low, high);
        }
    }
};
