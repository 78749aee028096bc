// The operators of diloco.kernels at memory speed on a CPU. What they compute is defined in reference*.py, bit for bit.
//
// The file compiles its own body once per instruction set (LEVEL) and picks one when it is called. Work is cut into tiles
// that stay in the L1/L2 cache: each value is read and written once, whatever number of steps it goes through.
// Build with -ffp-contract=off: a fused multiply-add rounds once where the definition rounds twice.
#ifndef LEVEL

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <system_error>
#include <thread>
#include <vector>

#define INLINE static inline __attribute__((always_inline))
#define EACH for (int64_t i = 0; i < m; ++i)

namespace {

enum Codec { FP32, FP16, BF16, INT8, E4M3, E5M2, E3M0, E2M1, NF4, INT4, STAT, TOPK };
enum Rule { NO_RULE = -1, SGD, SGDM, NESTEROV, GPA };
enum Op { ENCODE, ACCUMULATE, NORMS, TRIMMED, MERGE, STEP, CHECK, STAT_SUM, STAT_CODES, TOPK_SELECT, CORRECT, SWAP_LERP };

constexpr int64_t TILE = 2048;    // values of one tile; a block that is longer makes the tile longer
constexpr int64_t CHUNK = 1024;   // values folded into one partial sum of a squared norm
constexpr int64_t PAST_CACHE = 1 << 21;  // values from which on written tensors do not stay in the caches anyway
constexpr int64_t SLICE = 131072; // values whose statistics are summed in order

}  // namespace

extern "C" struct Job {
    int32_t codec, rule, bits, k, random, trim, dtype, flag;  // flag: STAT_SUM squares, MERGE overwrites
    int64_t n, block, workers, codes_at, table_at, shift_at;
    const float *x, *local, *error;
    float *residual;
    uint8_t *payload;
    double *sums;  // per chunk, or per payload and chunk, or per slice
    const uint8_t *const *payloads;
    const float *weights, *center, *edges, *mean;
    void *params;
    float *first, *second, *out;
    int64_t *counts;
    double mean64, width;
    uint64_t seed;
    float beta, lr, mu, mu_rest, mu_y, mu_y_rest, alpha, alpha_rest;
    int32_t bad;
};

namespace {

typedef float f32u __attribute__((aligned(1)));  // payloads start at any address
typedef uint16_t u16u __attribute__((aligned(1)));

const float NF4_TABLE[16] = {
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0};

struct Free { void operator()(void *p) const { std::free(p); } };
template <class T> std::unique_ptr<T[], Free> scratch(int64_t n) {
    return std::unique_ptr<T[], Free>(static_cast<T *>(std::aligned_alloc(64, ((n + 64) * sizeof(T) + 63) / 64 * 64)));
}

int64_t tile_of(const Job &j) { return j.codec >= INT8 && j.codec != STAT ? std::max(j.block, TILE) : TILE; }
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

typedef void (*Range)(Job &, int64_t, int64_t);

// Units of work in equal shares, one thread each; the caller's thread takes the first.
void spread(Range range, Job &job, int64_t units, int64_t threads) {
    threads = std::max<int64_t>(1, std::min(threads, units));
    std::vector<std::thread> others;
    for (int64_t t = 1; t < threads; ++t) {
        const int64_t first = units * t / threads, last = units * (t + 1) / threads;
        try {
            others.emplace_back([&job, range, first, last] { range(job, first, last); });
        } catch (const std::system_error &) {  // the machine has no thread left: do it here
            range(job, first, last);
        }
    }
    range(job, 0, units / threads);
    for (auto &other : others) other.join();
}

}  // namespace

#define CAT_(a, b) a##b
#define CAT(a, b) CAT_(a, b)

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HAVE_LEVELS 1
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#define LEVEL v4
#define WIDE 512
#include "diloco_kernels.cpp"
#undef LEVEL
#undef WIDE
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define LEVEL v3
#define WIDE 256
#include "diloco_kernels.cpp"
#undef LEVEL
#undef WIDE
#pragma GCC pop_options
#endif
#define LEVEL base
#define WIDE 128
#include "diloco_kernels.cpp"
#undef LEVEL
#undef WIDE

extern "C" {

// The instruction sets compiled in and usable here: 0 baseline, 1 x86-64-v3, 2 x86-64-v4.
int diloco_level() {
#ifdef HAVE_LEVELS
    __builtin_cpu_init();
    if (__builtin_cpu_supports("x86-64-v4")) return 2;
    if (__builtin_cpu_supports("x86-64-v3")) return 1;
#endif
    return 0;
}

int64_t diloco_job_size() { return sizeof(Job); }

// Runs one operator; returns 1 if the input was not finite (ENCODE, STEP) or a code is no number (CHECK).
int diloco_run(int op, Job *job, int64_t threads, int level) {
    job->bad = 0;
#ifdef HAVE_LEVELS
    if (level == 2) return v4::run(op, *job, threads);
    if (level == 1) return v3::run(op, *job, threads);
#endif
    return base::run(op, *job, threads);
}

}

#else  // ---- the body, once per LEVEL ----

