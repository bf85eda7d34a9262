// What the kernels share that compute row by row: R rows of D numbers. T is float or double, as in elementwise.cu.
//
// One block computes a row at a time and strides over the rows; its threads stride over the columns. Any number of blocks is
// right, and any power of two of threads up to MAX_THREADS; with rows that are kept, from WARP threads on. All sums have an
// order that depends on D and the threads alone: no atomics, the same bits every time. Branches around a barrier depend on the
// row or on an argument, never on the thread.

#define MAX_THREADS 1024
#define EACH_ROW(r, R) for (long long r = blockIdx.x; r < (R); r += gridDim.x)
#define EACH_COLUMN(j, D) for (long long j = threadIdx.x; j < (D); j += blockDim.x)

struct Sum {
    static __device__ T of(T a, T b) { return a + b; }
};
struct Largest {
    static __device__ T of(T a, T b) { return a > b ? a : b; }
};

__device__ T *one_for_each_thread()
{
    __shared__ T part[MAX_THREADS];
    return part;
}

// The values of all threads of the block, joined four by four, so that few barriers are met: the same result for every thread.
template <class Join> __device__ T across(T value)
{
    T *part = one_for_each_thread();
    const unsigned int t = threadIdx.x;
    __syncthreads();  // everybody has read the result of the call before
    part[t] = value;
    for (unsigned int left = blockDim.x; left > 1; left /= 4) {
        const unsigned int n = left > 2 ? left / 4 : 1;
        __syncthreads();
        if (t < n) {
            value = Join::of(part[t], part[t + n]);
            part[t] = left > 2 ? Join::of(value, Join::of(part[t + 2 * n], part[t + 3 * n])) : value;
        }
    }
    __syncthreads();
    return part[0];
}

// A row in work. A thread reads KEPT of its columns together, 64 bytes, and they stay in its registers from pass to pass: up to
// KEPT x MOST_KEEPING numbers come from memory once, 4,096 of float. Columns that are left, of longer rows, come again in every
// pass. A warp keeps KEPT x WARP columns beside each other: with a step that the compiler knows, one address serves for all of
// them, and a third fewer registers are needed than with the block's step.
#ifndef WARP
#define WARP 32
#endif
#define KEPT (64 / (int)sizeof(T))
#define MOST_KEEPING 256  // threads of a block, as launch.py knows
#define EACH_KEPT(k, j)                                                                                  \
    for (int k = 0, j = threadIdx.x / WARP * (KEPT * WARP) + threadIdx.x % WARP; k < KEPT; ++k, j += WARP)
#define EACH_LEFT(j, D) for (long long j = KEPT * (long long)blockDim.x + threadIdx.x; j < (D); j += blockDim.x)

// Of the D columns those from `least` on, before `open`, are read; the others hold `absent`. All do, where `from` is null.
struct Row {
    T kept[KEPT];
    const T *from;
    const long long D, least, open;
    const T absent;

    __device__ Row(const T *from, long long D, long long least, long long open, T absent)
        : from(from), D(D), least(least), open(open), absent(absent)
    {
        #pragma unroll
        EACH_KEPT(k, j)
            kept[k] = read(j);
    }

    __device__ Row(const T *from, long long D) : Row(from, D, 0, D, T(0)) {}

    __device__ bool has(long long j) const { return j >= least && j < open; }

    __device__ T read(long long j) const { return from && has(j) ? from[j] : absent; }

    // x_j = f(j, x_j); in columns that are not kept `to` holds it, which may be where they are. f is called for more columns
    // than there are, too, with `absent`: without a branch the exps of a thread are computed side by side.
    template <class F> __device__ void change(T *to, const F &f)
    {
        #pragma unroll
        EACH_KEPT(k, j)
            kept[k] = f(j, kept[k]);
        EACH_LEFT(j, D)
            to[j] = f(j, read(j));
        from = to;
    }
};

// visit(j, what each of the rows has in column j), for every column of the thread; all rows have as many
template <class Visit, class... Rows> __device__ void each(const Visit &visit, const Row &row, const Rows &... rows)
{
    #pragma unroll
    EACH_KEPT(k, j)
        if (j < row.D)
            visit(j, row.kept[k], rows.kept[k]...);
    EACH_LEFT(j, row.D)
        visit(j, row.read(j), rows.read(j)...);
}
