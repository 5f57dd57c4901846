// The body of a kernel: all layers of a decode step. So many blocks as a GPU runs at once take the work of each stage
// among them and meet before the next; what does not depend on the stage before is asked for while they wait (READY).
//
// A stage is the body of product.cu, attend.cu, stream.cu or finish.cu as a function, made one by rl/rollouts/whole.py,
// which also tells in constants what the linear layers QKV, O, GATE_UP and DOWN are. The host launches one kernel where
// it launched five or seven a layer, and no stage waits for a launch.
//
// rows (B, IN) the embedded tokens, first (B, IN) their norm if STREAMED; layers (L, 34) as in Layer below, cached
// (L, 4, 5) as in Cached: addresses and numbers; turns (T, kinds, B, D) and spans (T, kinds, B, 5) as attend.cu has
// them, of steps of which now[0] is this one; column (T). came (2) is written to: arrivals, and whether they did not come. out
// (B, IN) hidden states, normed if STREAMED, no numbers if blocks did not come; scratch and parts are what stages leave for each other.
    struct Linear {
        const void *weight, *scales, *offsets, *a, *b, *where, *bias;
    };
    struct Layer {
        Linear qkv, o, gate_up, down;
        const T *before, *after, *q_gamma, *k_gamma;  // before: if STREAMED the next layer's, at last the model's
        unsigned long long turns, spans;  // which kind
    };
    struct Cached {
        const T* at;
        long long strides[3], columns;
    };
    struct Record {
        Layer layer;
        Cached prompt_keys, prompt_values, keys, values;
    };
    constexpr int OF_LAYER = sizeof(Layer) / 8, OF_ALL = sizeof(Record) / 8, OUT_OF_QKV = (HEADS + 2 * KV) * D;
    static_assert(2 * sizeof(Record) <= 16 * KEPT);
    const int B = rows_shape[0], LAYERS = layers_shape[0], step = now[0], kinds = turns_shape[1];
    T* const qkv = scratch;
    T* const attended = qkv + B * OUT_OF_QKV;
    T* const between = attended + B * HEADS * D;
    T* const middle = between + B * GATE_UP_OUT / 2;
    T* const kept = STREAMED ? middle : out;  // what the layers add to
    T* const normed = STREAMED ? out : nullptr;
    unsigned long long* const records = reinterpret_cast<unsigned long long*>(kept_room());
    unsigned long long* const counter = const_cast<unsigned long long*>(reinterpret_cast<const unsigned long long*>(came));
    unsigned long long goal = 0;

    const auto bring = [&](int layer) {
        for (int i = threadIdx.x; i < OF_ALL && layer < LAYERS; i += blockDim.x)
            records[layer % 2 * OF_ALL + i] =
                i < OF_LAYER ? layers[layer * OF_LAYER + i] : cached[layer * (OF_ALL - OF_LAYER) + i - OF_LAYER];
    };
    // `down` rows of `across` pieces of work each, and then `down` more, which are small if there are any: who has the
    // last of a round has the first of the next
    const auto share = [&](int across, int down, bool more, const auto& work) {
        bool met = false;
        const auto ready = [&]() {
            if (!met) meet(counter, goal);
            met = true;
        };
        const int most = across * down, all = most + (more ? down : 0);
        for (int begin = 0; begin < all; begin += gridDim.x) {
            const int i = begin + (begin / gridDim.x % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
            if (i >= all) continue;
            __syncthreads();  // nobody reads what the work before has left in the block's memory
            const int x = i < most ? i % across : across, y = i < most ? i / across : i - most;
            work(Place{static_cast<unsigned>(x), static_cast<unsigned>(y)}, ready);
        }
        ready();
    };
#if STREAMED
    const auto stream_all = [&](auto shape, const Linear& one, const T* x, void* to) {
        using S = decltype(shape);
        constexpr int outputs = S::GATED ? S::OUT / 2 : S::OUT, across = outputs / (16 * S::NT * S::WN);
        constexpr bool PARTS = S::SPLIT > 1;
        share(across, (B + 8 * S::MT - 1) / (8 * S::MT) * S::SPLIT, PARTS && S::RANKS > 0,
              [&](Place place, const auto& ready) {
                  stream<T, S::NT, S::WN, S::MT, S::STAGES, S::SPLIT, PARTS, S::RANKS, S::GATED, S::BIAS && !PARTS>(
                      x, Sizes{B, S::IN}, static_cast<const T*>(one.weight), Sizes{S::OUT, 0},
                      static_cast<const T*>(one.a), static_cast<const T*>(one.b), static_cast<const int*>(one.where),
                      static_cast<const T*>(one.bias), to, place, ready);
              });
    };
    const auto finish_all = [&](auto shape, const Linear& one, const T* more, const T* gamma) {
        using S = decltype(shape);
        share(B, 1, false, [&](Place place, const auto& ready) {
            finish<T, S::SPLIT, S::RANKS, (S::OUT + 2047) / 2048, S::BIAS>(
                parts, static_cast<const T*>(one.b), static_cast<const int*>(one.where), static_cast<const T*>(one.bias),
                more, Sizes{B, S::OUT}, gamma, kept, normed, EPS, place, ready);
        });
    };
#else
    const auto multiply_all = [&](auto shape, const Linear& one, const T* x, const T* gamma, const T* more, T* to) {
        using S = decltype(shape);
        const int outputs = S::GATED ? S::OUT / 2 : S::OUT;
        share(outputs / (16 * S::NT), (B + 8 * S::MT - 1) / (8 * S::MT), false, [&](Place place, const auto& ready) {
            product<T, S::BITS, S::GROUP, S::NT, S::MT, 8, S::RANKS, S::NORM, S::GATED, S::BIAS, S::ADD>(
                x, Sizes{B, S::IN}, one.weight, Sizes{S::OUT, 0}, static_cast<const T*>(one.scales),
                static_cast<const T*>(one.offsets), gamma, static_cast<const T*>(one.a), static_cast<const T*>(one.b),
                static_cast<const int*>(one.where), static_cast<const T*>(one.bias), more, to, EPS, place, ready);
        });
    };
#endif

    bring(0);
    __syncthreads();
    for (int layer = 0; layer < LAYERS; layer++) {
        const Record& record = *reinterpret_cast<const Record*>(records + layer % 2 * OF_ALL);
        const Layer& own = record.layer;
        const T* const x = layer == 0 ? rows : kept;
#if STREAMED
        stream_all(Qkv{}, own.qkv, layer == 0 ? first : normed, qkv);
#else
        multiply_all(Qkv{}, own.qkv, x, own.before, nullptr, qkv);
#endif
        bring(layer + 1);  // over the record before, which nobody reads any more
        share(HEADS / TOGETHER, (B + ATTEND_ROWS - 1) / ATTEND_ROWS, false, [&](Place place, const auto& ready) {
            attend<T, D, HEADS, KV, TOGETHER, ATTEND_ROWS, AT_ONCE, 8, QK_NORM>(
                qkv, turns + (static_cast<size_t>(step) * kinds + own.turns) * B * D, own.q_gamma, own.k_gamma,
                record.prompt_keys.at, record.prompt_keys.strides, record.prompt_values.at, record.prompt_values.strides,
                record.keys.at, record.keys.strides, Columns{record.keys.columns}, record.values.at,
                record.values.strides, spans + (static_cast<size_t>(step) * spans_shape[1] + own.spans) * B * 5,
                Sizes{B, 5}, column + step, attended, SCALE, QK_EPS, place, ready);
        });
#if STREAMED
        stream_all(O{}, own.o, attended, parts);
        finish_all(O{}, own.o, x, own.after);
        stream_all(GateUp{}, own.gate_up, normed, between);
        stream_all(Down{}, own.down, between, parts);
        finish_all(Down{}, own.down, kept, own.before);
#else
        multiply_all(O{}, own.o, attended, nullptr, x, middle);
        multiply_all(GateUp{}, own.gate_up, middle, own.after, nullptr, between);
        multiply_all(Down{}, own.down, between, nullptr, middle, kept);
#endif
    }
    for (int i = threadIdx.x; i < B * Qkv::IN && counter[1] != 0; i += blockDim.x) out[i] = static_cast<T>(nanf(""));