namespace {
namespace LEVEL {

constexpr float MAGIC = 12582912.0f;  // adding it rounds to an integer, ties to even
constexpr int32_t MAGIC_BITS = 0x4B400000;

INLINE int32_t bits(float x) { int32_t u; std::memcpy(&u, &x, 4); return u; }
INLINE float number(int32_t u) { float x; std::memcpy(&x, &u, 4); return x; }
INLINE float least(float a, float b) { return a < b ? a : b; }
INLINE float most(float a, float b) { return a > b ? a : b; }
constexpr float power(int e) { return e < 0 ? 0.5f * power(e + 1) : e > 0 ? 2.0f * power(e - 1) : 1.0f; }

// ---- codes: quotient -> code and level, code -> level ----

template <int LARGEST, int MASK> struct Integer {
    static constexpr float divisor = LARGEST;
    static constexpr bool signed_table = false;
    INLINE void quantise(float y, const float *, int32_t &code, float &level) {
        float r = most(least(y, float(LARGEST)), -float(LARGEST)) + MAGIC;
        code = (bits(r) - MAGIC_BITS) & MASK;
        level = r - MAGIC;
    }
    INLINE float at(int32_t code) {
        return float(MASK == 15 ? (code ^ 8) - 8 : int32_t(int8_t(code)));
    }
};

// Floats of M mantissa bits and bias B with subnormals, no infinity below LARGEST.
template <int M, int B> struct Small {
    static constexpr int32_t shift = 23 - M, rebias = (127 - B) << M;
    INLINE int32_t nearest(float a) {  // a >= 0
        int32_t u = bits(a);
        int32_t normal = ((u + ((1 << (shift - 1)) - 1) + ((u >> shift) & 1)) >> shift) - rebias;
        int32_t sub = bits(a * power(M + B - 1) + MAGIC) - MAGIC_BITS;
        return a >= power(1 - B) ? normal : sub;
    }
    INLINE int32_t below(float a) {
        int32_t normal = (bits(a) >> shift) - rebias;
        return a >= power(1 - B) ? normal : int32_t(a * power(M + B - 1));
    }
    INLINE float magnitude(int32_t c) {
        float normal = number((c << shift) + (rebias << shift));
        return c >= (1 << M) ? normal : float(c) * power(1 - B - M);
    }
};

template <int M, int B, int TOP, int SIGN> struct Minifloat {
    static constexpr int top = TOP, sign_bit = SIGN;
    INLINE float largest() { return Small<M, B>::magnitude(TOP); }
    INLINE int32_t below(float a) { return Small<M, B>::below(a); }
    INLINE float magnitude(int32_t c) { return Small<M, B>::magnitude(c); }
    INLINE void quantise(float y, const float *, int32_t &code, float &level) {
        int32_t c = Small<M, B>::nearest(least(std::fabs(y), largest()));
        int32_t negative = bits(y) < 0 && c != 0 ? -1 : 0;
        code = c | (negative & SIGN);
        level = number(bits(magnitude(c)) | (negative & INT32_MIN));
    }
    INLINE float at(int32_t code) {
        float a = magnitude(code & (SIGN - 1));
        return code & SIGN ? -a : a;
    }
};

struct PowerOfTwo {
    static constexpr int top = 7, sign_bit = 8;
    INLINE float largest() { return 1.0f; }
    INLINE int32_t below(float a) {
        int32_t c = (bits(a) >> 23) - 120;
        return c < 1 ? 0 : c;
    }
    INLINE float magnitude(int32_t c) { return c ? number((c + 120) << 23) : 0.0f; }
    INLINE void quantise(float y, const float *, int32_t &code, float &level) {
        float a = std::fabs(y);
        int32_t c = ((bits(a) + 0x00400000) >> 23) - 120;
        c = c < 1 ? 1 : c > 7 ? 7 : c;
        bool zero = !(a > power(-7));
        int32_t sign = bits(y) & INT32_MIN;
        code = zero ? 0 : c | ((sign >> 28) & 8);
        level = number(zero ? 0 : ((c + 120) << 23) | sign);
    }
    INLINE float at(int32_t code) {
        float a = magnitude(code & 7);
        return (code & 8) && (code & 7) ? -a : a;
    }
};

struct Normal4 {
    INLINE void quantise(float y, const float *edges, int32_t &code, float &level) {
        int32_t c = 0;
        float l = NF4_TABLE[0];
        for (int e = 0; e < 15; ++e) {
            bool above = y > edges[e];
            c += above;
            l = above ? NF4_TABLE[e + 1] : l;
        }
        code = c;
        level = l;
    }
    INLINE float at(int32_t code) { return NF4_TABLE[code]; }
};

typedef Integer<127, 255> Int8;
typedef Integer<7, 15> Int4;
typedef Minifloat<3, 7, 0x7E, 0x80> E4m3;
typedef Minifloat<2, 15, 0x7B, 0x80> E5m2;
typedef Minifloat<1, 1, 7, 8> E2m1;

INLINE float divisor_of(int codec) {
    switch (codec) {
        case INT8: return 127.0f;
        case E4M3: return 448.0f;
        case E5M2: return 57344.0f;
        case E2M1: return 6.0f;
        case INT4: return 7.0f;
    }
    return 1.0f;
}

// ---- stochastic rounding ----

INLINE void fill_uniform(uint64_t seed, int64_t first, int64_t m, float *u) {  // first is a multiple of 4
    for (int64_t i = 0; i < m; i += 4) {
        uint64_t place = uint64_t(first + i) / 4;
        uint32_t c0 = uint32_t(place), c1 = uint32_t(place >> 32), c2 = 0, c3 = 0;
        uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
        for (int r = 0; r < 10; ++r) {
            uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
            c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
            c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
            c1 = uint32_t(p1);
            c3 = uint32_t(p0);
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        const uint32_t words[4] = {c0, c1, c2, c3};
        for (int w = 0; w < 4; ++w) u[i + w] = float(int32_t(words[w] >> 8)) * power(-24);
    }
}

template <int LARGEST, int MASK> INLINE void at_random(Integer<LARGEST, MASK>, float y, float u, int32_t &code, float &level) {
    float below = std::floor(y);
    level = below + (u < y - below ? 1.0f : 0.0f);
    level = most(least(level, float(LARGEST)), -float(LARGEST));
    code = int32_t(level) & MASK;
    level = float(int32_t(level));  // no minus zero
}

template <class C> INLINE void at_random(C, float y, float u, int32_t &code, float &level) {
    float a = least(std::fabs(y), C::largest());
    int32_t c = C::below(a);
    c = c < C::top - 1 ? c : C::top - 1;
    float low = C::magnitude(c), high = C::magnitude(c + 1);
    c += u < (a - low) / (high - low);
    bool negative = y < 0 && c != 0;
    code = c | (negative ? C::sign_bit : 0);
    level = negative ? -C::magnitude(c) : C::magnitude(c);
}

INLINE void at_random(Normal4, float y, float u, int32_t &code, float &level) {
    int32_t c = -1;
    for (int e = 0; e < 16; ++e) c += y >= NF4_TABLE[e];
    c = c < 0 ? 0 : c > 14 ? 14 : c;
    c += u < (y - NF4_TABLE[c]) / (NF4_TABLE[c + 1] - NF4_TABLE[c]);
    code = c;
    level = NF4_TABLE[c];
}

// ---- sums ----

// One partial sum for each chunk of v: the squares, folded by halves. Sixteen squares meet in registers; 64 sums remain.
INLINE void fold_squares(const float *__restrict v, int64_t m, double *sums) {
    alignas(64) double t[64];
    alignas(64) float last[CHUNK];
    for (int64_t lo = 0; lo < m; lo += CHUNK, v += CHUNK) {
        const float *__restrict a = v;
        if (m - lo < CHUNK) {
            std::memset(last, 0, sizeof last);
            std::memcpy(last, v, (m - lo) * 4);
            a = last;
        }
        for (int i = 0; i < 64; ++i) {
#define SQUARE(k) (double(a[i + 64 * (k)]) * double(a[i + 64 * (k)]))
#define PAIR(k) (SQUARE(k) + SQUARE((k) + 8))
            t[i] = ((PAIR(0) + PAIR(4)) + (PAIR(2) + PAIR(6))) + ((PAIR(1) + PAIR(5)) + (PAIR(3) + PAIR(7)));
#undef PAIR
#undef SQUARE
        }
        for (int i = 0; i < 32; ++i) t[i] += t[i + 32];
        for (int i = 0; i < 16; ++i) t[i] += t[i + 16];
        for (int i = 0; i < 8; ++i) t[i] += t[i + 8];
        for (int i = 0; i < 4; ++i) t[i] += t[i + 4];
        *sums++ = (t[0] + t[2]) + (t[1] + t[3]);
    }
}

INLINE int32_t largest_bits(const float *__restrict e, int64_t m) {
    int32_t largest = 0;
    EACH {
        int32_t u = bits(e[i]) & INT32_MAX;
        largest = u > largest ? u : largest;
    }
    return largest;
}

// While one tile is computed upon, memory would idle: ask for the same place of the next one, a block at a time.
struct Ahead {
    const float *streams[5];
    int64_t distance;
    inline __attribute__((always_inline)) void fetch(int64_t lo, int64_t m) const {
        for (const float *stream : streams)
            if (stream)
                for (int64_t i = 0; i < m; i += 16) __builtin_prefetch(stream + distance + lo + i, 0, 2);
    }
};

// ---- encoding one tile ----

// e/scale, correctly rounded, without a division: the rounded reciprocal and two corrections (Markstein). The remainders
// are exact while the scale is neither tiny nor huge and the quotient not below 2^-20, where every codec rounds to zero.
struct ByCorrection {
    float scale, inverse;
    INLINE bool fits(float scale) { return WIDE > 128 && scale > power(-80) && scale < power(100); }
    inline __attribute__((always_inline)) float operator()(float e) const {
        float q = e * inverse;
        q = __builtin_fmaf(__builtin_fmaf(-q, scale, e), inverse, q);
        return __builtin_fmaf(__builtin_fmaf(-q, scale, e), inverse, q);
    }
};

struct ByDivision {
    float scale;
    inline __attribute__((always_inline)) float operator()(float e) const { return e / scale; }
};

template <class C, class D>
INLINE void quantise_nearest(const float *__restrict e, int64_t m, D quotient, float scale, const float *edges,
                             int32_t *__restrict codes, float *__restrict v) {
    EACH {
        int32_t code;
        float level;
        C::quantise(quotient(e[i]), edges, code, level);
        codes[i] = code;
        v[i] = level * scale;
    }
}

// Codes of whole numbers from the uncorrected quotient, which is off by less than 2e-5: true if none lies so near to a
// tie that this could matter. It mostly does not, and the other way takes twice as long.
template <int LARGEST, int MASK>
INLINE bool quantise_roughly(Integer<LARGEST, MASK>, const float *__restrict e, int64_t m, float scale,
                             int32_t *__restrict codes, float *__restrict v) {
    const float inverse = 1.0f / scale;
    int32_t farthest = 0;
    EACH {
        const float q = e[i] * inverse, r = q + MAGIC, level = r - MAGIC;
        const int32_t off = bits(q - level) & INT32_MAX;
        farthest = off > farthest ? off : farthest;
        codes[i] = bits(r) & MASK;
        v[i] = level * scale;
    }
    return number(farthest) < 0.49997f;
}
template <class C>
INLINE bool quantise_roughly(C, const float *, int64_t, float, int32_t *, float *) { return false; }

template <class C>
INLINE void quantise_block(const float *__restrict e, const float *__restrict u, int64_t m, float scale,
                           const float *edges, int32_t *__restrict codes, float *__restrict v) {
    if (u == nullptr && ByCorrection::fits(scale)) {
        if (quantise_roughly(C(), e, m, scale, codes, v)) return;
        quantise_nearest<C>(e, m, ByCorrection{scale, 1.0f / scale}, scale, edges, codes, v);
    } else if (u == nullptr) {
        quantise_nearest<C>(e, m, ByDivision{scale}, scale, edges, codes, v);
    } else {
        EACH {
            int32_t code;
            float level;
            at_random(C(), e[i] / scale, u[i], code, level);
            codes[i] = code;
            v[i] = level * scale;
        }
    }
}

INLINE void pack_pairs(const uint8_t *__restrict codes, int64_t m, uint8_t *__restrict out) {
    for (int64_t i = 0; i < m / 2; ++i) {
        uint16_t pair;
        std::memcpy(&pair, codes + 2 * i, 2);
        out[i] = uint8_t(pair | pair >> 4);
    }
    if (m & 1) out[m / 2] = codes[m - 1];
}

// Codes, one to an int, as bytes or (PAIRS) as nibbles. A loop that narrows while it computes is slower than one more pass.
template <bool PAIRS> INLINE void narrow(const int32_t *__restrict codes, int64_t m, uint8_t *__restrict out) {
    if (!PAIRS) {
        EACH out[i] = uint8_t(codes[i]);
        return;
    }
    int64_t i = 0;
#if WIDE == 512
    for (; i + 16 <= m; i += 16) {
        const __m512i pair = _mm512_loadu_si512(codes + i);  // even code, odd code << 32
        const __m128i eight = _mm512_cvtepi64_epi8(_mm512_or_si512(pair, _mm512_srli_epi64(pair, 28)));
        _mm_storel_epi64(reinterpret_cast<__m128i *>(out + i / 2), eight);
    }
#endif
    for (; i + 1 < m; i += 2) out[i / 2] = uint8_t(codes[i] | codes[i + 1] << 4);
    if (i < m) out[i / 2] = uint8_t(codes[i]);
}

// Sixteen values at a time from e to packed codes and v; false (codes and v to be written again) where the quotient has to
// be known better than it is here, or where there is no such way.
template <class C> INLINE bool quantise_packed(C, const float *, int64_t, float, uint8_t *, float *) { return false; }

#if WIDE == 512
INLINE void store_codes(uint8_t *out, int64_t i, __m512i codes, bool pairs) {
    if (pairs) {  // even code, odd code << 32
        const __m512i both = _mm512_or_si512(codes, _mm512_srli_epi64(codes, 28));
        _mm_storel_epi64(reinterpret_cast<__m128i *>(out + i / 2), _mm512_cvtepi64_epi8(both));
    } else {
        _mm_storeu_si128(reinterpret_cast<__m128i *>(out + i), _mm512_cvtepi32_epi8(codes));
    }
}

// Whole numbers from the uncorrected quotient: see `quantise_roughly`.
template <int LARGEST, int MASK>
INLINE bool quantise_packed(Integer<LARGEST, MASK>, const float *e, int64_t m, float scale, uint8_t *out, float *v) {
    const __m512 inverse = _mm512_set1_ps(1.0f / scale), magic = _mm512_set1_ps(MAGIC), width = _mm512_set1_ps(scale);
    const __m512i mask = _mm512_set1_epi32(MASK);
    __m512 farthest = _mm512_setzero_ps();
    for (int64_t i = 0; i < m; i += 16) {
        const __m512 q = _mm512_mul_ps(_mm512_loadu_ps(e + i), inverse), r = _mm512_add_ps(q, magic);
        const __m512 level = _mm512_sub_ps(r, magic);
        farthest = _mm512_range_ps(farthest, _mm512_sub_ps(q, level), 0x0B);  // the larger of the two without signs
        _mm512_storeu_ps(v + i, _mm512_mul_ps(level, width));
        store_codes(out, i, _mm512_and_si512(_mm512_castps_si512(r), mask), MASK == 15);
    }
    return _mm512_reduce_max_ps(farthest) < 0.49997f;
}

// Powers of two need no quotient: where e/scale, rounded, reaches 1.5*2^-k is a limit on e, and limits are powers of two
// apart. Least such e for k = 0, whose bits the others share but for the exponent.
INLINE int32_t limit_of(float scale) {
    float limit = 0.75f * scale;
    while (limit / scale >= 0.75f) limit = number(bits(limit) - 1);
    while (limit / scale < 0.75f) limit = number(bits(limit) + 1);
    return bits(limit);
}

INLINE bool quantise_packed(PowerOfTwo, const float *e, int64_t m, float scale, uint8_t *out, float *v) {
    const __m512i positive = _mm512_set1_epi32(INT32_MAX), least = _mm512_set1_epi32(limit_of(scale) - (7 << 23));
    const __m512i one = _mm512_set1_epi32(1), seven = _mm512_set1_epi32(7);
    const __m512i base = _mm512_set1_epi32(bits(scale) - (7 << 23)), zero = _mm512_set1_epi32(bits(scale * power(-7)));
    for (int64_t i = 0; i < m; i += 16) {
        const __m512i x = _mm512_loadu_si512(e + i), a = _mm512_and_si512(x, positive);
        const __m512i sign = _mm512_andnot_si512(positive, x);
        __m512i c = _mm512_srai_epi32(_mm512_sub_epi32(a, least), 23);
        c = _mm512_min_epi32(_mm512_max_epi32(c, one), seven);
        const __mmask16 some = _mm512_cmpgt_epi32_mask(a, zero);
        const __m512i level = _mm512_or_si512(_mm512_add_epi32(base, _mm512_slli_epi32(c, 23)), sign);
        _mm512_storeu_si512(v + i, _mm512_maskz_mov_epi32(some, level));
        store_codes(out, i, _mm512_maskz_or_epi32(some, c, _mm512_srli_epi32(sign, 28)), true);
    }
    return true;
}
#endif

template <class C, bool PAIRS>
INLINE bool encode_blocks(const Job &j, const Ahead &ahead, const float *e, const float *u, int64_t lo, int64_t m, int32_t *codes, float *v) {
    const float divisor = divisor_of(j.codec);
    const int64_t scales = ceil_div(j.n, j.block);
    uint8_t *out = j.payload + 4 * scales + (PAIRS ? lo / 2 : lo);
    bool finite = true;
    float edges[15];
    if (j.edges) std::memcpy(edges, j.edges, sizeof edges);
    const bool whole = j.block % 16 == 0;  // codes of a block begin at a byte of their own
    for (int64_t at = 0; at < m; at += j.block) {
        const int64_t length = std::min(j.block, m - at);
        ahead.fetch(lo + at, length);
        const int32_t largest = largest_bits(e + at, length);
        const float scale = number(largest) / divisor;
        finite &= largest < 0x7F800000;
        std::memcpy(j.payload + 4 * ((lo + at) / j.block), &scale, 4);
        int32_t *to = codes + at;
        uint8_t *packed = out + (PAIRS ? at / 2 : at);
        if (scale == 0.0f) {
            const float zero = C::at(0) * scale;
            for (int64_t i = 0; i < length; ++i) to[i] = 0, v[at + i] = zero;
        } else {
            if (whole && length % 16 == 0 && u == nullptr && ByCorrection::fits(scale) &&
                quantise_packed(C(), e + at, length, scale, packed, v + at))
                continue;
            quantise_block<C>(e + at, u ? u + at : nullptr, length, scale, edges, to, v + at);
        }
        if (whole) narrow<PAIRS>(to, length, packed);
    }
    if (!whole) narrow<PAIRS>(codes, m, out);
    return finite;
}

INLINE uint16_t half_of(float x) {  // overflow to infinity, as IEEE and torch have it
    int32_t u = bits(x) & INT32_MAX, sign = (bits(x) >> 16) & 0x8000;
    int32_t c = Small<10, 15>::nearest(number(u < 0x47800000 ? u : 0x47800000));
    c = c < 0x7C00 ? c : 0x7C00;
    return uint16_t(sign | (u > 0x7F800000 ? 0x7E00 : c));
}
INLINE float of_half(uint16_t h) {
    float a = Small<10, 15>::magnitude(h & 0x7FFF);
    a = (h & 0x7C00) == 0x7C00 ? number(((h & 0x7FFF) << 13) | 0x7F800000) : a;
    return number(bits(a) | (int32_t(h & 0x8000) << 16));
}
INLINE uint16_t brain_of(float x) {
    uint32_t u = uint32_t(bits(x));
    uint32_t rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16;
    return uint16_t((u & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
}
INLINE float of_brain(uint16_t h) { return number(int32_t(uint32_t(h) << 16)); }

INLINE bool encode_cast(const Job &j, const Ahead &ahead, const float *__restrict e, int64_t lo, int64_t m, float *__restrict v) {
    ahead.fetch(lo, m);
    if (j.codec == FP32) {
        std::memcpy(j.payload + 4 * lo, e, 4 * m);
        std::memcpy(v, e, 4 * m);
    } else if (j.codec == FP16) {
        u16u *__restrict out = reinterpret_cast<u16u *>(j.payload + 2 * lo);
        EACH {
            uint16_t h = half_of(most(least(e[i], 65504.0f), -65504.0f));
            out[i] = h;
            v[i] = of_half(h);
        }
    } else {
        u16u *__restrict out = reinterpret_cast<u16u *>(j.payload + 2 * lo);
        const float largest = number(0x7F7F0000);
        EACH {
            uint16_t h = brain_of(most(least(e[i], largest), -largest));
            out[i] = h;
            v[i] = of_brain(h);
        }
    }
    return largest_bits(e, m) < 0x7F800000;
}

// payload = enc(e), v = dec(payload), for one tile; false if e is not finite.
INLINE bool encode_tile(const Job &j, const Ahead &ahead, const float *e, float *u, int64_t lo, int64_t m, int32_t *codes, float *v) {
    if (j.random)
        fill_uniform(j.seed, lo, m, u);
    else
        u = nullptr;
    switch (j.codec) {
        case INT8: return encode_blocks<Int8, false>(j, ahead, e, u, lo, m, codes, v);
        case E4M3: return encode_blocks<E4m3, false>(j, ahead, e, u, lo, m, codes, v);
        case E5M2: return encode_blocks<E5m2, false>(j, ahead, e, u, lo, m, codes, v);
        case E3M0: return encode_blocks<PowerOfTwo, true>(j, ahead, e, u, lo, m, codes, v);
        case E2M1: return encode_blocks<E2m1, true>(j, ahead, e, u, lo, m, codes, v);
        case NF4: return encode_blocks<Normal4, true>(j, ahead, e, u, lo, m, codes, v);
        case INT4: return encode_blocks<Int4, true>(j, ahead, e, u, lo, m, codes, v);
    }
    return encode_cast(j, ahead, e, lo, m, v);
}

// ---- decoding one tile ----

// v = table[nibble], or (ADD) v += table[nibble]; 16 entries, even index in the low nibble.
template <bool ADD> INLINE void look_up(const uint8_t *__restrict p, int64_t m, const float *table, float *__restrict v) {
    int64_t i = 0;
#if WIDE == 512
    const __m512 t = _mm512_loadu_ps(table);
    for (; i + 16 <= m; i += 16) {
        int64_t eight;
        std::memcpy(&eight, p + i / 2, 8);
        __m512i w = _mm512_cvtepu8_epi64(_mm_cvtsi64_si128(eight));
        w = _mm512_or_si512(w, _mm512_slli_epi64(w, 28));  // a permutation looks at the low four bits only
        const __m512 x = _mm512_permutexvar_ps(w, t);
        _mm512_storeu_ps(v + i, ADD ? _mm512_add_ps(_mm512_loadu_ps(v + i), x) : x);
    }
#elif WIDE == 256
    const __m256 low = _mm256_loadu_ps(table), high = _mm256_loadu_ps(table + 8);
    for (; i + 8 <= m; i += 8) {
        int32_t four;
        std::memcpy(&four, p + i / 2, 4);
        __m256i w = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
        w = _mm256_or_si256(w, _mm256_slli_epi64(w, 28));
        __m256 a = _mm256_permutevar8x32_ps(low, w), b = _mm256_permutevar8x32_ps(high, w);
        const __m256 x = _mm256_blendv_ps(a, b, _mm256_castsi256_ps(_mm256_slli_epi32(w, 28)));
        _mm256_storeu_ps(v + i, ADD ? _mm256_add_ps(_mm256_loadu_ps(v + i), x) : x);
    }
#endif
    for (; i < m; ++i) {
        const float x = table[(p[i / 2] >> (4 * (i & 1))) & 15];
        v[i] = ADD ? v[i] + x : x;
    }
}

// Decoded values to v, or (ADD) weight times them added to v, product and sum rounded one after the other.
template <class C, bool ADD>
INLINE void decode_bytes(const Job &j, const uint8_t *p, int64_t lo, int64_t m, float weight, float *__restrict v) {
    const uint8_t *__restrict codes = p + 4 * ceil_div(j.n, j.block) + lo;
    for (int64_t at = 0; at < m; at += j.block) {
        float scale;
        std::memcpy(&scale, p + 4 * ((lo + at) / j.block), 4);
        const int64_t length = std::min(j.block, m - at);
        for (int64_t i = at; i < at + length; ++i) {
            const float x = C::at(codes[i]) * scale;
            v[i] = ADD ? v[i] + x * weight : x;
        }
    }
}

// The sixteen values of a nibble, for a scale of one.
template <class C> INLINE void levels_of(float *level) {
    for (int c = 0; c < 16; ++c) level[c] = C::at(c);
}
INLINE void levels_of(int codec, float *level) {
    switch (codec) {
        case E3M0: levels_of<PowerOfTwo>(level); break;
        case E2M1: levels_of<E2m1>(level); break;
        case NF4: levels_of<Normal4>(level); break;
        case INT4: levels_of<Int4>(level); break;
    }
    if (codec == E3M0 || codec == E2M1) level[8] = 0.0f;  // no minus zero
}

template <bool ADD>
INLINE void decode_pairs(const Job &j, const uint8_t *p, int64_t lo, int64_t m, float weight, float *__restrict v) {
    const uint8_t *codes = p + 4 * ceil_div(j.n, j.block) + lo / 2;
    alignas(64) float level[16], table[16];
    levels_of(j.codec, level);
    for (int64_t at = 0; at < m; at += j.block) {
        float scale;
        std::memcpy(&scale, p + 4 * ((lo + at) / j.block), 4);
        for (int c = 0; c < 16; ++c) table[c] = ADD ? level[c] * scale * weight : level[c] * scale;
        look_up<ADD>(codes + at / 2, std::min(j.block, m - at), table, v + at);
    }
}

// The statistical codec's values lo .. lo+m of one group; lo need not start on a byte.
INLINE void decode_stat(const Job &j, const uint8_t *p, int64_t lo, int64_t m, float *__restrict v) {
    float shift, table[256];
    const int size = 1 << j.bits;
    std::memcpy(&shift, p + j.shift_at, 4);
    std::memcpy(table, p + j.table_at, 4 * size);
    for (int c = 0; c < size; ++c) table[c] = table[c] + shift;
    const uint8_t *codes = p + j.codes_at;
    if (j.bits == 8) {
        EACH v[i] = table[codes[lo + i]];
    } else if (j.bits == 4 && lo % 2 == 0) {
        look_up<false>(codes + lo / 2, m, table, v);
    } else if (j.bits == 4) {
        EACH v[i] = table[(codes[(lo + i) / 2] >> (4 * ((lo + i) & 1))) & 15];
    } else {
        EACH v[i] = table[(codes[(lo + i) / 4] >> (2 * ((lo + i) & 3))) & 3];
    }
}

INLINE void decode_topk(const Job &j, const uint8_t *p, int64_t lo, int64_t m, float *__restrict v) {
    float kept[4096];
    std::memset(v, 0, 4 * m);
    for (int64_t at = 0; at < m; at += j.block) {
        const int64_t chunk = (lo + at) / j.block;
        decode_stat(j, p, chunk * j.k, j.k, kept);
        const uint8_t *index = p + chunk * (j.k / 2) * 3;
        for (int64_t i = 0; i < j.k; i += 2, index += 3) {
            const int64_t a = at + (index[0] | (index[1] & 15) << 8), b = at + (index[1] >> 4 | index[2] << 4);
            if (a < m) v[a] = kept[i];  // an index into the padding of the last chunk
            if (b < m) v[b] = kept[i + 1];
        }
    }
}

template <bool ADD> INLINE void decode_tile(const Job &j, const uint8_t *p, int64_t lo, int64_t m, float weight, float *__restrict v) {
    switch (j.codec) {
        case FP32: {
            const f32u *__restrict x = reinterpret_cast<const f32u *>(p + 4 * lo);
            EACH v[i] = ADD ? v[i] + x[i] * weight : x[i];
            return;
        }
        case FP16: {
            const u16u *__restrict h = reinterpret_cast<const u16u *>(p + 2 * lo);
            EACH v[i] = ADD ? v[i] + of_half(h[i]) * weight : of_half(h[i]);
            return;
        }
        case BF16: {
            const u16u *__restrict h = reinterpret_cast<const u16u *>(p + 2 * lo);
            EACH v[i] = ADD ? v[i] + of_brain(h[i]) * weight : of_brain(h[i]);
            return;
        }
        case INT8: return decode_bytes<Int8, ADD>(j, p, lo, m, weight, v);
        case E4M3: return decode_bytes<E4m3, ADD>(j, p, lo, m, weight, v);
        case E5M2: return decode_bytes<E5m2, ADD>(j, p, lo, m, weight, v);
        case E3M0: case E2M1: case NF4: case INT4: return decode_pairs<ADD>(j, p, lo, m, weight, v);
    }
    alignas(64) float own[ADD ? 4096 : 1];
    float *__restrict to = ADD ? own : v;
    if (j.codec == STAT)
        decode_stat(j, p, lo, m, to);
    else
        decode_topk(j, p, lo, m, to);
    if (ADD) EACH v[i] = v[i] + own[ADD ? i : 0] * weight;
}

INLINE void decode_tile(const Job &j, const uint8_t *p, int64_t lo, int64_t m, float *__restrict v) {
    decode_tile<false>(j, p, lo, m, 0.0f, v);
}

// ---- the operators, each on a range of tiles ----

// What is to be sent, before the codec: beta*error + (x - local).
INLINE void corrected(const Job &j, int64_t lo, int64_t m, float *__restrict e) {
    const float *__restrict x = j.x + lo;
    const float *__restrict l = j.local + lo;
    const float *__restrict r = j.error + lo;
    const float beta = j.beta;
    if (j.local && j.error) EACH e[i] = r[i] * beta + (x[i] - l[i]);
    else if (j.error) EACH e[i] = r[i] * beta + x[i];
    else if (j.local) EACH e[i] = x[i] - l[i];
    else std::memcpy(e, x, 4 * m);
}

// left = e - sent
INLINE void leave(const float *__restrict e, const float *__restrict sent, int64_t m, float *__restrict left, bool past_cache) {
    int64_t i = 0;
#if WIDE == 512
    if (past_cache && reinterpret_cast<uintptr_t>(left) % 64 == 0)
        for (; i + 16 <= m; i += 16)
            _mm512_stream_ps(left + i, _mm512_sub_ps(_mm512_loadu_ps(e + i), _mm512_loadu_ps(sent + i)));
#elif WIDE == 256
    if (past_cache && reinterpret_cast<uintptr_t>(left) % 32 == 0)
        for (; i + 8 <= m; i += 8)
            _mm256_stream_ps(left + i, _mm256_sub_ps(_mm256_loadu_ps(e + i), _mm256_loadu_ps(sent + i)));
#endif
    (void)past_cache;
    for (; i < m; ++i) left[i] = e[i] - sent[i];
}

void encode(Job &j, int64_t first, int64_t last) {
    const int64_t tile = tile_of(j);
    auto e = scratch<float>(tile), v = scratch<float>(tile), u = scratch<float>(j.random ? tile : 0);
    auto codes = scratch<int32_t>(tile);
    // A residual of its own is next looked at a round later: written past the caches, it need not be read first.
    const bool past_cache = j.residual != j.error && j.n >= PAST_CACHE;
    const bool fetched = past_cache || j.residual == j.error;
    const Ahead ahead = {{j.x, j.local, j.error, fetched ? nullptr : j.residual, nullptr}, tile};
    bool finite = true;
    for (int64_t t = first; t < last; ++t) {
        const int64_t lo = t * tile, m = std::min(tile, j.n - lo);
        const float *from = j.x + lo;
        if (j.local || j.error) {
            corrected(j, lo, m, e.get());
            from = e.get();
        }
        finite &= encode_tile(j, ahead, from, u.get(), lo, m, codes.get(), v.get());
        if (j.residual) leave(from, v.get(), m, j.residual + lo, past_cache);
        fold_squares(v.get(), m, j.sums + lo / CHUNK);
    }
    if (!finite) __atomic_store_n(&j.bad, 1, __ATOMIC_RELAXED);
#if WIDE > 128
    _mm_sfence();
#endif
}

void correct(Job &j, int64_t first, int64_t last) {
    alignas(64) float e[TILE];  // the residual may be the error itself
    for (int64_t t = first; t < last; ++t) {
        const int64_t lo = t * TILE, m = std::min(TILE, j.n - lo);
        corrected(j, lo, m, e);
        std::memcpy(j.residual + lo, e, 4 * m);
    }
}

constexpr int64_t STRIP = 128;  // values that stay in registers while all workers are added to them
constexpr int64_t AHEAD = 1024;  // values further on, to be fetched meanwhile

#if WIDE == 512
#define METHOD inline __attribute__((always_inline))
template <int BITS> METHOD void fetch(const uint8_t *p, int64_t i) {
    for (int64_t k = 0; k < STRIP * BITS / 8; k += 64) __builtin_prefetch(p + i * BITS / 8 + k, 0, 2);
}

struct WeightedInt8 {
    static constexpr int width = 8;
    const int64_t start, block;
    METHOD __m512 at_strip(const uint8_t *p, int64_t lo, float) const {
        float scale;
        std::memcpy(&scale, p + 4 * (lo / block), 4);
        return _mm512_set1_ps(scale);
    }
    METHOD __m512 operator()(const uint8_t *codes, int64_t i, __m512 scale, __m512 weight) const {
        const __m512i code = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(codes + i)));
        return _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(code), scale), weight);
    }
};

struct WeightedBrain {
    static constexpr int width = 16;
    const int64_t start = 0;
    METHOD __m512 at_strip(const uint8_t *, int64_t, float) const { return _mm512_setzero_ps(); }
    METHOD __m512 operator()(const uint8_t *codes, int64_t i, __m512, __m512 weight) const {
        const __m512i code = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(codes + 2 * i)));
        return _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(code, 16)), weight);
    }
};

