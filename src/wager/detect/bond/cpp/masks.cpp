// Products of rebuilt adjacency rows under a dropout mask that is drawn pair by pair, without the N x N matrix and without storing the mask.
//
// Whether pair (i, j) is dropped is a hash of the row's two keys and the column, so that both directions of the gradient see the same mask. The
// sums over all pairs have a closed form (a small matrix, made by the caller); here the dropped pairs are visited and taken off, a share p of
// them all. A row's sums run in a fixed order, whatever the number of threads.
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {
constexpr int LANES = 8, GROUP = 8;                // dropped pairs that are worked on together
constexpr int64_t ROWS = 32, BLOCK_BYTES = 192 * 1024;  // rows that share a block of columns in cache
typedef float vf __attribute__((vector_size(LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));

template <class V, class T>
inline V load(const T* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

// The finalizer of MurmurHash3: every bit of the input moves every bit of the output.
template <class U>
inline U mixed(U x) {
    x ^= x >> 16;
    x *= 0x85ebca6bu;
    x ^= x >> 13;
    x *= 0xc2b2ae35u;
    return x ^ (x >> 16);
}

// Multiplier (odd) and offset of each row; a pair is dropped when the mixed number, read as signed, lies below `limit`.
struct Mask {
    const uint32_t *multiplier, *offset;
    int32_t limit;
    bool transposed;  // the rows of this pass are the columns of the mask

    bool dropped(int64_t row, int64_t column) const {
        const int64_t i = transposed ? column : row, j = transposed ? row : column;
        return static_cast<int32_t>(mixed(static_cast<uint32_t>(j) * multiplier[i] + offset[i])) < limit;
    }
    vi lanes(int64_t row, int64_t column) const {
        const vu step = {0, 1, 2, 3, 4, 5, 6, 7};
        const vu x = transposed ? static_cast<uint32_t>(row) * load<vu>(multiplier + column) + load<vu>(offset + column)
                                : (step + static_cast<uint32_t>(column)) * multiplier[row] + offset[row];
        return (vi)mixed(x) < limit;
    }
};

#if defined(__AVX2__)
struct Compress {  // for every set of lanes, the lanes in it first
    alignas(32) int32_t lane[256][8];
    Compress() {
        for (int set = 0; set < 256; ++set) {
            int kept = 0;
            for (int l = 0; l < 8; ++l)
                if (set >> l & 1) lane[set][kept++] = l;
            while (kept < 8) lane[set][kept++] = 0;
        }
    }
};
const Compress COMPRESS;
#endif

// The dropped columns of [begin, end) of a row; `out` has room for LANES more than there are columns.
int64_t listed(const Mask& mask, int64_t row, int64_t begin, int64_t end, int32_t* out) {
    int64_t count = 0, j = begin;
#if defined(__AVX2__)
    for (; j + LANES <= end; j += LANES) {
        const vi hit = mask.lanes(row, j);
        __m256i lanes;
        std::memcpy(&lanes, &hit, sizeof lanes);
        const int set = _mm256_movemask_ps(_mm256_castsi256_ps(lanes));
        const __m256i at = _mm256_add_epi32(_mm256_load_si256(reinterpret_cast<const __m256i*>(COMPRESS.lane[set])),
                                            _mm256_set1_epi32(static_cast<int32_t>(j)));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + count), at);
        count += __builtin_popcount(set);
    }
#endif
    for (; j < end; ++j)
        if (mask.dropped(row, j)) out[count++] = static_cast<int32_t>(j);
    return count;
}

// Lane t of the result is the sum of part[t].
inline vf sums(const vf* part) {
#if defined(__AVX2__)
    __m256 p[8];
    std::memcpy(p, part, sizeof p);
    const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(p[0], p[1]), _mm256_hadd_ps(p[2], p[3]));
    const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(p[4], p[5]), _mm256_hadd_ps(p[6], p[7]));
    const __m256 s = _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
    return load<vf>(reinterpret_cast<const float*>(&s));
#else
    vf s;
    for (int t = 0; t < 8; ++t) s[t] = ((part[t][0] + part[t][1]) + (part[t][2] + part[t][3])) + ((part[t][4] + part[t][5]) + (part[t][6] + part[t][7]));
    return s;
#endif
}

