// The body of a kernel: outputs of linear layers of one input, for the few rows that decode, with all that is done to
// the input before and to the output after. A block makes 16 × NT outputs (of gate and of up each, if GATED) of 8 × MT
// rows; its warps share the inputs K among them, in parts of 32, and add up what they have at the end.
//
// Tensor cores multiply 16 × 16 weights with 16 × 8 inputs (PTX ISA, mma.m16n8k16). Which 16 of the K inputs meet in
// one product is free, so a lane takes 8 neighbours in one load: they are its part of two products.
//
// rows (M, K); weight (N, K), or codes of BITS with scales and offsets (N, K / GROUP); gamma (K) of RMSNorm if NORM;
// a (R, K) and b (R, N) of the adapters, whose rows from where[n / 16] on belong to outputs n … n + 15, 16 × RANKS of
// them, none if it is negative; bias (N) if BIAS; more (M, outputs) is added if ADD. out (M, outputs).
    constexpr int SIDES = GATED ? 2 : 1, OUT = SIDES * NT, ALL = OUT + SIDES * RANKS, ROWS = 8 * MT, RANK = 16 * RANKS;
    constexpr int THREADS = 32 * WARPS, EACH = (16 * ROWS + THREADS - 1) / THREADS, SOME = RANK > 0 ? RANK : 1;
    constexpr int AT_ONCE = ALL > 4 ? 1 : 2;  // as registers allow
    constexpr int WIDE = 20;  // 16 and what keeps a warp's 32 words in 32 banks
    constexpr float DOWN = 0.0625f;  // of rows that are normed at the end: float16 would not hold some of them times gamma
    struct Shared {
        float parts[WARPS][ROWS][WIDE], squares[WARPS][ROWS];
        T lows[SIDES][ROWS][SOME], ups[SIDES][SOME][16 * NT];
    };
    SHARED(Shared, shared);
    auto& parts = shared.parts;
    auto& squares = shared.squares;
    auto& lows = shared.lows;
    auto& ups = shared.ups;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int K = rows_shape[1], N = weight_shape[0], outputs = N / SIDES;
    const int begin = blockIdx.x * 16 * NT, top = blockIdx.y * ROWS;
    const int count = rows_shape[0] - top < ROWS ? rows_shape[0] - top : ROWS;
    const T* mine = rows + static_cast<size_t>(top) * K;

    // the first weight row of each tile; of an adapter that is not there -1
    int tile[ALL];
    for (int s = 0; s < SIDES; s++) {
        for (int n = 0; n < NT; n++) tile[s * NT + n] = s * outputs + begin + 16 * n;
        for (int r = 0; r < RANKS; r++) {
            const int from = where[(s * outputs + begin) / 16];
            tile[OUT + s * RANKS + r] = from < 0 ? -1 : from + 16 * r;
        }
    }
    // what is needed at the end is asked for now
    float added[NT][EACH];
    if constexpr (ADD) {
#pragma unroll
        for (int n = 0; n < NT; n++)
            for (int e = 0; e < EACH; e++) {
                const int at = threadIdx.x + THREADS * e, m = at / 16;
                if (m < count)
                    added[n][e] = static_cast<float>(
                        more[static_cast<size_t>(top + m) * outputs + begin + 16 * n + at % 16]);
            }
    }
    for (int at = threadIdx.x; RANK > 0 && at < SIDES * RANK * 16 * NT; at += THREADS) {
        const int s = at / (16 * NT) / SOME, r = at / (16 * NT) % SOME, n = at % (16 * NT);
        if (tile[OUT + s * RANKS] >= 0)
            ups[s][r][n] = b[static_cast<size_t>(tile[OUT + s * RANKS] + r) * N + s * outputs + begin + n];
    }

    for (int s = 0; s < SIDES && WAITS; s++) {  // to where all blocks read from
        constexpr int LINE = 128;
        const char* from = reinterpret_cast<const char*>(weight) + static_cast<size_t>(tile[s * NT]) * K * BITS / 8;
        for (int i = LINE * threadIdx.x; i < 16 * NT * K * BITS / 8; i += LINE * THREADS) will_read(from + i);
    }
    READY();
    float sums[ALL][MT][4], square[MT];
