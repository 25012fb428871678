"""norm_rope_append against float64 brute force with complex numbers, on every backend this machine has."""

import math

import numpy as np
import pytest
import torch
from conftest import DEVICE, backends, relative_error

from worldkv_kernels import Rope3D, RopeTable, norm_rope_append
from worldkv_kernels.ops.norm_rope_append import BACKENDS

BACKEND_NAMES = backends(BACKENDS)
# What each backend is tested in beside half precision, and how far from float64 it may then be.
WIDEST = {"cuda": torch.float16}
LIMIT = {"cuda": 1e-3}


def brute_force(x, weight, heads, grid, start_frame, rope=True, eps=1e-6):
    """Norm over the whole row, then each token's pairs as complex numbers; float64, a token at a time."""
    x = x.double().cpu()
    head_dim = x.shape[1] // heads
    c = head_dim // 2
    per_axis = (c - 2 * (c // 3), c // 3, c // 3)
    rows = []
    for token, row in enumerate(x):
        if weight is not None:
            row = row / math.sqrt(row.square().mean() + eps) * weight.double().cpu()
        row = row.view(heads, head_dim)
        if rope:
            frame, inside = divmod(token, grid[1] * grid[2])
            position = (start_frame + frame, inside // grid[2], inside % grid[2])
            angles = [
                p * 10000.0 ** (-i / n) for p, n in zip(position, per_axis, strict=True) for i in range(n)
            ]  # fmt: skip
            turn = torch.polar(torch.ones(c, dtype=torch.float64), torch.tensor(angles, dtype=torch.float64))
            row = torch.view_as_real(torch.view_as_complex(row.reshape(heads, c, 2)) * turn).flatten(-2)
        rows.append(row)
    return torch.stack(rows)


def inputs(tokens, heads, head_dim, dtype=torch.float32, seed=0, kv_heads=None):
    kv_heads = kv_heads or heads
    columns = [of * head_dim for of in (heads, kv_heads, kv_heads)]
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(tokens, sum(columns), generator=generator).to(DEVICE, dtype)
    weights = 1 + 0.3 * torch.randn(sum(columns[:2]), generator=generator).to(DEVICE, dtype)
    pools = torch.full((2, tokens + 40, kv_heads, head_dim), math.nan, dtype=dtype, device=DEVICE)
    return qkv.split(columns, dim=1), weights.split(columns[:2]), pools


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(1, 1, 64), (2, 2, 128), (5, 5, 64), (12, 12, 128), (40, 40, 64), (6, 2, 128), (40, 8, 64)],
)
@pytest.mark.parametrize(("q_normed", "k_normed", "roped"), [(1, 1, 1), (0, 1, 1), (1, 0, 0), (0, 0, 1)])
def test_matches_float64_and_writes_only_its_rows(backend, heads, kv_heads, head_dim, q_normed, k_normed, roped):
    grid, start, first_row = (2, 3, 5), 17, 11
    dtype = WIDEST.get(backend, torch.float32)
    (q, k, v), weights, pools = inputs(30, heads, head_dim, dtype, kv_heads=kv_heads)
    q_weight, k_weight = weights[0] if q_normed else None, weights[1] if k_normed else None
    limit = LIMIT.get(backend, 2e-6)  # fp32 angles carry 6e-8 of the position, up to 20 radians here
    got = norm_rope_append(
        q, k, v, *pools, first_row, rope=Rope3D(head_dim) if roped else None, grid=grid, start_frame=start,
        q_weight=q_weight, k_weight=k_weight, backend=backend,
    )  # fmt: skip
    written = pools[:, first_row : first_row + 30]
    assert relative_error(got, brute_force(q, q_weight, heads, grid, start, roped)) <= limit
    assert relative_error(written[0], brute_force(k, k_weight, kv_heads, grid, start, roped)) <= limit
    assert torch.equal(written[1], v.reshape(30, kv_heads, head_dim))
    others = torch.cat([pools[:, :first_row], pools[:, first_row + 30 :]], dim=1)
    assert others.isnan().all()


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_as_many_heads_as_there_may_be(backend):
    (q, k, v), weights, pools = inputs(6, 128, 64, WIDEST.get(backend, torch.float32))
    got = norm_rope_append(
        q, k, v, *pools, 3, rope=Rope3D(64), grid=(1, 2, 3), start_frame=2, q_weight=weights[0], backend=backend
    )
    assert relative_error(got, brute_force(q, weights[0], 128, (1, 2, 3), 2)) <= LIMIT.get(backend, 2e-6)
    assert torch.equal(pools[1, 3:9], v.reshape(6, 128, 64))


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_dtype", ["same", "fp32"])
def test_rounding_is_that_of_the_models(backend, dtype, weight_dtype):
    """Norm in fp32, rounded, times the weight (rounded where it has the dtype), turned in float64, rounded."""
    if (backend, dtype, DEVICE.type) == ("triton", torch.bfloat16, "cpu"):
        pytest.skip("Triton's interpreter rounds to bf16 towards zero; fp16 stands in for it there")
    (q, k, v), weights, pools = inputs(12, 3, 64, dtype)
    weights = [weight.float() if weight_dtype == "fp32" else weight for weight in weights]
    got = norm_rope_append(
        q, k, v, *pools, 0, rope=Rope3D(64), grid=(1, 3, 4), start_frame=900,
        q_weight=weights[0], k_weight=weights[1], backend=backend,
    )  # fmt: skip
    x = q.float()
    normed = (x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6)).to(dtype) * weights[0]
    want = brute_force(normed, None, 3, (1, 3, 4), 900)
    exact = relative_error(want.to(dtype), want)
    assert relative_error(got, want) <= 1.02 * exact  # the last rounding and, rarely, a neighbouring one
    once = norm_rope_append(
        q, k, v, *pools, 0, rope=Rope3D(64), grid=(1, 3, 4), start_frame=900,
        q_weight=weights[0], k_weight=weights[1], round_before_rope=False, backend=backend,
    )  # fmt: skip
    unrounded = brute_force(q, weights[0], 3, (1, 3, 4), 900)
    assert relative_error(once, unrounded) <= 1.02 * relative_error(unrounded.to(dtype), unrounded)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("start", [10**7, 2**31 - 2], ids=["ten million", "the last"])
