// What the kernels are made of: 8 numbers at a time, and the tensor cores' product.
//
// A body is a kernel of its own, or a stage of whole.cu, which says then where the block's memory is and how it waits
// for other blocks.
#ifndef READY
#define SHARED(Type, name) __shared__ Type name
#define WAITS false  // what is read before READY is asked for while the block waits
#define READY()  // what earlier stages have made is there from here on
#endif
struct alignas(16) Eight {
    unsigned x, y, z, w;  // pairs of T, the first of each in the lower half
};

template <typename T>
__device__ inline Eight load(const T* from) {
    return *reinterpret_cast<const Eight*>(from);
}

template <typename T>
__device__ inline float rounded(float x) {
    return static_cast<float>(static_cast<T>(x));
}

template <typename T>
__device__ inline unsigned pair(float first, float second) {
    const T both[2] = {static_cast<T>(first), static_cast<T>(second)};
    unsigned out;
    memcpy(&out, both, 4);
    return out;
}

template <typename T>
__device__ inline Eight joined(const float (&x)[8]) {
    return Eight{pair<T>(x[0], x[1]), pair<T>(x[2], x[3]), pair<T>(x[4], x[5]), pair<T>(x[6], x[7])};
}

template <typename T>
__device__ inline void spread(Eight from, float (&x)[8]) {
    T own[8];
    memcpy(own, &from, 16);
    for (int j = 0; j < 8; j++) x[j] = static_cast<float>(own[j]);
}

// Weights k … k + 7 of a row, as MLX packs and scales codes of them: the lowest bits of a word are its first code. What
// `fetch` has asked for may still be under way until `open` wants it.
template <typename T, int BITS, int GROUP>
struct Held {
    struct alignas(BITS) Codes {
        unsigned words[BITS / 4];
    } codes;
    T scale, offset;

    __device__ inline void fetch(const void* from, const T* scales, const T* offsets, size_t row, int k, int K) {
        const size_t at = row * (K / GROUP) + k / GROUP;
        scale = scales[at];
        offset = offsets[at];
        codes = *reinterpret_cast<const Codes*>(static_cast<const unsigned*>(from) + (row * K + k) / (32 / BITS));
    }
    __device__ inline Eight open() const {
        constexpr int WORD = 32 / BITS;
        const float times = static_cast<float>(scale), plus = static_cast<float>(offset);
        float x[8];
        for (int j = 0; j < 8; j++) {
            const unsigned code = (codes.words[j / WORD] >> (BITS * (j % WORD))) & ((1u << BITS) - 1);
            x[j] = times * static_cast<float>(code) + plus;
        }
        return joined<T>(x);
    }
};

// The same of weights as they are.
template <typename T, int GROUP>
struct Held<T, 16, GROUP> {
    Eight all;

    __device__ inline void fetch(const void* from, const T*, const T*, size_t row, int k, int K) {
        all = load(static_cast<const T*>(from) + row * K + k);
    }
    __device__ inline Eight open() const { return all; }
};

// sums (16 × 8 over a warp) += weights (16 × 16) × inputs (16 × 8)
template <typename T>
__device__ inline void multiply(
    float (&sums)[4], unsigned w0, unsigned w1, unsigned w2, unsigned w3, unsigned x0, unsigned x1);

#ifdef __CUDACC__
// 16 bytes from a GPU's memory past registers into a block's, zeros where they are not there, as one of a group of
// copies; waiting is for all groups but the last so many.
__device__ inline void copy_16(void* to, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(
                     static_cast<unsigned>(__cvta_generic_to_shared(to))),
                 "l"(from), "r"(there ? 16 : 0)
                 : "memory");
}
__device__ inline void copies_asked() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LAST>
__device__ inline void copies_under_way() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LAST) : "memory");
}
#ifndef ROOM
#define ROOM(name) extern __shared__ Eight name[]
#endif
__device__ inline void will_read(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }
#define MULTIPLY(T, NAME) \
    template <> \
    __device__ inline void multiply<T>( \
        float (&sums)[4], unsigned w0, unsigned w1, unsigned w2, unsigned w3, unsigned x0, unsigned x1) { \
        asm("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME ".f32 " \
            "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]) \
            : "r"(w0), "r"(w1), "r"(w2), "r"(w3), "r"(x0), "r"(x1)); \
    }
MULTIPLY(__half, "f16")
MULTIPLY(__nv_bfloat16, "bf16")
#undef MULTIPLY
#endif

// The same of 8 neighbours a lane, of rows g and g + 8 of the weights.
template <typename T>
__device__ inline void accumulate(float (&sums)[4], const Eight (&w)[2], Eight x) {
    multiply<T>(sums, w[0].x, w[1].x, w[0].y, w[1].y, x.x, x.y);
    multiply<T>(sums, w[0].z, w[1].z, w[0].w, w[1].w, x.z, x.w);
}
