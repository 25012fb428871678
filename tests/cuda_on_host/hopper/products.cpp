// Products of warp groups: what each thread brings, when they are under way, and what threads must not do meanwhile.
//
// A thread does not stop at a product. Its k-th step is the k-th of its group; a product can be taken once all have
// brought it, is taken at any time from then on, and is over for a thread when that has waited for it.
#include "model.h"

namespace cuda_on_host::hopper {
namespace {

constexpr uint32_t kPoison = 0x7fa5a5a5;  // a NaN that no operation makes
constexpr size_t kMaxRemembered = 64;

const char* name_of(Step step) {
    switch (step) {
        case Step::kFence: return "fence";
        case Step::kProduct: return "product";
        case Step::kCommit: return "commit";
        case Step::kWait: return "wait";
        case Step::kTakeRegisters: return "take";
        default: return "give";
    }
}

Group& own_group(Place place) {
    const size_t group = thread_in_block() / kGroupThreads;
    if (group >= model().groups.size()) fault(text(place) + " by threads that are no whole warp group");
    return model().groups[group];
}

Member& own_member(Group& group) { return group.members[thread_in_block() % kGroupThreads]; }

void end_groups(Group& group) {
    while (!group.open.empty() && group.open.front().second <= group.taken) {
        group.done = group.open.front().first;
        group.open.pop_front();
    }
    for (size_t i = 0; i < group.waiters.size();) {
        if (group.waiters[i].until > group.done) {
            ++i;
            continue;
        }
        wake(group.waiters[i].thread);
        group.waiters[i] = group.waiters.back();
        group.waiters.pop_back();
    }
}

GroupStep& bring(Group& group, Step step, Place place, int number) {
    Member& member = own_member(group);
    const uint64_t index = member.next_step++ - group.first_step;
    if (index == group.steps.size()) {
        if (group.returned) fault(text(place) + ", after others of its warp group have returned");
        group.steps.push_back({step, place, number, 0, nullptr});
    }
    GroupStep& first = group.steps[index];
    if (first.step != step || first.number != number || !same(first.place, place)) {
        fault("the threads of a warp group part: " + text(place) + " (" + name_of(step) + " " + std::to_string(number) +
              ") where others have come to " + text(first.place) + " (" + name_of(first.step) + " " +
              std::to_string(first.number) + ")");
    }
    return first;
}

// Steps are completed in their order.
void have_brought(Group& group, GroupStep& step) {
    if (++step.brought < kGroupThreads) return;
    if (step.step == Step::kProduct) {
        check_operands(*step.product, thread_in_block() / kGroupThreads);
        group.queue.push_back(step.product);
        ++group.brought;
    } else if (step.step == Step::kCommit) {
        group.open.push_back({++group.commits, group.brought});
    }
    group.steps.pop_front();
    ++group.first_step;
    end_groups(group);
}

template <typename T>
T* take_from(std::vector<T*>& free, std::deque<T>& all) {
    if (free.empty()) {
        all.emplace_back();
        return &all.back();
    }
    T* taken = free.back();
    free.pop_back();
    return taken;
}

Flight* find_flight(Member& member, const float* d) {
    for (Flight& flight : member.flights) {
        if (flight.d == d) return &flight;
    }
    return nullptr;
}

Registers& remembered(Member& member, const uint32_t* address, int count) {
    for (Registers& registers : member.registers) {
        if (registers.address == address && registers.count == count) return registers;
    }
    if (member.registers.size() == kMaxRemembered) member.registers.erase(member.registers.begin());
    Registers& made = member.registers.emplace_back();
    made.address = address;
    made.count = count;
    made.fenced = false;
    made.landed = member.landed_at;  // for all that is known, made of what landed then
    return made;
}

// Before registers are used that the thread may have touched.
void check_fenced(Member& member, const uint32_t* address, int count, Place place, const char* name) {
    const Registers& registers = remembered(member, address, count);
    if (member.fenced_at == 0 || member.fenced_at <= registers.landed) {
        fault(text(place) + ": no fence_products since the registers of " + name + " were touched");
    }
    if (registers.fenced && memcmp(registers.values, address, 4 * count)) {
        fault(text(place) + ": " + name + " was written after the last fence_products");
    }
}

bool poisoned(const float* d, int count) {
    uint32_t differing = 0;
    for (int i = 0; i < count; ++i) {
        uint32_t bits;
        memcpy(&bits, d + i, 4);
        differing |= bits ^ kPoison;
    }
    return differing == 0;
}

// The accumulators of this thread for the product that it brings; they hold poison from here on.
void bring_accumulators(Member& member, Product& product, float* d, Place place) {
    Model& m = model();
    const int thread = thread_in_block() % kGroupThreads, count = product.shape.n / 2;
    const auto check_same = [&](bool same) {
        if (!same) fault(text(place) + ": the threads of a warp group bring different accumulators");
    };
    Flight* flight = find_flight(member, d);
    if (!flight) {
        for (const Flight& other : member.flights) {
            if (d < other.d + other.shape.n / 2 && other.d < d + count) fault(text(place) + ": accumulators overlap");
        }
        check_fenced(member, reinterpret_cast<uint32_t*>(d), count, place, "d");
        if (!product.d) {
            product.d = take_from(m.free_accumulators, m.accumulators);
            std::fill(std::begin(product.d->of_thread), std::end(product.d->of_thread), nullptr);
            product.d->users = kGroupThreads;
        }
        check_same(!product.d->of_thread[thread]);
        product.d->of_thread[thread] = d;
        if (product.shape.accumulate) take_in(*product.d, d, product.shape.n, thread);
        for (int i = 0; i < count; ++i) memcpy(d + i, &kPoison, 4);
        member.flights.push_back({d, product.d, product.shape, 0, 0});
        flight = &member.flights.back();
    } else {
        if (!product.d) product.d = flight->accumulator;
        check_same(product.d == flight->accumulator);
        if (!poisoned(d, count)) fault(text(place) + ": d was written while products on it were under way");
        const bool same_shape = flight->shape.n == product.shape.n && flight->shape.half == product.shape.half;
        if (!same_shape && member.fenced_at <= flight->last_product) {
            fault(text(place) + ": a product of another shape on d without fence_products between the two");
        }
        flight->shape = product.shape;
    }
    flight->committed_as = product.committed_as;
    flight->last_product = member.next_step;
}

// What this thread has waited for is over: it gets its accumulators back.
void land(Group& group, Member& member, uint32_t until, Place place) {
    Model& m = model();
    const int thread = thread_in_block() % kGroupThreads;
    bool any = false;
    for (size_t i = 0; i < member.flights.size();) {
        const Flight flight = member.flights[i];
        if (flight.committed_as > until) {
            ++i;
            continue;
        }
        const int count = flight.shape.n / 2;
        if (!poisoned(flight.d, count)) fault(text(place) + ": d was written while products on it were under way");
        give_back(*flight.accumulator, flight.d, flight.shape.n, thread);
        if (--flight.accumulator->users == 0) m.free_accumulators.push_back(flight.accumulator);
        Registers& registers = remembered(member, reinterpret_cast<uint32_t*>(flight.d), count);
        registers.landed = member.next_step;
        registers.fenced = false;
        member.flights.erase(member.flights.begin() + i);
        any = true;
    }
    if (any) member.landed_at = member.next_step;
    size_t kept = 0;
    for (Product* product : member.products) {
        if (product->committed_as > until) {
            member.products[kept++] = product;
            continue;
        }
        if (product->shape.from_registers && memcmp(product->a_of_thread[thread], product->a_values[thread], 16)) {
            fault(text(place) + ": registers a of " + text(product->place) + " were written while products read them");
        }
        if (--product->users == 0) m.free_products.push_back(product);
    }
    member.products.resize(kept);
    uint32_t& heard = clock().at[kFirstGroupAgent + (&group - m.groups.data())];
    heard = std::max(heard, until);
}

}  // namespace

void clear_groups(int count) {
    Model& m = model();
    m.groups.resize(count);
    for (Group& group : m.groups) group = {};
    m.free_accumulators.clear();
    m.free_products.clear();
    for (Accumulator& accumulator : m.accumulators) m.free_accumulators.push_back(&accumulator);
    for (Product& product : m.products) m.free_products.push_back(&product);
}

void leave_group() {
    Model& m = model();
    const size_t number = thread_in_block() / kGroupThreads;
    if (number >= m.groups.size()) return;
    Group& group = m.groups[number];
    const Member& member = own_member(group);
    ++group.returned;
    if (member.next_step < group.first_step + group.steps.size()) {
        fault("it returned where others of its warp group have come to " +
              text(group.steps[member.next_step - group.first_step].place));
    }
    if (!member.products.empty()) {
        fault("it returned while products are under way, the last from " + text(member.products.back()->place));
    }
}

void bring_step(Step step, Place place, int number) {
    Group& group = own_group(place);
    have_brought(group, bring(group, step, place, number));
}

void fence_products(Place place) {
    Group& group = own_group(place);
    bring_step(Step::kFence, place, 0);
    Member& member = own_member(group);
    member.fenced_at = member.next_step;
    for (Registers& registers : member.registers) {
        registers.fenced = !find_flight(member, reinterpret_cast<const float*>(registers.address));
        if (registers.fenced) memcpy(registers.values, registers.address, 4 * registers.count);
    }
}

void bring_product(const Shape& shape, float* d, uint64_t a, const uint32_t* a_registers, uint64_t b, Place place) {
    Model& m = model();
    Group& group = own_group(place);
    Member& member = own_member(group);
    const int thread = thread_in_block() % kGroupThreads;
    GroupStep& step = bring(group, Step::kProduct, place, shape.n);
    if (!step.product) {
        step.product = take_from(m.free_products, m.products);
        Product& made = *step.product;
        made.shape = shape;
        made.place = place;
        made.a = a;
        made.b = b;
        made.committed_as = member.commits + 1;
        made.users = kGroupThreads;
        made.d = nullptr;
        made.known = clock();
    }
    Product& product = *step.product;
    if (!(product.shape == shape) || product.a != a || product.b != b) {
        fault(text(place) + ": the threads of a warp group bring different descriptors or flags");
    }
    bring_accumulators(member, product, d, place);
    if (shape.from_registers) {
        check_fenced(member, a_registers, 4, place, "a");
        product.a_of_thread[thread] = a_registers;
        memcpy(product.a_values[thread], a_registers, 16);
    }
    product.known.meet(clock());
    member.products.push_back(&product);
    ++member.uncommitted;
    have_brought(group, step);
}

void commit_products(Place place) {
    Group& group = own_group(place);
    bring_step(Step::kCommit, place, 0);
    Member& member = own_member(group);
    ++member.commits;
    member.uncommitted = 0;
}

void wait_products(int pending, Place place) {
    Group& group = own_group(place);
    bring_step(Step::kWait, place, pending);
    Member& member = own_member(group);
    if (member.uncommitted) fault(text(place) + " while products are not committed, which it does not wait for");
    const uint32_t until = member.commits > static_cast<uint32_t>(pending) ? member.commits - pending : 0;
    if (until > group.done) {
        group.waiters.push_back({thread_in_block(), until});
        suspend_for(Wait::kProducts, &group - model().groups.data(), until, place);
    }
    land(group, member, until, place);
}

void take_next_product(int number) {
    Group& group = model().groups[number];
    take(*group.queue.front());
    group.queue.pop_front();
    ++group.taken;
    end_groups(group);
}

// Arithmetic makes other NaNs; this one, quieted or not, comes from accumulators that were read while under way.
void check_number(uint32_t bits, Place place) {
    constexpr uint32_t kSignAndQuiet = 0x80400000;
    if ((bits & ~kSignAndQuiet) == (kPoison & ~kSignAndQuiet)) {
        fault(text(place) + ": a number made of accumulators that were read while products on them were under way");
    }
}

}  // namespace cuda_on_host::hopper