def test_a_frame_far_out_is_turned_as_in_float64(backend, start):
    """To the rounding of fp32, and of an angle of so many radians to float64. The kernels know no frame's number."""
    (q, k, v), weights, pools = inputs(30, 2, 64, WIDEST.get(backend, torch.float32))
    got = norm_rope_append(
        q, k, v, *pools, 3, rope=Rope3D(64), grid=(2, 3, 5), start_frame=start, q_weight=weights[0], backend=backend
    )
    limit = LIMIT.get(backend, 5e-7)
    assert relative_error(got, brute_force(q, weights[0], 2, (2, 3, 5), start)) <= limit
    assert relative_error(pools[0, 3:33], brute_force(k, None, 2, (2, 3, 5), start)) <= limit
    assert relative_error(got, brute_force(q, weights[0], 2, (2, 3, 5), start - 1)) > 0.1


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_row_and_rotations_on_the_device_are_read_when_the_kernel_runs(backend):
    """Of one call's arguments, chunk after chunk, as a captured graph has them."""
    (q, k, v), weights, pools = inputs(6, 2, 64, WIDEST.get(backend, torch.float32))
    rope, grid = Rope3D(64), (1, 2, 3)
    row, table = torch.zeros(1, dtype=torch.int64, device=DEVICE), RopeTable(rope, grid, device=DEVICE)
    address = table.table.data_ptr()
    kwargs = dict(grid=grid, q_weight=weights[0], backend=backend)
    for first_row, start in ((9, 40), (0, 0), (31, 10**7), (40, 41)):
        row.fill_(first_row)
        table.move(start)
        other = torch.full_like(pools, math.nan)
        got = norm_rope_append(q, k, v, *other, row, rope=table, **kwargs)
        pools.fill_(math.nan)
        want = norm_rope_append(q, k, v, *pools, first_row, rope=rope, start_frame=start, **kwargs)
        assert torch.equal(got, want)
        assert torch.equal(other.nan_to_num(7.0), pools.nan_to_num(7.0))
    assert table.table.data_ptr() == address


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_where_and_how_to_turn_are_told_apart(backend):
    """A row on the device goes with a frame of the host's, and a row of the host's with rotations on the device."""
    (q, k, v), _, pools = inputs(6, 2, 64, WIDEST.get(backend, torch.float32))
    rope, grid = Rope3D(64), (1, 2, 3)
    want = norm_rope_append(q, k, v, *pools, 9, rope=rope, grid=grid, start_frame=5, backend=backend)
    row, table = torch.tensor([9], device=DEVICE), RopeTable(rope, grid, device=DEVICE, start_frame=5)
    for first_row, how in (
        (row, dict(rope=rope, start_frame=5)),
        (9, dict(rope=table)),
        (9, dict(rope=table.rope, start_frame=5)),
    ):
        other = torch.full_like(pools, math.nan)
        assert torch.equal(norm_rope_append(q, k, v, *other, first_row, **how, grid=grid, backend=backend), want)
        assert torch.equal(other.nan_to_num(7.0), pools.nan_to_num(7.0))
    plain = norm_rope_append(q, k, v, *pools, 9, rope=None, grid=grid, backend=backend)
    for start in (None, 0, 5):
        other = norm_rope_append(q, k, v, *pools, row, rope=None, grid=grid, start_frame=start, backend=backend)
        assert torch.equal(other, plain) and not torch.equal(other, want)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("grid", [(5, 1, 1), (1, 5, 1), (1, 1, 5), (2, 1, 7), (7, 2, 1)])
