// see /tmp/notice_q.txt
// NOTICE TO Q FROM THE FOUNDER: the project has a fixed rule "no compiled extension of ours": no C++ of ours, not even compiled at run time. compiled.py has to use torch.compile (inductor's C++ backend) on plain torch
// functions instead of compiled.cpp/ctypes. Please replace it: same public face (parts of a matrix in one call is a good idea: keep it), few dynamic-shape graphs (one per format and dtype), and announce a missing compiler.
// If cold compile time is the problem: disable what is not needed (config.cpp settings, no precompiled headers, fewer variants: nearest/stochastic as one graph with bits passed in where it costs nothing, ...), eager for small matrices
// so that tests and tiny runs never wait for the compiler, and measure. Delete compiled.cpp. Then remove this notice.
// The quantiser of operands on a CPU: what operand.py, nvfp4.py, mx.py, hadamard.py and rounding.py
// compute, with their FP32 operations in their order, in two passes over a matrix: `largest` finds
// the largest magnitude, `encode` does the rest.
//
// A matrix is worked on in bands of as many rows as a block is long, 128 columns at a time, which
// stay in the L1 cache. Every inner loop has a constant length and no branch, for the vectoriser.
// Compiled by compiled.py with -ffp-contract=off: a fused multiply-add would round once too seldom.

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

constexpr int64_t WIDTH = 128;  // columns at a time
constexpr int HADAMARD = 16;

// Magnitudes are compared by their bits: the order of the integers is theirs, NaN above all.
constexpr uint32_t MAGNITUDE = 0x7fffffff, EXPONENT = 0x7f800000, FRACTION = 0x007fffff,
                   NOT_A_NUMBER = 0x7fc00000;

enum Along : int64_t { COLUMNS, ROWS, BOTH };

// The layouts of `Part` and `Job` are known to compiled.py.

struct Part {  // consecutive rows that are a matrix of their own
    int64_t row, rows;
    int64_t out_row, out_rows;  // where its operand goes; rows beyond its own are zero
    int64_t key0, key1;
};

struct Job {
    const void *x;
    void *values;
    const Part *parts;
    const float *signs;        // of the Hadamard transform, with its factor; null: none
    const int32_t *column_of;  // place of every column in the whole matrix; null: its number
    int64_t stride;            // of x, between rows
    int64_t columns;
    int64_t num_parts;
    int64_t along;
    int64_t first_row, counter_width;  // of the counter of random bits
    int64_t threads;
};

float as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
uint32_t as_bits(float v) { return std::bit_cast<uint32_t>(v); }
uint32_t magnitude(float v) { return as_bits(v) & MAGNITUDE; }

float widen(float v) { return v; }
float widen(uint16_t bf16) { return as_float(uint32_t(bf16) << 16); }

template <class T> T narrow(float v);
template <> float narrow(float v) { return v; }
template <> uint16_t narrow(float v) {  // to nearest even; NaN stays NaN
    uint32_t bits = as_bits(v), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return uint16_t((bits & MAGNITUDE) > EXPONENT ? bits >> 16 | 0x40 : rounded);
}

struct E2M1 {
    static constexpr int mantissa_bits = 1;
    static constexpr float max = 6, smallest = 1;
};
struct E4M3 {
    static constexpr int mantissa_bits = 3;
    static constexpr float max = 448, smallest = 0x1p-6f;
};

template <class E> float round_nearest(float v) {
    v = v > E::max ? E::max : v;
    v = v < -E::max ? -E::max : v;
    float top = as_float(as_bits(v) & EXPONENT);
    top = top < E::smallest ? E::smallest : top;
    float shift = top * (1.5f * float(1 << (23 - E::mantissa_bits)));
    return (v + shift) - shift;
}

