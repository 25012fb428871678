"""The host's stand-in for Hopper (cuda_on_host/hopper): layouts are exact, right kernels run, each flaw is seen."""

import ctypes
import re
import shutil
import subprocess

import cuda_on_host
import numpy as np
import pytest

SEEDS = range(6)
KERNELS = cuda_on_host.HERE / "kernels"


def flaws(source, enum):
    """Numbers of an enum in a kernel's source, by name."""
    names = re.search(rf"enum {enum} {{(.*?)}}", (KERNELS / source).read_text(), re.S)[1]
    return {name: number for number, name in enumerate(re.findall(r"\w+", names))}


PIPELINE_FLAWS = flaws("hopper_pipeline.cu", "Flaw")
PRODUCT_FLAWS = flaws("hopper_units.cu", "ProductFlaw")


@pytest.fixture
def call(small_kernels):
    """call(function, *arguments, seed=0) -> what went wrong or None. Arrays go as pointers, floats in 32 bits."""

    def call(function, *arguments, seed=0):
        run = getattr(small_kernels, function)
        run.restype = ctypes.c_char_p
        small_kernels.cuda_on_host_seed(ctypes.c_uint64(seed))
        as_pointer = {np.ndarray: lambda x: ctypes.c_void_p(x.ctypes.data), float: ctypes.c_float, str: str.encode}
        fault = run(*[as_pointer.get(type(x), lambda x: x)(x) for x in arguments])
        return fault and fault.decode()

    return call


def rounded(x, half):
    """16-bit patterns, to nearest even."""
    if half:
        return x.astype(np.float16).view(np.uint16)
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def widened(bits, half):
    return bits.view(np.float16).astype(np.float32) if half else (bits.astype(np.uint32) << 16).view(np.float32)


