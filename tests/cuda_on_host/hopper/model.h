// A block's shared memory as Hopper has it, and what works on it beside the threads: barriers, copies, products.
//
// Who may touch what is told by vector clocks. Agents are the warps, the phases of each barrier, which stand for the
// copies that they count, and the products of each warp group. A thread knows of each agent up to which time it has
// heard; what it has not heard of by way of a barrier, it may not rely on. Memory is told apart by 128 bytes.
#pragma once

#include "../scheduler.h"

#include <attention/hopper.cuh>

#include <deque>
#include <vector>

namespace cuda_on_host::hopper {

constexpr int kMaxWarps = kMaxThreads / 32, kMaxBarriers = 64, kGroupThreads = 128;
constexpr int kMaxGroups = kMaxThreads / kGroupThreads;
constexpr int kFirstBarrierAgent = kMaxWarps, kFirstGroupAgent = kFirstBarrierAgent + kMaxBarriers;
constexpr int kAgents = kFirstGroupAgent + kMaxGroups;
constexpr uint32_t kBase = 1024;  // where dynamic shared memory begins: on a device something lies below
constexpr uint32_t kGranule = 128, kPattern = 1024, kRowBytes = 128;

struct alignas(64) Clock {
    uint32_t at[(kAgents + 15) / 16 * 16];

    void join(const Clock& other) {
        for (int i = 0; i < kAgents; ++i) at[i] = std::max(at[i], other.at[i]);
    }
    void meet(const Clock& other) {
        for (int i = 0; i < kAgents; ++i) at[i] = std::min(at[i], other.at[i]);
    }
};

struct Access {
    int agent = -1;  // of none
    uint32_t at = 0;
    Place place{};

