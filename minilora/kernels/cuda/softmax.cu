// Softmax of rows, and the softmax of attention. A row is read once and written once. Four blocks of 256 threads, or as many
// smaller ones, find room beside each other, with 64 registers: 64 KB are on their way to a multiprocessor, and 18 would do.
#include "block.cuh"

// ops/softmax.py, Softmax, along the rows
extern "C" __global__ void __launch_bounds__(MOST_KEEPING, 4)
softmax_T(const T *x, T *y, long long R, long long D)
{
    EACH_ROW(r, R) {
        Row row(x + r * D, D, 0, D, log(T(0)));  // e^-infinity adds nothing to a sum
        T *yr = y + r * D, largest = x[r * D], sum = T(0);
        each([&](long long, T v) { largest = Largest::of(v, largest); }, row);
        largest = across<Largest>(largest);
        row.change(yr, [&](long long, T v) {
            const T e = exp(v - largest);
            sum += e;
            return e;
        });
        const T share = T(1) / across<Sum>(sum);  // a division takes as long as an exp
        each([&](long long j, T e) { yr[j] = e * share; }, row);
    }
}

// dx = y (dy - sum of dy y). The last half of the queries of 8 texts of 512 and 12 heads: 151 MB, 45 us of an H100's memory;
// the first half, which see half of the keys: 75 MB, 23 us.
extern "C" __global__ void __launch_bounds__(MOST_KEEPING, 4)
softmax_backward_T(const T *y, const T *dy, T *dx, long long R, long long D)
{
    EACH_ROW(r, R) {
        const Row yr(y + r * D, D), dyr(dy + r * D, D);
        T sum = T(0);
        each([&](long long, T v, T dv) { sum += dv * v; }, yr, dyr);
        sum = across<Sum>(sum);
        each([&](long long j, T v, T dv) { dx[r * D + j] = v * (dv - sum); }, yr, dyr);
    }
}

// ops/attention.py, P of a block of scores z: R rows, `queries` of them for each of the matrices (heads of texts), the first
// being query `first` of `all`. Query t sees those of the D keys from t + behind to t + ahead. `mask` (may be null) is added to
// z: its steps lead from text to text of `heads` heads, head to head, query to query, key to key. m and n: (matrices, all).
#define QUERY                                                                                        \
    const long long t = first + r % queries, i = r / queries, place = i * all + t;                   \
    const long long open = t + ahead + 1 < D ? t + ahead + 1 : D, least = t + behind;                \
    const T *masks = mask ? mask + i / heads * to_text + i % heads * to_head + r % queries * to_query : mask;

// The last half of the queries of 8 texts of 512 and 12 heads: 38 MB read and 50 written, 26 us of an H100's memory, as keys
// behind the diagonal are not read; the first half: 13 and 25 MB, 11 us.
extern "C" __global__ void __launch_bounds__(MOST_KEEPING, 4)
masked_softmax_T(T *z, const T *mask, T *m, T *n, T lowest, long long first, long long queries, long long all, long long ahead,
                 long long behind, long long heads, long long to_text, long long to_head, long long to_query, long long to_key,
                 long long R, long long D)
{
    EACH_ROW(r, R) {
        QUERY
        T *zr = z + r * D, high = lowest, sum = T(0);
        Row row(zr, D, least, open, log(T(0)));
        row.change(zr, [&](long long j, T v) {
            if (masks && row.has(j))
                v += masks[j * to_key];
            high = Largest::of(v, high);
            return v;
        });
        high = across<Largest>(high);
        row.change(zr, [&](long long, T v) {
            const T e = exp(v - high);
            sum += e;
            return e;
        });
        sum = across<Sum>(sum);
        if (sum == T(0))  // nothing may be attended
            sum = T(1);
        const T share = T(1) / sum;
        each([&](long long j, T e) { zr[j] = row.has(j) ? e * share : T(0); }, row);
        if (threadIdx.x == 0) {
            m[place] = high;
            n[place] = sum;
        }
    }
}

// The same P once more, from m and n: every number by itself, and as many bytes
extern "C" __global__ void __launch_bounds__(MOST_KEEPING, 4)
masked_exp_T(T *z, const T *mask, const T *m, const T *n, long long first, long long queries, long long all, long long ahead,
             long long behind, long long heads, long long to_text, long long to_head, long long to_query, long long to_key,
             long long R, long long D)
{
    EACH_ROW(r, R) {
        QUERY
        T *zr = z + r * D;
        const T high = m[place], share = T(1) / n[place];
        Row row(zr, D, least, open, log(T(0)));
        row.change(zr, [&](long long j, T v) {
            if (masks && row.has(j))
                v += masks[j * to_key];
            return exp(v - high) * share;
        });
        each([&](long long j, T p) { zr[j] = row.has(j) ? p : T(0); }, row);
    }
}