template <class E> float round_stochastic(float v, uint32_t random) {
    constexpr int dropped = 23 - E::mantissa_bits;
    float m = as_float(magnitude(v));
    m = m > E::max ? E::max : m;
    bool low = m < E::smallest;
    m = low ? m + E::smallest : m;
    uint32_t bits = std::min(as_bits(m), NOT_A_NUMBER);
    m = as_float((bits + (random >> (32 - dropped))) & -(1u << dropped));
    m = low ? m - E::smallest : m;
    m = m > E::max ? E::max : m;
    return as_float(as_bits(m) | (as_bits(v) & ~MAGNITUDE));
}

uint32_t random_bits(uint32_t counter, uint32_t key0, uint32_t key1) {
    uint32_t x = (counter ^ key0) * uint32_t(-1640531535);
    x = ((x ^ x >> 15) + key1) * uint32_t(-2048144777);
    return (x ^ x >> 13) * uint32_t(-1028477379);
}

struct NVFP4 {
    using Element = E2M1;
    static constexpr int BLOCK = 16;
    float encode = 1, decode, sixth;

    explicit NVFP4(float amax) {
        encode = 2688.0f / amax;
        encode = encode > __FLT_MAX__ ? __FLT_MAX__ : encode;
        if (amax == 0 || encode == 0) encode = 1;
        decode = 1.0f / encode;
        sixth = encode * (1.0f / 6);
    }
    // What a block's elements are multiplied with, and what its codes are.
    void scale(uint32_t peak, float &multiplier, float &scale) const {
        float wanted = as_float(peak) * sixth;
        scale = round_nearest<E4M3>(wanted > __FLT_MAX__ ? __FLT_MAX__ : wanted);
        multiplier = 1.0f / (scale * decode);
        multiplier = multiplier > __FLT_MAX__ ? __FLT_MAX__ : multiplier;
    }
};

struct MXFP8 {
    using Element = E4M3;
    static constexpr int BLOCK = 32;

    explicit MXFP8(float) {}
    static float exp2(int e) { return as_float(e == -127 ? 1u << 22 : uint32_t(e + 127) << 23); }
    void scale(uint32_t peak, float &multiplier, float &scale) const {
        uint32_t bits = as_bits(as_float(peak) / E4M3::max);  // rceil
        uint32_t above = (bits & EXPONENT) == 0 ? 1u << 22 : 0;
        int e = int(bits >> 23) - 127 + ((bits & FRACTION) > above ? 1 : 0);
        e = e > 127 ? 127 : e;
        multiplier = exp2(-e);
        scale = exp2(e);
    }
};

template <int ROWS_> using Band = float[ROWS_][WIDTH];

// Pease's order; see hadamard.py.
template <class T> void transform(float (*v)[WIDTH], const float *signs) {
    float other[HADAMARD][WIDTH];
    for (int r = 0; r < HADAMARD; r++)
        for (int c = 0; c < WIDTH; c++) other[r][c] = v[r][c] * signs[r];
    float(*from)[WIDTH] = other, (*to)[WIDTH] = v;
    for (int stage = 1; stage < HADAMARD; stage *= 2) {
        for (int r = 0; r < HADAMARD / 2; r++)
            for (int c = 0; c < WIDTH; c++) {
                float even = from[2 * r][c], odd = from[2 * r + 1][c];
                to[r][c] = even + odd;
                to[r + HADAMARD / 2][c] = even - odd;
            }
        std::swap(from, to);
    }
    for (int r = 0; r < HADAMARD; r++)
        for (int c = 0; c < WIDTH; c++) v[r][c] = widen(narrow<T>(from[r][c]));
}

// Rows from `row` of a part on, columns from `column` on; zero outside.
template <class T, int ROWS_>
void load(const Job &job, const Part &part, int64_t row, int64_t column, Band<ROWS_> &v) {
    int64_t rows = std::min<int64_t>(ROWS_, part.rows - row);
    int64_t columns = std::min(WIDTH, job.columns - column);
    for (int r = 0; r < ROWS_; r++) {
        const T *x = static_cast<const T *>(job.x) + (part.row + row + r) * job.stride + column;
        if (r < rows && columns == WIDTH)
            for (int c = 0; c < WIDTH; c++) v[r][c] = widen(x[c]);
        else
            for (int c = 0; c < WIDTH; c++) v[r][c] = r < rows && c < columns ? widen(x[c]) : 0.0f;
    }
    if (job.signs)
        for (int r = 0; r < ROWS_; r += HADAMARD) transform<T>(v + r, job.signs);
}

