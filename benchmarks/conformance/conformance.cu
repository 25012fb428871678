// What segment attention takes for granted of sm_90a, a small kernel a fact. Each writes bits that conformance.py
// compares with those expected; tests/cuda_on_host runs the same kernels.
#include "boxes.cuh"
#include "handoff.cuh"
#include "products.cuh"
#include "threads.cuh"

#include <algorithm>
#include <cstring>
#include <exception>

namespace worldkv::conformance {
namespace {

struct Fact {
    const char* name;
    Words (*run)();
};

const Fact kFacts[] = {
    {"numbers", numbers},
    {"box_of_a_tile", box_of_a_tile},
    {"boxes_of_8_rows", boxes_of_8_rows},
    {"boxes_of_a_row", boxes_of_a_row},
    {"boxes_past_the_end", boxes_past_the_end},
    {"boxes_before_the_start", boxes_before_the_start},
    {"pool_of_heads_apart", pool_of_heads_apart},
    {"pool_of_padded_rows", pool_of_padded_rows},
    {"phases", phases},
    {"ring", ring},
    {"handoff_by_lane", handoff<GivenBack::kByLane>},
    {"handoff_by_lanes", handoff<GivenBack::kByLanes>},
    {"turns", turns},
    {"registers", registers},
    {"accumulate", accumulate},
    {"accumulators", accumulators},
    {"scores_64", slabs<64, 128, 2>},
    {"scores_128", slabs<128, 128, 2>},
    {"scores_176", slabs<176, 128, 1>},
    {"scores_narrow", slabs<64, 64, 1>},
    {"fp16", fp16},
    {"turned_scores", turned_scores<8>},
    {"partly_turned_scores", turned_scores<3>},
    {"values_64", values<128, 64>},
    {"values_128", values<128, 128>},
    {"values_176", values<128, 176>},
    {"values_narrow", values<64, 176>},
    {"chain", chain},
};

// Not a fact: what a tool that looks for races is to find.
const Fact kRace = {"handoff_too_early", handoff<GivenBack::kTooEarly>};

}  // namespace
}  // namespace worldkv::conformance

#define EXPORTED extern "C" __attribute__((visibility("default")))

// The name of fact i, null behind the last.
EXPORTED const char* conformance_fact(int i) {
    using namespace worldkv::conformance;
    return i >= 0 && i < static_cast<int>(std::size(kFacts)) ? kFacts[i].name : nullptr;
}

// Runs the fact, or kRace. Returns the number of words written, of which the first `capacity` are in `words`; -1 for a failure,
// of which `message` then tells.
EXPORTED int conformance_run(const char* name, uint32_t* words, int capacity, char* message, int message_bytes) {
    using namespace worldkv::conformance;
    try {
        const auto is_called = [=](const Fact& fact) { return !strcmp(fact.name, name); };
        const Fact* fact = std::find_if(std::begin(kFacts), std::end(kFacts), is_called);
        if (fact == std::end(kFacts)) {
            if (!is_called(kRace)) throw std::invalid_argument(std::string("no fact is called ") + name);
            fact = &kRace;
        }
        const Words found = fact->run();
        std::copy_n(found.begin(), std::min<size_t>(found.size(), capacity), words);
        return found.size();
    } catch (const std::exception& error) {
        strncpy(message, error.what(), message_bytes - 1);
        message[message_bytes - 1] = 0;
        return -1;
    }
}
