// The body of a kernel: what stream.cu has left in parts is added up, with the adapter's B, a bias and what went in, and
// comes out with its RMSNorm, which the next product reads. A block has a row.
//
// parts (SPLIT, M, N + 16 × RANKS), float32, the last columns A's product; b (R, N) and where as in product.cu, bias (N)
// if BIAS, more (M, N), gamma (N). out (M, N), and normed, its norm.
    constexpr int WARPS = 8, THREADS = 32 * WARPS, RANK = 16 * RANKS, SOME = RANK > 0 ? RANK : 1;
    struct Shared {
        float lows[SOME], squares[WARPS];
    };
    SHARED(Shared, shared);
    auto& lows = shared.lows;
    auto& squares = shared.squares;
    const int N = more_shape[1], m = blockIdx.x, line = N + RANK;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const float* mine = parts + static_cast<size_t>(m) * line;
    const size_t next = static_cast<size_t>(more_shape[0]) * line;
    READY();
    if (threadIdx.x < RANK) {
        float sum = 0.0f;
        for (int s = 0; s < SPLIT; s++) sum += mine[s * next + N + threadIdx.x];
        lows[threadIdx.x] = rounded<T>(sum);
    }
    if (RANK > 0) __syncthreads();
    float x[EACH][8], square = 0.0f;
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        const int n = 8 * (threadIdx.x + THREADS * e);
        if (n >= N) break;
        for (int j = 0; j < 8; j++) x[e][j] = 0.0f;
#pragma unroll
        for (int s = 0; s < SPLIT; s++)
            for (int h = 0; h < 2; h++) {
                const Eight four = load(mine + s * next + n + 4 * h);
                float own[4];
                memcpy(own, &four, 16);
                for (int j = 0; j < 4; j++) x[e][4 * h + j] += own[j];
            }
        const int first = RANK > 0 ? where[n / 16] : -1;
        float y[8];
        for (int r = 0; r < RANK && first >= 0; r++) {
            spread<T>(load(b + static_cast<size_t>(first + r) * N + n), y);
            for (int j = 0; j < 8; j++) x[e][j] += lows[r] * y[j];
        }
        if constexpr (BIAS) {
            spread<T>(load(bias + n), y);
            for (int j = 0; j < 8; j++) x[e][j] += y[j];
        }
        spread<T>(load(more + static_cast<size_t>(m) * N + n), y);
        for (int j = 0; j < 8; j++) {
            x[e][j] = rounded<T>(rounded<T>(x[e][j]) + y[j]);
            square += x[e][j] * x[e][j];
        }
        *reinterpret_cast<Eight*>(out + static_cast<size_t>(m) * N + n) = joined<T>(x[e]);
    }
    for (int o = 16; o > 0; o /= 2) square += __shfl_xor_sync(0xffffffff, square, o);
    if (lane == 0) squares[warp] = square;
    __syncthreads();
    square = 0.0f;
    for (int w = 0; w < WARPS; w++) square += squares[w];
    const float inverse = rsqrtf(square / N + EPS);
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        const int n = 8 * (threadIdx.x + THREADS * e);
        if (n >= N) break;
        float scale[8];
        spread<T>(load(gamma + n), scale);
        for (int j = 0; j < 8; j++) scale[j] *= rounded<T>(x[e][j] * inverse);
        *reinterpret_cast<Eight*>(normed + static_cast<size_t>(m) * N + n) = joined<T>(scale);
    }