struct WeightedPairs {
    static constexpr int width = 4;
    const int64_t start, block;
    const __m512 levels;
    METHOD __m512 at_strip(const uint8_t *p, int64_t lo, float weight) const {
        float scale;
        std::memcpy(&scale, p + 4 * (lo / block), 4);
        return _mm512_mul_ps(_mm512_mul_ps(levels, _mm512_set1_ps(scale)), _mm512_set1_ps(weight));
    }
    METHOD __m512 operator()(const uint8_t *codes, int64_t i, __m512 table, __m512) const {
        int64_t eight;
        std::memcpy(&eight, codes + i / 2, 8);
        const __m512i w = _mm512_cvtepu8_epi64(_mm_cvtsi64_si128(eight));
        return _mm512_permutexvar_ps(_mm512_or_si512(w, _mm512_slli_epi64(w, 28)), table);
    }
};

template <class D> INLINE void accumulate_strips(const Job &j, const D &weighted, int64_t lo, int64_t m) {
    for (int64_t at = lo; at < lo + m; at += STRIP) {
        __m512 sums[STRIP / 16];
        for (int i = 0; i < STRIP / 16; ++i) sums[i] = _mm512_loadu_ps(j.out + at + 16 * i);
        for (int64_t i = 0; i < STRIP; i += 16) __builtin_prefetch(j.out + at + AHEAD + i, 1, 2);
        for (int64_t w = 0; w < j.workers; ++w) {
            const uint8_t *codes = j.payloads[w] + weighted.start;
            fetch<D::width>(codes, at + AHEAD);
            const __m512 own = weighted.at_strip(j.payloads[w], at, j.weights[w]);
            const __m512 weight = _mm512_set1_ps(j.weights[w]);
            for (int i = 0; i < STRIP / 16; ++i)
                sums[i] = _mm512_add_ps(sums[i], weighted(codes, at + 16 * i, own, weight));
        }
        for (int i = 0; i < STRIP / 16; ++i) _mm512_storeu_ps(j.out + at + 16 * i, sums[i]);
    }
}
#undef METHOD
#endif