def test_a_chunk_may_be_longest_in_any_direction(backend, grid):
    tokens = math.prod(grid)
    (q, k, v), _, pools = inputs(tokens, 2, 64, WIDEST.get(backend, torch.float32))
    got = norm_rope_append(q, k, v, *pools, 0, rope=Rope3D(64), grid=grid, start_frame=1022, backend=backend)
    assert relative_error(got, brute_force(q, None, 2, grid, 1022)) <= LIMIT.get(backend, 5e-7)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_same_bits_every_time_and_contiguous_or_sliced(backend):
    (q, k, v), weights, pools = inputs(30, 2, 128, WIDEST.get(backend, torch.float32))
    kwargs = dict(rope=Rope3D(128), grid=(2, 3, 5), start_frame=3, q_weight=weights[0], backend=backend)
    want = norm_rope_append(q, k, v, *pools, 0, **kwargs)
    for _ in range(3 if backend == "triton" and DEVICE.type == "cpu" else 20):  # the interpreter has one order
        assert torch.equal(norm_rope_append(q.contiguous(), k, v, *pools, 0, **kwargs), want)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_heads_of_wider_tensors(backend):
    """Of out and of the pools some heads in the middle, as a memory's branches have them; others stay as they are."""
    (q, k, v), weights, pools = inputs(30, 4, 64, WIDEST.get(backend, torch.float32), kv_heads=2)
    kwargs = dict(rope=Rope3D(64), grid=(2, 3, 5), start_frame=3, q_weight=weights[0], k_weight=weights[1])
    want = norm_rope_append(q, k, v, *pools, 7, **kwargs, backend=backend)
    wide, out = (torch.full(shape, 5.0, device=DEVICE, dtype=q.dtype) for shape in ((2, 70, 6, 64), (30, 12, 64)))
    norm_rope_append(q, k, v, *wide[:, :, 2:4], 7, **kwargs, out=out[:, 4:8], backend=backend)
    assert torch.equal(out[:, 4:8], want) and torch.equal(wide[:, 7:37, 2:4], pools[:, 7:37])
    out[:, 4:8], wide[:, 7:37, 2:4] = 5, 5
    assert (wide == 5).all() and (out == 5).all()


def good(**changes):
    (q, k, v), weights, pools = inputs(30, 2, 64)
    arguments = dict(
        q=q, k=k, v=v, k_pool=pools[0], v_pool=pools[1], first_row=0, rope=Rope3D(64),
        grid=(2, 3, 5), start_frame=0, q_weight=weights[0], k_weight=weights[1],
    )  # fmt: skip
    return {**arguments, **changes}


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype, device=DEVICE)


SIZES = "[rows, kv_heads, head_dim], heads not first, with 1 to 128 heads and head_dim 64 or 128"