    bool known_to(const Clock& clock) const { return agent < 0 || at <= clock.at[agent]; }
};

struct Granule {
    Access write;
    int unfenced = 0;  // threads that have written it with ordinary stores and not fenced them yet
    int barriers = 0;
    std::vector<Access> reads;  // the last one of each agent since the write
};

struct Waiter {
    int thread;
    uint32_t until;
};

// An mbarrier.
struct Barrier {
    uint32_t address;
    int arrivals, pending;
    int64_t bytes = 0;       // expected and not landed
    uint32_t completed = 0;  // phases
    int copies = 0;          // under way that count for this phase
    bool fenced = false;
    Access init;
    int init_thread;
    Clock arriving{}, complete{};
    std::vector<Waiter> waiters;
};

struct Named {
    int threads = 0, count = 0;  // of the round that is open
    Place place;
    Clock joining{};
    std::vector<bool> arrived = std::vector<bool>(kMaxThreads);
    std::vector<int> waiters;
};

// What cuTensorMapEncodeTiled hides in a CUtensorMap. Innermost dimension first.
struct TensorMap {
    uint64_t magic;
    const char* base;
    uint64_t strides[4];  // bytes; of dimensions 1 up
    uint32_t last[5];     // sizes less one
    uint8_t box_less_one[5], element_strides[5];
    uint8_t rank, type, swizzle;
};

struct Copy {
    TensorMap map;
    uint32_t destination;
    int barrier;
    int from[3];                 // column, head, row
    std::vector<uint16_t> rows;  // of the box, that have not landed
};

inline bool operator==(const Shape& a, const Shape& b) {
    return a.half == b.half && a.from_registers == b.from_registers && a.transposed == b.transposed &&
           a.accumulate == b.accumulate && a.n == b.n;
}

constexpr int kMaxN = 176;

// The numbers that the products under way are writing, for a whole warp group.
struct Accumulator {
    int users;  // threads that have not got their part back
    float* of_thread[kGroupThreads];
    float values[64][kMaxN];
};

struct Product {
    Shape shape;
    Place place;
    uint64_t a, b;
    uint32_t committed_as;
    int users;  // threads that have not waited for it
    Accumulator* d;
    Clock known;  // to all threads of the group
    const uint32_t* a_of_thread[kGroupThreads];
    uint32_t a_values[kGroupThreads][4];
};

enum class Step { kFence, kProduct, kCommit, kWait, kTakeRegisters, kGiveRegisters };

// One thing that all threads of a warp group do, each in its turn.
struct GroupStep {
    Step step;
    Place place;
    int number;
    int brought;  // threads that have come to it
    Product* product;
};

// Registers of a thread that products have used, and what was in them at the last fence.
struct Registers {
    const uint32_t* address;
    int count;
    bool fenced;  // the values are those of the last fence
    uint64_t landed;
    uint32_t values[kMaxN / 2];
};

struct Flight {
    float* d;
    Accumulator* accumulator;
    Shape shape;
    uint32_t committed_as;  // the last product on it
    uint64_t last_product;
};

// A thread of a warp group.
struct Member {
    uint64_t next_step = 0;
    uint64_t fenced_at = 0, landed_at = 0;  // steps, from 1 on; 0 for never
    uint32_t commits = 0;
    int uncommitted = 0;
    std::vector<Flight> flights;
    std::vector<Product*> products;
    std::vector<Registers> registers;
};

struct Group {
    std::deque<GroupStep> steps;
    uint64_t first_step = 0;  // number of the first in `steps`
    std::vector<Member> members = std::vector<Member>(kGroupThreads);
    std::deque<Product*> queue;  // brought by all, not taken yet
    std::deque<std::pair<uint32_t, uint64_t>> open;  // committed groups that are not done: number, last product
    uint64_t brought = 0, taken = 0;                 // products
    uint32_t commits = 0, done = 0;
    int returned = 0;
    std::vector<Waiter> waiters;
};

// What a thread waits for, to be said in a deadlock.
struct Wait {
    enum Kind { kNothing, kBarrier, kNamed, kProducts, kRegisters } kind = kNothing;
    int which = 0;
    uint32_t until = 0;
};

struct Model {
    bool started = false;
    uint32_t bytes = 0;
    std::vector<uint8_t> memory = std::vector<uint8_t>(kBase + kMaxDynamicBytes);
    std::vector<Granule> granules = std::vector<Granule>((kBase + kMaxDynamicBytes) / kGranule);
    std::vector<Clock> clocks;                    // of the threads
    std::vector<std::vector<uint32_t>> unfenced;  // granules, by thread
    std::vector<Wait> waits;                      // of the threads
    uint32_t warp_time[kMaxWarps];
    std::vector<Barrier> barriers;
    std::vector<int8_t> barrier_at = std::vector<int8_t>((kBase + kMaxDynamicBytes) / 8);
    Named named[16];
    std::vector<Copy> copies;
    std::vector<Group> groups;
    std::deque<Accumulator> accumulators;
    std::deque<Product> products;
    std::vector<Accumulator*> free_accumulators;
    std::vector<Product*> free_products;
    std::vector<int> registers;                   // of each thread
    int64_t free_registers;
    std::deque<Waiter> register_waiters;
    size_t copy_pace, product_pace;  // one step of the engines in so many, beside those of the threads
};

Model& model();
bool started();  // without starting it

// memory.cpp
int warp();
Clock& clock();       // of the thread that runs
Access access_now(Place place);
Clock& release();     // its clock, to be handed on: what it does from here on is not known by that
std::string text_of(uint32_t address);
std::string role(int thread);
std::string agent_name(int agent);
void check_inside(uint32_t address, uint64_t bytes, Place place);
// `known` is what the reader or writer has heard of, `own_warp` whose accesses need no order, or -1.
void note_read(uint32_t address, uint32_t bytes, const Access& by, const Clock& known, int own_warp, bool by_engine);
void note_write(uint32_t address, uint32_t bytes, const Access& by, const Clock& known, int own_warp, bool by_engine);
void suspend_for(Wait::Kind kind, int which, uint32_t until, Place place);

// barriers.cpp
Barrier& barrier_for_use(uint32_t address, Place place);
void end_phase_if_done(Barrier& barrier);
std::string describe(const Barrier& barrier);
void land_bytes(Barrier& barrier, int64_t bytes);
void start_registers();

// copies.cpp
void land_some_rows(size_t copy);

// products.cpp
void bring_step(Step step, Place place, int number);  // what all threads of a warp group do alike
void take_next_product(int group);
void leave_group();  // the thread that runs returns
void clear_groups(int count);

// operands.cpp
void check_operands(const Product& product, int group);
void take(const Product& product);
void take_in(Accumulator& accumulator, const float* d, int n, int thread);
void give_back(const Accumulator& accumulator, float* d, int n, int thread);

}  // namespace cuda_on_host::hopper