// All workers of one tile at once, where that is built.
INLINE bool accumulate_tile(const Job &j, int64_t lo, int64_t m) {
#if WIDE == 512
    if (m % STRIP) return false;
    if (j.codec == BF16) return accumulate_strips(j, WeightedBrain(), lo, m), true;
    if (j.block % STRIP || j.codec < INT8 || j.codec > INT4) return false;
    const int64_t start = 4 * ceil_div(j.n, j.block);
    if (j.codec == INT8) return accumulate_strips(j, WeightedInt8{start, j.block}, lo, m), true;
    if (j.codec < E3M0) return false;
    alignas(64) float levels[16];
    levels_of(j.codec, levels);
    return accumulate_strips(j, WeightedPairs{start, j.block, _mm512_load_ps(levels)}, lo, m), true;
#endif
    return false;
}

void accumulate(Job &j, int64_t first, int64_t last) {
    const int64_t tile = tile_of(j);
    // Bytes of a tile's codes, and where they start, in the codecs that have one code after the other.
    const int64_t bytes = j.codec == FP32 ? 4 * tile : j.codec <= BF16 ? 2 * tile : j.codec <= E5M2 ? tile : j.codec <= INT4 ? tile / 2 : 0;
    const int64_t at = j.codec >= INT8 && j.codec <= INT4 ? 4 * ceil_div(j.n, j.block) : 0;
    for (int64_t t = first; t < last; ++t) {
        const int64_t lo = t * tile, m = std::min(tile, j.n - lo);
        float *__restrict out = j.out + lo;
        if (accumulate_tile(j, lo, m)) continue;
        for (int64_t i = 0; i < tile; i += 16) __builtin_prefetch(out + tile + i, 1, 2);
        for (int64_t w = 0; w < j.workers; ++w) {
            const uint8_t *next = j.payloads[w] + at + (t + 1) * bytes;
            for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(next + i, 0, 2);
            decode_tile<true>(j, j.payloads[w], lo, m, j.weights[w], out);
        }
    }
}