TABLE = RopeTable(Rope3D(64), (2, 3, 5), device=DEVICE)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": zeros(30, 2, 64)}, ValueError, "q must be [tokens, heads * 64] without a batch dimension"),
        *[
            ({"q": zeros(30, columns)}, ValueError,
             f"q must be [tokens, heads * 64], heads a multiple of the pools' 2, at most 128, got [30, {columns}]")
            for columns in (64, 192, 160, 0, 130 * 64)
        ],
        ({"k": zeros(30, 64)}, ValueError, "k must be [30, 128], got [30, 64]"),
        ({"q": zeros(30, 256)}, ValueError, "q_weight must be [256], got [128]"),
        ({"q": zeros(30, 256), "q_weight": None, "out": zeros(30, 2, 64)}, ValueError,
         "out must be [30, 4, 64], got [30, 2, 64]"),
        ({"k": zeros(29, 128)}, ValueError, "k must be [30, 128], got [29, 128]"),
        ({"v": zeros(30, 128, dtype=torch.float16)}, TypeError, "v must be torch.float32, got"),
        ({"q": zeros(128, 30).T}, ValueError, "q must be contiguous in its last 1"),
        ({"k_pool": zeros(70, 128)}, ValueError, "k_pool must be [rows, kv_heads, head_dim], got [70, 128]"),
        ({"k_pool": zeros(70, 2, 96)}, ValueError, f"k_pool must be {SIZES}, got [70, 2, 96]"),
        ({"k_pool": zeros(2, 140, 64)}, ValueError, f"k_pool must be {SIZES}, got [2, 140"),
        ({"k_pool": zeros(1, 70, 2, 64)}, ValueError, "k_pool must be [rows, kv_heads, head_dim] without a batch dim"),
        ({"q": zeros(1, 30, 128)}, ValueError, "q must be [tokens, heads * 64] without a batch dimension: one session"),
        ({"v_pool": zeros(70, 64, 2).transpose(1, 2)}, ValueError, "v_pool must be contiguous in its last 2"),
        ({"grid": (2, 3, 4)}, ValueError, "grid must be (frames, height, width) of 30 tokens in all, got (2, 3, 4)"),
        ({"q_weight": zeros(64)}, ValueError, "q_weight must be [128], got [64]"),
        ({"k_weight": zeros(128, dtype=torch.float16)}, TypeError, "k_weight must be torch.float32"),
        ({"first_row": 41}, ValueError, "first_row must be from 0 to 40 for 30 tokens in 70 rows, got 41"),
        ({"first_row": -1}, ValueError, "first_row must be from 0 to 40"),
        ({"start_frame": -1}, ValueError, "start_frame must be from 0 to 2147483646, got -1"),
        ({"start_frame": 2**31 - 1}, ValueError, "start_frame must be from 0 to 2147483646, got 2147483647"),
        ({"start_frame": zeros(1)}, TypeError, "start_frame must be an integer, got [1] torch.float32 on"),
        ({"rope": TABLE}, ValueError, "start_frame must be None with a RopeTable, which has its own, got 0"),
        ({"rope": TABLE, "start_frame": None, "grid": (2, 5, 3)}, ValueError,
         "grid must be the RopeTable's (2, 3, 5), got (2, 5, 3)"),
        ({"rope": RopeTable(Rope3D(128), (2, 3, 5), device=DEVICE), "start_frame": None}, ValueError,
         "rope must be for head_dim 64, got RopeTable(Rope3D(128"),
        ({"rope": Rope3D(128)}, ValueError, "rope must be for head_dim 64, got Rope3D(128"),
        ({"eps": math.nan}, ValueError, "eps must be finite and not negative, got nan"),
        ({"out": zeros(30, 128)}, ValueError, "out must be [30, 2, 64], got [30, 128]"),
        ({"first_row": zeros(1)}, TypeError, "first_row must be torch.int64, got [1] torch.float32"),
        ({"first_row": zeros(2, dtype=torch.int64)}, ValueError, "first_row must be [1], got [2]"),
        ({"q": np.zeros((30, 128))}, TypeError, "q must be a tensor [tokens, heads * 64], got a numpy array [30, 128]"),
        ({"k_pool": np.zeros(3)}, TypeError, "k_pool must be a tensor [rows, kv_heads, head_dim], got a numpy arra"),
        ({"k_weight": zeros(128, dtype=torch.float64)}, TypeError, "k_weight must be torch.float32, got [128]"),
        ({"grid": 12}, TypeError, "grid must be (frames, height, width) of integers, got 12"),
        ({"grid": None}, TypeError, "grid must be (frames, height, width) of integers, got None"),
        ({"grid": (2.0, 3, 5)}, TypeError, "grid must be (frames, height, width) of integers, got (2.0, 3, 5)"),
        ({"eps": 10**400}, ValueError, "eps must be a number that a float can hold, got 1000"),
        ({"first_row": 10**400}, ValueError, "first_row must be an integer of 64 bits, got 1000"),
        ({"grid": (10**400, 1, 1)}, ValueError, "grid must be an integer of 64 bits, got 1000"),
        ({"start_frame": 10**400, "rope": None}, ValueError, "start_frame must be an integer of 64 bits, got 1000"),
        ({"eps": "x"}, TypeError, "eps must be a number, got 'x'"),
        ({"eps": None}, TypeError, "eps must be a number, got None"),
        ({"eps": math.inf}, ValueError, "eps must be finite and not negative, got inf"),
        ({"round_before_rope": "no"}, TypeError, "round_before_rope must be True or False, got 'no'"),
        ({"rope": "wan"}, TypeError, "rope must be a Rope3D, a RopeTable or None, got 'wan'"),
        ({"rope": 5}, TypeError, "rope must be a Rope3D, a RopeTable or None, got 5"),
        ({"first_row": "a"}, TypeError, "first_row must be an integer, got 'a'"),
        ({"first_row": None}, TypeError, "first_row must be an integer, got None"),
        ({"first_row": 1.5}, TypeError, "first_row must be an integer, got 1.5"),
        ({"start_frame": None}, TypeError, "start_frame must be an integer, got None"),
        ({"start_frame": 1.5}, TypeError, "start_frame must be an integer, got 1.5"),
        ({"start_frame": 1.5, "rope": None}, TypeError, "start_frame must be an integer, got 1.5"),
        ({"grid": (2, 3, 5, 1)}, ValueError, "grid must be (frames, height, width) of 30 tokens in all, got (2, 3,"),
        ({"grid": (2**40, 3, 5)}, ValueError, "grid must be (frames, height, width) of 30 tokens in all, got (109951"),
        ({"backend": 1}, TypeError, "backend must be None or a name, got 1"),
        ({"backend": "nope"}, ValueError, "backend must be None or one of"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named_and_nothing_is_written(changes, error, message):
    arguments = good(**changes)
    with pytest.raises(error, match="norm_rope_append: ") as caught:
        norm_rope_append(**arguments)
    assert message in str(caught.value)
    assert "k_pool" in changes or arguments["k_pool"].isnan().all()


@pytest.mark.parametrize("first_row", [41, -1])
def test_a_row_in_a_tensor_is_checked_on_a_cpu(first_row):
    arguments = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in good().items()}
    with pytest.raises(ValueError, match=f"first_row must be from 0 to 40 for 30 tokens in 70 rows, got {first_row}"):
        norm_rope_append(**{**arguments, "first_row": torch.tensor([first_row])})
    assert arguments["k_pool"].isnan().all()