// out += sum over the listed columns j of weight_j (a . b_j) b_j. V > 0: so many vectors a row, known to the compiler.
template <int V>
void visit(const float* a, const float* b, const float* weight, const int32_t* at, int64_t count, int64_t vectors, float* out) {
    const int64_t n = V ? V : vectors, stride = n * LANES;
    for (int64_t g = 0; g < count; g += GROUP) {
        const float* row[GROUP];
        vf part[GROUP] = {}, w;
        for (int t = 0; t < GROUP; ++t) row[t] = b + at[g + t] * stride, w[t] = weight[at[g + t]];
        for (int64_t v = 0; v < n; ++v) {
            const vf x = load<vf>(a + v * LANES);
#pragma GCC unroll 8
            for (int t = 0; t < GROUP; ++t) part[t] += x * load<vf>(row[t] + v * LANES);
        }
        const vf scale = sums(part) * w;
        for (int64_t v = 0; v < n; ++v) {
            vf even = load<vf>(out + v * LANES), odd = {};
#pragma GCC unroll 4
            for (int t = 0; t < GROUP; t += 2) even += scale[t] * load<vf>(row[t] + v * LANES), odd += scale[t + 1] * load<vf>(row[t + 1] + v * LANES);
            even += odd;
            std::memcpy(out + v * LANES, &even, sizeof even);
        }
    }
}

using Visit = void (*)(const float*, const float*, const float*, const int32_t*, int64_t, int64_t, float*);
constexpr Visit VISIT[] = {visit<0>, visit<1>, visit<2>, visit<3>, visit<4>, visit<5>};

// Rows of `features` numbers, filled up with zeros to whole vectors, and one row of zeros at the end.
std::vector<float> padded(const float* x, int64_t rows, int64_t features, int64_t vectors) {
    std::vector<float> out(static_cast<size_t>(rows + 1) * vectors * LANES, 0.0f);
    for (int64_t i = 0; i < rows; ++i) std::copy_n(x + i * features, features, out.data() + i * vectors * LANES);
    return out;
}
}  // namespace

extern "C" {

// dropped_RH: sum over the dropped columns j of weight_j (a_i . b_j) b_j.
void wager_mask_dropped(const float* a, const float* b, const float* weight, int64_t rows, int64_t columns, int64_t features,
                        const uint32_t* multiplier, const uint32_t* offset, int32_t limit, int transposed, double* out, int threads) {
    const int64_t vectors = (features + LANES - 1) / LANES, stride = vectors * LANES;
    const std::vector<float> b_pad = padded(b, columns, features, vectors);
    std::vector<float> weight_pad(weight, weight + columns);
    weight_pad.push_back(0.0f);
    const Mask mask{multiplier, offset, limit, transposed != 0};
    const Visit step = VISIT[vectors < static_cast<int64_t>(std::size(VISIT)) ? vectors : 0];
    const int64_t block = std::max<int64_t>(64, BLOCK_BYTES / (stride * 4) / LANES * LANES);
#pragma omp parallel num_threads(threads)
    {
        std::vector<int32_t> at(static_cast<size_t>(block) + 2 * LANES);
        std::vector<float> own(stride, 0.0f), part(stride);
#pragma omp for schedule(dynamic)
        for (int64_t r0 = 0; r0 < rows; r0 += ROWS) {
            const int64_t r1 = std::min(rows, r0 + ROWS);
            std::fill(out + r0 * features, out + r1 * features, 0.0);
            for (int64_t c0 = 0; c0 < columns; c0 += block)
                for (int64_t r = r0; r < r1; ++r) {
                    const int64_t count = listed(mask, r, c0, std::min(columns, c0 + block), at.data());
                    std::fill_n(at.data() + count, LANES, static_cast<int32_t>(columns));
                    std::copy_n(a + r * features, features, own.data());
                    std::fill(part.begin(), part.end(), 0.0f);
                    step(own.data(), b_pad.data(), weight_pad.data(), at.data(), count, vectors, part.data());
                    for (int64_t f = 0; f < features; ++f) out[r * features + f] += part[f];
                }
        }
    }
}

// kept_E: whether the pairs (row, column) of the mask are kept.
void wager_mask_kept(const int64_t* row, const int64_t* column, int64_t pairs, const uint32_t* multiplier, const uint32_t* offset,
                     int32_t limit, uint8_t* out) {
    const Mask mask{multiplier, offset, limit, false};
    for (int64_t e = 0; e < pairs; ++e) out[e] = !mask.dropped(row[e], column[e]);
}
}
