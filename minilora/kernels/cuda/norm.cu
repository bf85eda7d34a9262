// Normalisation of rows. A row is read once and written once: LayerNorm of 4,096 rows of 768 is 25 MB, 7.5 us of an H100's
// memory, and its backward 38 MB, 11.3 us.
//
// Two blocks of 256 threads, or as many smaller ones, find room beside each other: with 96 registers for the three rows.
#include "block.cuh"

// ops/norm.py, LayerNorm; without `mean`, RMSNorm. w and b may be null. rstd is q there.
extern "C" __global__ void __launch_bounds__(MOST_KEEPING, 2)
norm_T(const T *x, const T *w, const T *b, T *y, T *mean, T *rstd, T eps, long long R, long long D)
{
    const Row weights(w, D), shifts(b, D);
    EACH_ROW(r, R) {
        const Row row(x + r * D, D);
        T sum = T(0), squares = T(0);
        if (mean)
            each([&](long long, T v) { sum += v; }, row);
        const T m = mean ? across<Sum>(sum) / T(D) : T(0);
        each([&](long long, T v) { squares += (v - m) * (v - m); }, row);
        const T q = T(1) / sqrt(across<Sum>(squares) / T(D) + eps);
        each([&](long long j, T v, T weight, T shift) {
            const T xhat = (v - m) * q;
            y[r * D + j] = (w ? xhat * weight : xhat) + shift;
        }, row, weights, shifts);
        if (threadIdx.x == 0) {
            if (mean)
                mean[r] = m;
            rstd[r] = q;
        }
    }
}

// dx = q (g - mean(g) - xhat mean(g xhat)) with g = dy w; without `mean`, RMSNorm: the middle term is absent
extern "C" __global__ void __launch_bounds__(MOST_KEEPING, 2)
norm_backward_T(const T *dy, const T *x, const T *w, const T *mean, const T *rstd, T *dx, long long R, long long D)
{
    const Row weights(w, D);
    EACH_ROW(r, R) {
        const Row dyr(dy + r * D, D), xr(x + r * D, D);
        const T m = mean ? mean[r] : T(0), q = rstd[r];
        T sum = T(0), along = T(0);
        each([&](long long, T dv, T v, T weight) {
            const T g = w ? dv * weight : dv;
            sum += g;
            along += g * ((v - m) * q);
        }, dyr, xr, weights);
        const T mean_g = mean ? across<Sum>(sum) / T(D) : T(0), mean_along = across<Sum>(along) / T(D);
        each([&](long long j, T dv, T v, T weight) {
            const T g = w ? dv * weight : dv;
            dx[r * D + j] = q * (g - mean_g - (v - m) * q * mean_along);
        }, dyr, xr, weights);
    }
}

// Sums of dy (to db) and of dy xhat (to dw) over `chunk` rows at a time: dw and db are (chunks, D), and may be null. Without
// dw, x, mean and rstd are not read. A thread adds up one column of one chunk; its neighbours have the columns beside it.
extern "C" __global__ void column_sums_T(const T *dy, const T *x, const T *mean, const T *rstd, T *dw, T *db, long long chunk,
                                         long long R, long long D)
{
    const long long chunks = (R + chunk - 1) / chunk;
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < chunks * D; i += step) {
        const long long j = i % D, first = i / D * chunk, stop = first + chunk < R ? first + chunk : R;
        T along = T(0), sum = T(0);
        for (long long r = first; r < stop; ++r) {
            sum += dy[r * D + j];
            if (dw)
                along += dy[r * D + j] * ((x[r * D + j] - (mean ? mean[r] : T(0))) * rstd[r]);
        }
        if (dw)
            dw[i] = along;
        if (db)
            db[i] = sum;
    }
}