void norms(Job &j, int64_t first, int64_t last) {
    const int64_t tile = tile_of(j), chunks = ceil_div(j.n, CHUNK);
    auto v = scratch<float>(tile);
    for (int64_t t = first; t < last; ++t) {
        const int64_t lo = t * tile, m = std::min(tile, j.n - lo);
        for (int64_t w = 0; w < j.workers; ++w) {
            float *__restrict values = v.get();
            decode_tile(j, j.payloads[w], lo, m, values);
            if (j.center) {
                const float *__restrict c = j.center + lo;
                EACH values[i] = values[i] - c[i];
            }
            fold_squares(values, m, j.sums + w * chunks + lo / CHUNK);
        }
    }
}

void trimmed(Job &j, int64_t first, int64_t last) {
    const int64_t tile = tile_of(j), n = j.workers;
    auto v = scratch<float>(tile * n);
    for (int64_t t = first; t < last; ++t) {
        const int64_t lo = t * tile, m = std::min(tile, j.n - lo);
        for (int64_t w = 0; w < n; ++w) {
            float *__restrict row = v.get() + w * tile;
            decode_tile(j, j.payloads[w], lo, m, row);
            EACH row[i] = row[i] + 0.0f;  // minus zero counts as zero
            for (int64_t q = w; q > 0; --q) {  // insertion of a whole row, coordinate by coordinate
                float *__restrict a = v.get() + (q - 1) * tile;
                float *__restrict b = v.get() + q * tile;
                EACH {
                    const float low = least(a[i], b[i]), high = most(a[i], b[i]);
                    a[i] = low;
                    b[i] = high;
                }
            }
        }
        float *__restrict out = j.out + lo;
        const float count = float(n - 2 * j.trim);
        std::memcpy(out, v.get() + j.trim * tile, 4 * m);
        for (int64_t w = j.trim + 1; w < n - j.trim; ++w) {
            const float *__restrict row = v.get() + w * tile;
            EACH out[i] = out[i] + row[i];
        }
        EACH out[i] = out[i] / count;
    }
}

