"""The host's stand-in for a GPU (cuda_on_host): small kernels that are wrong are seen to be, and right ones are not."""

import ctypes
import re

import numpy as np
import pytest

THREADS = 96
SEEDS = range(20)


@pytest.fixture
def run(small_kernels):
    """run(name, seed=0, blocks=1, first=0) -> (numbers, what went wrong or None)."""
    small_kernels.run_small_kernel.restype = ctypes.c_char_p

    def run(name, seed=0, blocks=1, first=0):
        small_kernels.cuda_on_host_seed(ctypes.c_uint64(seed))
        numbers = np.full(blocks * THREADS, 0, np.int32)
        numbers[0] = first
        fault = small_kernels.run_small_kernel(name.encode(), ctypes.c_void_p(numbers.ctypes.data), blocks)
        return numbers, fault and fault.decode()

    return run


@pytest.mark.parametrize("name", ["mirror", "rotate twice"])
def test_a_missing_barrier_changes_the_result(run, name):
    wanted = {"mirror": np.arange(THREADS)[::-1], "rotate twice": (np.arange(THREADS) + 80) % THREADS}[name]
    missing = {"mirror": "mirror without a barrier", "rotate twice": "rotate twice without the second barrier"}[name]
    for seed in SEEDS:
        numbers, fault = run(name, seed, blocks=5)
        assert fault is None and (numbers.reshape(5, THREADS) == wanted).all()
        numbers, fault = run(missing, seed, blocks=5)
        assert fault is None and (numbers.reshape(5, THREADS) != wanted).any()


def test_shared_memory_starts_as_garbage_in_every_block(run):
    numbers, fault = run("read unset shared memory", blocks=20)
    assert fault is None
    assert len(np.unique(numbers)) == numbers.size


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("two barriers", r"__syncthreads at kernels/faults\.cu:\d+ while others wait in __syncthreads at"),
        ("return before a barrier", r"others have returned before __syncthreads at"),
        ("return beside a barrier", r"others have returned before|deadlock; .* 1 of 96 .* 94 others in __sync"),
        ("return before a shuffle", r"__shfl_xor_sync at .* with lanes that have returned"),
        ("return beside a shuffle", r"with lanes that have returned|it returned while others wait in __shfl_xor_sync"),
        ("lanes apart", "while other lanes wait in"),
        ("lane at a barrier", r"deadlock; .* 0 of 96 .*__ballot_sync at .*, thread 5 and 64 others in __syncthreads"),
        ("lane outside the mask", "by a lane that is not in its mask"),
        ("source outside the mask", "reads a lane outside its mask"),
        ("spin", r"deadlock; block \(0, 0, 0\): 0 of 96 returned, 96 spin"),
        ("read null", "an illegal memory access"),
        ("read misaligned", "a misaligned address"),
    ],
)
def test_a_fault_ends_the_launch_with_a_message(run, name, message):
    for seed in SEEDS:
        fault = run(name, seed)[1]
        assert re.search(message, fault or "no fault"), fault
    assert run("mirror")[1] is None  # the next launch is as good as any


def test_blocks_start_in_any_order_and_only_some_at_a_time(run):
    """A block that waits for a lower ticket is served with every seed; one that waits for a lower blockIdx is not."""
    assert all(run("chain of tickets", seed, blocks=12)[1] is None for seed in SEEDS)
    faults = [run("chain of blocks", seed, blocks=12)[1] for seed in SEEDS]
    assert all(fault is None or fault.startswith("deadlock") for fault in faults)
    assert sum(fault is not None for fault in faults) > len(SEEDS) / 2


def test_a_seed_gives_the_same_schedule_again(run):
    name = "rotate twice without the second barrier"
    results = [run(name, seed, blocks=5)[0].tolist() for seed in SEEDS]
    assert results == [run(name, seed, blocks=5)[0].tolist() for seed in SEEDS]
    assert len({tuple(result) for result in results}) == len(SEEDS)