def in_memory(rows, first_byte):
    """Rows of 64 numbers as they lie from `first_byte` on: chunks of 8 swizzled by bits 7 to 9 of the address."""
    rows = rows.reshape(-1, 8, 8)
    place = np.arange(8) ^ ((first_byte // 128 + np.arange(len(rows)))[:, None] % 8)
    return np.take_along_axis(rows, place[:, :, None], axis=1).reshape(-1, 64)


def box_of(tensor, column, head, row, box_rows):
    """[box_rows, 64]; zeros outside of the tensor."""
    padded = np.pad(tensor, ((300, 300), (3, 3), (300, 300)))
    return padded[300 + row : 300 + row + box_rows, 3 + head, 300 + column : 364 + column]


@pytest.mark.parametrize("box_rows", [1, 2, 7, 8, 128, 176, 256])
@pytest.mark.parametrize(
    ("column", "head", "row"),
    [(0, 0, 0), (64, 2, 11), (0, 1, -3), (64, 1, 129), (0, -1, 5), (0, 3, 5), (-24, 0, 140), (99, 1, 3)],
)
def test_a_box_lands_swizzled_and_with_zeros_for_what_lies_outside(call, box_rows, column, head, row):
    rng = np.random.default_rng(0)
    tensor = rng.integers(1, 2**16, (150, 3, 128), dtype=np.uint16)
    for seed, offset in enumerate([0, 1024, 3072] if box_rows >= 8 else [0, 128, 640, 1024]):
        memory = np.zeros((box_rows + 32, 64), np.uint16)
        place = (column, head, row, offset)
        fault = call("run_box", tensor, *tensor.shape, box_rows, *place, memory, memory.size // 2, seed=seed)
        assert fault is None
        wanted = np.full_like(memory, 0xAAAA)
        first = offset // 128
        wanted[first : first + box_rows] = in_memory(box_of(tensor, column, head, row, box_rows), offset)
        assert (memory == wanted).all()


@pytest.mark.parametrize(("box_rows", "offset"), [(128, 512), (8, 128), (1, 64), (7, 16)])
def test_where_a_box_may_not_land(call, box_rows, offset):
    tensor, memory = np.ones((9, 3, 128), np.uint16), np.zeros((32, 64), np.uint16)
    fault = call("run_box", tensor, 9, 3, 128, box_rows, 0, 0, 0, offset, memory, 0)
    assert re.search(rf"copy_box at .*: a box of {box_rows} rows to 0x\w+, which is no multiple of", fault)


def test_a_box_behind_the_end_of_shared_memory(call):
    tensor, memory = np.ones((9, 3, 128), np.uint16), np.zeros((32, 64), np.uint16)
    fault = call("run_box", tensor, 9, 3, 128, 128, 0, 0, 0, 96 << 10, memory, 0)
    assert "lies outside of the" in fault


def test_a_copy_from_memory_that_is_not_there(call):
    nowhere, memory = ctypes.c_void_p(1 << 12), np.zeros((32, 64), np.uint16)
    for seed in SEEDS:
        fault = call("run_box", nowhere, 9, 3, 128, 8, 0, 0, 0, 0, memory, 0, seed=seed)
        assert re.match(r"block \(0, 0, 0\): an illegal memory access", fault)


PRODUCTS = [(half, n, *layout) for half in (False, True) for n in (64, 128, 176) for layout in ((0, 0), (0, 1), (1, 1))]


def product(call, half, n, transposed, from_registers, flaw="kNone", seed=0):
    """d of the emulator, what it should be in fp64, and what went wrong."""
    rng = np.random.default_rng(n)
    a, b = (rounded(rng.standard_normal(shape), half) for shape in ((64, 64), (64, n) if transposed else (n, 64)))
    rows = b
    if transposed:  # [halves of 64 columns, 64, 64]
        rows = np.concatenate([np.pad(b, ((0, 0), (0, -n % 64)))[:, i : i + 64] for i in range(0, n, 64)])
    d = np.full((64, n), np.nan, np.float32)
    arrays = (np.ascontiguousarray(a), np.ascontiguousarray(rows), d)
    arguments = (half, n, bool(transposed), bool(from_registers), *arrays, PRODUCT_FLAWS[flaw])
    fault = call("run_product", *arguments, seed=seed)
    a, b = widened(a, half).astype(np.float64), widened(b, half).astype(np.float64)
    return d, a @ b if transposed else a @ b.T, fault


@pytest.mark.parametrize(("half", "n", "transposed", "from_registers"), PRODUCTS)
def test_products_are_right_and_have_the_same_bits_in_every_schedule(call, half, n, transposed, from_registers):
    results = []
    for seed in SEEDS:
        d, wanted, fault = product(call, half, n, transposed, from_registers, seed=seed)
        assert fault is None
        assert np.abs(d - wanted).max() < 1e-4
        results.append(d)
    assert all((d == results[0]).all() for d in results)


@pytest.mark.parametrize(
    ("flaw", "from_registers", "message"),
    [
        ("kNoProxyFence", 0, r"from_shared at .* reads the 128 bytes at .* without fence_async_proxy by the thread"),
        ("kProxyFenceByOneThread", 1, r"without fence_async_proxy by the thread"),
        ("kProxyFenceTooEarly", 1, r"without fence_async_proxy by the thread"),
        ("kNoSyncBeforeProducts", 0, r"race on the 128 bytes at .*: from_shared at .* reads what store_shared at"),
        ("kNoFence", 0, r"from_shared at .*: no fence_products since the registers of d were touched"),
        ("kWrittenAfterFence", 0, r"from_shared at .*: d was written after the last fence_products"),
        ("kAWrittenAfterFence", 1, r"from_registers at .*: a was written after the last fence_products"),
        ("kNoCommit", 0, r"wait_products at .* while products are not committed"),
        ("kNoWait", 0, r"it returned while products are under way, the last from from_shared at"),
        ("kAccumulatorsApart", 0, r"from_shared at .*: the threads of a warp group bring different accumulators"),
        (
            "kDescriptorsApart",
            0,
            r"from_shared at .*: the threads of a warp group bring different descriptors or flags",
        ),
        ("kOutside", 0, r"from_shared at .*: 0x\w+ lies outside of the \d+ bytes of dynamic shared memory at 0x400"),
        ("kAlongARow", 0, r"from_shared at .*: b starts at byte 16 of a row"),
        ("kReservedBits", 0, r"from_shared at .*: a: bits are set in its descriptor that have to be 0"),
        ("kGroupsOnOneRow", 0, r"from_shared at .*: b: groups of 8 rows lie 128 bytes apart"),
        ("kStoredInFlight", 0, r"store_shared at .*: a number made of accumulators that were read while products"),
        ("kReadInFlight", 0, r"__shfl_xor_sync at .*: a number made of accumulators that were read while products"),
    ],
)
def test_a_flaw_around_products(call, flaw, from_registers, message):
    for seed in SEEDS:
        fault = product(call, False, 64, 0, from_registers, flaw, seed)[2]
        assert re.search(message, fault or "no fault"), fault
    assert product(call, False, 64, 0, from_registers)[2] is None


WORD = np.zeros(4096, np.int32)
RACE_ON_A_WORD = (
    r"race on the 128 bytes at 0x400: (load_shared at .* reads what store_shared at .* by warp \d .* wrote, and|"
    r"store_shared at .* writes over what load_shared at .* by warp \d \(warp group \d\) may still be reading)"
)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("share a word without a barrier", RACE_ON_A_WORD),
        (
            "overwrite a word without a barrier",
            r"race on .*: store_shared at .* may still be reading|reads what store_",
        ),
        ("wait by one lane without __syncwarp", RACE_ON_A_WORD),
        ("run past", r"wait at .* the barrier may run past this thread, which then waits for the wrong phase"),
        ("too many arrivals", r"arrive at .*: more arrivals than there should be at the barrier at 0x18400 \(0 phases"),
        ("misaligned barrier", r"init_barrier at .*: a barrier at 0x404, which is no multiple of 8"),
        ("barrier outside", r"init_barrier at .*: 0x\w+ lies outside of the"),
        ("barrier twice", r"init_barrier at .*: a barrier was initialised before at 0x18400"),
        ("barrier of none", r"init_barrier at .*: a barrier of 0 arrivals"),
        ("arrive before init", r"arrive at .*: no barrier was initialised at 0x18400"),
        ("write over a barrier", r"store_shared at .* writes over the barrier at 0x18400"),
        ("named 0", r"sync_named at .*: named barrier 0, where they are 1 to 15"),
        ("named 16", r"sync_named at .*: named barrier 16, where they are 1 to 15"),
        ("named of 100", r"named barrier 1 of 100 threads, in a block of 256"),
        ("named of more", r"named barrier 1 of 288 threads, in a block of 256"),
        ("named by two counts", r"named barrier 1 of (128|256) threads, while sync_named at .* counts (128|256)"),
        ("named by half warps", r"sync_named at .*: named barrier 1 is full with 16 lanes of warp 0"),
        ("named twice", r"arrive_named at .*: named barrier 1: the thread comes a second time before"),
        ("registers of the other direction", r"take_registers at .* of 128 registers by a thread that has 256"),
        ("load outside", r"load_shared at .*: 0x\w+ lies outside of the \d+ bytes of dynamic shared memory at 0x400"),
        ("store below", r"store_shared at .*: 0x3fc lies outside of"),
        ("load misaligned", r"load_shared at .*: the address 0x402 is no multiple of 4"),
        ("part of a group", r"fence_products at .*, after others of its .* returned|it returned where others"),
        ("part of a group, the others gone", r"fence_products at .*, after others of its warp group have returned"),
        ("other order", r"the threads of a warp group part: (fence|commit)_products at .* where others have come to"),
        ("null map", r"an illegal memory access"),
    ],
)
def test_a_flaw_in_a_small_kernel(call, name, message):
    for seed in SEEDS:
        fault = call("run_hopper_kernel", name, WORD, 1, seed=seed)
        assert re.search(message, fault or "no fault"), fault
        assert re.search(
            rf"thread \(\d+, 0, 0\) \(warp group [01], warp \d, lane \d+\): .* \(launch 1 of seed {seed}\)", fault
        )
    assert call("run_hopper_kernel", "phases", np.zeros(200, np.int32), 1) is None  # the next launch is as good as any


@pytest.mark.parametrize("name", ["share a word", "overwrite a word", "wait by one lane", "named of both", "registers"])
def test_a_right_kernel_has_no_fault(call, name):
    assert all(call("run_hopper_kernel", name, WORD, 3, seed=seed) is None for seed in SEEDS)


def test_a_barrier_hands_over_one_phase_after_the_other(call):
    for seed in SEEDS:
        numbers = np.zeros(200, np.int32)
        assert call("run_hopper_kernel", "phases", numbers, 1, seed=seed) is None
        assert (numbers == np.arange(200)).all()


def test_dynamic_shared_memory_starts_as_garbage_in_every_block(call):
    numbers = np.zeros(20 * 256, np.int32)
    assert call("run_hopper_kernel", "read unset", numbers, 20) is None
    assert len(np.unique(numbers)) == numbers.size


def test_more_than_48_kilobytes_have_to_be_asked_for(call):
    numbers = np.zeros(200, np.int32)
    assert call("run_with_shared_memory", 97 << 10, 0, numbers) == "invalid argument"
    assert call("run_with_shared_memory", 97 << 10, 96 << 10, numbers) == "invalid argument"
    assert call("run_with_shared_memory", 97 << 10, 97 << 10, numbers) is None
    assert (numbers == np.arange(200)).all()
    assert call("run_with_shared_memory", 232448, 232448, numbers) is None
    assert call("run_with_shared_memory", 232448, 232449, numbers) == "invalid argument"


BFLOAT16, FLOAT32, SWIZZLE_64B, SWIZZLE_128B = 9, 7, 2, 3


@pytest.mark.parametrize(
    ("change", "accepted"),
    [
        ({}, True),
        (dict(box=(64, 1, 256)), True),
        (dict(box=(64, 1, 257)), False),
        (dict(box=(64, 0, 1)), False),
        (dict(box=(72, 1, 1)), False),  # 144 bytes
        (dict(box=(60, 1, 1)), False),  # 120 bytes
        (dict(type=FLOAT32), False),  # 256 bytes
        (dict(swizzle=SWIZZLE_64B), False),
        (dict(strides=(256, 24)), False),
        (dict(strides=(256, 1 << 40)), False),
        (dict(strides=(256, (1 << 40) - 16)), True),
        (dict(sizes=(128, 3, 1 << 32)), True),
        (dict(sizes=(128, 3, (1 << 32) + 1)), False),
        (dict(sizes=(128, 0, 9)), False),
        (dict(offset=8), False),
        (dict(element_strides=(1, 0, 1)), False),
        (dict(element_strides=(1, 9, 1)), False),
        (dict(rank=0), False),
        (dict(map_offset=32), False),
        (dict(map_offset=64), True),
    ],
)
def test_which_tensor_maps_are_refused(small_kernels, change, accepted):
    base = dict(type=BFLOAT16, rank=3, offset=0, sizes=(128, 3, 9), strides=(256, 768), box=(64, 1, 8))
    of = base | dict(element_strides=(1, 1, 1), swizzle=SWIZZLE_128B, map_offset=0) | change
    numbers = np.zeros(64, np.int64)
    address = (numbers.ctypes.data + 15) // 16 * 16 + of["offset"]
    arrays = [np.array(of[name], np.uint64) for name in ("sizes", "strides")]
    arrays += [np.array(of[name], np.uint32) for name in ("box", "element_strides")]
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in arrays]
    error = small_kernels.encode(
        of["type"], of["rank"], ctypes.c_void_p(address), *pointers, of["swizzle"], of["map_offset"]
    )
    assert error == (0 if accepted else 1)


