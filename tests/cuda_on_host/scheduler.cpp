// Runs a grid on one thread of the host. A CUDA thread is a fiber; a few blocks are resident at a time. Fibers change
// where threads wait for each other and at atomic operations; which one goes on is drawn from a seed, so that every
// run can be had again. Memory is sequentially consistent: a missing fence shows nowhere, but in what hopper/ models.
#include "scheduler.h"

#include <csetjmp>
#include <csignal>
#include <link.h>
#include <sstream>
#include <stdexcept>
#include <string>
#include <sys/mman.h>
#include <ucontext.h>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_on_host {
namespace {

constexpr size_t kStackBytes = 128 << 10;

enum class State { kRunnable, kAtBarrier, kAmongLanes, kWaiting, kReturned };

struct Thread {
    char* stack = nullptr;
    bool started = false;  // its fiber waits in run_threads for the next kernel, or in one
    jmp_buf context;
    State state;
    Place place;  // where it waits
    unsigned mask, value, result;
    int source;
};

struct Warp {
    unsigned waiting;   // lanes that are among_lanes
    unsigned returned;  // lanes that are not there any more, or never were
};

struct Block {
    uint3 index;
    Warp warps[kMaxThreads / 32];
    std::vector<Thread> threads = std::vector<Thread>(kMaxThreads);
    std::vector<int> runnable;
    std::vector<char> shared;
    int at_barrier, returned;
    Place barrier;
};

struct Random {
    uint64_t state = 0;
    uint64_t operator()() {
        uint64_t x = state += 0x9e3779b97f4a7c15;
        x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
        x = (x ^ x >> 27) * 0x94d049bb133111eb;
        return x ^ x >> 31;
    }
    size_t below(size_t bound) { return (*this)() % bound; }
};

Random g_random;
Block g_blocks[kMaxResident];
const std::function<void()>* g_body;
int g_num_threads;
jmp_buf g_scheduler;
Block* g_block;  // of the thread that runs
Thread* g_self;  // the thread that runs, null in the scheduler
bool g_in_engines;
std::string g_fault;
int64_t g_idle_steps;  // since a thread did anything but look whether it may go on
bool g_spun;

std::string text(const uint3& index) {
    return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

// Back to the scheduler and, when it has chosen this thread again, on. Not inlined: nothing but the jump may be live.
__attribute__((noinline)) void suspend() {
    if (!_setjmp(g_self->context)) _longjmp(g_scheduler, 1);
}

template <typename Use>
void for_each_lane(unsigned mask, Use use) {
    for (; mask; mask &= mask - 1) use(__builtin_ctz(mask));
}

void check_return() {
    hopper::thread_returns();
    const int thread = g_self - g_block->threads.data();
    Warp& warp = g_block->warps[thread / 32];
    for_each_lane(warp.waiting, [&](int lane) {
        const Thread& other = g_block->threads[thread / 32 * 32 + lane];
        if (other.mask >> thread % 32 & 1) fault("it returned while others wait in " + text(other.place));
    });
    warp.returned |= 1u << thread % 32;
    ++g_block->returned;
    g_self->state = State::kReturned;
}

void run_threads() {
    for (;;) {
        (*g_body)();
        check_return();
        suspend();
    }
}

__attribute__((noinline)) void resume(Thread& thread) {
    if (_setjmp(g_scheduler)) return;
    if (thread.started) _longjmp(thread.context, 1);
    if (!thread.stack) {
        void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (stack == MAP_FAILED) throw std::bad_alloc();
        thread.stack = static_cast<char*>(stack);
    }
    thread.started = true;
    static ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = thread.stack;
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, run_threads, 0);
    setcontext(&context);
}

// Every __shared__ variable of the module: its block of thread-local storage.
struct Shared {
    char* data = nullptr;
    size_t bytes = 0;
    Block* owner = nullptr;  // of what is there now
    std::vector<char> outside;

    Shared() {
        static thread_local char touched;  // the storage is there once something of it was used
        *const_cast<volatile char*>(&touched) = 1;
        dl_iterate_phdr(find, this);
        outside.assign(data, data + bytes);
    }
    ~Shared() { std::copy(outside.begin(), outside.end(), data); }