void merge(Job &j, int64_t first, int64_t last) {
    const int64_t tile = tile_of(j);
    auto scratch_v = scratch<float>(tile);
    const float a = j.alpha, b = j.alpha_rest;
    const bool copy = j.flag;
    for (int64_t t = first; t < last; ++t) {
        const int64_t lo = t * tile, m = std::min(tile, j.n - lo);
        float *__restrict v = scratch_v.get();
        decode_tile(j, j.payloads[0], lo, m, v);
        if (j.dtype == FP32) {
            float *__restrict p = static_cast<float *>(j.params) + lo;
            if (copy) EACH p[i] = v[i];
            else EACH p[i] = p[i] * a + v[i] * b;
        } else if (j.dtype == BF16) {
            uint16_t *__restrict p = static_cast<uint16_t *>(j.params) + lo;
            if (copy) EACH p[i] = brain_of(v[i]);
            else EACH p[i] = brain_of(of_brain(p[i]) * a + v[i] * b);
        } else {
            uint16_t *__restrict p = static_cast<uint16_t *>(j.params) + lo;
            if (copy) EACH p[i] = half_of(v[i]);
            else EACH p[i] = half_of(of_half(p[i]) * a + v[i] * b);
        }
    }
}

// The update of one tile: to u, or (DIRECT) subtracted from params at once.
template <bool DIRECT> INLINE void update(const Job &j, int64_t lo, int64_t m, float *__restrict u) {
    float *__restrict p = static_cast<float *>(j.params) + lo;
    const float *__restrict d = j.mean + lo;
    float *__restrict b = j.first + lo;
    float *__restrict z = j.second + lo;
    const float lr = j.lr, mu = j.mu, rest = j.mu_rest, mu_y = j.mu_y, rest_y = j.mu_y_rest;
#define TAKE(value) { const float taken = (value); if (DIRECT) p[i] = p[i] - taken; else u[i] = taken; }
    switch (j.rule) {
        case SGD: EACH TAKE(d[i] * lr) return;
        case SGDM: EACH { b[i] = b[i] * mu + d[i]; TAKE(b[i] * lr) } return;
        case NESTEROV: EACH {
            const float momentum = b[i] * mu + d[i];
            b[i] = momentum;
            TAKE((momentum * mu + d[i]) * lr)
        } return;
        default: EACH {
            const float after = z[i] - d[i] * lr;
            const float x = b[i] * mu + after * rest;
            z[i] = after;
            b[i] = x;
            TAKE(p[i] - (x * mu_y + after * rest_y))
        }
    }
#undef TAKE
}

