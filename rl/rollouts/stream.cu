// The body of a kernel: outputs of linear layers of one input for up to 8 × MT rows, where a step waits for the weights.
// They come through shared memory, STAGES chunks of KB inputs on their way at a time, asked for by all threads and
// copied past registers; the rows come beside them.
//
// A block makes 16 × NT × WN outputs (of gate and of up each, if GATED): a warp NT tiles of 16, of each chunk the 32
// inputs that are its own among WK warps, or both halves of 64. With PARTS a block takes one of SPLIT parts of the
// inputs and leaves its sums as they are, to be added up by finish.cu: so few outputs of many inputs fill a GPU too. An
// adapter's A is a block of its own then; else its product with the rows is each block's too, and its warps share that.
//
// A lane's 8 neighbours are its part of two products, as in product.cu. Odd lines have the halves of each 128 bytes
// exchanged, so that 8 lanes, which are two lines, read all 32 banks.
//
// rows (M, K); weight (N, K); a (R, K), b (R, N), where and bias as in product.cu. out (M, N / SIDES), or with PARTS
// (SPLIT, M, N + 16 × RANKS), float32.
    constexpr int SIDES = GATED ? 2 : 1, WARPS = 8, THREADS = 32 * WARPS, WK = WARPS / WN, ROWS = 8 * MT;
    constexpr int KB = WK > 2 ? 32 * WK : 64, STEPS = KB / 32 / WK, LINE = KB / 8, OUT = SIDES * NT;
    constexpr int TILES = PARTS ? 0 : SIDES * RANKS, SOME = TILES > 0 ? TILES : 1, DEEP = RANKS > 0 ? RANKS : 1;
    constexpr int TURNS = WN / SOME, RANK = 16 * RANKS, SLOTS = 16 * DEEP;
    constexpr int LINES = 16 * OUT * WN, LOW_LINES = 16 * TILES, STAGE = (LINES + LOW_LINES + ROWS) * LINE;
    constexpr int TOGETHER = MT < 4 ? MT : 4;  // tiles of rows that are multiplied without a look at whether there are so many
    static_assert(WN % SOME == 0);
    ROOM(room);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int wn = warp % WN, wk = warp / WN;
    const int K = rows_shape[1], N = weight_shape[0], outputs = N / SIDES, M = rows_shape[0];
    const int split = PARTS ? blockIdx.y % SPLIT : 0, top = (PARTS ? blockIdx.y / SPLIT : blockIdx.y) * ROWS;
    const int count = M - top < ROWS ? M - top : ROWS;
    const int chunks = K / KB / (PARTS ? SPLIT : 1), start = split * chunks;  // K is whole chunks of each part
    const bool low_block = PARTS && RANKS > 0 && 16 * NT * WN * blockIdx.x >= N;
    const int begin = low_block ? 0 : 16 * NT * WN * blockIdx.x;  // the block's first output of each side
    const T* from_here = low_block ? a : weight;
    const int lines = low_block ? RANK : LINES;

    int from[SIDES];  // the adapter's first row, negative if there is none
    for (int s = 0; s < SIDES; s++) from[s] = TILES > 0 ? where[(s * outputs + begin) / 16] : -1;
    const int low_tile = wn % SOME, turn = wn / SOME;
    const bool has_low = TILES > 0 && from[low_tile / DEEP] >= 0;

    const auto place = [](int line, int piece) { return line * LINE + (piece ^ (line & 1) << 2); };
    const auto ask = [&](int chunk, bool weights, bool inputs) {
        if (chunk >= chunks) return;
        Eight* stage = room + chunk % STAGES * STAGE;
        const int k = KB * (start + chunk) + 8 * (threadIdx.x % LINE);
        if (weights) {
#pragma unroll
            for (int e = 0; e < (LINES * LINE + THREADS - 1) / THREADS; e++) {
                const int line = (threadIdx.x + THREADS * e) / LINE;
                if (line >= LINES) break;
                const int row = line / (16 * NT * WN) * outputs + begin + line % (16 * NT * WN);
                copy_16(stage + place(line, threadIdx.x % LINE), from_here + static_cast<size_t>(row) * K + k, line < lines);
            }
#pragma unroll
            for (int e = 0; e < (LOW_LINES * LINE + THREADS - 1) / THREADS; e++) {
                const int line = (threadIdx.x + THREADS * e) / LINE;
                if (line >= LOW_LINES) break;
                const int first = from[line / SLOTS < SIDES ? line / SLOTS : 0];
                const int row = first < 0 ? 0 : first + line % SLOTS;
                copy_16(stage + place(LINES + line, threadIdx.x % LINE), a + static_cast<size_t>(row) * K + k, first >= 0);
            }
        }
        if (inputs) {
#pragma unroll
            for (int e = 0; e < (ROWS * LINE + THREADS - 1) / THREADS; e++) {
                const int line = (threadIdx.x + THREADS * e) / LINE;
                if (line >= ROWS) break;
                const int row = top + (line < count ? line : 0);
                const int to = place(LINES + LOW_LINES + line, threadIdx.x % LINE);
                copy_16(stage + to, rows + static_cast<size_t>(row) * K + k, line < count);
            }
        }
    };

    float sums[OUT][MT][4], low_sums[MT][4];
