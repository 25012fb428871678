// Between launches (runtime.cpp), the scheduler of threads, and the model of what Hopper does beside them (hopper/).
#pragma once

#include <cuda_runtime.h>

namespace cuda_on_host {

constexpr int kMaxThreads = 1024;
constexpr int kMaxResident = 6;
constexpr int kMaxDynamicBytes = 232448;  // of shared memory

// Every thread of a grid. Throws std::runtime_error on a fault.
void run(const std::function<void()>& thread, dim3 grid, dim3 block, size_t dynamic_bytes);
void seed(uint64_t number);  // for all that is drawn from here on

// Of the block whose thread, or whose engines, run.
int resident_block();   // its number among those that are resident
int block_threads();
int thread_in_block();  // the thread that runs
size_t draw(size_t bound);
std::string text(const Place& place);
bool same(const Place& a, const Place& b);

void wait_to_be_woken(Place place);  // suspends the thread that runs
void wake(int thread);               // of the same block

namespace hopper {

// With garbage in its shared memory. What an earlier block left is gone.
void start_block(size_t dynamic_bytes);
bool started();
void finish_block();
void thread_returns();
void all_threads_meet();            // at __syncthreads
void lanes_meet(unsigned mask);     // of the warp that runs, at __syncwarp
std::string role(int thread);
std::string what_it_waits_for(int block, int thread);

// Copies and products that are under way. A step, if it is their turn, lands some rows of one or takes one product.
bool engines_busy();
void step_engines(bool nothing_else);

}  // namespace hopper
}  // namespace cuda_on_host
