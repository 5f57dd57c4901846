// The body of a kernel that does what product.cu does, from the same inputs, for layers so large that a step waits for
// their weights. Each weight is read once for all of 64 rows, by the one warp that wants it, straight into registers
// and well before it does; the rows come through shared memory, a chunk of KB inputs at a time, read once by a block.
//
// A block makes 16 × WN outputs (of gate and of up each, if GATED) of 64 rows: a warp a tile of 16, of each chunk the
// 64 inputs that are its own among WK warps. A's products with the rows are the block's too: its warps share them out.
//
// A lane's 8 neighbours are its part of two products, as there. Lines of KB + 32 numbers let 8 lanes, which are two
// rows, read all 32 banks.
    constexpr int SIDES = GATED ? 2 : 1, WARPS = 8, THREADS = 32 * WARPS, WK = WARPS / WN, MT = 8, ROWS = 8 * MT;
    constexpr int STEPS = 2, KB = 32 * STEPS * WK, PIECES = KB / 8, LINE = PIECES + 4, TAKEN = ROWS * PIECES / THREADS;
    constexpr int BUFFERS = WK == 2 ? 2 : 1;  // as shared memory allows: 48 KB
    constexpr int AHEAD = GATED && RANKS > 0 ? 1 : 2;  // chunks, as registers allow
    constexpr int TOGETHER = 4;  // tiles of rows that are multiplied without a look at whether there are so many
    constexpr int RANK = 16 * RANKS, TILES = SIDES * RANKS, SOME = TILES > 0 ? TILES : 1, DEEP = RANKS > 0 ? RANKS : 1;
    constexpr int TURNS = WN / SOME, KEPT = TURNS == 1 ? STEPS : 1, SHARE = MT / WK;
    constexpr int STAGED = BUFFERS * ROWS * LINE, PARTS = ROWS * 16 * WARPS / 4, LOWS = TILES * ROWS * 16 / 8;
    constexpr float DOWN = 0.0625f;  // as in product.cu
    static_assert(WN % SOME == 0);
    __shared__ Eight room[STAGED > PARTS + LOWS ? STAGED : PARTS + LOWS];  // the rows; at the end sums, and A's product
    __shared__ float inverse[ROWS];
    float* parts = reinterpret_cast<float*>(room);
    T* lows = reinterpret_cast<T*>(room + PARTS);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int wn = warp % WN, wk = warp / WN, line = threadIdx.x / PIECES, piece = threadIdx.x % PIECES;
    const int K = rows_shape[1], N = weight_shape[0], outputs = N / SIDES, chunks = K / KB;
    const int begin = 16 * (blockIdx.x * WN + wn), top = blockIdx.y * ROWS;
    const int count = rows_shape[0] - top < ROWS ? rows_shape[0] - top : ROWS;

    // A's tile of this warp, of which it takes every TURNS-th step
    const int low_tile = wn % SOME, turn = wn / SOME;
    int from[SIDES];  // the adapter's first row, negative if there is none
    for (int s = 0; s < SIDES; s++) from[s] = RANKS > 0 ? where[(s * outputs + begin) / 16] : -1;
    const int low_from = low_tile / DEEP == 0 ? from[0] : from[SIDES - 1];
    const int low_row = low_from + 16 * (low_tile % DEEP) + g;
    const auto own = [&](int chunk, int s) {
        return RANKS > 0 && low_from >= 0 && (STEPS * chunk + s) % TURNS == turn;
    };

    Held<T, BITS, GROUP> held[AHEAD][STEPS][SIDES][2];  // rows g and g + 8 of a tile
    Eight low_held[AHEAD][KEPT][2], next[TAKEN], next_gamma;
    const auto ask = [&](int chunk, int d, int s) {
        if (chunk >= chunks) return;
        const int k = KB * chunk + 32 * (STEPS * wk + s) + 8 * t;
#pragma unroll
        for (int side = 0; side < SIDES; side++)
#pragma unroll
            for (int h = 0; h < 2; h++)
                held[d][s][side][h].fetch(weight, scales, offsets, side * outputs + begin + g + 8 * h, k, K);
        if (own(chunk, s))
#pragma unroll
            for (int h = 0; h < 2; h++)
                low_held[d][s % KEPT][h] = load(a + static_cast<size_t>(low_row + 8 * h) * K + k);
    };
    const auto ask_rows = [&](int chunk) {
        if (chunk >= chunks) return;
        const int k = KB * chunk + 8 * piece;
        if constexpr (NORM) next_gamma = load(gamma + k);
#pragma unroll
        for (int e = 0; e < TAKEN; e++) {
            const int m = line + THREADS / PIECES * e;
            next[e] = Eight{0, 0, 0, 0};
            if (m < count) next[e] = load(rows + static_cast<size_t>(top + m) * K + k);
        }
    };
    ask_rows(0);
