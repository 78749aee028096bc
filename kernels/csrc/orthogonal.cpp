// Orthogonalised momentum on a CPU with AVX-512: the whole iteration of a batch of matrices in one call.
//
// Every matrix is kept in one packed layout, in which it can be the left and the right operand of a product: panels
// of 48 lanes, each [k][48] words of 32 bits, where a word holds one float or two neighbouring bfloat16 along k.
// Products of commuting symmetric matrices compute the tiles on and above the diagonal and mirror them, so such a
// matrix is symmetric to the bit. Sums are float32 in a fixed order: results depend neither on the number of threads
// nor on the other matrices of a batch.
//
// Here: momentum, normalisation, the iteration, NorMuon's row statistics, the update of the weights. Which forms and
// coefficients are worth using is decided by the caller (`orthogonal_cpu.py`).

#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)

#include <cpuid.h>
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <numeric>
#include <system_error>
#include <thread>
#include <vector>

#pragma GCC diagnostic push
#pragma GCC push_options
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of the compiler's own intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,avx2,prfchw")

using std::int64_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;

#include "orthogonal_threads.h"
#include "orthogonal_tiles.h"

namespace {

struct Step {
  float a, b, c;
};

// What all matrices of one call share.
struct Options {
  const Step* steps;
  int64_t step_count;
  float div, eps;
  float weight;  // of the gradient in the momentum, 1 - beta; below 0: the input is taken as it is
  float keep;    // of the weights: 1 - lr decay
  float advance; // of the second moment: 1 - beta2
  float norm_eps;
  bool nesterov, cautious, restore_rms;
};

// One matrix. `source`: float32 [rows, columns]. `moment`, `weights` (float32), `second` (float32 [rows]) may be null;
// `out` (of the iteration's type, [rows, columns]) is used when there are no `weights` to update in place. Bit i of
// `starts`: X is brought up to date before iteration i; between two of them only its Gram matrix is.
struct Matrix {
  const float* source;
  float* moment;
  void* out;
  float* weights;
  float* second;
  int64_t rows, columns;
  uint64_t starts;
  float step;

  bool starts_at(int64_t i) const { return i == 0 || starts >> i & 1; }
};

// Words of 32 bits per panel; the depth is whole panels because tiles are stored whole.
template <class E>
int64_t pitch_of(int64_t depth) {
  return up(depth, LANES) * LANES / E::PACK * LANES;
}

struct Sizes {
  int64_t n, m, small, wide, tall, temporary, result, sums;

  template <class E>
  static Sizes of(int64_t rows, int64_t columns, bool keeps_result) {
    Sizes s{};
    s.n = std::min(rows, columns);
    s.m = std::max(rows, columns);
    s.small = up(s.n, LANES) * pitch_of<E>(s.n);
    s.wide = up(s.n, LANES) * pitch_of<E>(s.m);
    s.tall = up(s.m, LANES) * pitch_of<E>(s.n);
    s.temporary = up(pitch_of<E>(s.n) + 8 * LANES, 16) * 16;
    s.result = keeps_result ? up(rows * columns * (int64_t)sizeof(typename E::Value), 64) * 16 : 0;
    s.sums = up(std::max(rows, columns) * 2 + 2, 16) * 16;
    return s;
  }
  // The prefetch of a product runs a few rows past its panel.
  int64_t shared() const { return 4 * small + wide + tall + result + sums + 16 * LANES; }
};

// ---- one matrix ----

template <class E>
struct Work {
  const Options& o;
  const Matrix& x;
  Member me;
  Sizes s;
  Packed small[4], by_row, by_column;  // by_row: lanes are rows of the wide X; by_column: its columns
  uint32_t* temporary;                 // this thread's
  typename E::Value* result;           // kept for the row statistics
  double* sums;                        // per source row
  bool turned;                         // the source is tall

  Work(const Options& options, const Matrix& matrix, Member member, uint32_t* shared, uint32_t* own)
      : o(options), x(matrix), me(member), temporary(own), turned(matrix.rows > matrix.columns) {
    s = Sizes::of<E>(x.rows, x.columns, x.second != nullptr);
    for (auto& p : small) p = take(shared, s.small, s.n);
    by_row = take(shared, s.wide, s.m);
    by_column = take(shared, s.tall, s.n);
    result = (typename E::Value*)shared;
    sums = (double*)(shared + s.result);
  }

  static Packed take(uint32_t*& from, int64_t words, int64_t depth) {
    Packed p{from, up(depth, E::PACK), pitch_of<E>(depth)};
    from += words;
    return p;
  }

