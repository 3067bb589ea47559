// The CPU's kernels: moments, shrink and fused optimizer steps, each one pass over memory, all layers in one call.
//
// Layers are cut into blocks, threads take blocks, and a block is worked on row by row. A row fits the first-level
// cache, so what is done to it one loop after another reads and writes memory once. Sums run in float over a row, whose
// few additions in each lane lose nothing, and in double over rows and blocks, in an order that depends neither on the
// number of threads nor on the caller: a fused step leaves the very sums that measuring its weights would find.
//
// Compiled when first needed, for the machine it runs on; see toolchain.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int ROW = 512;
constexpr int64_t BLOCK = 32 * ROW;
constexpr int AHEAD = 2 * ROW;  // how far ahead of a row its successors are asked for, where a pass is but one stream

// Sixteen floats, in as many registers as the machine needs for them.
using Lanes = float __attribute__((vector_size(64), aligned(4), may_alias));
using LaneBits = int32_t __attribute__((vector_size(64)));
using DoubleLanes = double __attribute__((vector_size(128)));
constexpr int LANES = 16;

struct bfloat16 {
  uint16_t bits;
};

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// --- a row as floats -------------------------------------------------------------------------------------------------

// A float row is worked on in place.
inline const float* open(const float* row, float*, int) { return row; }
inline float* open(float* row, float*, int) { return row; }
inline void close(float*, const float*, int) {}

inline float* open(const bfloat16* row, float* copy, int n) {
  for (int i = 0; i < n; i++) copy[i] = float_of(uint32_t{row[i].bits} << 16);
  return copy;
}

// Rounds to nearest, ties to even, as torch's conversion does.
inline void close(bfloat16* row, const float* copy, int n) {
  for (int i = 0; i < n; i++) {
    const uint32_t bits = bits_of(copy[i]);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    row[i].bits = static_cast<uint16_t>(copy[i] != copy[i] ? (bits >> 16) | 0x40 : rounded);
  }
}

// Hardware alone keeps seven streams busy, but not one.
inline void prefetch(const float* row) {
  for (int i = 0; i < ROW; i += LANES) __builtin_prefetch(row + AHEAD + i);
}

inline void prefetch(const bfloat16* row) {
  for (int i = 0; i < ROW; i += 2 * LANES) __builtin_prefetch(row + AHEAD + i);
}

// --- what is done to a row -------------------------------------------------------------------------------------------

inline Lanes load(const float* p) { return *reinterpret_cast<const Lanes*>(p); }
inline Lanes magnitude(Lanes x) { return (Lanes)((LaneBits)x & 0x7fffffff); }

// Sums of m = |w| and m^2, lane by lane.
struct Sums {
  DoubleLanes m{}, q{};
};

// Not inlined, so that every caller gets the same instructions and the same bits.
__attribute__((noinline)) void add_up(const float* w, int n, Sums& sums) {
  Lanes m0{}, m1{}, m2{}, m3{}, q0{}, q1{}, q2{}, q3{};
  const auto add = [&](const float* p) {
    const Lanes a = magnitude(load(p)), b = magnitude(load(p + LANES));
    const Lanes c = magnitude(load(p + 2 * LANES)), d = magnitude(load(p + 3 * LANES));
    m0 += a, m1 += b, m2 += c, m3 += d;
    q0 += a * a, q1 += b * b, q2 += c * c, q3 += d * d;
  };
  int i = 0;
  for (; i + 4 * LANES <= n; i += 4 * LANES) add(w + i);
  if (i < n) {
    float rest[4 * LANES] = {};
    std::copy(w + i, w + n, rest);
    add(rest);
  }
  sums.m += __builtin_convertvector((m0 + m1) + (m2 + m3), DoubleLanes);
  sums.q += __builtin_convertvector((q0 + q1) + (q2 + q3), DoubleLanes);
}

inline void shrink(float* w, int n, float gain, float threshold) {
  for (int i = 0; i < n; i++) {
    const float above = w[i] < -threshold ? -threshold : w[i];
    const float clamped = above > threshold ? threshold : above;
    w[i] = (w[i] - clamped) * gain;
  }
}

