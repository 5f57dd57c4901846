// What bodies of kernels need to be stages of one, and how its blocks meet.
#define READY() ready()
#define WAITS true
#define SHARED(Type, name) \
    static_assert(sizeof(Type) <= ROOM_BYTES, "a block's memory"); \
    ROOM(of_##name); \
    Type& name = *reinterpret_cast<Type*>(of_##name)
struct Place {
    unsigned x, y;
};
struct Sizes {
    int first, second;
    __device__ int operator[](int i) const { return i == 0 ? first : second; }
};
struct Columns {  // of an array whose third size they are
    long long count;
    __device__ int operator[](int) const { return static_cast<int>(count); }
};
#ifdef __CUDACC__
// Blocks that wait for each other must all run at once: the compiler keeps to as many registers as that leaves them.
#undef __global__
#define __global__ __attribute__((global)) __launch_bounds__(256, 1)
#define FUNCTION __device__ __noinline__  // each with registers of its own
extern __shared__ uint4 of_block[];
#define ROOM(name) Eight* const name = reinterpret_cast<Eight*>(of_block) + KEPT
__device__ inline void* kept_room() { return of_block; }

// Until all blocks have come here: each counts itself in `came`, whose `goal` is a multiple of their number. Where they
// do not come, because a card runs fewer at once, came[1] says so and nobody waits any more.
__device__ __noinline__ void meet(unsigned long long* came, unsigned long long& goal) {
    constexpr int PATIENCE = 1 << 21;  // looks, each half a microsecond at least
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        const unsigned long long before = atomicAdd(came, 1ull);
        if (goal == 0) goal = before - before % gridDim.x;
        goal += gridDim.x;
        unsigned long long now, alone;
        int looks = 0;
        do {
            asm volatile("ld.acquire.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(now), "=l"(alone) : "l"(came) : "memory");
            if (++looks == PATIENCE) atomicExch(came + 1, 1ull);
        } while (now < goal && !alone);
    }
    __syncthreads();
}
#else
#define FUNCTION inline
#endif