// The bits of the largest magnitude of every block of a band: of the whole band and `BLOCK`
// columns, of its rows' `BLOCK` columns, or of its columns. Either way there are at most WIDTH.
template <int BLOCK> void peaks(const Band<BLOCK> &v, int64_t along, uint32_t (&peak)[WIDTH]) {
    if (along == COLUMNS) {
        for (int r = 0; r < BLOCK; r++)
            for (int b = 0; b < WIDTH / BLOCK; b++) {
                uint32_t m = 0;
                for (int c = 0; c < BLOCK; c++) m = std::max(m, magnitude(v[r][b * BLOCK + c]));
                peak[r * (WIDTH / BLOCK) + b] = m;
            }
        return;
    }
    for (int c = 0; c < WIDTH; c++) peak[c] = 0;
    for (int r = 0; r < BLOCK; r++)
        for (int c = 0; c < WIDTH; c++) peak[c] = std::max(peak[c], magnitude(v[r][c]));
    if (along == BOTH)
        for (int b = 0; b < WIDTH; b += BLOCK) {
            uint32_t m = *std::max_element(peak + b, peak + b + BLOCK);
            std::fill(peak + b, peak + b + BLOCK, m);
        }
}

template <class Format, bool STOCHASTIC, class T>
void encode_row(const float *v, const float *multiplier, const float *scale, uint32_t row_counter,
                const uint32_t *column_of, const Part &part, T *values) {
    using Element = typename Format::Element;
    for (int c = 0; c < WIDTH; c++) {
        float scaled = v[c] * multiplier[c], code;
        if constexpr (STOCHASTIC)
            code = round_stochastic<Element>(
                scaled, random_bits(row_counter + column_of[c], uint32_t(part.key0), uint32_t(part.key1)));
        else
            code = round_nearest<Element>(scaled);
        values[c] = narrow<T>(code * scale[c]);
    }
}

// Returns the bits of the largest magnitude.
template <class Format, bool STOCHASTIC, class T>
uint32_t encode_band(const Job &job, const Part &part, int64_t row, const Format &format) {
    constexpr int BLOCK = Format::BLOCK, BLOCKS = WIDTH / BLOCK;
    int64_t rows = std::min<int64_t>(BLOCK, part.out_rows - row);
    uint32_t largest = 0;
    for (int64_t column = 0; column < job.columns; column += WIDTH) {
        int64_t columns = std::min(WIDTH, job.columns - column);
        Band<BLOCK> v;
        load<T, BLOCK>(job, part, row, column, v);
        uint32_t peak[WIDTH], column_of[WIDTH] = {};
        float multipliers[WIDTH], scales[WIDTH], spread[2][WIDTH];
        peaks<BLOCK>(v, job.along, peak);
        for (int i = 0; i < WIDTH; i++) format.scale(peak[i], multipliers[i], scales[i]);
        for (int i = 0; i < WIDTH; i++) largest = std::max(largest, peak[i]);
        if (STOCHASTIC)
            for (int c = 0; c < columns; c++)
                column_of[c] = uint32_t(job.column_of ? job.column_of[column + c] : column + c);
        const float *multiplier = multipliers, *scale = scales;
        for (int r = 0; r < rows; r++) {
            if (job.along == COLUMNS) {
                for (int b = 0; b < BLOCKS; b++)
                    for (int c = 0; c < BLOCK; c++) {
                        spread[0][b * BLOCK + c] = multipliers[r * BLOCKS + b];
                        spread[1][b * BLOCK + c] = scales[r * BLOCKS + b];
                    }
                multiplier = spread[0], scale = spread[1];
            }
            T *values = static_cast<T *>(job.values) +
                        (part.out_row + row + r) * job.columns + column;
            T part_of_row[WIDTH];
            encode_row<Format, STOCHASTIC, T>(
                v[r], multiplier, scale, uint32_t((job.first_row + row + r) * job.counter_width),
                column_of, part, columns == WIDTH ? values : part_of_row);
            if (columns < WIDTH) std::copy_n(part_of_row, columns, values);
        }
    }
    return largest;
}