def pipeline(call, flaw="kNone", seed=0, *, half=False, tile_rows=128, q_len=200, heads=2, tiles=4, grid=2, ask=True):
    """Errors of output and sums, and what went wrong."""
    rng = np.random.default_rng(0)
    rows = tiles * tile_rows - 5  # the last rows of the last tile lie outside: zeros, of weight 1
    q, k, v = (rounded(rng.standard_normal((n, heads, 128)), half) for n in (q_len, rows, rows))
    out = np.full((q_len, heads, 128), np.nan, np.float32)
    sums = np.full((heads, q_len), np.nan, np.float32)
    arguments = (PIPELINE_FLAWS[flaw], half, tile_rows, q, k, v, out, sums, 0.1, q_len, heads, rows, tiles, grid, ask)
    fault = call("run_pipeline", *arguments, seed=seed)
    q, k, v = (widened(x, half) for x in (q, k, v))
    weights = np.exp2(np.einsum("qhd,khd->hqk", q, k) * np.float32(0.1))
    wanted = np.einsum("hqk,khd->qhd", widened(rounded(weights, half), half), v)
    out_error = np.abs(out - wanted).max() / np.abs(wanted).max()
    return out_error, np.abs(sums / (weights.sum(-1) + 5) - 1).max(), fault, out