    static int find(dl_phdr_info* info, size_t, void* self) {
        bool is_this_module = false;
        size_t bytes = 0;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
            const auto& header = info->dlpi_phdr[i];
            const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
            const uintptr_t here = reinterpret_cast<uintptr_t>(&g_blocks);
            if (header.p_type == PT_LOAD) is_this_module |= begin <= here && here < begin + header.p_memsz;
            if (header.p_type == PT_TLS) bytes = header.p_memsz;
        }
        if (!is_this_module) return 0;
        static_cast<Shared*>(self)->data = static_cast<char*>(info->dlpi_tls_data);
        static_cast<Shared*>(self)->bytes = bytes;
        return 1;
    }
    void give(Block& block) {
        if (owner == &block) return;
        if (owner) owner->shared.assign(data, data + bytes);
        std::copy(block.shared.begin(), block.shared.end(), data);
        owner = &block;
    }
    void fill_with_garbage(Block& block) {
        if (owner == &block) owner = nullptr;
        block.shared.resize(bytes);
        for (char& byte : block.shared) byte = static_cast<char>(g_random());
    }
};

// A bad address in a thread ends the launch and not the process.
struct Signals {
    static constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE};
    struct sigaction before[3];

    static void caught(int signal) {
        if (!g_self && !g_in_engines) {
            std::signal(signal, SIG_DFL);
            return;
        }
        fault(signal == SIGFPE ? "a division by zero" : "an illegal memory access");
    }
    Signals() {
        struct sigaction action {};
        action.sa_handler = caught;
        action.sa_flags = SA_NODEFER;
        for (int i = 0; i < 3; ++i) sigaction(kSignals[i], &action, &before[i]);
    }
    ~Signals() {
        for (int i = 0; i < 3; ++i) sigaction(kSignals[i], &before[i], nullptr);
    }
};

// All threads of a block may go on. They stand in order, but start anywhere.
void release(Block& block) {
    const int first = g_random.below(g_num_threads);
    block.runnable.clear();
    for (int i = 0; i < g_num_threads; ++i) {
        block.runnable.push_back((first + i) % g_num_threads);
        block.threads[block.runnable.back()].state = State::kRunnable;
    }
}

int take_runnable(Block& block, size_t among) {
    const size_t count = block.runnable.size();
    const size_t chosen = count - 1 - g_random.below(std::min(among, count));
    const int thread = block.runnable[chosen];
    block.runnable.erase(block.runnable.begin() + chosen);
    return thread;
}

void step(Block& block, int thread) {
    g_block = &block;
    g_self = &block.threads[thread];
    blockIdx = block.index;
    threadIdx.x = thread % blockDim.x;
    threadIdx.y = thread / blockDim.x % blockDim.y;
    threadIdx.z = thread / blockDim.x / blockDim.y;
    g_spun = false;
    resume(*g_self);
    g_self = nullptr;
}

// Named only where Hopper's warp groups have a meaning.
std::string role(int thread) {
    return hopper::started() ? " (" + hopper::role(thread) + ")" : "";
}

// What Hopper's engines do on behalf of a block.
template <typename Work>
void beside_threads(Block& block, Work work) {
    g_block = &block;
    if (_setjmp(g_scheduler)) {
        g_in_engines = false;
        throw std::runtime_error(g_fault);
    }
    g_in_engines = true;
    work();
    g_in_engines = false;
}