  static int registers(int64_t left) { return (int)std::min<int64_t>(3, up(left, 16)); }

  // u of 16 entries, and with `write` the new momentum.
  __m512 input(int64_t at, __mmask16 k, bool write) const {
    __m512 g = _mm512_maskz_loadu_ps(k, x.source + at);
    if (o.weight < 0) return g;
    __m512 M = _mm512_maskz_loadu_ps(k, x.moment + at);
    if (write) {
      M = _mm512_fmadd_ps(_mm512_set1_ps(o.weight), _mm512_sub_ps(g, M), M);
      _mm512_mask_storeu_ps(x.moment + at, k, M);
    }
    if (!o.nesterov) return M;
    return _mm512_fnmadd_ps(_mm512_sub_ps(M, g), _mm512_set1_ps(o.weight), M);
  }

  // Advance the momentum and return what the input is multiplied by.
  float factor() {
    me.each(up(x.rows, 32), [&](int64_t q) {
      for (int64_t i = 32 * q; i < std::min(x.rows, 32 * q + 32); i++) sums[i] = advance_row(i * x.columns);
    });
    float norm = (float)std::sqrt(std::accumulate(sums, sums + x.rows, 0.0));
    float d = o.div * norm + o.eps;
    return 1 / (d < std::numeric_limits<float>::min() ? std::numeric_limits<float>::min() : d);  // keeps a NaN
  }

  // The new momentum of a row; the sum of the squares of its u.
  float advance_row(int64_t at) const {
    __m512 total[4];
    for (auto& t : total) t = _mm512_setzero_ps();
    int64_t j = 0;
    for (; j + 64 <= x.columns; j += 64)
#pragma GCC unroll 4
      for (int r = 0; r < 4; r++) {
        __m512 u = input(at + j + 16 * r, 0xffff, true);
        total[r] = _mm512_fmadd_ps(u, u, total[r]);
      }
    for (; j < x.columns; j += 16) {
      __m512 u = input(at + j, lanes(x.columns - j), true);
      total[0] = _mm512_fmadd_ps(u, u, total[0]);
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(total[0], total[1]), _mm512_add_ps(total[2], total[3])));
  }

  // X = factor u, rounded once, in both packed forms.
  void load(float factor) {
    Packed& direct = turned ? by_row : by_column;
    Packed& other = turned ? by_column : by_row;
    __m512 scale = _mm512_set1_ps(factor);
    me.each(6 * up(x.rows, LANES), [&](int64_t p) {
      alignas(64) float tile[ROWS * LANES];
      for (int64_t q = 0; q < up(x.columns, LANES); q++) {
        for (int64_t i = 0; i < ROWS; i++)
          for (int64_t j = 0; j < LANES; j += 16) {
            int64_t row = ROWS * p + i, column = LANES * q + j;
            __mmask16 k = row < x.rows ? lanes(x.columns - column) : 0;
            __m512 u = k ? input(row * x.columns + column, k, false) : _mm512_setzero_ps();
            _mm512_store_ps(tile + i * LANES + j, _mm512_maskz_mul_ps(k, u, scale));
          }
        store_direct<E>(tile, direct.panel(q) + ROWS * p / E::PACK * LANES, 3);
        store_turned<E>(tile, other.rows(p) + LANES * q / E::PACK * LANES, 3);
      }
    });
  }

  // out = alpha L R + beta D for a symmetric result; D may be absent.
  void symmetric(Packed& out, const Packed& L, const Packed& R, float alpha, const Packed* D, float beta) {
    int64_t panels = up(s.n, LANES);
    me.each(panels, [&](int64_t reverse) {
      int64_t q = panels - 1 - reverse;  // the longest first
      int count = registers(s.n - LANES * q);
      alignas(64) float tile[ROWS * LANES] = {}, block[LANES * LANES] = {};
      for (int64_t p = 0; p < 6 * q; p++) {
        product<E>(L.rows(p), R.panel(q), L.words, 0, count, tile);
        uint32_t* to = out.panel(q) + ROWS * p / E::PACK * LANES;
        if (D) combine<E>(tile, alpha, D->panel(q) + ROWS * p / E::PACK * LANES, beta, 0, count);
        store_direct<E>(tile, to, count);
        store_turned<E>(tile, out.rows(p) + LANES * q / E::PACK * LANES, count);
      }
      for (int64_t i = 0; i < LANES; i += ROWS) {  // the diagonal: the upper half, then its mirror image
        int first = (int)(i / 16);
        if (first >= count) break;
        product<E>(L.rows(6 * q + i / ROWS), R.panel(q), L.words, first, count - first, block + i * LANES);
        if (D)
          combine<E>(block + i * LANES, alpha, D->panel(q) + (LANES * q + i) / E::PACK * LANES, beta, first,
                     count - first);
      }
      for (int64_t i = 0; i < LANES; i++)
        for (int64_t j = 0; j < i; j++) block[i * LANES + j] = block[j * LANES + i];
      for (int64_t i = 0; i < LANES; i += ROWS)
        store_direct<E>(block + i * LANES, out.panel(q) + (LANES * q + i) / E::PACK * LANES, 3);
    });
  }