@pytest.mark.parametrize(("half", "tile_rows"), [(False, 128), (False, 176), (True, 128)])
def test_a_pipeline_is_right_and_has_the_same_bits_in_every_schedule(call, half, tile_rows):
    results = []
    for seed in SEEDS:
        out_error, sums_error, fault, out = pipeline(call, seed=seed, half=half, tile_rows=tile_rows)
        assert fault is None
        assert out_error < 1e-3 and sums_error < 1e-5
        results.append(out)
    assert all((out == results[0]).all() for out in results)


def test_one_thread_may_wait_for_all_that_a_barrier_then_orders(call):
    out_error, sums_error, fault, _ = pipeline(call, "kOneThreadWaitsForK")
    assert fault is None and out_error < 1e-3 and sums_error < 1e-5


RACE = r"race on the 128 bytes at 0x\w+: "
UNHEARD = RACE + r"from_{} at .* reads what copy_box at .* wrote, and has not heard that it is there"
REFILLED = RACE + r"copy_box at .* writes over what from_{} at .* may still be reading"
STUCK = r"deadlock; block \(\d, 0, 0\): \d+ of 384 returned, .*"


@pytest.mark.parametrize(
    ("flaw", "message"),
    [
        ("kNoWaitForK", UNHEARD.format("shared")),
        ("kNoWaitForV", UNHEARD.format("registers")),
        ("kNoWaitForQ", UNHEARD.format("shared")),
        ("kVOfTheNextPhase", r"wait at .* may run past this thread|" + UNHEARD.format("registers") + "|" + STUCK),
        ("kNoWaitForEmptyK", r"arrive_expecting at .*: more arrivals than there|" + REFILLED.format("shared")),
        ("kEmptyKOfTheOtherParity", STUCK + r"thread 0 .* in wait at .* for phase 0 of the barrier at .* 2 of 2 arr"),
        ("kNoWaitForEmptyQ", UNHEARD.format("shared") + "|" + REFILLED.format("shared") + "|more arrivals"),
        ("kVReleasedEarly", REFILLED.format("registers")),
        ("kQReleasedEarly", UNHEARD.format("shared") + "|" + REFILLED.format("shared")),
        ("kScoresReadEarly", r"exp2_approx at .*: a number made of accumulators that were read while products"),
        ("kNoWaitForScores", r"exp2_approx at .*: a number made of accumulators that were read while products"),
        ("kWeightsWrittenEarly", r"wait_products at .*: registers a of from_registers at .* were written while"),
        ("kOutputScaledEarly", r"wait_products at .*: d was written while products on it were under way"),
        ("kNoFence", r"from_shared at .*: no fence_products since the registers of d were touched"),
        ("kNoSecondFence", r"from_registers at .*: no fence_products since the registers of d were touched"),
        ("kNoCommit", r"wait_products at .* while products are not committed"),
        ("kReturnsEarly", r"it returned while products are under way, the last from from_registers at"),
        ("kHalfStrideOfARow", r"from_registers at .*: b: its halves lie 128 bytes apart"),
        ("kNotOnAPattern", r"from_shared at .*: b starts at 0x\w+, not with a pattern of the swizzle, on 1024 bytes"),
        ("kNoSwizzle", r"from_shared at .*: a is not described as in the 128-byte swizzle"),
        ("kHalfOfTheBytes", r"fewer bytes were expected than are being copied: 1 copies are under way"),
        ("kTwiceTheBytes", STUCK + r"for phase 0 of the barrier at 0x\w+ \(0 phases done; .* 0 of 1 .* 32768 bytes"),
        ("kOneArrivalForK", UNHEARD.format("shared") + "|" + REFILLED.format("shared") + "|may run past|more arrivals"),
        ("kTooManyArrivalsForV", STUCK + r"254 of 256 arrivals and 0 bytes are missing"),
        ("kNoSyncAfterInit", r"no barrier was initialised at|has not heard that the barrier at .* was initialised"),
        ("kNoFenceAfterInit", r"no fence_barrier_init after the barrier at 0x\w+ was initialised"),
        ("kNoFirstTurn", STUCK + r"in sync_named at .* for named barrier 1, to which 128 of 256 threads have come"),
        ("kTurnOfOneGroup", r"named barrier 1 of (128|256) threads, while .*_named at .* counts (128|256)"),
        ("kTurnByOneWarp", r"named barrier [12]: the thread comes a second time before the barrier is full"),
        ("kTooManyRegisters", STUCK + r"in take_registers at .* for 80 registers, of which \d+ are free"),
        ("kRegistersNotGiven", STUCK + r"in take_registers at .* for 72 registers, of which 0 are free"),
        ("kMisaligned", r"copy_box at .*: a box of 128 rows to 0x8480, which is no multiple of 1024"),
        ("kOverlappingStages", RACE + r"copy_box at .* writes over what (copy_box|from_shared) at"),
        ("kPhaseNotFlipped", r"arrive_expecting at .*: more arrivals than there should be|" + STUCK),
        ("kGroupsPart", r"from_shared at .*: the threads of a warp group (bring different descriptors|part)"),
    ],
)
def test_a_flaw_in_a_pipeline(call, flaw, message):
    for seed in SEEDS:
        fault = pipeline(call, flaw, seed)[2]
        assert re.search(message, fault or "no fault"), fault
    assert pipeline(call)[2] is None