void step(Job &j, int64_t first, int64_t last) {
    const int64_t tile = tile_of(j);
    const bool sends = j.payload != nullptr;
    auto e = scratch<float>(tile), v = scratch<float>(tile), u = scratch<float>(j.random ? tile : 0);
    auto codes = scratch<int32_t>(tile);
    const Ahead ahead = {{static_cast<const float *>(j.params), j.mean, j.first, j.second, j.residual}, tile};
    bool finite = true;
    for (int64_t t = first; t < last; ++t) {
        const int64_t lo = t * tile, m = std::min(tile, j.n - lo);
        if (!sends) {
            update<true>(j, lo, m, nullptr);
            continue;
        }
        float *__restrict p = static_cast<float *>(j.params) + lo;
        float *__restrict left = j.residual + lo;
        float *__restrict whole = e.get();
        float *__restrict sent = v.get();
        update<false>(j, lo, m, whole);
        EACH whole[i] = left[i] + whole[i];
        finite &= encode_tile(j, ahead, whole, u.get(), lo, m, codes.get(), sent);
        EACH {
            left[i] = whole[i] - sent[i];
            p[i] = p[i] - sent[i];
        }
        fold_squares(sent, m, j.sums + lo / CHUNK);
    }
    if (!finite) __atomic_store_n(&j.bad, 1, __ATOMIC_RELAXED);
}

// ---- received bytes, statistics, selection ----

void check(Job &j, int64_t first, int64_t last) {
    int32_t bad = 0;
    for (int64_t t = first; t < last; ++t) {
        const int64_t lo = t * TILE, m = std::min(TILE, j.n - lo);
        if (j.codec == FP32) {
            const f32u *__restrict x = reinterpret_cast<const f32u *>(j.payload) + lo;
            EACH bad |= (bits(x[i]) & INT32_MAX) >= 0x7F800000;
        } else if (j.codec == FP16 || j.codec == BF16) {
            const u16u *__restrict x = reinterpret_cast<const u16u *>(j.payload) + lo;
            const uint16_t limit = j.codec == FP16 ? 0x7C00 : 0x7F80;
            uint16_t wrong = 0;
            EACH wrong |= uint16_t(x[i] & 0x7FFF) >= limit;
            bad |= wrong;
        } else {
            const uint8_t *__restrict x = j.payload + 4 * ceil_div(j.n, j.block) + lo;
            const uint8_t limit = j.codec == E4M3 ? 0x7E : 0x7B;
            uint8_t wrong = 0;
            EACH wrong |= uint8_t(x[i] & 0x7F) > limit;
            bad |= wrong;
        }
    }
    if (bad) __atomic_store_n(&j.bad, 1, __ATOMIC_RELAXED);
}