  // X = a X + B X.
  void update(const Packed& B, float a) {
    me.each(up(s.m, LANES), [&](int64_t q) {
      alignas(64) float tile[ROWS * LANES] = {};
      int count = registers(s.m - LANES * q);
      uint32_t* panel = by_column.panel(q);
      std::memcpy(temporary, panel, (size_t)by_column.pitch * 4);
      for (int64_t p = 0; p < up(s.n, ROWS); p++) {
        product<E>(B.rows(p), temporary, B.words, 0, count, tile);
        if (a != 0) combine<E>(tile, 1, temporary + ROWS * p / E::PACK * LANES, a, 0, count);
        store_direct<E>(tile, panel + ROWS * p / E::PACK * LANES, count);
        store_turned<E>(tile, by_row.rows(p) + LANES * q / E::PACK * LANES, count);
      }
    });
  }

  // The last X = a X + B X, in the source's orientation, to where it is wanted.
  void finish(const Packed& B, float a) {
    const Packed& L = turned ? by_column : B;
    const Packed& R = turned ? B : by_column;
    const Packed& D = turned ? by_row : by_column;
    const char* to = x.second ? (char*)result : x.weights ? (char*)x.weights : (char*)x.out;
    int64_t width = x.weights && !x.second ? 4 : (int64_t)sizeof(typename E::Value);
    me.each(up(x.columns, LANES), [&](int64_t q) {
      alignas(64) float tile[ROWS * LANES];
      int64_t j0 = LANES * q;
      int count = registers(x.columns - j0);
      std::memcpy(temporary, R.panel(q), (size_t)R.pitch * 4);
      for (int64_t p = 0; p < up(x.rows, ROWS); p++) {
        int64_t i0 = ROWS * p, height = std::min(ROWS, x.rows - i0);
        for (int64_t i = 0; i < height; i++)  // a product takes long enough to hide the way from memory
          for (int64_t j = j0; j < std::min(x.columns, j0 + LANES); j += 16)
            __builtin_prefetch(to + ((i0 + i) * x.columns + j) * width, 1);
        product<E>(L.rows(p), temporary, R.words, 0, count, tile);
        if (a != 0) combine<E>(tile, 1, D.panel(q) + i0 / E::PACK * LANES, a, 0, count);
        for (int64_t i = 0; i < height; i++)
          for (int64_t j = j0; j < std::min(x.columns, j0 + LANES); j += 16) {
            __m512 O = _mm512_load_ps(tile + i * LANES + j - j0);
            int64_t at = (i0 + i) * x.columns + j;
            __mmask16 k = lanes(x.columns - j);
            if (x.second)
              E::store(result + at, k, O);
            else if (x.weights)
              apply(at, k, E::round(O), x.step);
            else
              E::store((typename E::Value*)x.out + at, k, O);
          }
      }
    });
  }

  // p = keep p - step u; cautious: only entries with u p >= 0 decay.
  void apply(int64_t at, __mmask16 k, __m512 u, float step) const {
    __m512 p = _mm512_maskz_loadu_ps(k, x.weights + at);
    __mmask16 decays = k;
    if (o.cautious) decays = _mm512_mask_cmp_ps_mask(k, _mm512_mul_ps(u, p), _mm512_setzero_ps(), _CMP_GE_OQ);
    p = _mm512_mask_mul_ps(p, decays, p, _mm512_set1_ps(o.keep));
    _mm512_mask_storeu_ps(x.weights + at, k, _mm512_fnmadd_ps(_mm512_set1_ps(step), u, p));
  }