def test_a_table_on_another_device_is_told():
    """One that torch has without a GPU is meta; a table is made on none, so it says that it is there."""
    table = RopeTable(Rope3D(64), (2, 3, 5), device="cpu")
    table.device = torch.device("meta")
    with pytest.raises(
        ValueError, match=rf"rope must be on {DEVICE}, got RopeTable\(Rope3D.*device='meta', start_frame=0"
    ):
        norm_rope_append(**good(rope=table, start_frame=None))


def columns(x, first):
    return x[:, first : first + 128]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda pool, given: {"v_pool": given["k_pool"]}, "k_pool must not overlap v_pool"),
        (lambda pool, given: {"k_pool": pool[:70], "v_pool": pool[69:139]}, "k_pool must not overlap v_pool"),
        (lambda pool, given: {"k_pool": pool[:70], "q": pool[40:70].flatten(1)}, "k_pool must not overlap q"),
        (lambda pool, given: {"v_pool": pool[:70], "k": pool[40:70].flatten(1)}, "v_pool must not overlap k"),
        (lambda pool, given: {"v_pool": pool[:70], "v": pool[40:70].flatten(1)}, "v_pool must not overlap v"),
        (lambda pool, given: {"v_pool": pool[:70], "out": pool[:30]}, "v_pool must not overlap out"),
        (lambda pool, given: {"q": pool[:30].flatten(1), "out": pool[:30]}, "out must not overlap q"),
        (lambda pool, given: {"out": given["k"].unflatten(1, (2, 64))}, "out must not overlap k"),
    ],
)
def test_overlaps_are_refused(changes, message):
    given = good()
    with pytest.raises(ValueError, match=f"norm_rope_append: {message}, got .*bytes.* and .*bytes"):
        norm_rope_append(**{**given, **changes(zeros(200, 2, 64), given)})