#pragma unroll
    for (int i = 0; i < MT; i++) {
        square[i] = 0.0f;
#pragma unroll
        for (int o = 0; o < ALL; o++)
            for (int j = 0; j < 4; j++) sums[o][i][j] = 0.0f;
    }
#pragma unroll(AT_ONCE)
    for (int k = 32 * warp + 8 * t; k < K; k += 32 * WARPS) {
        Eight x[MT];
        float scaled[8];
        if constexpr (NORM) {
            spread<T>(load(gamma + k), scaled);
            for (int j = 0; j < 8; j++) scaled[j] *= DOWN;
        }
#pragma unroll
        for (int i = 0; i < MT; i++) {
            const int m = 8 * i + g;
            x[i] = Eight{0, 0, 0, 0};
            if (m < count) x[i] = load(mine + static_cast<size_t>(m) * K + k);
            if constexpr (NORM) {
                float f[8];
                spread<T>(x[i], f);
                for (int j = 0; j < 8; j++) {
                    square[i] += f[j] * f[j];
                    f[j] *= scaled[j];
                }
                x[i] = joined<T>(f);
            }
        }
#pragma unroll
        for (int o = 0; o < ALL; o++) {
            Eight w[2] = {};  // rows g and g + 8 of the tile
            for (int h = 0; h < 2; h++) {
                const size_t row = tile[o] + g + 8 * h;
                if (o < OUT) {
                    Held<T, BITS, GROUP> held;
                    held.fetch(weight, scales, offsets, row, k, K);
                    w[h] = held.open();
                } else if (tile[o] >= 0) {
                    w[h] = load(a + row * K + k);
                }
            }
#pragma unroll
            for (int i = 0; i < MT; i++) {
                if (8 * i < count) accumulate<T>(sums[o][i], w, x[i]);
            }
        }
    }
    if constexpr (NORM) {
        for (int i = 0; i < MT; i++) {
            for (int o = 2; o > 0; o /= 2) square[i] += __shfl_xor_sync(0xffffffff, square[i], o);
            if (t == 0) squares[warp][8 * i + g] = square[i];
        }
    }

    // tile by tile, adapters first: a thread adds up the warps' parts of EACH outputs, always in the same order
    float inverse[EACH], gate[NT][EACH];
#pragma unroll
    for (int step = 0; step < ALL; step++) {
        const int o = step < ALL - OUT ? OUT + step : step - (ALL - OUT);
        const int side = o < OUT ? o / NT : (o - OUT) / (RANKS > 0 ? RANKS : 1);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < MT; i++) {
            if (8 * i >= count) continue;
            for (int j = 0; j < 4; j++) parts[warp][8 * i + 2 * t + j % 2][g + 8 * (j / 2)] = sums[o][i][j];
        }
        __syncthreads();
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            const int at = threadIdx.x + THREADS * e, m = at / 16, n = at % 16;
            if (m >= count) continue;
            if (NORM && step == 0) {
                float all = 0.0f;
                for (int w = 0; w < WARPS; w++) all += squares[w][m];
                inverse[e] = rsqrtf(all / K + EPS) / DOWN;
            }
            float sum = 0.0f;
            for (int w = 0; w < WARPS; w++) sum += parts[w][m][n];
            if constexpr (NORM) sum *= inverse[e];
            if (o >= OUT) {
                lows[side][m][16 * ((o - OUT) % (RANKS > 0 ? RANKS : 1)) + n] = static_cast<T>(sum);
                continue;
            }
            if (RANK > 0 && tile[OUT + side * RANKS] >= 0)
                for (int r = 0; r < RANK; r++)
                    sum += static_cast<float>(lows[side][m][r]) * static_cast<float>(ups[side][r][16 * (o % NT) + n]);
            const int output = begin + 16 * (o % NT) + n;
            if constexpr (BIAS) sum += static_cast<float>(bias[side * outputs + output]);
            if constexpr (GATED) {
                if (side == 0) {
                    gate[o % NT][e] = rounded<T>(sum);
                    continue;
                }
                const float x = gate[o % NT][e];
                sum = rounded<T>(x / (1.0f + expf(-x))) * rounded<T>(sum);
            }
            if constexpr (ADD) sum = rounded<T>(sum) + added[o % NT][e];
            out[static_cast<size_t>(top + m) * outputs + output] = static_cast<T>(sum);
        }
    }