  // NorMuon: v = lerp(v, mean O^2 of the row, advance); O / (sqrt(v) + eps), brought back to its norm; the update.
  void apply_by_row() {
    double* divided = sums + x.rows;
    me.each(up(x.rows, 32), [&](int64_t q) {
      for (int64_t i = 32 * q; i < std::min(x.rows, 32 * q + 32); i++) {
        __m512 total[2] = {};
        for (int64_t j = 0, r = 0; j < x.columns; j += 16, r++) {
          __m512 O = E::load(result + i * x.columns + j, lanes(x.columns - j));
          total[r % 2] = _mm512_fmadd_ps(O, O, total[r % 2]);
        }
        sums[i] = _mm512_reduce_add_ps(_mm512_add_ps(total[0], total[1]));
        float& v = x.second[i];
        v += o.advance * ((float)(sums[i] / (double)x.columns) - v);
        double d = std::sqrt(v) + o.norm_eps;
        divided[i] = sums[i] / (d * d);
      }
    });
    double before = std::sqrt(std::accumulate(sums, sums + x.rows, 0.0));
    double after = std::sqrt(std::accumulate(divided, divided + x.rows, 0.0)) + o.norm_eps;
    if (o.restore_rms) before = 0.2 * std::sqrt((double)(x.rows * x.columns));
    double factor = x.step * before / after;
    me.each(up(x.rows, 32), [&](int64_t q) {
      for (int64_t i = 32 * q; i < std::min(x.rows, 32 * q + 32); i++) {
        float step = (float)(factor / (std::sqrt(x.second[i]) + o.norm_eps));
        for (int64_t j = 0; j < x.columns; j += 16) {
          int64_t at = i * x.columns + j;
          __mmask16 k = lanes(x.columns - j);
          apply(at, k, E::load(result + at, k), step);
        }
      }
    });
  }

  // out = S + a I.
  void shifted(Packed& out, const Packed& S, float a) {
    me.each(up(s.n, LANES), [&](int64_t q) {
      std::memcpy(out.panel(q), S.panel(q), (size_t)S.pitch * 4);
      for (int64_t i = LANES * q; i < std::min(s.n, LANES * q + LANES); i++) {
        uint32_t* word = out.panel(q) + i / E::PACK * LANES + i - LANES * q;
        typename E::Value* v = (typename E::Value*)word + i % E::PACK;
        E::store(v, 1, _mm512_add_ps(E::load(v, 1), _mm512_set1_ps(a)));
      }
    });
  }

  // B of X = a X + B X.
  Packed& one_step(const Step& step, float& a) {
    symmetric(small[0], by_row, by_row, 1, nullptr, 0);
    symmetric(small[1], small[0], small[0], step.c, &small[0], step.b);
    a = step.a;
    return small[1];
  }

  // Q of X = Q X for the steps first .. end-1, from the Gram matrix of X alone.
  Packed& polynomial(int64_t first, int64_t end) {
    Packed &R = small[0], &Z = small[1], *Q = &small[2], *T = &small[3];
    symmetric(R, by_row, by_row, 1, nullptr, 0);
    for (int64_t i = first; i < end; i++) {
      const Step& step = o.steps[i];
      symmetric(Z, R, R, step.c, &R, step.b);
      if (i == first) {
        shifted(*Q, Z, step.a);
      } else {
        symmetric(*T, *Q, Z, 1, Q, step.a);
        std::swap(Q, T);
      }
      if (i + 1 < end) {
        symmetric(*T, R, Z, 1, &R, step.a);
        symmetric(R, Z, *T, 1, T, step.a);
      }
    }
    return *Q;
  }

  void run() {
    load(factor());
    for (int64_t i = 0, end; i < o.step_count; i = end) {
      for (end = i + 1; end < o.step_count && !x.starts_at(end);) end++;
      float a = 0;
      Packed& B = i + 1 == end ? one_step(o.steps[i], a) : polynomial(i, end);
      if (end < o.step_count)
        update(B, a);
      else
        finish(B, a);
    }
    if (x.second) apply_by_row();
  }
};

int64_t flops(const Matrix& x, const Options& o) {
  int64_t n = std::min(x.rows, x.columns), m = std::max(x.rows, x.columns);
  return n * n * (3 * m + n) * o.step_count;
}

// Team size: the least number of rounds times the work of one, with a tenth lost per doubling.
int64_t members_for(int64_t count, int64_t threads) {
  int64_t best = 1;
  double least = 1e300;
  for (int64_t size = 1; size <= threads; size++) {
    double rounds = (double)up(count, threads / size) / (double)size * (1 + 0.1 * std::log2((double)size));
    if (rounds < least * 0.999) least = rounds, best = size;
  }
  return best;
}

