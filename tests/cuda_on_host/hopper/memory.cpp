// Shared memory, who may touch what of it, and the life of a block.
#include "model.h"

#include <cstdio>

namespace cuda_on_host::hopper {
namespace {

Model g_models[kMaxResident];

// The block of the thread that runs has met Hopper's functions, or was launched with dynamic shared memory.
void start(Model& model, size_t dynamic_bytes) {
    model.started = true;
    model.bytes = dynamic_bytes;
    for (size_t i = kBase; i < model.memory.size(); i += 8) {
        const uint64_t garbage = draw(UINT64_MAX);
        memcpy(&model.memory[i], &garbage, 8);
    }
    for (Granule& granule : model.granules) {
        granule.write = {};
        granule.unfenced = granule.barriers = 0;
        granule.reads.clear();
    }
    model.clocks.assign(block_threads(), Clock{});
    model.unfenced.assign(block_threads(), {});
    model.waits.assign(block_threads(), {});
    std::fill(std::begin(model.warp_time), std::end(model.warp_time), 1);
    model.barriers.clear();
    model.barriers.reserve(kMaxBarriers);
    std::fill(model.barrier_at.begin(), model.barrier_at.end(), -1);
    for (Named& named : model.named) named = {};
    model.copies.clear();
    clear_groups(block_threads() / kGroupThreads);
    start_registers();
    model.copy_pace = std::vector<size_t>{1, 10, 100, SIZE_MAX}[draw(4)];
    model.product_pace = std::vector<size_t>{1, 10, 100, SIZE_MAX}[draw(4)];
}

std::string span(uint32_t granule) { return "the 128 bytes at " + text_of(granule * kGranule); }

std::string described(const Access& access) { return text(access.place) + " by " + agent_name(access.agent); }

bool ordered(const Access& access, const Clock& known, int own_warp) {
    return access.known_to(known) || access.agent == own_warp;
}

// One that has work: -1 for the copies, else a warp group; -2 where none has.
int draw_engine(bool with_copies, bool with_products) {
    Model& m = model();
    int candidates[kMaxGroups + 1], count = 0;
    if (with_copies && !m.copies.empty()) candidates[count++] = -1;
    for (size_t i = 0; with_products && i < m.groups.size(); ++i) {
        if (!m.groups[i].queue.empty()) candidates[count++] = i;
    }
    return count ? candidates[draw(count)] : -2;
}

}  // namespace

Model& model() {
    Model& model = g_models[resident_block()];
    if (!model.started) start(model, 0);
    return model;
}

bool started() { return g_models[resident_block()].started; }

void start_block(size_t dynamic_bytes) {
    g_models[resident_block()].started = false;
    if (dynamic_bytes) start(g_models[resident_block()], dynamic_bytes);
}

void finish_block() {
    if (!started() || model().copies.empty()) return;
    const Barrier& barrier = model().barriers[model().copies.front().barrier];
    fault("the block ended while copies to " + text_of(model().copies.front().destination) + " were under way, for " +
          describe(barrier));
}

void thread_returns() {
    if (started()) leave_group();
}

int warp() { return thread_in_block() / 32; }

Clock& clock() { return model().clocks[thread_in_block()]; }

Access access_now(Place place) {
    const uint32_t now = model().warp_time[warp()];
    clock().at[warp()] = now;
    return {warp(), now, place};
}

Clock& release() {
    clock().at[warp()] = model().warp_time[warp()]++;
    return clock();
}

std::string text_of(uint32_t address) {
    char text[16];
    snprintf(text, sizeof(text), "0x%x", address);
    return text;
}

std::string role(int thread) {
    return "warp group " + std::to_string(thread / kGroupThreads) + ", warp " + std::to_string(thread / 32) +
           ", lane " + std::to_string(thread % 32);
}

std::string agent_name(int agent) {
    if (agent >= kFirstGroupAgent) return "products of warp group " + std::to_string(agent - kFirstGroupAgent);
    if (agent >= kFirstBarrierAgent) {
        return "the copy engine, for the barrier at " +
               text_of(model().barriers[agent - kFirstBarrierAgent].address);
    }
    return "warp " + std::to_string(agent) + " (warp group " + std::to_string(agent / 4) + ")";
}

void check_inside(uint32_t address, uint64_t bytes, Place place) {
    if (address < kBase || address + bytes > kBase + model().bytes) {
        fault(text(place) + ": " + text_of(address) + " lies outside of the " + std::to_string(model().bytes) +
              " bytes of dynamic shared memory at " + text_of(kBase));
    }
}

void note_read(uint32_t address, uint32_t bytes, const Access& by, const Clock& known, int own_warp, bool by_engine) {
    Model& m = model();
    for (uint32_t i = address / kGranule; i <= (address + bytes - 1) / kGranule; ++i) {
        Granule& granule = m.granules[i];
        if (!ordered(granule.write, known, own_warp)) {
            fault("race on " + span(i) + ": " + text(by.place) + " reads what " + described(granule.write) +
                  " wrote, and has not heard that it is there");
        }
        if (by_engine && granule.unfenced) {
            fault(text(by.place) + " reads " + span(i) + ", which " + described(granule.write) +
                  " wrote, without fence_async_proxy by the thread that wrote");
        }
        bool found = false;
        for (Access& read : granule.reads) {
            if (read.agent != by.agent) continue;
            read = by;
            found = true;
        }
        if (!found) granule.reads.push_back(by);
    }
}

void note_write(uint32_t address, uint32_t bytes, const Access& by, const Clock& known, int own_warp, bool by_engine) {
    Model& m = model();
    for (uint32_t i = address / kGranule; i <= (address + bytes - 1) / kGranule; ++i) {
        Granule& granule = m.granules[i];
        if (!ordered(granule.write, known, own_warp)) {
            fault("race on " + span(i) + ": " + text(by.place) + " writes over what " + described(granule.write) +
                  " wrote, and has not heard that it is there");
        }
        for (const Access& read : granule.reads) {
            if (ordered(read, known, own_warp)) continue;
            fault("race on " + span(i) + ": " + text(by.place) + " writes over what " + described(read) +
                  " may still be reading");
        }
        if (by_engine && granule.unfenced) {
            fault(text(by.place) + " writes over " + span(i) + ", which " + described(granule.write) +
                  " wrote, without fence_async_proxy by the thread that wrote");
        }
        if (granule.barriers) {
            const uint32_t end = std::min((i + 1) * kGranule, address + bytes);
            for (uint32_t word = std::max(i * kGranule, address / 8 * 8); word < end; word += 8) {
                if (m.barrier_at[word / 8] >= 0) fault(text(by.place) + " writes over the barrier at " + text_of(word));
            }
        }
        granule.reads.clear();
        granule.write = by;
    }
}

void all_threads_meet() {
    if (!started()) return;
    Model& m = model();
    Clock all{};
    for (int i = 0; i < block_threads(); ++i) {
        m.clocks[i].at[i / 32] = m.warp_time[i / 32];
        all.join(m.clocks[i]);
    }
    for (Clock& clock : m.clocks) clock = all;
    for (uint32_t& time : m.warp_time) ++time;
}

void lanes_meet(unsigned mask) {
    if (!started()) return;
    Model& m = model();
    Clock all{};
    const int first = warp() * 32;
    for (unsigned rest = mask; rest; rest &= rest - 1) all.join(m.clocks[first + __builtin_ctz(rest)]);
    all.at[warp()] = m.warp_time[warp()]++;
    for (unsigned rest = mask; rest; rest &= rest - 1) m.clocks[first + __builtin_ctz(rest)] = all;
}

void suspend_for(Wait::Kind kind, int which, uint32_t until, Place place) {
    const int thread = thread_in_block();
    model().waits[thread] = {kind, which, until};
    wait_to_be_woken(place);
    model().waits[thread] = {};
}

std::string what_it_waits_for(int block, int thread) {
    const Model& m = g_models[block];
    if (!m.started) return "";
    const Wait& wait = m.waits[thread];
    const std::string until = std::to_string(wait.until);
    switch (wait.kind) {
        case Wait::kBarrier:
            return " for phase " + std::to_string(wait.until - 1) + " of " + describe(m.barriers[wait.which]);
        case Wait::kNamed:
            return " for named barrier " + std::to_string(wait.which) + ", to which " +
                   std::to_string(m.named[wait.which].count) + " of " + std::to_string(m.named[wait.which].threads) +
                   " threads have come";
        case Wait::kProducts:
            return " for group " + until + " of products of warp group " + std::to_string(wait.which) + ", of which " +
                   std::to_string(m.groups[wait.which].done) + " are done";
        case Wait::kRegisters:
            return " for " + until + " registers, of which " + std::to_string(m.free_registers) + " are free";
        default:
            return "";
    }
}

bool engines_busy() {
    if (!started()) return false;
    Model& m = model();
    if (!m.copies.empty()) return true;
    for (const Group& group : m.groups) {
        if (!group.queue.empty()) return true;
    }
    return false;
}

void step_engines(bool nothing_else) {
    Model& m = model();
    const bool copies = nothing_else || draw(m.copy_pace) == 0;
    const bool products = nothing_else || draw(m.product_pace) == 0;
    const int engine = draw_engine(copies, products);
    if (engine == -1) land_some_rows(draw(m.copies.size()));
    if (engine >= 0) take_next_product(engine);
}

uint32_t shared_base() {
    model();
    return kBase;
}

uint32_t load_shared(uint32_t address, Place place) {
    check_inside(address, 4, place);
    if (address % 4) fault(text(place) + ": the address " + text_of(address) + " is no multiple of 4");
    note_read(address, 4, access_now(place), clock(), warp(), false);
    uint32_t value;
    memcpy(&value, &model().memory[address], 4);
    return value;
}

void store_shared(uint32_t address, uint32_t value, Place place) {
    check_inside(address, 4, place);
    if (address % 4) fault(text(place) + ": the address " + text_of(address) + " is no multiple of 4");
    Model& m = model();
    check_number(value, place);
    note_write(address, 4, access_now(place), clock(), warp(), false);
    memcpy(&m.memory[address], &value, 4);
    std::vector<uint32_t>& mine = m.unfenced[thread_in_block()];
    if (std::find(mine.begin(), mine.end(), address / kGranule) != mine.end()) return;
    mine.push_back(address / kGranule);
    ++m.granules[address / kGranule].unfenced;
}

// What was written counts from here on as written now: who reads by an engine has to have heard of the fence.
void fence_async_proxy(Place place) {
    Model& m = model();
    const Access now = access_now(place);
    for (uint32_t i : m.unfenced[thread_in_block()]) {
        Granule& granule = m.granules[i];
        --granule.unfenced;
        if (granule.write.agent == now.agent) granule.write.at = now.at;
    }
    m.unfenced[thread_in_block()].clear();
}

}  // namespace cuda_on_host::hopper