#pragma unroll
    for (int d = 0; d < AHEAD; d++)
#pragma unroll
        for (int s = 0; s < STEPS; s++) ask(d, d, s);

    float sums[SIDES][MT][4], low_sums[MT][4], square[TAKEN];
#pragma unroll
    for (int i = 0; i < MT; i++)
        for (int j = 0; j < 4; j++) {
            for (int side = 0; side < SIDES; side++) sums[side][i][j] = 0.0f;
            low_sums[i][j] = 0.0f;
        }
    for (int e = 0; e < TAKEN; e++) square[e] = 0.0f;

    for (int first = 0; first < chunks; first += AHEAD)
#pragma unroll
        for (int d = 0; d < AHEAD; d++) {
            const int chunk = first + d;
            if (chunk >= chunks) break;
            Eight* lines = room + chunk % BUFFERS * ROWS * LINE;
            float scaled[8];
            if constexpr (NORM) {
                spread<T>(next_gamma, scaled);
                for (int j = 0; j < 8; j++) scaled[j] *= DOWN;
            }
#pragma unroll
            for (int e = 0; e < TAKEN; e++) {
                if constexpr (NORM) {
                    float x[8];
                    spread<T>(next[e], x);
                    for (int j = 0; j < 8; j++) {
                        square[e] += x[j] * x[j];
                        x[j] *= scaled[j];
                    }
                    next[e] = joined<T>(x);
                }
                lines[(line + THREADS / PIECES * e) * LINE + piece] = next[e];
            }
            __syncthreads();
            ask_rows(chunk + 1);
#pragma unroll
            for (int s = 0; s < STEPS; s++) {
                Eight w[SIDES][2];
#pragma unroll
                for (int side = 0; side < SIDES; side++)
                    for (int h = 0; h < 2; h++) w[side][h] = held[d][s][side][h].open();
                const Eight* mine = lines + g * LINE + 4 * (STEPS * wk + s) + t;
#pragma unroll
                for (int i = 0; i < MT; i += TOGETHER) {
                    if (8 * i >= count) break;
                    Eight x[TOGETHER];
#pragma unroll
                    for (int j = 0; j < TOGETHER; j++) x[j] = mine[8 * (i + j) * LINE];
#pragma unroll
                    for (int side = 0; side < SIDES; side++)
#pragma unroll
                        for (int j = 0; j < TOGETHER; j++) accumulate<T>(sums[side][i + j], w[side], x[j]);
                    if (own(chunk, s))
#pragma unroll
                        for (int j = 0; j < TOGETHER; j++) accumulate<T>(low_sums[i + j], low_held[d][s % KEPT], x[j]);
                }
                ask(chunk + AHEAD, d, s);
            }
            if constexpr (BUFFERS == 1) __syncthreads();
        }

    // what is needed at the end is asked for now
    unsigned ups[SIDES][DEEP][4];
    T added[SHARE][4];