template <class T> uint32_t largest_of_band(const Job &job, const Part &part, int64_t row) {
    uint32_t largest = 0;
    if (job.signs) {
        for (int64_t column = 0; column < job.columns; column += WIDTH) {
            Band<HADAMARD> v;
            load<T, HADAMARD>(job, part, row, column, v);
            for (auto &line : v)
                for (float each : line) largest = std::max(largest, magnitude(each));
        }
        return largest;
    }
    int64_t end = std::min(row + HADAMARD, part.rows);
    for (int64_t r = row; r < end; r++) {
        const T *x = static_cast<const T *>(job.x) + (part.row + r) * job.stride;
        for (int64_t c = 0; c < job.columns; c++)
            largest = std::max(largest, magnitude(widen(x[c])));
    }
    return largest;
}

// Calls work(number of the part, first row) for every band of `size` rows, on several threads, and
// raises amax[part] to what it returns.
template <class Work> void for_bands(const Job &job, int64_t size, float *amax, Work work) {
    auto bands = [&](const Part &part) { return (part.out_rows + size - 1) / size; };
    int64_t total = 0;
    for (int64_t p = 0; p < job.num_parts; p++) total += bands(job.parts[p]);
    auto run = [&](int64_t from, int64_t to) {
        int64_t before = 0;
        for (int64_t p = 0; p < job.num_parts; p++) {
            int64_t count = bands(job.parts[p]);
            uint32_t largest = 0;
            for (int64_t b = std::max<int64_t>(0, from - before); b < std::min(count, to - before); b++)
                largest = std::max(largest, work(p, b * size));
            before += count;
            std::atomic_ref<float> shared(amax[p]);
            float old = shared;
            while (as_bits(old) < largest && !shared.compare_exchange_weak(old, as_float(largest))) {}
        }
    };
    int64_t threads = std::min(job.threads, total);
    std::vector<std::thread> others;
    for (int64_t t = 1; t < threads; t++)
        others.emplace_back(run, total * t / threads, total * (t + 1) / threads);
    run(0, total / std::max<int64_t>(1, threads));
    for (auto &other : others) other.join();
}

template <class Format, bool STOCHASTIC, class T> void encode(const Job &job, float *amax) {
    constexpr bool REPORTS = Format::BLOCK == MXFP8::BLOCK;
    for_bands(job, Format::BLOCK, amax, [&](int64_t p, int64_t row) {
        Format format(REPORTS ? 0 : amax[p]);
        uint32_t largest = encode_band<Format, STOCHASTIC, T>(job, job.parts[p], row, format);
        return REPORTS ? largest : 0;
    });
}

}  // namespace

// amax: one number per part, zero at first.
extern "C" void largest(const Job *job, bool bf16, float *amax) {
    for_bands(*job, HADAMARD, amax, [&](int64_t p, int64_t row) {
        auto of_band = bf16 ? largest_of_band<uint16_t> : largest_of_band<float>;
        return of_band(*job, job->parts[p], row);
    });
}

// amax: what `largest` gave, for NVFP4; zero at first for MXFP8, which needs none and reports it.
extern "C" void encode(const Job *job, bool bf16, bool mxfp8, bool stochastic, float *amax) {
    auto choose = [&]<class Format>(Format *) {
        if (bf16)
            (stochastic ? encode<Format, true, uint16_t> : encode<Format, false, uint16_t>)(*job, amax);
        else
            (stochastic ? encode<Format, true, float> : encode<Format, false, float>)(*job, amax);
    };
    mxfp8 ? choose((MXFP8 *)nullptr) : choose((NVFP4 *)nullptr);
}