@pytest.mark.parametrize("flaw", ["kHalvesSwapped", "kNotTransposed", "kOtherHalf", "kOtherQueries"])
def test_a_flaw_that_only_the_result_shows(call, flaw):
    assert all(not pipeline(call, flaw, seed)[0] < 0.1 for seed in SEEDS)


def declarations(text):
    """Of the functions that a header declares: names, template parameters, parameters."""
    text = re.sub(r"//.*|FILE_LINE|\b(inline|static|constexpr|__device__|__forceinline__)\b|\\(?=\n)", "", text)
    template, parameters = r"(?:template <([^<>]*)>\s*)?", r"\(((?:[^()]|\([^()]*\))*)\)"
    found = re.findall(rf"(?:^|\n)\s*{template}[\w:<>]+ (\w+)(<\w+>)?{parameters}\s*([{{;])", text)
    return {
        (name, *(" ".join(re.findall(r"[^\s,]+", words)) for words in (of_template, of_function)))
        for of_template, name, specialised, of_function, end in found
        if not specialised and (of_template or end == "{")
    }


def test_both_headers_declare_the_same():
    device = (cuda_on_host.CSRC / "attention/hopper.cuh").read_text()
    host = (cuda_on_host.HERE / "include/attention/hopper.cuh").read_text().split("namespace worldkv::hopper {")[1]
    # What the host takes of a few arrays only, since the place follows them.
    variadic = {"fence_products", "wait_products", "keep"}
    device, host = ({x for x in declarations(text) if x[0] not in variadic} for text in (device, host))
    names = {name for name, *_ in device}
    assert {"copy_box", "wait", "from_shared", "from_registers", "take_registers", "pack", "matrix_at"} <= names
    assert device == host


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
@pytest.mark.parametrize("source", ["hopper_units.cu", "hopper_pipeline.cu"])
def test_the_same_kernels_are_cuda(source, tmp_path):
    command = ["nvcc", "-cubin", "-O1", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", f"-I{cuda_on_host.CSRC}"]
    command += ["-Werror=all-warnings", str(KERNELS / source), "-o", str(tmp_path / "kernels.cubin")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
