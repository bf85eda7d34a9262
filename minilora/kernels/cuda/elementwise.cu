// Elementwise kernels. T is float or double: launch.py compiles this text once for each, with the type in the place of the T at
// the end of every name. All loops stride over the whole grid, so any launch shape computes every element.

#define GRID_LOOP(i, n)                                                              \
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < (n);    \
         i += (long long)gridDim.x * blockDim.x)

// Four numbers that one load of 16 bytes brings (of doubles, two), where their address allows it. A thread that reads so much
// before it computes keeps enough on the way to hide memory's answer: 4,096 x 3,072 numbers, read and written, are 30 us of an
// H100's memory, with a gradient beside 45.
struct alignas(16) Four {
    T of[4];
};

__device__ bool aligned(const T *x) { return (unsigned long long)x % 16 == 0; }

// The four from place i on, a multiple of 4, of n numbers: zeros behind them.
__device__ Four read(const T *x, long long i, long long n)
{
    if (aligned(x) && i + 4 <= n)
        return *(const Four *)(x + i);
    Four four;
    for (int k = 0; k < 4; ++k)
        four.of[k] = i + k < n ? x[i + k] : T(0);
    return four;
}

__device__ void write(T *y, long long i, long long n, const Four &four)
{
    if (aligned(y) && i + 4 <= n)
        *(Four *)(y + i) = four;
    else
        for (int k = 0; k < 4 && i + k < n; ++k)
            y[i + k] = four.of[k];
}

// y_i = f(x_i, ...) for n numbers, four by a thread
template <class F, class... Inputs> __device__ void by_fours(T *y, long long n, const F &f, const Inputs *... inputs)
{
    GRID_LOOP(block, (n + 3) / 4) {
        [&](const auto &... fours) {
            Four result;
            #pragma unroll
            for (int k = 0; k < 4; ++k)
                result.of[k] = f(fours.of[k]...);
            write(y, 4 * block, n, result);
        }(read(inputs, 4 * block, n)...);
    }
}

// optim/adam.py, adam_update: seven passes over memory in all (read theta, g, m, v; write theta, m, v). In a recorded step the
// last three numbers come from memory, where `sizes`, `epses` and `keeps` point; else these are null.
extern "C" __global__ void adam_T(T *theta, const T *g, T *m, T *v, long long n, T beta1, T beta2, T size, T eps, T keep,
                                  const T *sizes, const T *epses, const T *keeps)
{
    if (sizes) {
        size = sizes[0];
        eps = epses[0];
        keep = keeps[0];
    }
    GRID_LOOP(i, n) {
        const T gi = g[i];
        const T mi = beta1 * m[i] + gi;
        const T vi = beta2 * v[i] + gi * gi;
        m[i] = mi;
        v[i] = vi;
        theta[i] = keep * theta[i] - size * mi / (sqrt(vi) + eps);
    }
}

// ops/activation.py, GELU: t = c x (1 + a x^2), where |x| > 10 is taken as 10: tanh is 1 there, and x^2 could overflow
#define NEAR(x) ((x) > T(10) ? T(10) : (x) < T(-10) ? T(-10) : (x))

extern "C" __global__ void gelu_T(const T *x, T *y, long long n)
{
    const T c = T(0.79788456080286535588), a = T(0.044715);
    by_fours(y, n, [=](T v) {
        const T near = NEAR(v);
        return T(0.5) * v * (T(1) + tanh(c * near * (T(1) + a * near * near)));
    }, x);
}

extern "C" __global__ void gelu_backward_T(const T *x, const T *dy, T *dx, long long n)
{
    const T c = T(0.79788456080286535588), a = T(0.044715);
    by_fours(dx, n, [=](T v, T dv) {
        const T near = NEAR(v);
        const T th = tanh(c * near * (T(1) + a * near * near));
        const T slope = c * (T(1) + T(3) * a * near * near);
        return dv * (T(0.5) * (T(1) + th) + T(0.5) * v * (T(1) - th * th) * slope);
    }, x, dy);
}

// ops/erf.py, normal: Phi(x), and e^(-x^2/2) = sqrt(2 pi) Phi'(x). launch.py puts the table there into PHI_P, PHI_Q, PHI_END.
__device__ T phi(T x, T *bell)
{
    const T far = x >= T(0) ? x : -x, t = far > T(PHI_END) ? T(PHI_END) : far;  // both comparisons let a NaN through
    const T h = rint(t * T(16)) / T(16);
    *bell = exp(T(-0.5) * h * h) * exp(T(-0.5) * (t - h) * (t + h));
    const T tail = *bell * (PHI_P(t) / PHI_Q(t));
    return x >= T(0) ? T(1) - tail : tail;
}

// ops/activation.py, ExactGELU
extern "C" __global__ void exact_gelu_T(const T *x, T *y, long long n)
{
    by_fours(y, n, [](T v) {
        T bell;
        return v * phi(v, &bell);
    }, x);
}

extern "C" __global__ void exact_gelu_backward_T(const T *x, const T *dy, T *dx, long long n)
{
    const T density = T(0.39894228040143267794);  // 1 / sqrt(2 pi)
    by_fours(dx, n, [=](T v, T dv) {
        T bell;
        const T share = phi(v, &bell);
        return dv * (share + density * v * bell);
    }, x, dy);
}

