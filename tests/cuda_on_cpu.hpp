// As much of CUDA as the kernels in rl/rollouts need, on one thread of a CPU: each thread of a block is a fiber, which
// goes on when all of its warp, or of its block, have come as far. A warp runs to where its block waits before the next
// does, and a block to where it waits for others before they do: what wants a wait that is not there comes out wrong.
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

inline dim threadIdx, blockIdx, blockDim, gridDim;
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
// of one block after the other, or of all at once
inline std::vector<Barrier> blocks, warps;
inline Barrier everyone;

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

inline void held_until(Barrier& barrier, unsigned size) {
    fibers[running].held = true;
    wait(barrier, size);
    fibers[running].held = false;
}
inline void __syncthreads() { held_until(blocks[running / blockDim.x], blockDim.x); }
// All blocks' (whole.cuh); counted too, as there.
inline void meet(unsigned long long* came, unsigned long long& goal) {
    __syncthreads();
    if (threadIdx.x == 0) ++*came;
    held_until(everyone, fibers.size());
}
inline void warp_wait() { wait(warps[running / 32], 32); }

// what each lane of the running warp has put down for the others
struct Words {
    uint32_t of[32];
    operator uint32_t*() { return of; }
};
inline std::vector<Words> words;
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
inline std::vector<std::unique_ptr<char[]>> rooms, kept_rooms;  // of the blocks that run
#define ROOM(name) Eight* const name = reinterpret_cast<Eight*>(rooms[running / blockDim.x].get())
inline void* kept_room() { return kept_rooms[running / blockDim.x].get(); }
inline void will_read(const void*) {}
inline void make_rooms(unsigned count) {
    rooms.clear();
    kept_rooms.clear();
    for (unsigned i = 0; i < count; i++) {
        rooms.emplace_back(new char[room_bytes + 1]);
        kept_rooms.emplace_back(new char[1 << 12]);
    }
}
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
#ifdef COPIES_AT_ONCE
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
struct Fragments {
    Fragment of[32];
    Fragment& operator[](int i) { return of[i]; }
};
inline std::vector<Fragments> fragments;

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

// Fibers of so many blocks, from number `first` on, to their end.
inline void run_blocks(unsigned first, unsigned count, unsigned blocks_x, unsigned threads) {
    if (fibers.size() != count * threads) fibers = std::vector<Fiber>(count * threads);
    blocks.assign(count, {});
    warps.assign(count * threads / 32, {});
    words.resize(warps.size());
    fragments.resize(warps.size());
    everyone = {};
    copies.clear();
    for (auto& fiber : fibers) fiber.begun = fiber.done = fiber.held = false;
    for (bool going = true; going;) {
        going = false;
        for (unsigned block = 0; block < count; block++)
            for (unsigned own = block * threads; own < (block + 1) * threads; own += 32)
                for (bool moving = true; moving;) {
                    moving = false;
                    for (running = own; running < own + 32; running++) {
                        if (fibers[running].done) continue;
                        going = true;
                        threadIdx = {running % threads, 0};
                        blockIdx = {(first + block) % blocks_x, (first + block) / blocks_x};
                        go_on(fibers[running]);
                        moving = moving || !(fibers[running].done || fibers[running].held);
                    }
                }
    }
}

inline void launch(unsigned blocks_x, unsigned blocks_y, unsigned threads, bool at_once, std::function<void()> kernel) {
    body = kernel;
    blockDim = {threads, 1};
    gridDim = {blocks_x, blocks_y};
    const unsigned count = at_once ? blocks_x * blocks_y : 1;
    make_rooms(count);
    for (unsigned first = 0; first < blocks_x * blocks_y; first += count) run_blocks(first, count, blocks_x, threads);
}