template <class E>
int run_all(const Options& o, std::vector<Matrix>& all, int64_t threads) {
  int64_t shared = 0, own = 0;
  double work = 0;
  for (const Matrix& x : all) {
    Sizes s = Sizes::of<E>(x.rows, x.columns, x.second != nullptr);
    shared = std::max(shared, s.shared());
    own = std::max(own, s.temporary);
    work += (double)flops(x, o);
  }
  // Starting a thread costs about as much as some ten million operations.
  threads = std::max<int64_t>(1, std::min<int64_t>(threads, (int64_t)(work / 2e7)));
  std::sort(all.begin(), all.end(), [&](const Matrix& a, const Matrix& b) { return flops(a, o) > flops(b, o); });
  int64_t count = (int64_t)all.size(), size = members_for(count, threads), teams = std::min(count, threads / size);
  shared = up(shared, 16) * 16;
  Arena arena((size_t)(teams * (shared + size * own)) * 4);
  if (!arena.ok()) return -1;
  std::atomic<int64_t> next{0};
  std::vector<int64_t> current((size_t)teams);
  int64_t phases = 8 + 6 * o.step_count;
  std::vector<std::unique_ptr<Team>> group;
  for (int64_t t = 0; t < teams; t++) group.push_back(std::make_unique<Team>(size, phases));
  std::atomic<int> go{0};  // 1: work; -1: a thread could not be started, and a team does not work with one missing
  auto body = [&](int64_t t, int64_t index) {
    while (go.load() == 0) std::this_thread::yield();
    Team& team = *group[(size_t)t];
    uint32_t* base = arena.data() + t * (shared + size * own);
    while (go.load() > 0) {
      if (index == 0) {
        current[(size_t)t] = next.fetch_add(1);
        for (auto& counter : team.next) counter = 0;
      }
      team.wait();
      int64_t i = current[(size_t)t];
      if (i >= count) break;
      Work<E>(o, all[(size_t)i], Member{team}, base, base + shared + index * own).run();
      team.wait();
    }
  };
  std::vector<std::thread> pool;
  try {
    for (int64_t w = 1; w < teams * size; w++) pool.emplace_back(body, w / size, w % size);
    go = 1;
    body(0, 0);
  } catch (const std::system_error&) {
    go = -1;
  }
  for (auto& t : pool) t.join();
  return go > 0 ? 0 : run_all<E>(o, all, 1);
}

}  // namespace

#pragma GCC pop_options
#pragma GCC diagnostic pop

// Bit 0: float32 here is faster than a general product; bit 1: bfloat16 is too (that is, there is no AMX).
extern "C" int diloco_orthogonal_supported() {
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
    return 0;
  unsigned a = 0, b = 0, c = 0, d = 0;
  bool amx = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
  return 1 | (__builtin_cpu_supports("avx512bf16") && !amx ? 2 : 0);
}

// `table`: per matrix source, moment, out, weights, second (addresses or 0), rows, columns, starts. `scalars`: div, eps,
// weight (below 0: no momentum), keep, advance, norm_eps. `flags`: 1 bfloat16, 2 nesterov, 4 cautious, 8 restore_rms.
// `triples`: a, b, c per iteration. Returns 0, or -1 when there is no memory for the work (nothing is written then).
extern "C" int diloco_orthogonal(int64_t count, const int64_t* table, const float* step, int64_t iterations,
                                 const float* triples, const float* scalars, int64_t flags, int64_t threads) {
  Options o{};
  o.steps = (const Step*)triples;
  o.step_count = iterations;
  o.div = scalars[0];
  o.eps = scalars[1];
  o.weight = scalars[2];
  o.keep = scalars[3];
  o.advance = scalars[4];
  o.norm_eps = scalars[5];
  o.nesterov = flags & 2;
  o.cautious = flags & 4;
  o.restore_rms = flags & 8;
  std::vector<Matrix> all;
  for (int64_t i = 0; i < count; i++, table += 8)
    all.push_back({(const float*)table[0], (float*)table[1], (void*)table[2], (float*)table[3], (float*)table[4],
                   table[5], table[6], (uint64_t)table[7], step[i]});
  return flags & 1 ? run_all<BFloat16>(o, all, threads) : run_all<Float32>(o, all, threads);
}

#else

extern "C" int diloco_orthogonal_supported() { return 0; }
extern "C" int diloco_orthogonal(std::int64_t, const std::int64_t*, const float*, std::int64_t, const float*,
                                 const float*, std::int64_t, std::int64_t) {
  return -1;
}

#endif