// ops/activation.py, SiLU: from e^-|x|, so that nothing overflows
__device__ T logistic(T x)
{
    const T e = exp(x >= T(0) ? -x : x);
    return (x >= T(0) ? T(1) : e) / (T(1) + e);
}

extern "C" __global__ void silu_T(const T *x, T *y, long long n)
{
    by_fours(y, n, [](T v) { return v * logistic(v); }, x);
}

extern "C" __global__ void silu_backward_T(const T *x, const T *dy, T *dx, long long n)
{
    by_fours(dx, n, [](T v, T dv) {
        const T p = logistic(v);
        return dv * (p + v * p * (T(1) - p));
    }, x, dy);
}

// optim/sgd.py; v may be null
extern "C" __global__ void sgd_T(T *theta, const T *g, T *v, long long n, T lr, T momentum, T weight_decay, const T *lrs)
{
    if (lrs)  // a recorded step
        lr = lrs[0];
    GRID_LOOP(i, n) {
        T h = g[i];
        if (weight_decay != T(0))  // 0 times an infinite weight would be NaN
            h = h + weight_decay * theta[i];
        if (v) {
            h = momentum * v[i] + h;
            v[i] = h;
        }
        theta[i] -= lr * h;
    }
}

// ops/philox.py and ops/dropout.py: one thread makes four words of Philox4x32-10 and the four factors of the mask.
// 4,096 x 3,072 factors are 15 us of an H100's memory.
extern "C" __global__ void dropout_mask_T(T *mask, long long n, unsigned long long seed, unsigned long long step,
                                              unsigned int threshold, T scale, const unsigned long long *steps)
{
    if (steps)  // a recorded step
        step = steps[0];
    GRID_LOOP(block, (n + 3) / 4) {
        unsigned int c0 = (unsigned int)block, c1 = (unsigned int)(block >> 32);
        unsigned int c2 = (unsigned int)step, c3 = (unsigned int)(step >> 32);
        unsigned int k0 = (unsigned int)seed, k1 = (unsigned int)(seed >> 32);
        for (int round = 0; round < 10; ++round) {
            const unsigned long long p0 = 0xD2511F53ull * c0, p1 = 0xCD9E8D57ull * c2;
            const unsigned int n0 = (unsigned int)(p1 >> 32) ^ c1 ^ k0, n2 = (unsigned int)(p0 >> 32) ^ c3 ^ k1;
            c0 = n0;
            c1 = (unsigned int)p1;
            c2 = n2;
            c3 = (unsigned int)p0;
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        const unsigned int words[4] = {c0, c1, c2, c3};
        Four factors;
        for (int j = 0; j < 4; ++j)
            factors.of[j] = (words[j] >> 8) >= threshold ? scale : T(0);
        write(mask, 4 * block, n, factors);
    }
}

// quant/halves.py, narrowed: float32 to the bits of 16, to nearest and ties to even, by whole numbers: no header, no cast of
// the card's own, and no flushing of small numbers. What is too large becomes infinite, what is no number stays none.
struct alignas(8) FourShorts {
    unsigned short of[4];
};

// y_i = f(the bits of x_i), four by a thread
template <class F> __device__ void to_16_bits(const T *x, unsigned short *y, long long n, const F &f)
{
    const bool together = (unsigned long long)y % 8 == 0;
    GRID_LOOP(block, (n + 3) / 4) {
        const Four four = read(x, 4 * block, n);
        FourShorts result;
        #pragma unroll
        for (int k = 0; k < 4; ++k) {
            const float number = float(four.of[k]);
            unsigned int bits;
            memcpy(&bits, &number, sizeof bits);
            result.of[k] = (unsigned short)f(bits);
        }
        if (together && 4 * block + 4 <= n)
            *(FourShorts *)(y + 4 * block) = result;
        else
            for (int k = 0; k < 4 && 4 * block + k < n; ++k)
                y[4 * block + k] = result.of[k];
    }
}

extern "C" __global__ void to_bfloat16_T(const T *x, unsigned short *y, long long n)
{
    to_16_bits(x, y, n, [](unsigned int b) {
        const bool none = (b & 0x7fffffffu) > 0x7f800000u;
        return none ? (b >> 16) | 0x40u : (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
    });
}

extern "C" __global__ void to_float16_T(const T *x, unsigned short *y, long long n)
{
    to_16_bits(x, y, n, [](unsigned int b) {
        const unsigned int sign = (b >> 16) & 0x8000u, a = b & 0x7fffffffu;
        if (a > 0x7f800000u)
            return sign | 0x7e00u;
        if (a >= 0x477ff000u)  // 65520 and more are nearer to 65536, which is infinite here
            return sign | 0x7c00u;
        if (a >= 0x38800000u)  // 2^-14 and more: the exponent counts from 15 in place of 127, 13 bits less follow
            return sign | ((a + 0xfffu + ((a >> 13) & 1u) - 0x38000000u) >> 13);
        if (a <= 0x33000000u)  // 2^-25 and less
            return sign;
        const unsigned int shift = 126u - (a >> 23), whole = (a & 0x7fffffu) | 0x800000u, middle = 1u << (shift - 1u);
        const unsigned int rest = whole & (2u * middle - 1u), h = whole >> shift;  // in steps of 2^-24
        return sign | (h + (rest > middle || (rest == middle && (h & 1u)) ? 1u : 0u));
    });
}
