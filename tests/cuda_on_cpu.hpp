// As much of CUDA as the kernels in rl/rollouts need, on one thread of a CPU: each thread of a block is a fiber, which
// goes on when all of its warp, or of its block, have come as far. A warp runs to where its block waits before the next
// does: what wants a __syncthreads that is not there comes out wrong.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __device__
#define __shared__ static
#define alignas(bytes)  // MLX's arrays on a CPU begin 8 bytes behind a multiple of 16
using std::max, std::memcpy, std::memset, std::min;

struct __nv_bfloat16 {
    uint16_t bits;
    __nv_bfloat16() = default;
    explicit __nv_bfloat16(float x) {  // to the nearest, of two the even
        uint32_t word;
        memcpy(&word, &x, 4);
        bits = (word + 0x7fff + (word >> 16 & 1)) >> 16;
    }
    explicit operator float() const {
        const uint32_t word = uint32_t{bits} << 16;
        float x;
        memcpy(&x, &word, 4);
        return x;
    }
};
struct dim {
    unsigned x, y;
};
struct Numbers {
    const int64_t* of;
    int64_t operator[](int i) const { return of[i]; }
};

inline dim threadIdx, blockIdx;
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

constexpr size_t STACK = 1 << 17;
struct Fiber {
    std::unique_ptr<char[]> stack{new char[STACK]};
    jmp_buf at;  // entered by ucontext, then left and gone on with by jumps, which ask nothing of the system
    bool begun = false, done = false, held = false;  // held: where the block waits
};
inline std::vector<Fiber> fibers;
inline jmp_buf back;
inline unsigned running;
inline std::function<void()> body;

struct Barrier {
    unsigned came = 0, round = 0;
};
inline Barrier whole, warps[32];

inline void pass() {
    if (_setjmp(fibers[running].at) == 0) _longjmp(back, 1);
}

inline void wait(Barrier& barrier, unsigned size) {
    const unsigned mine = barrier.round;
    if (++barrier.came == size) {
        barrier.came = 0;
        barrier.round++;
    }
    while (barrier.round == mine) pass();
}

inline void __syncthreads() {
    fibers[running].held = true;
    wait(whole, fibers.size());
    fibers[running].held = false;
}
inline void warp_wait() { wait(warps[running / 32], 32); }

// what each lane of the running warp has put down for the others
inline uint32_t words[32][32];
template <typename X>
inline X __shfl_sync(unsigned, X x, int other) {
    static_assert(sizeof(X) == 4);
    uint32_t* own = words[running / 32];
    memcpy(&own[running % 32], &x, 4);
    warp_wait();
    memcpy(&x, &own[other & 31], 4);
    warp_wait();
    return x;
}
inline float __shfl_xor_sync(unsigned all, float x, int other) { return __shfl_sync(all, x, running % 32 ^ other); }
inline unsigned __ballot_sync(unsigned, bool x) {
    const uint32_t* own = words[running / 32];
    words[running / 32][running % 32] = x;
    warp_wait();
    unsigned found = 0;
    for (int lane = 0; lane < 32; lane++) found |= own[lane] << lane;
    warp_wait();
    return found;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned which) {
    const uint64_t both = uint64_t{high} << 32 | low;
    unsigned found = 0;
    for (int i = 0; i < 4; i++) found |= (both >> 8 * (which >> 4 * i & 7) & 0xff) << 8 * i;
    return found;
}

// Copies past registers: done at the last moment, when they are waited for, or at once; a kernel must live with both.
inline size_t room_bytes = 0;
#define ROOM(name) \
    static Eight name[1 << 14]; \
    if (sizeof name < room_bytes) std::abort()
struct Copy {
    void* to;
    const void* from;
    bool there;
    void done() const {
        if (there) memcpy(to, from, 16);
        else memset(to, 0, 16);
    }
};
inline std::vector<std::vector<std::vector<Copy>>> copies;  // of each thread, by groups
#ifdef AT_ONCE
constexpr bool at_once = true;
#else
constexpr bool at_once = false;
#endif
inline std::vector<std::vector<Copy>>& own_copies() {
    copies.resize(fibers.size());
    if (copies[running].empty()) copies[running].resize(1);
    return copies[running];
}
inline void copy_16(void* to, const void* from, bool there) {
    own_copies().back().push_back({to, from, there});
    if (at_once) own_copies().back().back().done();
}
inline void copies_asked() { own_copies().emplace_back(); }
template <int LAST>
inline void copies_under_way() {
    auto& groups = own_copies();
    while (groups.size() > LAST + 1) {
        for (const Copy& copy : groups.front())
            if (!at_once) copy.done();
        groups.erase(groups.begin());
    }
}

struct Fragment {
    unsigned w[4], x[2];
};
inline Fragment fragments[32][32];

// The layout of mma.m16n8k16 as PTX's manual gives it: lane 4 g + t holds rows g and g + 8, columns 2 t, 2 t + 1, + 8.
template <typename T>
inline void multiply_in_warp(float (&sums)[4], Fragment own) {
    const unsigned warp = running / 32, lane = running % 32;
    fragments[warp][lane] = own;
    warp_wait();
    auto number = [](unsigned word, int half) {
        T both[2];
        memcpy(both, &word, 4);
        return static_cast<float>(both[half]);
    };
    for (int j = 0; j < 4; j++) {
        const int m = lane / 4 + 8 * (j / 2), n = 2 * (lane % 4) + j % 2;
        for (int k = 0; k < 16; k++) {
            const int holder = k % 8 / 2, upper = k / 8;
            const Fragment& of_m = fragments[warp][4 * (m % 8) + holder];
            const Fragment& of_n = fragments[warp][4 * n + holder];
            sums[j] += number(of_m.w[2 * upper + m / 8], k % 2) * number(of_n.x[upper], k % 2);
        }
    }
    warp_wait();
}

inline void enter() {
    body();
    fibers[running].done = true;
    _longjmp(back, 1);
}

inline void go_on(Fiber& fiber) {
    if (_setjmp(back) != 0) return;
    if (fiber.begun) _longjmp(fiber.at, 1);
    fiber.begun = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack.get();
    context.uc_stack.ss_size = STACK;
    context.uc_link = nullptr;
    makecontext(&context, enter, 0);
    setcontext(&context);
}

inline void launch(unsigned blocks_x, unsigned blocks_y, unsigned threads, std::function<void()> kernel) {
    body = kernel;
    if (fibers.size() != threads) fibers = std::vector<Fiber>(threads);
    for (unsigned y = 0; y < blocks_y; y++)
        for (unsigned x = 0; x < blocks_x; x++) {
            blockIdx = {x, y};
            whole = {};
            for (auto& warp : warps) warp = {};
            copies.clear();
            for (auto& fiber : fibers) fiber.begun = fiber.done = fiber.held = false;
            for (bool going = true; going;) {
                going = false;
                for (unsigned first = 0; first < threads; first += 32)
                    for (bool moving = true; moving;) {
                        moving = false;
                        for (running = first; running < first + 32; running++) {
                            if (fibers[running].done) continue;
                            going = true;
                            threadIdx = {running, 0};
                            go_on(fibers[running]);
                            moving = moving || !(fibers[running].done || fibers[running].held);
                        }
                    }
            }
        }
}