#pragma unroll
    for (int i = 0; i < MT; i++)
        for (int j = 0; j < 4; j++) {
            for (int o = 0; o < OUT; o++) sums[o][i][j] = 0.0f;
            low_sums[i][j] = 0.0f;
        }
    // loops that need not be unrolled are not: a processor keeps 128 KB of instructions, and whole.cu has as many
#pragma unroll 1
    for (int chunk = 0; chunk < STAGES - 1 && WAITS; chunk++) ask(chunk, true, false);
    READY();
#pragma unroll 1
    for (int chunk = 0; chunk < STAGES - 1; chunk++) {
        ask(chunk, !WAITS, true);
        copies_asked();  // as a group, also where there is none: waiting counts them
    }
    for (int chunk = 0; chunk < chunks; chunk++) {
        copies_under_way<STAGES - 2>();
        __syncthreads();  // all have theirs, and nobody reads the stage that comes next any more
        ask(chunk + STAGES - 1, true, true);
        copies_asked();
        const Eight* stage = room + chunk % STAGES * STAGE;
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
            const int piece = 4 * (STEPS * wk + s) + t;
            const bool low_turn = has_low && (STEPS * chunk + s) % TURNS == turn;
            Eight w[OUT][2], low[2];
#pragma unroll
            for (int o = 0; o < OUT; o++)
                for (int h = 0; h < 2; h++)
                    w[o][h] = stage[place(16 * ((o / NT * WN + wn) * NT + o % NT) + 8 * h + g, piece)];
            if (low_turn)
                for (int h = 0; h < 2; h++) low[h] = stage[place(LINES + 16 * low_tile + 8 * h + g, piece)];
#pragma unroll
            for (int i = 0; i < MT; i += TOGETHER) {
                if (8 * i >= count) break;
                Eight x[TOGETHER];
#pragma unroll
                for (int j = 0; j < TOGETHER; j++) x[j] = stage[place(LINES + LOW_LINES + 8 * (i + j) + g, piece)];
#pragma unroll
                for (int o = 0; o < OUT; o++)
#pragma unroll
                    for (int j = 0; j < TOGETHER; j++) accumulate<T>(sums[o][i + j], w[o], x[j]);
                if (low_turn)
#pragma unroll
                    for (int j = 0; j < TOGETHER; j++) accumulate<T>(low_sums[i + j], low, x[j]);
            }
        }
    }

    // B's part of the warp's outputs is asked for now; where it is none, nothing is added to it
    unsigned ups[OUT][DEEP][4];