// sums[slice]: x - mean, or its squares, in eight lanes each summed in order.
void stat_sum(Job &j, int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
        const int64_t lo = t * SLICE, m = std::min(SLICE, j.n - lo);
        const float *__restrict x = j.x + lo;
        alignas(64) double lane[8] = {0, 0, 0, 0, 0, 0, 0, 0};
        const double mean = j.mean64;
        int64_t i = 0;
        if (j.flag) {
            for (; i + 8 <= m; i += 8)
                for (int q = 0; q < 8; ++q) {
                    const double c = double(x[i + q]) - mean;
                    lane[q] += c * c;
                }
            for (int q = 0; i < m; ++i, ++q) lane[q] += (double(x[i]) - mean) * (double(x[i]) - mean);
        } else {
            for (; i + 8 <= m; i += 8)
                for (int q = 0; q < 8; ++q) lane[q] += double(x[i + q]) - mean;
            for (int q = 0; i < m; ++i, ++q) lane[q] += double(x[i]) - mean;
        }
        for (int q = 0; q < 4; ++q) lane[q] += lane[q + 4];
        j.sums[t] = (lane[0] + lane[2]) + (lane[1] + lane[3]);
    }
}

// Codes of a group, and per slice the sum and the count of the members of each bin.
void stat_codes(Job &j, int64_t first, int64_t last) {
    const int size = 1 << j.bits, per_byte = 8 / j.bits;
    const double middle = size / 2, top = size - 1, magic = 6755399441055744.0;
    alignas(64) uint8_t q[TILE];
    alignas(64) double c[TILE];
    for (int64_t t = first; t < last; ++t) {
        double *sums = j.sums + t * size;
        int64_t *counts = j.counts + t * size;
        for (int s = 0; s < size; ++s) sums[s] = 0.0, counts[s] = 0;
        for (int64_t lo = t * SLICE; lo < std::min((t + 1) * SLICE, j.n); lo += TILE) {
            const int64_t m = std::min(TILE, j.n - lo);
            const float *__restrict x = j.x + lo;
            const double mean = j.mean64, width = j.width;
            EACH {
                c[i] = double(x[i]) - mean;
                double y = c[i] / width + middle;
                y = y < 0.0 ? 0.0 : y > top ? top : y;
                const double r = y + magic;
                int64_t u;
                std::memcpy(&u, &r, 8);
                q[i] = uint8_t(u);
            }
            EACH {
                sums[q[i]] += c[i];
                ++counts[q[i]];
            }
            uint8_t *out = j.payload + j.codes_at + lo * j.bits / 8;
            for (int64_t i = m; i % per_byte; ++i) q[i] = 0;
            if (j.bits == 8) std::memcpy(out, q, m);
            else if (j.bits == 4) pack_pairs(q, m + (m & 1), out);
            else for (int64_t i = 0; i < m; i += 4) out[i / 4] = uint8_t(q[i] | q[i + 1] << 2 | q[i + 2] << 4 | q[i + 3] << 6);
        }
    }
}

// The k largest of each chunk: kept values to out, packed indices to payload. Units are chunks.
void topk_select(Job &j, int64_t first, int64_t last) {
    alignas(64) int32_t a[4096];
    alignas(64) float full[4096];
    const int64_t m = j.block, k = j.k;
    std::vector<int32_t> index(k);
    for (int64_t t = first; t < last; ++t) {
        const int64_t length = std::min(m, j.n - t * m);
        std::memset(full, 0, 4 * m);
        std::memcpy(full, j.x + t * m, 4 * length);
        EACH a[i] = bits(full[i]) & INT32_MAX;
        // The k-th largest by bisection over its bits; counting a chunk in the cache is cheap.
        int32_t cut = 0;
        for (int32_t bit = 1 << 30; bit; bit >>= 1) {
            int32_t count = 0;
            EACH count += a[i] >= (cut | bit);
            if (count >= k) cut |= bit;
        }
        int32_t above = 0;
        EACH above += a[i] > cut;
        int64_t room = k - above, found = 0;
        for (int64_t i = 0; i < m && found < k; ++i) {
            if (a[i] < cut || (a[i] == cut && room == 0)) continue;
            room -= a[i] == cut;
            j.out[t * k + found] = full[i];
            index[found++] = int32_t(i);
        }
        uint8_t *out = j.payload + t * (k / 2) * 3;
        for (int64_t i = 0; i < k; i += 2, out += 3) {
            out[0] = uint8_t(index[i]);
            out[1] = uint8_t(index[i] >> 8 | (index[i + 1] & 15) << 4);
            out[2] = uint8_t(index[i + 1] >> 4);
        }
    }
}

// (a, b) <- (b, a + weight (b - a)), weight alpha; from one half on counted from b, so that both ends are exact.
void swap_lerp(Job &j, int64_t first, int64_t last) {
    float *__restrict a = static_cast<float *>(j.params), *__restrict b = j.first;
    const bool near = j.alpha < 0.5f;
    const float weight = near ? j.alpha : -j.alpha_rest;
    for (int64_t t = first; t < last; ++t) {
        const int64_t lo = t * TILE, m = std::min(TILE, j.n - lo);
        float *__restrict p = a + lo, *__restrict q = b + lo;
        if (near) EACH { const float u = p[i], v = q[i]; p[i] = v; q[i] = u + (v - u) * weight; }
        else EACH { const float u = p[i], v = q[i]; p[i] = v; q[i] = v + (v - u) * weight; }
    }
}

int run(int op, Job &j, int64_t threads) {
    const int64_t tiles = ceil_div(j.n, tile_of(j)), slices = ceil_div(j.n, SLICE);
    switch (op) {
        case ENCODE: spread(encode, j, tiles, threads); break;
        case ACCUMULATE: spread(accumulate, j, tiles, threads); break;
        case NORMS: spread(norms, j, tiles, threads); break;
        case TRIMMED: spread(trimmed, j, tiles, threads); break;
        case MERGE: spread(merge, j, tiles, threads); break;
        case STEP: spread(step, j, tiles, threads); break;
        case CHECK: spread(check, j, ceil_div(j.n, TILE), threads); break;
        case STAT_SUM: spread(stat_sum, j, slices, threads); break;
        case STAT_CODES: spread(stat_codes, j, slices, threads); break;
        case TOPK_SELECT: spread(topk_select, j, ceil_div(j.n, j.block), threads); break;
        case CORRECT: spread(correct, j, ceil_div(j.n, TILE), threads); break;
        case SWAP_LERP: spread(swap_lerp, j, ceil_div(j.n, TILE), threads); break;
    }
    return j.bad;
}

}  // namespace LEVEL
}  // namespace

#endif