// Bijection of 32-bit integers whose output looks random (Wellons' lowbias32).
inline uint32_t scramble(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

struct Rounding {
  bool stochastic;
  uint64_t seed;

  // Key of a row's random bits, from its layer and the index of its first weight.
  uint32_t key(int64_t layer, int64_t start) const {
    uint64_t x = seed + 0x9e3779b97f4a7c15u * (static_cast<uint64_t>(layer) + 1) + static_cast<uint64_t>(start / ROW);
    for (int round = 0; round < 2; round++) {  // splitmix64
      x += 0x9e3779b97f4a7c15u;
      x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
      x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
      x ^= x >> 31;
    }
    return static_cast<uint32_t>(x);
  }
};

inline void round_row(float*, float*, int, const Rounding&, uint32_t) {}

// Brings floats onto bfloat16's grid, to finite values where they were finite before.
inline void round_row(bfloat16* row, float* w, int n, const Rounding& rounding, uint32_t key) {
  constexpr uint32_t INFINITE = 0x7f800000, LARGEST = 0x7f7f0000, SIGN = 0x80000000;
  uint32_t noise[ROW];
  for (int i = 0; rounding.stochastic && i < ROW / 2; i++) {
    const uint32_t word = scramble(key + 0x9e3779b9u * static_cast<uint32_t>(i + 1));
    noise[i] = word & 0xffff;
    noise[i + ROW / 2] = word >> 16;
  }
  for (int i = 0; i < n; i++) {
    const uint32_t before = uint32_t{row[i].bits} << 16, bits = bits_of(w[i]);
    const uint32_t add = rounding.stochastic ? noise[i] : 0x7fff + ((bits >> 16) & 1);
    const uint32_t rounded = std::min(((bits & ~SIGN) + add) & 0xffff0000u, LARGEST) | (bits & SIGN);
    w[i] = float_of((before & INFINITE) == INFINITE ? before : rounded);
  }
}

struct AdamW {
  static constexpr int COEFFICIENTS = 5;
  float sign, rate1, beta2, rate2, eps;

  void operator()(float* __restrict p, const float* __restrict g, float* __restrict m, float* __restrict v, int n,
                  const float* c) const {
    const float decay = c[2], step = c[3], root = c[4];
    for (int i = 0; i < n; i++) {
      const float gradient = sign * g[i];
      const float mean = m[i] + (gradient - m[i]) * rate1;
      const float square = beta2 * v[i] + rate2 * gradient * gradient;
      p[i] = p[i] * decay - step * mean / (std::sqrt(square) * root + eps);
      m[i] = mean;
      v[i] = square;
    }
  }
};

struct SGD {
  static constexpr int COEFFICIENTS = 3;
  float sign, weight_decay, momentum, fresh;
  bool nesterov;

  void operator()(float* __restrict p, const float* __restrict g, float* __restrict b, float*, int n,
                  const float* c) const {
    const float lr = c[2];
    if (b == nullptr) {
      for (int i = 0; i < n; i++) p[i] -= lr * (sign * g[i] + weight_decay * p[i]);
      return;
    }
    for (int i = 0; i < n; i++) {
      const float gradient = sign * g[i] + weight_decay * p[i];
      const float buffer = momentum * b[i] + fresh * gradient;
      p[i] -= lr * (nesterov ? gradient + momentum * buffer : buffer);
      b[i] = buffer;
    }
  }
};

// --- all rows of all layers ------------------------------------------------------------------------------------------

struct Layers {
  int64_t count;
  const int64_t* addresses;  // stream by stream
  const int64_t* sizes;
  std::vector<int64_t> first;  // block of every layer, and their number

  Layers(int64_t count, const int64_t* addresses, const int64_t* sizes)
      : count(count), addresses(addresses), sizes(sizes), first(count + 1) {
    for (int64_t i = 0; i < count; i++) first[i + 1] = first[i] + (sizes[i] + BLOCK - 1) / BLOCK;
  }

  template <class T>
  T* stream(int index, int64_t layer) const {
    return reinterpret_cast<T*>(addresses[index * count + layer]);
  }
};

// Calls work(block, layer, begin, end) for every block.
template <class Work>
void for_blocks(const Layers& layers, int threads, const Work& work) {
  const int64_t blocks = layers.first.back();
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t block = 0; block < blocks; block++) {
    const int64_t layer = std::upper_bound(layers.first.begin(), layers.first.end(), block) - layers.first.begin() - 1;
    const int64_t begin = (block - layers.first[layer]) * BLOCK;
    work(block, layer, begin, std::min(begin + BLOCK, layers.sizes[layer]));
  }
}

inline int row_length(int64_t start, int64_t end) { return static_cast<int>(std::min<int64_t>(ROW, end - start)); }

struct BlockSums {
  std::vector<double> sums;

  explicit BlockSums(const Layers& layers) : sums(2 * layers.first.back()) {}
  void set(int64_t block, const Sums& lanes) {
    for (int i = 0; i < LANES; i++) {
      sums[2 * block] += lanes.m[i];
      sums[2 * block + 1] += lanes.q[i];
    }
  }

  void finish(const Layers& layers, double* result) const {
    for (int64_t layer = 0; layer < layers.count; layer++)
      for (int64_t block = layers.first[layer]; block < layers.first[layer + 1]; block++)
        for (int moment = 0; moment < 2; moment++) result[2 * layer + moment] += sums[2 * block + moment];
  }
};