#pragma unroll
    for (int o = 0; o < OUT; o++)
        for (int u = 0; u < 4 * DEEP; u++) {
            ups[o][u / 4][u % 4] = 0;
            if (TILES == 0 || from[o / NT] < 0) continue;
            const int first = from[o / NT] + 16 * (u / 4) + 4 * t + u % 4 / 2 * 2;
            const T* at = b + static_cast<size_t>(first) * N + o / NT * outputs + begin + 16 * (wn * NT + o % NT) + g +
                u % 2 * 8;
            ups[o][u / 4][u % 4] = pair<T>(static_cast<float>(at[0]), static_cast<float>(at[N]));
        }

    // the warps' sums, each as its lanes hold them; a thread adds up those of its outputs, always in the same order
    float* parts = reinterpret_cast<float*>(room);
    T* lows = reinterpret_cast<T*>(parts + WARPS * OUT * MT * 128);
    const auto share = [&](int number, const float(&sums)[MT][4]) {
#pragma unroll
        for (int i = 0; i < MT; i++)
            for (int j = 0; j < 4; j++) parts[((warp * OUT + number) * MT * 4 + 4 * i + j) * 32 + lane] = sums[i][j];
    };
    const auto all_of = [&](int number, int first, int stride, int which) {
        float sum = 0.0f;
        for (int w = first; w < WARPS; w += stride) sum += parts[((w * OUT + number) * MT * 4 + which) * 32 + lane];
        return sum;
    };
    copies_under_way<0>();
    __syncthreads();
    if constexpr (TILES > 0) {
        share(0, low_sums);
        __syncthreads();
#pragma unroll
        for (int e = 0; e < TILES * MT * 4 / WARPS; e++) {
            const int tile = (warp + WARPS * e) / (MT * 4), which = (warp + WARPS * e) % (MT * 4);
            const int m = which / 4 * 8 + 2 * t + which % 2;
            lows[(tile / DEEP * ROWS + m) * RANK + tile % DEEP * 16 + g + which % 4 / 2 * 8] =
                static_cast<T>(all_of(0, tile, SOME, which));
        }
        __syncthreads();
    }
#pragma unroll
    for (int o = 0; o < OUT; o++) share(o, sums[o]);
    __syncthreads();
    constexpr int SHARE = MT > WK ? MT / WK : 1;  // tiles of rows that a warp ends
#pragma unroll 1
    for (int i = SHARE * wk; i < SHARE * (wk + 1) && i < MT; i++) {
        float sum[OUT][4];
#pragma unroll
        for (int o = 0; o < OUT; o++) {
            for (int j = 0; j < 4; j++) sum[o][j] = all_of(o, wn, WN, 4 * i + j);
            for (int r = 0; r < RANKS && TILES > 0; r++) {
                unsigned x[2];
                memcpy(x, lows + (o / NT * ROWS + 8 * i + g) * RANK + 16 * r + 4 * t, 8);
                const unsigned(&w)[4] = ups[o][r];
                if (from[o / NT] >= 0) multiply<T>(sum[o], w[0], w[1], w[2], w[3], x[0], x[1]);
            }
        }
#pragma unroll
        for (int o = 0; o < NT; o++)
            for (int j = 0; j < 4; j++) {
                const int m = 8 * i + 2 * t + j % 2, own = 16 * (wn * NT + o) + g + j / 2 * 8;
                if (m >= count || own >= lines) continue;
                if constexpr (PARTS) {
                    const size_t line = static_cast<size_t>(split) * M + top + m;
                    reinterpret_cast<float*>(out)[line * (N + RANK) + (low_block ? N : begin) + own] = sum[o][j];
                    continue;
                }
                for (int s = 0; s < SIDES && BIAS; s++)
                    sum[s * NT + o][j] += static_cast<float>(bias[s * outputs + begin + own]);
                float x = sum[o][j];
                if constexpr (GATED) {
                    x = rounded<T>(x);
                    x = rounded<T>(x / (1.0f + expf(-x))) * rounded<T>(sum[OUT - NT + o][j]);
                }
                reinterpret_cast<T*>(out)[static_cast<size_t>(top + m) * outputs + begin + own] = static_cast<T>(x);
            }
    }
