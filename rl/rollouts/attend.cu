// The body of a kernel: attention of the token that each row decodes, from what the queries', keys' and values' product
// gave: norms of queries and keys, RoPE, the new key and value written into their column, and the softmax over all keys
// that the row sees. A block has QUERIES heads that share their keys; D / 8 lanes make a group, which takes every
// GROUPS-th key, AT_ONCE of them before it looks at the scores, so that their loads overlap. The softmax is the running
// one of Milakov and Gimelshein 2018 (arXiv 1805.02867, algorithm 3), in each group, and once more over the groups.
//
// qkv (B, (HEADS + 2 KV) D); turns (B, D), cosines and sines; q_gamma, k_gamma (D) of RMSNorm if NORM; keys and values
// (B, KV, L, D); seen (B, 1, K), K <= L, true for column[0]. out (B, HEADS D).
//
// keys and values are written to though MLX takes them for inputs. Nobody else reads that column before the output is
// there: the blocks of this kernel use the numbers themselves, and later kernels need the output first.
    constexpr int LANES = D / 8, GROUPS = 32 * WARPS / LANES, REPEATS = HEADS / KV, AT_ONCE = 4;
    constexpr float NONE = -3.0e38f;  // the score of a key that is not seen
    const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES, row = blockIdx.y;
    const int head = blockIdx.x * QUERIES, kv = head / REPEATS, count = seen_shape[2], at = column[0];
    const T* own = qkv + static_cast<size_t>(row) * (HEADS + 2 * KV) * D + 8 * lane;
    const float* turn = turns + static_cast<size_t>(row) * D + lane % (LANES / 2) * 8;
    const T* key = keys + row * keys_strides[0] + kv * keys_strides[1] + 8 * lane;
    const T* value = values + row * values_strides[0] + kv * values_strides[1] + 8 * lane;
    const bool* mine = seen + row * seen_strides[0];

    float query[QUERIES][8], fresh_key[8];
#pragma unroll
    for (int which = 0; which <= QUERIES; which++) {
        float(&x)[8] = which < QUERIES ? query[which] : fresh_key;
        spread<T>(load(own + (which < QUERIES ? head + which : HEADS + kv) * D), x);
        if constexpr (NORM) {
            float gamma[8], square = 0.0f;
            spread<T>(load((which < QUERIES ? q_gamma : k_gamma) + 8 * lane), gamma);
            for (int i = 0; i < 8; i++) square += x[i] * x[i];
            for (int o = LANES / 2; o > 0; o /= 2) square += __shfl_xor_sync(0xffffffff, square, o);
            const float inverse = rsqrtf(square / D + EPS);
            for (int i = 0; i < 8; i++) x[i] = rounded<T>(gamma[i] * rounded<T>(x[i] * inverse));
        }
        for (int i = 0; i < 8; i++) {  // numbers d and d + D / 2 turn together
            const float other = __shfl_xor_sync(0xffffffff, x[i], LANES / 2);
            x[i] = rounded<T>(x[i] * turn[i] + (lane < LANES / 2 ? -other : other) * turn[D / 2 + i]);
            if (which < QUERIES) x[i] *= SCALE;
        }
    }
    const Eight fresh_value = load(own + (HEADS + KV + kv) * D);
    if (group == 0 && head % REPEATS == 0) {
        *reinterpret_cast<Eight*>(const_cast<T*>(key) + at * keys_strides[2]) = joined<T>(fresh_key);
        *reinterpret_cast<Eight*>(const_cast<T*>(value) + at * values_strides[2]) = fresh_value;
    }
    float sum[QUERIES][8], most[QUERIES], total[QUERIES];  // at first of the token itself, which group 0 takes
#pragma unroll
    for (int q = 0; q < QUERIES; q++) {
        float score = 0.0f, x[8];
        spread<T>(fresh_value, x);
        for (int i = 0; i < 8; i++) score += query[q][i] * fresh_key[i];
        for (int o = LANES / 2; o > 0; o /= 2) score += __shfl_xor_sync(0xffffffff, score, o);
        most[q] = group == 0 ? score : NONE;
        total[q] = group == 0 ? 1.0f : 0.0f;
        for (int i = 0; i < 8; i++) sum[q][i] = group == 0 ? x[i] : 0.0f;
    }
    for (int first = 0; first < count; first += AT_ONCE * GROUPS) {  // all groups alike: their lanes talk
        bool there[AT_ONCE];
        Eight k[AT_ONCE], v[AT_ONCE];
#pragma unroll
        for (int n = 0; n < AT_ONCE; n++) {
            const int j = first + n * GROUPS + group;
            there[n] = j < count && j != at && mine[j];
            k[n] = v[n] = Eight{0, 0, 0, 0};
            if (there[n]) {
                k[n] = load(key + j * keys_strides[2]);
                v[n] = load(value + j * values_strides[2]);
            }
        }
#pragma unroll
        for (int q = 0; q < QUERIES; q++) {
            float scores[AT_ONCE], higher = most[q];
#pragma unroll
            for (int n = 0; n < AT_ONCE; n++) {
                float x[8];
                spread<T>(k[n], x);
                scores[n] = 0.0f;
                for (int i = 0; i < 8; i++) scores[n] += query[q][i] * x[i];
                for (int o = LANES / 2; o > 0; o /= 2) scores[n] += __shfl_xor_sync(0xffffffff, scores[n], o);
                if (there[n]) higher = fmaxf(higher, scores[n]);
            }
            const float before = expf(most[q] - higher);
            total[q] *= before;
            for (int i = 0; i < 8; i++) sum[q][i] *= before;
#pragma unroll
            for (int n = 0; n < AT_ONCE; n++) {
                const float weight = there[n] ? expf(scores[n] - higher) : 0.0f;
                float x[8];
                spread<T>(v[n], x);
                total[q] += weight;
                for (int i = 0; i < 8; i++) sum[q][i] += weight * x[i];
            }
            most[q] = higher;
        }
    }
    __shared__ float tops[QUERIES][GROUPS], totals[QUERIES][GROUPS], weights[QUERIES][GROUPS], sums[QUERIES][GROUPS][D];
#pragma unroll
    for (int q = 0; q < QUERIES; q++) {
        for (int i = 0; i < 8; i++) sums[q][group][8 * lane + i] = sum[q][i];
        if (lane == 0) {
            tops[q][group] = most[q];
            totals[q][group] = total[q];
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < QUERIES * GROUPS; i += 32 * WARPS) {
        const int q = i / GROUPS;
        float top = NONE;
        for (int w = 0; w < GROUPS; w++) top = fmaxf(top, tops[q][w]);
        weights[q][i % GROUPS] = expf(tops[q][i % GROUPS] - top);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < QUERIES * D; i += 32 * WARPS) {
        const int q = i / D, d = i % D;
        float under = 0.0f, over = 0.0f;
        for (int w = 0; w < GROUPS; w++) {
            under += weights[q][w] * totals[q][w];
            over += weights[q][w] * sums[q][w][d];
        }
        out[(static_cast<size_t>(row) * HEADS + head) * D + i] = static_cast<T>(over / under);
    }
