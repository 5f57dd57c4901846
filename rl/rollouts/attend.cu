// The body of a kernel: attention of the token that each row decodes, from what the queries', keys' and values' product
// gave: norms of queries and keys, RoPE, the new key and value written into their column of the row's ring, and the
// softmax over all keys that the row sees: a stretch of its prompt's, and the last of its ring's.
//
// A block has ROWS rows and QUERIES heads that share their keys. A prompt's keys are read once for all of the block's
// rows that have it, wherever among them they stand, and each row's ring once; both come in pieces of 16 AT_ONCE keys,
// of which each warp takes every WARPS-th. The block's queries, up to 16, meet a piece in one product of the tensor
// cores, and a query forgets the scores of keys that it does not see. The softmax is the running one of Milakov and
// Gimelshein 2018 (arXiv 1805.02867, algorithm 3), in each warp, and once more over the warps.
//
// The next piece's keys are asked for once this one's have been multiplied, its values likewise: so what a lane waits
// for is under way while it works, in the registers that have become free. A lane holds parts of the product just as
// they lie in memory: scores come out where the values' product wants them, and which key or dimension has which number
// within a product does not matter as long as both sides agree.
//
// qkv (B, (HEADS + 2 KV) D); turns (B, D), cosines and sines; q_gamma, k_gamma (D) of RMSNorm if NORM; prompt_keys and
// prompt_values (P, KV, L, D); keys and values (B, KV, W, D), rings; spans (B, 5), for each row, in any order: its
// number, its prompt's, the first key that it sees of that and the one behind the last, and how many columns back it
// looks, column[0] among them. out (B, HEADS D).
//
// keys and values are written to though MLX takes them for inputs. A block that reads the new column has written it
// itself before, where two do so both the same; later kernels need the output first.
    constexpr int COLUMNS = ROWS * QUERIES, SETS = COLUMNS > 8 ? 2 : 1, REPEATS = HEADS / KV, KEYS = 16 * AT_ONCE;
    constexpr int LANES = D / 8, GROUPS = 32 * WARPS / LANES, CHUNKS = D / 32;
    constexpr int PART = D < 64 ? D / 8 : 8, PARTS = D / 8 / PART;  // of a value's dimensions that a lane takes
    constexpr unsigned ALL = 0xffffffff;
    constexpr float NONE = -3.0e38f;  // the score of a key that is not seen
    constexpr float LOG2_E = 1.44269504f;
    static_assert(COLUMNS <= 16, "queries of a block");
    struct alignas(2 * PART) Part {
        unsigned words[PART / 2];
    };
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int head = blockIdx.x * QUERIES, kv = head / REPEATS, at = column[0], ring = keys_shape[2];

    // lane l < ROWS knows the block's row l, and of which of its prompt's keys some row of the block sees one, unless a
    // lane before has that prompt; lane ROWS + l knows row l's ring
    const int span = blockIdx.y * ROWS + lane % ROWS;
    int row = 0, group = -1, first = 0, end = 0, back = 0;
    if (lane < 2 * ROWS && span < spans_shape[0]) {
        row = spans[5 * span];
        group = spans[5 * span + 1];
        first = spans[5 * span + 2];
        end = spans[5 * span + 3];
        back = spans[5 * span + 4];
    }
    if (first >= end) group = -1;
    int begin = lane < ROWS ? first : 0, finish = lane < ROWS ? end : back;
    bool again = false;
#pragma unroll
    for (int o = 0; o < ROWS; o++) {
        const int whose = __shfl_sync(ALL, group, o), from = __shfl_sync(ALL, first, o), to = __shfl_sync(ALL, end, o);
        if (lane < ROWS && whose == group && group >= 0) {
            begin = min(begin, from);
            finish = max(finish, to);
            again = again || o < lane;
        }
    }
    const int pieces = again || finish <= begin ? 0 : (finish - begin + KEYS - 1) / KEYS;
    int until = pieces;  // pieces up to those of this lane
    for (int o = 1; o < 32; o *= 2) {
        const int before = __shfl_sync(ALL, until, lane - o);
        if (lane >= o) until += before;
    }
    const int of_prompts = __shfl_sync(ALL, until, ROWS - 1), count = __shfl_sync(ALL, until, 31);

    int its_group[SETS], its_first[SETS], its_end[SETS], its_back[SETS];  // of the row of query g, and of query g + 8
