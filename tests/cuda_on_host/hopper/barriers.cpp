// Barriers in shared memory, named barriers, and the registers that warp groups hand to each other.
#include "model.h"

namespace cuda_on_host::hopper {
namespace {

constexpr int64_t kMaxCount = (1 << 20) - 1;  // of arrivals, and of bytes
constexpr int kRegisters = 65536, kMaxThreadRegisters = 256;

void check_barrier_address(uint32_t address, Place place) {
    check_inside(address, 8, place);
    if (address % 8) fault(text(place) + ": a barrier at " + text_of(address) + ", which is no multiple of 8");
}

void arrive_once(Barrier& barrier, Place place) {
    if (barrier.pending == 0) fault(text(place) + ": more arrivals than there should be at " + describe(barrier));
    barrier.arriving.join(release());
    --barrier.pending;
    end_phase_if_done(barrier);
}

void check_phase(const Barrier& barrier, uint32_t until, Place place) {
    if (barrier.completed <= until) return;
    const std::string phase = until ? "phase " + std::to_string(until - 1) : "what was before the first phase";
    fault(text(place) + " for " + phase + " of " + describe(barrier) +
          ": the barrier may run past this thread, which then waits for the wrong phase");
}

Named& named_barrier(int name, int threads, Place place) {
    const auto fail = [&](const std::string& what) {
        fault(text(place) + ": named barrier " + std::to_string(name) + what);
    };
    if (name < 1 || name > 15) fail(", where they are 1 to 15");
    if (threads < 32 || threads % 32 || threads > block_threads()) {
        fail(" of " + std::to_string(threads) + " threads, in a block of " + std::to_string(block_threads()));
    }
    Named& named = model().named[name];
    if (named.count && named.threads != threads) {
        fail(" of " + std::to_string(threads) + " threads, while " + text(named.place) + " counts " +
              std::to_string(named.threads));
    }
    if (named.arrived[thread_in_block()]) fail(": the thread comes a second time before the barrier is full");
    named.threads = threads;
    named.place = place;
    return named;
}

// Barriers count whole warps.
void check_whole_warps(const Named& named, int name, Place place) {
    for (int first = 0; first < block_threads(); first += 32) {
        int lanes = 0;
        for (int lane = 0; lane < 32 && first + lane < block_threads(); ++lane) lanes += named.arrived[first + lane];
        if (lanes && lanes < 32) {
            fault(text(place) + ": named barrier " + std::to_string(name) + " is full with " + std::to_string(lanes) +
                  " lanes of warp " + std::to_string(first / 32));
        }
    }
}

void come_to_named(int name, int threads, bool waits, Place place) {
    Named& named = named_barrier(name, threads, place);
    const int thread = thread_in_block();
    named.joining.join(release());
    named.arrived[thread] = true;
    if (waits) named.waiters.push_back(thread);
    if (++named.count == threads) {
        check_whole_warps(named, name, place);
        for (int waiter : named.waiters) {
            model().clocks[waiter].join(named.joining);
            wake(waiter);
        }
        named.waiters.clear();
        std::fill(named.arrived.begin(), named.arrived.end(), false);
        named.count = 0;
    }
    if (waits) suspend_for(Wait::kNamed, name, 0, place);
}

}  // namespace

std::string describe(const Barrier& barrier) {
    return "the barrier at " + text_of(barrier.address) + " (" + std::to_string(barrier.completed) +
           " phases done; of this one " + std::to_string(barrier.pending) + " of " + std::to_string(barrier.arrivals) +
           " arrivals and " + std::to_string(barrier.bytes) + " bytes are missing)";
}

Barrier& barrier_for_use(uint32_t address, Place place) {
    check_barrier_address(address, place);
    Model& m = model();
    if (m.barrier_at[address / 8] < 0) fault(text(place) + ": no barrier was initialised at " + text_of(address));
    Barrier& barrier = m.barriers[m.barrier_at[address / 8]];
    if (!barrier.init.known_to(clock()) && barrier.init_thread != thread_in_block()) {
        fault(text(place) + ": this thread has not heard that the barrier at " + text_of(address) + " was initialised");
    }
    if (!barrier.fenced && barrier.init_thread != thread_in_block()) {
        fault(text(place) + ": no fence_barrier_init after the barrier at " + text_of(address) + " was initialised");
    }
    return barrier;
}

void end_phase_if_done(Barrier& barrier) {
    if (barrier.pending == 0 && barrier.bytes < 0) {
        fault("more bytes were copied than expected for " + describe(barrier));
    }
    if (barrier.pending || barrier.bytes) return;
    if (barrier.copies) {
        fault("fewer bytes were expected than are being copied: " + std::to_string(barrier.copies) +
              " copies are under way at the end of a phase of " + describe(barrier));
    }
    ++barrier.completed;
    barrier.pending = barrier.arrivals;
    const int agent = kFirstBarrierAgent + (&barrier - model().barriers.data());
    barrier.arriving.at[agent] = barrier.completed;
    barrier.complete = barrier.arriving;
    for (size_t i = 0; i < barrier.waiters.size();) {
        if (barrier.waiters[i].until > barrier.completed) {
            ++i;
            continue;
        }
        wake(barrier.waiters[i].thread);
        barrier.waiters[i] = barrier.waiters.back();
        barrier.waiters.pop_back();
    }
}

void init_barrier(uint32_t address, int arrivals, Place place) {
    const std::string what = text(place);
    check_barrier_address(address, place);
    Model& m = model();
    if (arrivals < 1 || arrivals > kMaxCount) fault(what + ": a barrier of " + std::to_string(arrivals) + " arrivals");
    if (m.barrier_at[address / 8] >= 0) fault(what + ": a barrier was initialised before at " + text_of(address));
    if (m.barriers.size() == kMaxBarriers) fault(what + ": more barriers than are modelled");
    note_write(address, 8, access_now(place), clock(), warp(), false);
    m.barrier_at[address / 8] = m.barriers.size();
    ++m.granules[address / kGranule].barriers;
    Barrier barrier;
    barrier.address = address;
    barrier.arrivals = barrier.pending = arrivals;
    barrier.init = access_now(place);
    barrier.init_thread = thread_in_block();
    m.barriers.push_back(barrier);
}

void fence_barrier_init() {
    for (Barrier& barrier : model().barriers) barrier.fenced |= barrier.init_thread == thread_in_block();
}

void arrive(uint32_t address, Place place) { arrive_once(barrier_for_use(address, place), place); }

void arrive_expecting(uint32_t address, uint32_t bytes, Place place) {
    Barrier& barrier = barrier_for_use(address, place);
    barrier.bytes += bytes;
    if (barrier.bytes > kMaxCount) fault(text(place) + ": more than " + std::to_string(kMaxCount) + " bytes expected");
    arrive_once(barrier, place);
}

void land_bytes(Barrier& barrier, int64_t bytes) {
    barrier.bytes -= bytes;
    --barrier.copies;
    end_phase_if_done(barrier);
}

// Which phase a parity means: of those of which the thread does not know that they are over, the first; where that one
// has the other parity, the one before it, which is over. Hardware tells phases by their parity alone.
void wait(uint32_t address, uint32_t parity, Place place) {
    if (parity > 1) fault(text(place) + ": a parity of " + std::to_string(parity));
    Barrier& barrier = barrier_for_use(address, place);
    const int index = &barrier - model().barriers.data();
    const uint32_t known = clock().at[kFirstBarrierAgent + index];
    const uint32_t until = known + (known % 2 == parity);
    check_phase(barrier, until, place);
    if (barrier.completed < until) {
        barrier.waiters.push_back({thread_in_block(), until});
        suspend_for(Wait::kBarrier, index, until, place);
        check_phase(barrier, until, place);
    } else if (draw(8) == 0) {
        let_others_run(false);
        check_phase(barrier, until, place);
    }
    if (until) clock().join(barrier.complete);
}

void sync_named(int name, int threads, Place place) { come_to_named(name, threads, true, place); }

void arrive_named(int name, int threads, Place place) { come_to_named(name, threads, false, place); }

// A block has what it was launched with, all threads alike; what is over is not its own.
void start_registers() {
    Model& m = model();
    const int warps = (block_threads() + 31) / 32;
    m.registers.assign(block_threads(), std::min(kRegisters / (32 * warps) / 8 * 8, kMaxThreadRegisters));
    m.free_registers = 0;
    m.register_waiters.clear();
}

void change_registers(int count, bool take, Place place) {
    Model& m = model();
    const int thread = thread_in_block();
    const int more = count - m.registers[thread];
    if (take ? more < 0 : more > 0) {
        fault(text(place) + " of " + std::to_string(count) + " registers by a thread that has " +
              std::to_string(m.registers[thread]));
    }
    bring_step(take ? Step::kTakeRegisters : Step::kGiveRegisters, place, count);
    while (m.free_registers < more) {
        m.register_waiters.push_back({thread, static_cast<uint32_t>(more)});
        suspend_for(Wait::kRegisters, 0, more, place);
    }
    m.free_registers -= more;
    m.registers[thread] = count;
    if (take) return;
    int64_t left = m.free_registers;
    while (!m.register_waiters.empty() && m.register_waiters.front().until <= left) {
        left -= m.register_waiters.front().until;
        wake(m.register_waiters.front().thread);
        m.register_waiters.pop_front();
    }
}

}  // namespace cuda_on_host::hopper