// Where the threads of a block wait, those together that wait for the same.
std::string what_waits(const Block& block) {
    std::ostringstream out;
    out << "; block " << text(block.index) << ": " << block.returned << " of " << g_num_threads << " returned";
    std::vector<std::pair<std::string, int>> seen;  // and by which warp group
    std::vector<int> first, count;
    for (int i = 0; i < g_num_threads; ++i) {
        const Thread& thread = block.threads[i];
        if (thread.state == State::kReturned || thread.state == State::kRunnable) continue;
        const std::string what = text(thread.place) + hopper::what_it_waits_for(&block - g_blocks, i);
        const std::pair<std::string, int> by_role{what, hopper::started() ? i / 128 : 0};
        const size_t known = std::find(seen.begin(), seen.end(), by_role) - seen.begin();
        if (known == seen.size()) {
            seen.push_back(by_role);
            first.push_back(i);
            count.push_back(0);
        }
        ++count[known];
    }
    for (size_t i = 0; i < seen.size(); ++i) {
        out << ", thread " << first[i] << role(first[i]);
        if (count[i] > 1) out << " and " << count[i] - 1 << " others";
        out << " in " << seen[i].first;
    }
    return out.str();
}

void run_grid(size_t dynamic_bytes) {
    const Signals signals;
    Shared shared;
    std::vector<uint64_t> order(static_cast<uint64_t>(gridDim.x) * gridDim.y * gridDim.z);
    for (size_t i = 0; i < order.size(); ++i) {
        const size_t other = g_random.below(i + 1);
        order[i] = order[other];
        order[other] = i;
    }
    // How many blocks share the device, how long one is alone, and how far a warp may get ahead of the others.
    const size_t num_resident = std::vector<size_t>{1, 2, 3, kMaxResident}[g_random.below(4)];
    const size_t longest_turn = std::vector<size_t>{8, 100, 3000}[g_random.below(3)];
    const size_t ahead = std::vector<size_t>{0, 3, 30}[g_random.below(3)];
    std::vector<Block*> resident, free;
    for (size_t i = 0; i < num_resident; ++i) free.push_back(&g_blocks[i]);
    g_fault.clear();
    g_idle_steps = 0;

    for (size_t next = 0;;) {
        for (; !free.empty() && next < order.size(); ++next) {
            Block& block = *free.back();
            free.pop_back();
            resident.push_back(&block);
            block.index.x = order[next] % gridDim.x;
            block.index.y = order[next] / gridDim.x % gridDim.y;
            block.index.z = order[next] / gridDim.x / gridDim.y;
            block.at_barrier = block.returned = 0;
            for (int i = 0; i < kMaxThreads / 32; ++i) {
                const int lanes = std::clamp(g_num_threads - 32 * i, 0, 32);
                block.warps[i] = {0, lanes == 32 ? 0 : ~0u << lanes};
            }
            shared.fill_with_garbage(block);
            beside_threads(block, [&] { hopper::start_block(dynamic_bytes); });
            release(block);
        }
        if (resident.empty()) return;
        const size_t chosen = g_random.below(resident.size());
        Block& block = *resident[chosen];
        shared.give(block);
        bool any = true;  // after a turn, or a look in vain, whichever thread; else mostly one of the warp that ran
        for (size_t turn = 1 + g_random.below(longest_turn); turn > 0 && !block.runnable.empty(); --turn) {
            step(block, take_runnable(block, any ? kMaxThreads : 32));
            if (!g_fault.empty()) throw std::runtime_error(g_fault);
            if (hopper::engines_busy()) beside_threads(block, [] { hopper::step_engines(false); });
            if (g_spun) break;
            any = g_random.below(1 + ahead) == 0;
        }
        while (block.runnable.empty() && block.returned < g_num_threads && hopper::engines_busy()) {
            beside_threads(block, [] { hopper::step_engines(true); });
        }
        if (block.returned == g_num_threads) {
            beside_threads(block, [] { hopper::finish_block(); });
            resident.erase(resident.begin() + chosen);
            free.push_back(&block);
        } else if (block.runnable.empty()) {
            g_block = &block;
            throw std::runtime_error("deadlock" + what_waits(block));
        } else if (g_idle_steps > 100 * kMaxResident * g_num_threads) {
            std::string what = "deadlock";
            for (Block* each : resident) {
                g_block = each;
                what += what_waits(*each) + ", " + std::to_string(each->runnable.size()) + " spin";
            }
            throw std::runtime_error(what);
        }
    }
}

}  // namespace

