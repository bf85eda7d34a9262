// Sums over the rows that have one id, as trees whose shape depends on nothing but how many such rows there are.
#include "block.cuh"

// ops/embedding.py: rows 0 .. R - 1 in the order of their ids, those of one id in their own; and at the place of the first row
// of an id how many have it, 0 at all others. A row's place is the number of rows before it, which a block counts: R^2
// comparisons in all, nothing whose size depends on the ids, and no block waits for another. Numbers of double count exactly.
// D is R.
extern "C" __global__ void __launch_bounds__(MAX_THREADS)
order_by_id_T(const long long *ids, long long *order, long long *lengths, long long R, long long D)
{
    EACH_ROW(r, R) {
        const long long id = ids[r];
        T smaller = T(0), earlier = T(0), equal = T(0);
        EACH_COLUMN(m, D) {
            const long long other = ids[m];
            smaller += other < id ? T(1) : T(0);
            equal += other == id ? T(1) : T(0);
            earlier += other == id && m < r ? T(1) : T(0);
        }
        smaller = across<Sum>(smaller);
        equal = across<Sum>(equal);
        earlier = across<Sum>(earlier);
        if (threadIdx.x == 0) {
            const long long place = (long long)smaller + (long long)earlier;
            order[place] = r;
            lengths[place] = earlier == T(0) ? (long long)equal : 0;
        }
    }
}

#ifndef COLUMNS
#define COLUMNS 32  // of a row that a block reads side by side: 128 bytes of float
#endif
#define DEEPEST 64  // of a tree over as many rows as 64 bits count

// The rows order[0] .. order[n - 1] of one column, added up as a binary tree: each sum of 2^k rows that begin at a multiple of
// 2^k is made once, and the shorter ones at the end are joined from right to left.
__device__ T tree_sum(const T *g, const long long *order, long long n, long long D)
{
    T left[DEEPEST];
    int waiting = 0;
    for (long long i = 0; i < n; ++i) {
        T sum = g[order[i] * D];
        for (long long pairs = i; pairs & 1; pairs >>= 1)
            sum = left[--waiting] + sum;
        left[waiting++] = sum;
    }
    T sum = left[--waiting];
    while (waiting)
        sum = left[--waiting] + sum;
    return sum;
}

// out[id] = the sum of the rows of g (n, D) with that id; ids below 0, from V on and `without` are left out. `out` has its rows
// `to_row` and its columns `to_column` apart. A block adds up COLUMNS columns of one id; its threads share long trees by their
// branches of 2^k rows, and then go up the trunk, so that the sum is the same however many threads there are.
extern "C" __global__ void __launch_bounds__(MAX_THREADS)
sums_by_id_T(const T *g, const long long *ids, const long long *order, const long long *lengths, T *out, long long without,
             long long V, long long to_row, long long to_column, long long R, long long D)
{
    const long long columns = blockDim.x < COLUMNS ? blockDim.x : COLUMNS, branches = blockDim.x / columns;
    const long long wide = (D + columns - 1) / columns, own = threadIdx.x / columns;
    T *part = one_for_each_thread();
    EACH_ROW(u, R * wide) {
        const long long p = u / wide, j = u % wide * columns + threadIdx.x % columns, n = lengths[p], id = ids[order[p]];
        if (n == 0 || id == without || id < 0 || id >= V)
            continue;
        long long size = 1;
        while (size * branches < n)
            size *= 2;
        const long long first = own * size, rest = n - first;
        T sum = T(0);
        if (j < D && rest > 0)
            sum = tree_sum(g + j, order + p + first, rest < size ? rest : size, D);
        __syncthreads();  // the sums of the id before are written
        part[threadIdx.x] = sum;
        for (long long step = 1; step * size < n; step *= 2) {
            __syncthreads();
            if (own % (2 * step) == 0 && (own + step) * size < n)
                part[threadIdx.x] += part[threadIdx.x + step * columns];
        }
        if (own == 0 && j < D)
            out[id * to_row + j * to_column] = part[threadIdx.x];
    }
}