#pragma unroll
    for (int side = 0; side < SIDES; side++)
        for (int r = 0; r < RANKS; r++)
            for (int u = 0; u < 4; u++) {
                if (from[side] < 0) continue;
                const int first = from[side] + 16 * r + 4 * t + u / 2 * 2;
                const int output = side * outputs + begin + g + u % 2 * 8;
                const T* at = b + static_cast<size_t>(first) * N + output;
                ups[side][r][u] = pair<T>(static_cast<float>(at[0]), static_cast<float>(at[N]));
            }
    const auto row = [&](int i, int j) { return 8 * (SHARE * wk + i) + 2 * t + j % 2; };
    const auto place = [&](int i, int j) {
        return static_cast<size_t>(top + row(i, j)) * outputs + begin + g + j / 2 * 8;
    };
    if constexpr (ADD)
#pragma unroll
        for (int i = 0; i < SHARE; i++)
            for (int j = 0; j < 4; j++)
                if (row(i, j) < count) added[i][j] = more[place(i, j)];
    if constexpr (NORM)
#pragma unroll
        for (int e = 0; e < TAKEN; e++) {
            for (int o = PIECES / 2; o > 0; o /= 2) square[e] += __shfl_xor_sync(0xffffffff, square[e], o);
            if (piece == 0) inverse[line + THREADS / PIECES * e] = rsqrtf(square[e] / K + EPS) / DOWN;
        }

    // the warps' sums, each as its lanes hold them; a thread adds up every stride-th warp's, always in the same order
    const auto share = [&](const float(&sums)[MT][4]) {
        __syncthreads();
#pragma unroll
        for (int i = 0; i < MT; i++)
            for (int j = 0; j < 4; j++) parts[(warp * MT * 4 + 4 * i + j) * 32 + lane] = sums[i][j];
        __syncthreads();
    };
    const auto all_of = [&](int first, int stride, int which) {
        float sum = 0.0f;
        for (int w = 0; w < WARPS / stride; w++) sum += parts[((first + stride * w) * MT * 4 + which) * 32 + lane];
        return sum;
    };
    if constexpr (RANKS > 0) {
        share(low_sums);
#pragma unroll
        for (int e = 0; e < TILES * MT * 4 / WARPS; e++) {
            const int tile = (warp + WARPS * e) / (MT * 4), which = (warp + WARPS * e) % (MT * 4);
            const int m = which / 4 * 8 + 2 * t + which % 2;
            float sum = all_of(tile, SOME, which);
            if constexpr (NORM) sum *= inverse[m];
            lows[(tile / DEEP * ROWS + m) * RANK + tile % DEEP * 16 + g + which % 4 / 2 * 8] = static_cast<T>(sum);
        }
    }
    float sum[SIDES][SHARE][4];
#pragma unroll
    for (int side = 0; side < SIDES; side++) {
        share(sums[side]);
#pragma unroll
        for (int i = 0; i < SHARE; i++) {
            for (int j = 0; j < 4; j++) {
                sum[side][i][j] = all_of(wn, WN, 4 * (SHARE * wk + i) + j);
                if constexpr (NORM) sum[side][i][j] *= inverse[row(i, j)];
            }
            for (int r = 0; r < RANKS; r++) {
                if (from[side] < 0) continue;
                const T* low = lows + (side * ROWS + 8 * (SHARE * wk + i) + g) * RANK + 16 * r + 4 * t;
                unsigned x[2];
                memcpy(x, low, 8);
                const unsigned(&w)[4] = ups[side][r];
                multiply<T>(sum[side][i], w[0], w[1], w[2], w[3], x[0], x[1]);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < SHARE; i++)
        for (int j = 0; j < 4; j++) {
            if (row(i, j) >= count) continue;
            if constexpr (BIAS)
                for (int side = 0; side < SIDES; side++)
                    sum[side][i][j] += static_cast<float>(bias[side * outputs + begin + g + j / 2 * 8]);
            float x = sum[0][i][j];
            if constexpr (GATED) {
                x = rounded<T>(x);
                x = rounded<T>(x / (1.0f + expf(-x))) * rounded<T>(sum[SIDES - 1][i][j]);
            }
            if constexpr (ADD) x = rounded<T>(x) + static_cast<float>(added[i][j]);
            out[place(i, j)] = static_cast<T>(x);
        }
