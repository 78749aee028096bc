// Tiles: the arithmetic types, packed matrices, products of 8 rows by 48 lanes, and storing them packed or turned.
//
// A part of orthogonal.cpp, which includes it where AVX-512 is switched on.
#pragma once

namespace {

constexpr int64_t LANES = 48;  // of a panel: three registers
constexpr int64_t ROWS = 8;    // of a tile: 8 x 3 accumulators leave room for one row of the right operand
constexpr int64_t AHEAD = 16 * LANES;  // words from use to prefetch; the left operand often comes from further away

int64_t up(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }

__mmask16 lanes(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }

__m512 widen(__m256i bf16) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16)); }
__m256i narrow(__m512 v) { return (__m256i)_mm512_cvtneps_pbh(v); }

struct BFloat16 {
  static constexpr int64_t PACK = 2;
  using Value = uint16_t;
  static __m512 fma(__m512 c, __m512i a, __m512i b) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
  static __m512 round(__m512 v) { return widen(narrow(v)); }
  static void store(Value* p, __mmask16 m, __m512 v) { _mm256_mask_storeu_epi16(p, m, narrow(v)); }
  static __m512 load(const Value* p, __mmask16 m) { return widen(_mm256_maskz_loadu_epi16(m, p)); }
};

struct Float32 {
  static constexpr int64_t PACK = 1;
  using Value = float;
  static __m512 fma(__m512 c, __m512i a, __m512i b) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), c);
  }
  static __m512 round(__m512 v) { return v; }
  static void store(Value* p, __mmask16 m, __m512 v) { _mm512_mask_storeu_ps(p, m, v); }
  static __m512 load(const Value* p, __mmask16 m) { return _mm512_maskz_loadu_ps(m, p); }
};

// A packed matrix: `lanes` along the panels, `depth` along k.
struct Packed {
  uint32_t* data;
  int64_t words, pitch;  // words of depth to sum over, and from panel to panel
  uint32_t* panel(int64_t q) const { return data + q * pitch; }
  // Eight lanes as the rows of a left operand.
  const uint32_t* rows(int64_t p) const { return data + p / 6 * pitch + p % 6 * ROWS; }
  uint32_t* rows(int64_t p) { return data + p / 6 * pitch + p % 6 * ROWS; }
};

// A tile is float [8][48]; `first` is the first register of 16 lanes that counts, `count` how many do.

template <class E, int COUNT>
void multiply(const uint32_t* __restrict left, const uint32_t* __restrict right, int64_t words, float* tile) {
  __m512 c[ROWS][COUNT];
  for (auto& row : c)
    for (auto& v : row) v = _mm512_setzero_ps();
  for (int64_t k = 0; k < words; k++) {
    __m512i b[COUNT];
#pragma GCC unroll 3
    for (int j = 0; j < COUNT; j++) {
      b[j] = _mm512_load_si512(right + 16 * j);
      _mm_prefetch((const char*)(right + 16 * j + AHEAD), _MM_HINT_T0);
    }
    _mm_prefetch((const char*)(left + 3 * AHEAD), _MM_HINT_T0);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++) {
      __m512i a = _mm512_set1_epi32((int)left[i]);
#pragma GCC unroll 3
      for (int j = 0; j < COUNT; j++) c[i][j] = E::fma(c[i][j], a, b[j]);
    }
    left += LANES;
    right += LANES;
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 3
    for (int j = 0; j < COUNT; j++) _mm512_store_ps(tile + i * LANES + 16 * j, c[i][j]);
}

template <class E>
void product(const uint32_t* left, const uint32_t* right, int64_t words, int first, int count, float* tile) {
  right += 16 * first;
  tile += 16 * first;
  if (count == 3)
    multiply<E, 3>(left, right, words, tile);
  else if (count == 2)
    multiply<E, 2>(left, right, words, tile);
  else
    multiply<E, 1>(left, right, words, tile);
}

// Two rows (bfloat16) or one (float32) of a packed matrix, 16 lanes.
template <class E>
__m512 unpack(const uint32_t* words, int64_t row) {
  __m512i v = _mm512_load_si512(words + row / E::PACK * LANES);
  if constexpr (E::PACK == 1) return _mm512_castsi512_ps(v);
  return _mm512_castsi512_ps(row % 2 ? _mm512_and_si512(v, _mm512_set1_epi32((int)0xffff0000)) : _mm512_slli_epi32(v, 16));
}

// tile = alpha tile + beta D, where D starts at the tile's first row.
template <class E>
void combine(float* tile, float alpha, const uint32_t* D, float beta, int first, int count) {
  for (int64_t i = 0; i < ROWS; i++)
    for (int j = first; j < first + count; j++) {
      float* t = tile + i * LANES + 16 * j;
      __m512 scaled = _mm512_mul_ps(_mm512_load_ps(t), _mm512_set1_ps(alpha));
      _mm512_store_ps(t, _mm512_fmadd_ps(unpack<E>(D + 16 * j, i), _mm512_set1_ps(beta), scaled));
    }
}

// The tile's columns become lanes, its rows depth.
template <class E>
void store_direct(const float* tile, uint32_t* to, int count) {
  for (int64_t i = 0; i < ROWS; i += E::PACK)
    for (int j = 0; j < count; j++) {
      const float* t = tile + i * LANES + 16 * j;
      __m512 low = _mm512_load_ps(t);
      uint32_t* p = to + i / E::PACK * LANES + 16 * j;
      if constexpr (E::PACK == 1) {
        _mm512_store_ps(p, low);
      } else {
        __m512i a = _mm512_cvtepu16_epi32(narrow(low));
        __m512i b = _mm512_cvtepu16_epi32(narrow(_mm512_load_ps(t + LANES)));
        _mm512_store_si512(p, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
      }
    }
}

// Eight words of eight rows, to eight depths of eight lanes.
void store_8x8(const __m256i* r, uint32_t* to) {
  __m256i a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
    a[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; j++) {
      b[i + 2 * j] = _mm256_unpacklo_epi64(a[i + j], a[i + j + 2]);
      b[i + 2 * j + 1] = _mm256_unpackhi_epi64(a[i + j], a[i + j + 2]);
    }
  for (int i = 0; i < 4; i++) {
    _mm256_store_si256((__m256i*)(to + i * LANES), _mm256_permute2x128_si256(b[i], b[i + 4], 0x20));
    _mm256_store_si256((__m256i*)(to + (i + 4) * LANES), _mm256_permute2x128_si256(b[i], b[i + 4], 0x31));
  }
}

// The tile's rows become eight lanes, its columns depth.
template <class E>
void store_turned(const float* tile, uint32_t* to, int count) {
  __m256i r[8];
  for (int j = 0; j < count; j++) {
    if constexpr (E::PACK == 2) {
      for (int i = 0; i < 8; i++) r[i] = narrow(_mm512_load_ps(tile + i * LANES + 16 * j));
      store_8x8(r, to + 8 * j * LANES);
    } else {
      for (int h = 0; h < 2; h++) {
        for (int i = 0; i < 8; i++)
          r[i] = _mm256_load_si256((const __m256i*)(tile + i * LANES + 16 * j + 8 * h));
        store_8x8(r, to + (16 * j + 8 * h) * LANES);
      }
    }
  }
}

}  // namespace