#pragma unroll
    for (int s = 0; s < SETS; s++) {
        const int its = (8 * s + g) / QUERIES;  // of a column that is no query whatever comes: it is not written
        its_group[s] = __shfl_sync(ALL, group, its % ROWS);
        its_first[s] = __shfl_sync(ALL, first, its % ROWS);
        its_end[s] = __shfl_sync(ALL, end, its % ROWS);
        its_back[s] = __shfl_sync(ALL, back, its % ROWS);
    }

    // of the piece that is asked for: its first key, the one behind its last, and what each query sees of it
    int start, stop, low[SETS], high[SETS];
    bool drawn;
    const T *key, *value;
    Eight k[AT_ONCE][2][CHUNKS];
    Part v[AT_ONCE][4][PARTS];
    auto find = [&](int piece) {
        const int source = __popc(__ballot_sync(ALL, until <= piece));
        const int whose = __shfl_sync(ALL, lane < ROWS ? group : row, source);
        start = __shfl_sync(ALL, begin - (until - pieces) * KEYS, source) + piece * KEYS;
        stop = __shfl_sync(ALL, finish, source);
        drawn = source >= ROWS;
        key = drawn ? keys + whose * keys_strides[0] + kv * keys_strides[1]
                    : prompt_keys + whose * prompt_keys_strides[0] + kv * prompt_keys_strides[1];
        value = drawn ? values + whose * values_strides[0] + kv * values_strides[1]
                      : prompt_values + whose * prompt_values_strides[0] + kv * prompt_values_strides[1];
#pragma unroll
        for (int s = 0; s < SETS; s++) {
            low[s] = drawn ? 0 : its_first[s];
            if (drawn) high[s] = (8 * s + g) / QUERIES == source - ROWS ? its_back[s] : 0;
            else high[s] = its_group[s] == whose ? its_end[s] : 0;
        }
    };
    auto place = [&](int j) { return !drawn ? j : j <= at ? at - j : at - j + ring; };  // a ring is read backwards
    auto fetch_keys = [&]() {
        const auto step = drawn ? keys_strides[2] : prompt_keys_strides[2];
#pragma unroll
        for (int n = 0; n < 2 * AT_ONCE; n++) {
            const int j = start + 8 * n + g;
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) {
                k[n / 2][n % 2][c] = Eight{0, 0, 0, 0};  // nobody sees it: what lies there need be no number
                if (j < stop) k[n / 2][n % 2][c] = load(key + place(j) * step + 32 * c + 8 * t);
            }
        }
    };
    auto fetch_values = [&]() {
        const auto step = drawn ? values_strides[2] : prompt_values_strides[2];
#pragma unroll
        for (int n = 0; n < 4 * AT_ONCE; n++) {
            const int j = start + 8 * (n / 2) + 2 * t + n % 2;
#pragma unroll
            for (int p = 0; p < PARTS; p++) {
                v[n / 4][n % 4][p] = Part{};
                if (j < stop)
                    v[n / 4][n % 4][p] = *reinterpret_cast<const Part*>(value + place(j) * step + 64 * p + PART * g);
            }
        }
    };
    constexpr int WIDTH = D < 64 ? D : 64;  // dimensions that are put together at a time, of 8 queries
    struct Shared {
        Eight queries[8 * SETS][LANES < 8 ? LANES : LANES + 4];  // so that two rows lie in different banks
        float tops[SETS][8][WARPS], totals[SETS][8][WARPS], sums[WARPS][8][WIDTH + 1];
    };
    SHARED(Shared, shared);
    auto& queries = shared.queries;
    auto &tops = shared.tops, &totals = shared.totals;
    auto& sums = shared.sums;
    int piece = warp;
    // a prompt's pieces are under way while queries are made; a ring's may wait for a key made here