void fault(const std::string& what) {
    const std::string thread = g_self ? ", thread " + text(threadIdx) + role(thread_in_block()) : "";
    g_fault = "block " + text(g_block->index) + thread + ": " + what;
    _longjmp(g_scheduler, 1);
}

std::string text(const Place& place) {
    return std::string(place.call) + " at " + place.file + ":" + std::to_string(place.line);
}

bool same(const Place& a, const Place& b) { return a.line == b.line && a.call == b.call && a.file == b.file; }

int resident_block() { return g_block - g_blocks; }
int block_threads() { return g_num_threads; }
int thread_in_block() { return g_self - g_block->threads.data(); }
size_t draw(size_t bound) { return g_random.below(bound); }

void wait_to_be_woken(Place place) {
    g_idle_steps = 0;
    g_self->state = State::kWaiting;
    g_self->place = place;
    suspend();
}

void wake(int thread) {
    g_block->threads[thread].state = State::kRunnable;
    g_block->runnable.push_back(thread);
}

void let_others_run(bool spins) {
    g_idle_steps = spins ? g_idle_steps + 1 : 0;
    g_spun = spins;
    g_block->runnable.push_back(g_self - g_block->threads.data());
    suspend();
}

void barrier(Place place) {
    g_idle_steps = 0;
    if (g_block->returned) fault("others have returned before " + text(place));
    if (g_block->at_barrier && !same(g_block->barrier, place)) {
        fault(text(place) + " while others wait in " + text(g_block->barrier));
    }
    g_block->barrier = place;
    g_self->state = State::kAtBarrier;
    g_self->place = place;
    if (++g_block->at_barrier == g_num_threads) {
        g_block->at_barrier = 0;
        hopper::all_threads_meet();
        release(*g_block);
    }
    suspend();
}

unsigned among_lanes(Place place, unsigned mask, unsigned value, int source, Combine combine, bool orders_memory) {
    g_idle_steps = 0;
    const int thread = g_self - g_block->threads.data(), first = thread / 32 * 32;
    if (!(mask >> thread % 32 & 1)) fault(text(place) + " by a lane that is not in its mask");
    if (!combine && (source > 31 || !(mask >> source & 1))) {
        fault(text(place) + " reads a lane outside its mask");
    }
    g_self->state = State::kAmongLanes;
    g_self->place = place;
    g_self->mask = mask, g_self->value = value, g_self->source = source;
    Warp& warp = g_block->warps[thread / 32];
    if (mask & warp.returned) fault(text(place) + " with lanes that have returned or never were");
    if (mask & warp.waiting) {
        const Thread& other = g_block->threads[first + __builtin_ctz(mask & warp.waiting)];
        if (!same(other.place, place) || other.mask != mask) {
            fault(text(place) + " while other lanes wait in " + text(other.place) + ", or for other lanes");
        }
    }
    warp.waiting |= 1u << thread % 32;
    if ((mask & warp.waiting) == mask) {
        Thread* lanes = &g_block->threads[first];
        unsigned combined = lanes[__builtin_ctz(mask)].value;
        if (combine) for_each_lane(mask & mask - 1, [&](int lane) { combined = combine(combined, lanes[lane].value); });
        for_each_lane(mask, [&](int lane) {
            lanes[lane].result = combine ? combined : lanes[lanes[lane].source].value;
            lanes[lane].state = State::kRunnable;
            g_block->runnable.push_back(first + lane);
        });
        warp.waiting &= ~mask;
        if (orders_memory) hopper::lanes_meet(mask);
    }
    suspend();
    return g_self->result;
}

void run(const std::function<void()>& thread, dim3 grid, dim3 block, size_t dynamic_bytes) {
    g_body = &thread;
    g_num_threads = block.x * block.y * block.z;
    gridDim = grid;
    blockDim = block;
    try {
        run_grid(dynamic_bytes);
    } catch (...) {
        for (Block& each : g_blocks) {
            for (Thread& abandoned : each.threads) abandoned.started = false;
        }
        throw;
    }
}

void seed(uint64_t number) { g_random.state = number; }

}  // namespace cuda_on_host