template <class T>
void sum_all(const Layers& layers, double* result, int threads) {
  BlockSums sums(layers);
  for_blocks(layers, threads, [&](int64_t block, int64_t layer, int64_t begin, int64_t end) {
    Sums lanes;
    float copy[ROW];
    for (int64_t start = begin; start < end; start += ROW) {
      const T* row = layers.stream<T>(0, layer) + start;
      const int n = row_length(start, end);
      prefetch(row);
      add_up(open(row, copy, n), n, lanes);
    }
    sums.set(block, lanes);
  });
  sums.finish(layers, result);
}

template <class T>
void shrink_all(const Layers& layers, const float* gain, const float* threshold, Rounding rounding, int threads) {
  for_blocks(layers, threads, [&](int64_t, int64_t layer, int64_t begin, int64_t end) {
    if (gain[layer] == 1.0f && threshold[layer] == 0.0f) return;
    float copy[ROW];
    for (int64_t start = begin; start < end; start += ROW) {
      T* row = layers.stream<T>(0, layer) + start;
      const int n = row_length(start, end);
      prefetch(row);
      float* w = open(row, copy, n);
      shrink(w, n, gain[layer], threshold[layer]);
      round_row(row, w, n, rounding, rounding.key(layer, start));
      close(row, w, n);
    }
  });
}

template <class T, class Update>
void update_all(const Layers& layers, int streams, const float* coefficients, const Update& update, Rounding rounding,
                double* result, int threads) {
  BlockSums sums(layers);
  for_blocks(layers, threads, [&](int64_t block, int64_t layer, int64_t begin, int64_t end) {
    const float* c = coefficients + Update::COEFFICIENTS * layer;
    Sums lanes;
    float copies[4][ROW];
    for (int64_t start = begin; start < end; start += ROW) {
      const int n = row_length(start, end);
      T* rows[4] = {};
      float* opened[4] = {};
      for (int s = 0; s < streams; s++) {
        rows[s] = layers.stream<T>(s, layer) + start;
        opened[s] = open(rows[s], copies[s], n);
      }
      if (c[0] != 1.0f || c[1] != 0.0f) {
        shrink(opened[0], n, c[0], c[1]);
        round_row(rows[0], opened[0], n, rounding, rounding.key(layer, start));
      }
      update(opened[0], opened[1], opened[2], opened[3], n, c);
      for (int s = 0; s < streams; s++)
        if (s != 1) close(rows[s], opened[s], n);
      add_up(open(rows[0], copies[0], n), n, lanes);
    }
    sums.set(block, lanes);
  });
  sums.finish(layers, result);
}

}  // namespace

// --- the library's functions -----------------------------------------------------------------------------------------

extern "C" {

void wcr_sums(int64_t count, const int64_t* addresses, const int64_t* sizes, int narrow, int threads, double* result) {
  const Layers layers(count, addresses, sizes);
  narrow ? sum_all<bfloat16>(layers, result, threads) : sum_all<float>(layers, result, threads);
}

void wcr_shrink(int64_t count, const int64_t* addresses, const int64_t* sizes, int narrow, int threads,
                const float* gain, const float* threshold, int stochastic, uint64_t seed) {
  const Layers layers(count, addresses, sizes);
  const Rounding rounding{stochastic != 0, seed};
  narrow ? shrink_all<bfloat16>(layers, gain, threshold, rounding, threads)
         : shrink_all<float>(layers, gain, threshold, rounding, threads);
}

void wcr_adamw(int64_t count, const int64_t* addresses, const int64_t* sizes, int narrow, int threads,
               const float* coefficients, const float* constants, int stochastic, uint64_t seed, double* result) {
  const Layers layers(count, addresses, sizes);
  const Rounding rounding{stochastic != 0, seed};
  const AdamW update{constants[0], constants[1], constants[2], constants[3], constants[4]};
  narrow ? update_all<bfloat16>(layers, 4, coefficients, update, rounding, result, threads)
         : update_all<float>(layers, 4, coefficients, update, rounding, result, threads);
}

void wcr_sgd(int64_t count, const int64_t* addresses, const int64_t* sizes, int narrow, int threads,
             const float* coefficients, const float* constants, int nesterov, int stochastic, uint64_t seed,
             double* result) {
  const Layers layers(count, addresses, sizes);
  const Rounding rounding{stochastic != 0, seed};
  const SGD update{constants[0], constants[1], constants[2], constants[3], nesterov != 0};
  const int streams = constants[2] != 0.0f ? 3 : 2;
  narrow ? update_all<bfloat16>(layers, streams, coefficients, update, rounding, result, threads)
         : update_all<float>(layers, streams, coefficients, update, rounding, result, threads);
}

}  // extern "C"