#pragma unroll 1
    for (int made = 0; made < 2; made++) {  // one text for both: a processor keeps few instructions
        if (made ? piece >= of_prompts && piece < count : piece < of_prompts) {
            find(piece);
            fetch_keys();
            fetch_values();
        }
        if (made) break;
        READY();
        for (int base = 0; base < ROWS * (QUERIES + 2); base += GROUPS) {  // all alike: their lanes talk
            const int which = base + threadIdx.x / LANES, i = which / (QUERIES + 2), part = which % (QUERIES + 2);
            const int own_row = __shfl_sync(ALL, row, i % ROWS), eighth = threadIdx.x % LANES;
            const int own_head = part < QUERIES ? head + part : HEADS + kv + (part == QUERIES ? 0 : KV);
            Eight made = load(qkv + (static_cast<size_t>(own_row) * (HEADS + 2 * KV) + own_head) * D + 8 * eighth);
            const float* turn = turns + static_cast<size_t>(own_row) * D + eighth % (LANES / 2) * 8;
            float x[8];
            spread<T>(made, x);
            if constexpr (NORM) {
                float gamma[8], square = 0.0f;
                spread<T>(load((part < QUERIES ? q_gamma : k_gamma) + 8 * eighth), gamma);
                for (int j = 0; j < 8; j++) square += x[j] * x[j];
                for (int o = LANES / 2; o > 0; o /= 2) square += __shfl_xor_sync(ALL, square, o);
                const float inverse = rsqrtf(square / D + EPS);
                for (int j = 0; j < 8; j++) x[j] = rounded<T>(gamma[j] * rounded<T>(x[j] * inverse));
            }
            for (int j = 0; j < 8; j++) {  // numbers d and d + D / 2 turn together
                const float other = __shfl_xor_sync(ALL, x[j], LANES / 2);
                x[j] = x[j] * turn[j] + (eighth < LANES / 2 ? -other : other) * turn[D / 2 + j];
            }
            if (part <= QUERIES) made = joined<T>(x);
            if (i < ROWS && blockIdx.y * ROWS + i < spans_shape[0]) {
                if (part < QUERIES) {
                    queries[i * QUERIES + part][eighth] = made;
                } else {
                    const T* to = part == QUERIES
                        ? keys + own_row * keys_strides[0] + kv * keys_strides[1] + at * keys_strides[2]
                        : values + own_row * values_strides[0] + kv * values_strides[1] + at * values_strides[2];
                    *reinterpret_cast<Eight*>(const_cast<T*>(to) + 8 * eighth) = made;
                }
            }
        }
        __syncthreads();
    }

    const unsigned ones = pair<T>(1.0f, 1.0f);
    float most[SETS], total[SETS][4], sum[SETS][PARTS][PART / 2][4];  // of queries 2 t and 2 t + 1, most of g
#pragma unroll
    for (int s = 0; s < SETS; s++) {
        most[s] = NONE;
        for (int i = 0; i < 4; i++) total[s][i] = 0.0f;
        for (int i = 0; i < PARTS * PART * 2; i++) sum[s][i / 4 / (PART / 2)][i / 4 % (PART / 2)][i % 4] = 0.0f;
    }
    while (piece < count) {  // all of a warp alike
        float scores[AT_ONCE][2][4];
#pragma unroll
        for (int n = 0; n < 2 * AT_ONCE; n++) {
            float(&score)[4] = scores[n / 2][n % 2];
            for (int i = 0; i < 4; i++) score[i] = 0.0f;
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) {
                Eight query[2] = {queries[g][4 * c + t], Eight{0, 0, 0, 0}};
                if constexpr (SETS > 1) query[1] = queries[8 + g][4 * c + t];
                accumulate<T>(score, query, k[n / 2][n % 2][c]);
            }
#pragma unroll
            for (int i = 0; i < 2 * SETS; i++) {
                const int j = start + 8 * n + 2 * t + i % 2;
                score[i] = low[i / 2] <= j && j < high[i / 2] ? score[i] * (SCALE * LOG2_E) : NONE;
            }
        }
        bool sees[SETS];
        for (int s = 0; s < SETS; s++) sees[s] = low[s] < high[s];
        piece += WARPS;
        if (piece < count) {
            find(piece);
            fetch_keys();
        }