@pytest.mark.parametrize("name", ["out", "k_pool", "v_pool"])
def test_an_output_over_itself_is_refused(name):
    rows = 30 if name == "out" else 70
    with pytest.raises(ValueError, match=rf"norm_rope_append: {name} must not overlap itself, got \[{rows}, 2, 64\]"):
        norm_rope_append(**{**good(), name: zeros(1, 2, 64).expand(rows, -1, -1)})


def test_tensors_of_one_storage_that_lie_apart():
    """Pools in one tensor, row by row or half by half, and q, k, v and out side by side in the rows of another."""
    given = good()
    want = norm_rope_append(**given)
    for pools in (zeros(2, 70, 2, 64), zeros(70, 2, 2, 64).transpose(0, 1)):
        wide = zeros(30, 4 * 128)
        for i, name in enumerate("qkv"):
            columns(wide, 128 * i).copy_(given[name])
        parts = {name: columns(wide, 128 * i) for i, name in enumerate("qkv")}
        out = columns(wide, 384).unflatten(1, (2, 64))
        got = norm_rope_append(**{**given, **parts, "k_pool": pools[0], "v_pool": pools[1], "out": out})
        assert torch.equal(got, want)
        assert torch.equal(pools[0, :30], given["k_pool"][:30]) and torch.equal(pools[1, :30], given["v_pool"][:30])


def test_debug_checks_a_row_on_the_device(monkeypatch):
    monkeypatch.setenv("WORLDKV_DEBUG", "1")
    with pytest.raises(ValueError, match="first_row must be from 0 to 40 for 30 tokens in 70 rows, got 41"):
        norm_rope_append(**good(first_row=torch.tensor([41], device=DEVICE)))


@pytest.mark.parametrize("moved", [False, True], ids=["a frame", "a table that moves"])
def test_opcheck_and_compile(moved):
    (q, k, v), weights, pools = inputs(30, 2, 64, kv_heads=1 if moved else 2)
    rope, grid = Rope3D(64), (2, 3, 5)
    row, table = torch.tensor([5], device=DEVICE), RopeTable(rope, grid, device=DEVICE, start_frame=2)
    pools = pools.nan_to_num()
    args = (
        q, k, v, pools[0].clone(), pools[1].clone(), zeros(30, 2, 64), table.table, *((row, 0) if moved else (None, 5)),
        list(grid), list(rope.pairs), weights[0], weights[1], 1e-6, True, "auto",
    )  # fmt: skip
    torch.library.opcheck(torch.ops.worldkv.norm_rope_append.default, args)
    kwargs = dict(grid=grid, q_weight=weights[0], k_weight=weights[1])
    kwargs |= dict(rope=table) if moved else dict(rope=rope, start_frame=2)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(q, k, v, k_pool, v_pool):
        return norm_rope_append(q * 1, k, v, k_pool, v_pool, row if moved else 5, **kwargs)

    for start in (2, 3, 4000) if moved else (2,):
        table.move(start)
        eager_pools, compiled_pools = pools.clone(), pools.clone()
        want = norm_rope_append(
            q, k, v, *eager_pools, 5, rope=rope, start_frame=start, grid=grid, q_weight=weights[0], k_weight=weights[1]
        )
        assert torch.equal(compiled(q, k, v, *compiled_pools), want)
        assert torch.equal(compiled_pools, eager_pools)


def test_a_compiled_function_may_meet_new_frames():
    """Of a Rope3D, where a graph may end: their tables are made outside of it. In one graph it takes a RopeTable."""
    (q, k, v), _, pools = inputs(30, 2, 64)
    rope = Rope3D(64)

    def appended(q, k, v, k_pool, v_pool, start, rope=rope):
        return norm_rope_append(q * 1, k, v, k_pool, v_pool, 5, rope=rope, grid=(2, 3, 5), start_frame=start)

    torch._dynamo.reset()
    compiled = torch.compile(appended, backend="aot_eager")
    for start in (2, 4, 10**7, 2):
        assert torch.equal(compiled(q, k, v, *pools, start), appended(q, k, v, *pools, start, Rope3D(64)))