#pragma unroll
        for (int s = 0; s < SETS; s++) {
            float higher = most[s];
#pragma unroll
            for (int n = 0; n < 4 * AT_ONCE; n++) higher = fmaxf(higher, scores[n / 4][n / 2 % 2][2 * s + n % 2]);
            for (int o = 1; o < 4; o *= 2) higher = fmaxf(higher, __shfl_xor_sync(ALL, higher, o));
            const float before = sees[s] ? exp2f(most[s] - higher) : -1.0f;
            const float factors[2] = {__shfl_sync(ALL, before, 8 * t), __shfl_sync(ALL, before, 8 * t + 4)};
            unsigned weights[AT_ONCE][2];
#pragma unroll
            for (int n = 0; n < 2 * AT_ONCE; n++) {
                float x[2];
                for (int i = 0; i < 2; i++) {
                    const float score = scores[n / 2][n % 2][2 * s + i];
                    x[i] = score == NONE ? 0.0f : exp2f(score - higher);
                }
                weights[n / 2][n % 2] = pair<T>(x[0], x[1]);
            }
            most[s] = higher;
            for (int i = 0; i < 2; i++) total[s][i] *= factors[i] < 0.0f ? 1.0f : factors[i];
#pragma unroll
            for (int n = 0; n < AT_ONCE; n++)
                multiply<T>(total[s], ones, ones, ones, ones, weights[n][0], weights[n][1]);
#pragma unroll
            for (int p = 0; p < PARTS; p++)
#pragma unroll
                for (int w = 0; w < PART / 2; w++) {
                    float own[4];
                    for (int i = 0; i < 4; i++) own[i] = sum[s][p][w][i] * factors[i % 2];
#pragma unroll
                    for (int n = 0; n < AT_ONCE; n++) {
                        unsigned pairs[4];  // of two keys' lower numbers, and of their upper ones
                        for (int i = 0; i < 4; i++)
                            pairs[i] = __byte_perm(
                                v[n][i / 2 * 2][p].words[w], v[n][i / 2 * 2 + 1][p].words[w], i % 2 ? 0x7632 : 0x5410);
                        multiply<T>(own, pairs[0], pairs[1], pairs[2], pairs[3], weights[n][0], weights[n][1]);
                    }
                    // another row's values need be no numbers, and zero times those is none either
                    for (int i = 0; i < 4; i++) sum[s][p][w][i] = factors[i % 2] < 0.0f ? sum[s][p][w][i] : own[i];
                }
        }
        if (piece < count) fetch_values();
    }

#pragma unroll
    for (int s = 0; s < SETS; s++) {
        if (t == 0) tops[s][g][warp] = most[s];
        if (g == 0) {
            totals[s][2 * t][warp] = total[s][0];
            totals[s][2 * t + 1][warp] = total[s][1];
        }
    }
#pragma unroll
    for (int s = 0; s < SETS; s++)
#pragma unroll
        for (int p = 0; p < PARTS; p++) {
            if (s + p > 0) __syncthreads();
#pragma unroll
            for (int w = 0; w < PART / 2; w++)
                for (int i = 0; i < 4; i++) sums[warp][2 * t + i % 2][PART * g + 2 * w + i / 2] = sum[s][p][w][i];
            __syncthreads();
            for (int i = threadIdx.x; i < 8 * WIDTH; i += 32 * WARPS) {
                const int q = i / WIDTH, d = i % WIDTH, its = blockIdx.y * ROWS + (8 * s + q) / QUERIES;
                if (8 * s + q >= COLUMNS || its >= spans_shape[0]) continue;
                float top = NONE, under = 0.0f, over = 0.0f;
                for (int w = 0; w < WARPS; w++) top = fmaxf(top, tops[s][q][w]);
                for (int w = 0; w < WARPS; w++) {
                    const float weight = exp2f(tops[s][q][w] - top);
                    under += weight * totals[s][q][w];
                    over += weight * sums[w][q][d];
                }
                const size_t to = static_cast<size_t>(spans[5 * its]) * HEADS + head + (8 * s + q) % QUERIES;
                out[to * D + 64 * p + d] = static_cast<T>(over / under);
            }
        }
