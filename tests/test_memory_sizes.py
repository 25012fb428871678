"""What a memory takes is known to the byte before it is made, and a refusal names it and what would fit."""

import random
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from worldkv_kernels import MemoryConfig, Rope3D, WorldMemory
from worldkv_kernels.memory import pool, room
from worldkv_kernels.memory.sizes import memory_bytes
from worldkv_kernels.models.lingbot_config import LingBotConfig

CPU, GPU = torch.device("cpu"), torch.device("cuda")
LINGBOT = LingBotConfig.fast()
GIB = 2**30


def drawn(seed: int) -> tuple[MemoryConfig, torch.dtype]:
    """Any config, small."""
    of = random.Random(seed)
    head_dim = of.choice((64, 128))
    frames = of.choice((1, 2, 3, 4))
    half = head_dim // 2
    ropes = (None, "wan", Rope3D(head_dim, pairs=(half - 20, 20, 0)), Rope3D(head_dim, pairs=(0, half // 2, half // 2)))
    rope, mode = of.choice(ropes), of.choice(("worldkv", "worldkv", "worldkv", "full", "sliding", "sink_recent"))
    retrieved, (heads, kv_heads) = of.randint(0, 4), of.choice(((1, 1), (2, None), (3, 3), (3, 1), (4, 2)))
    config = MemoryConfig(
        num_layers=of.randint(1, 3), num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim,
        grid=(of.randint(1, 9), of.randint(1, 23)), chunk_frames=frames, mode=mode, rope=rope,
        sink_frames=of.randint(0, 2 * frames), recent_frames=of.randint(0, 3 * frames), retrieved_chunks=retrieved,
        keep_ratio=of.choice((0.01, 0.25, 0.3, 0.5, 1)), bank=of.choice(("device", "host")),
        bank_bits=of.choice((16, 16, 8, 4)),
        bank_chunks=of.randint(max(1, retrieved), 9),
        device_slots=of.choice((None, max(1, retrieved) + of.randint(0, 3))),
        rebase_time=rope is not None and of.random() < 0.5, retrieved_log_weight=of.choice((0, 0, 0.5)),
        unattended_chunks=of.choice((0, 0, 1, 2)), bank_sink=of.random() < 0.2, merge_pruned=of.random() < 0.5,
        retrieval=of.choice(("pose", "pose", "content")), branches=of.choice((1, 1, 2, 3)),
    )  # fmt: skip
    return config, of.choice((torch.bfloat16, torch.float16, torch.float32))


def held(found: object, seen: dict[int, torch.UntypedStorage], walked: set[int]) -> dict[int, torch.UntypedStorage]:
    """The storages of all tensors that an object of the package reaches."""
    if isinstance(found, torch.Tensor):
        seen[found.untyped_storage()._cdata] = found.untyped_storage()
    elif id(found) not in walked:
        walked.add(id(found))
        parts = [*found.keys(), *found.values()] if isinstance(found, dict) else []
        parts += found if isinstance(found, list | tuple | set | frozenset) else []
        if type(found).__module__.startswith("worldkv_kernels"):
            parts += vars(found).values() if hasattr(found, "__dict__") else []
        for part in parts:
            held(part, seen, walked)
    return seen


def bytes_of(found: object) -> int:
    return sum(storage.nbytes() for storage in held(found, {}, set()).values())


@pytest.mark.parametrize("seed", range(60))
def test_it_is_what_a_memory_allocates_to_the_byte(seed):
    config, dtype = drawn(seed)
    memory = WorldMemory(config, dtype=dtype)
    sizes = config.bytes(dtype)
    of_pool = sizes.sink + sizes.recent + sizes.gap + sizes.current + sizes.bank + sizes.restored
    assert bytes_of([memory._storage.pool.k, memory._storage.pool.v]) == of_pool
    assert bytes_of(memory._storage._packed) == sizes.packed_bank
    assert memory.stats()["device_bytes"] == of_pool + sizes.packed_bank
    of_window, rotations = [memory.window._tables, memory._storage._chosen], memory._attention.rotations
    of_rotations = [rotations._tables] if rotations is not None else []
    of_layers = memory._attention.layer_windows
    anew = [getattr(of_layers, name) for name in ("tiles", "tail_rows", "_steps", "_shared")] if of_layers else []
    assert bytes_of([x.on_device for x in of_window if x] + anew) == sizes.tables
    assert bytes_of([x.on_device for x in of_rotations]) == sizes.rotations
    on_host = [x.on_host for x in [*of_window, *of_rotations] if x]
    contents = memory._contents
    assert bytes_of([*on_host, contents._on_host if contents else ()]) == sizes.host_tables
    assert bytes_of(memory._bank._cache.arena.rows if config.caches_bank else ()) == sizes.host_bank
    assert bytes_of(memory) == sizes.device + sizes.host
    memory.begin_chunk(np.tile(np.eye(4), (config.chunk_frames, 1, 1)))
    q, k = (
        torch.zeros(config.chunk_tokens, heads * config.head_dim, dtype=dtype)
        for heads in (config.num_heads, config.num_kv_heads)
    )
    memory.attend(0, q, k, k, branch=0)
    assert bytes_of(memory) == sizes.device + sizes.host
    assert sum(sizes.on("cpu").values()) == sum(sizes.on("cuda").values()) == sum(sizes.parts.values())


def test_the_walk_meets_every_kind_of_config():
    configs = [drawn(seed)[0] for seed in range(60)]
    banks = {(c.bank, c.bank_bits) for c in configs if c.has_bank}
    assert banks == {(bank, bits) for bank in ("device", "host") for bits in (16, 8, 4)}
    assert {c.mode for c in configs} == {"worldkv", "full", "sliding", "sink_recent"}
    for seen in (
        {c.rope is None for c in configs}, {c.turns_segments for c in configs}, {c.weighs_segments for c in configs},
        {c.gap_chunks > 0 for c in configs}, {c.sink_frames % c.chunk_frames > 0 for c in configs},
        {c.caches_bank and c.device_slots is not None for c in configs}, {c.takes_contents for c in configs},
        {c.num_kv_heads < c.num_heads for c in configs}, {c.branches > 1 for c in configs},
    ):  # fmt: skip
        assert seen == {True, False}


def test_parts_by_hand():
    """LingBot-World-Fast in bf16: a row is 800 KiB over all layers; 4680 tokens take 4736 rows, 2340 take 2432."""
    row = 2 * 40 * 40 * 128 * 2
    sizes = LINGBOT.memory(bank="host", bank_chunks=10).bytes(torch.bfloat16)
    assert (sizes.sink, sizes.recent, sizes.gap, sizes.current) == (4736 * row, 2 * 4736 * row, 0, 4736 * row)
    assert sizes.bank == 8 * 2432 * row and 0 <= sizes.host_bank - 10 * 2340 * row <= 8192
    assert sizes.rotations == 52 * 128 * 4 and sizes.scratch == 4680 * 5120 * 2 + 2 * 40 * 2340 * 4 + 8
    assert sizes.host_tables == sizes.tables + sizes.rotations
    on_device = LINGBOT.memory(bank_chunks=10).bytes()
    assert (on_device.bank, on_device.host_bank) == (10 * 2432 * row, 0)
    assert LINGBOT.memory(bank_chunks=10).bytes(torch.float32).bank == 2 * on_device.bank
    fifth = replace(LINGBOT.memory(bank_chunks=10), num_kv_heads=8).bytes()  # of all but q
    two = replace(LINGBOT.memory(bank_chunks=10), branches=2).bytes()
    assert (two.bank, two.sink, two.rotations) == (2 * on_device.bank, 2 * on_device.sink, on_device.rotations)
    assert two.scratch - on_device.scratch == 4680 * 5120 * 2 and two.tables == on_device.tables
    assert (fifth.bank, fifth.sink, fifth.scratch) == (2 * 2432 * row, 4736 * row // 5, on_device.scratch)


@pytest.mark.parametrize(("bits", "of_a_layer"), [(8, 40 * (128 + 2) * 2340), (4, 40 * 128 * (2340 / 2 + 37 * 4))])
def test_parts_of_a_packed_bank_by_hand(bits, of_a_layer):
    """2340 tokens of 40 heads in bf16: a scale a token and head, or a scale and a minimum a channel and 64 tokens."""
    chunk = 40 * 2 * of_a_layer
    on_device = LINGBOT.memory(bank_bits=bits, bank_chunks=10).bytes()
    assert (on_device.packed_bank, on_device.bank, on_device.host_bank) == (10 * chunk, 0, 0)
    assert on_device.restored == 6 * 2432 * 2 * 40 * 128 * 2  # of one layer
    on_host = LINGBOT.memory(bank_bits=bits, bank="host", bank_chunks=10).bytes()
    assert (on_host.packed_bank, on_host.bank) == (8 * chunk, 0) and on_host.restored == on_device.restored
    assert 0 <= on_host.host_bank - 10 * chunk <= 8192


@pytest.mark.parametrize("fields", [{}, dict(bank="host"), dict(mode="full"), dict(bank="host", rope=None)])
def test_without_bank_chunks_it_is_told_how_many(fields, monkeypatch):
    config = MemoryConfig(num_layers=1, num_heads=1, head_dim=64, grid=(3, 4), retrieved_chunks=2, **fields)
    with pytest.raises(ValueError, match=r"^MemoryConfig.bytes: bank_chunks must be given .* has none, got None$"):
        config.bytes()
    monkeypatch.setattr(pool, "_free_host_bytes", lambda: 4 * 2**20)
    memory = WorldMemory(config)
    chunks = memory._storage.max_chunks if config.mode == "full" else memory.stats()["bank_capacity"]
    sizes = config.bytes(bank_chunks=chunks)
    assert chunks > 2 and bytes_of(memory) == sizes.device + sizes.host
    assert config.bytes(bank_chunks=chunks) == replace(config, bank_chunks=chunks).bytes()
    assert config.bytes(bank_chunks=chunks + 1) != config.bytes(bank_chunks=chunks)


def test_bytes_refuses_what_no_memory_takes():
    config = LINGBOT.memory()
    with pytest.raises(TypeError, match=r"MemoryConfig.bytes: dtype must be bfloat16, .* got torch.float64"):
        config.bytes(torch.float64, bank_chunks=8)
    with pytest.raises(ValueError, match="bank_chunks must be None or at least 6, since retrieved_chunks=6, got 5"):
        config.bytes(bank_chunks=5)
    assert LINGBOT.memory(mode="sliding").bytes().bank == 0


# --- what does not fit ---


def refusal(monkeypatch, config: MemoryConfig, device: torch.device, **free: float) -> str:
    """Of a memory, where so many GiB are free on each kind of device; empty where it fits."""
    monkeypatch.setattr(room, "free_bytes", lambda of: int(free[of.type] * GIB))
    try:
        room.check_room(config, device, torch.bfloat16, config.bank_chunks or 1)
    except ValueError as error:
        return str(error)
    return ""


def proposed(message: str) -> list[dict[str, object]]:
    """Fields and their values, change by change."""
    (told,) = re.findall(r"enough would be (.*)$", message)
    found = []
    for change in told.split(" or "):
        fields = [field.split("=") for field in re.sub(r" \(.*", "", change).split(", ")]
        found.append({name: value.strip("'") if "'" in value else float(value) for name, value in fields})
    return [
        {name: v if isinstance(v, str) or name == "keep_ratio" else int(v) for name, v in change.items()}
        for change in found
    ]


KEEP, RETRIEVED, RECENT, CHUNKS, BITS = "keep_ratio", "retrieved_chunks", "recent_frames", "bank_chunks", "bank_bits"
SLOTS = "device_slots"
CASES = [
    (dict(bank_chunks=20), GPU, dict(cuda=44, cpu=100), [CHUNKS, "bank", KEEP, BITS]),
    (dict(bank_chunks=7, keep_ratio=1), GPU, dict(cuda=39, cpu=9), [CHUNKS, KEEP, BITS, RECENT]),
    (dict(bank_chunks=9, bank="host"), GPU, dict(cuda=26, cpu=100), [KEEP, BITS, SLOTS, RETRIEVED, RECENT]),
    (dict(bank_chunks=60, bank="host"), GPU, dict(cuda=60, cpu=100), [CHUNKS, KEEP, BITS]),
    (dict(bank_chunks=60, bank="host", device_slots=13), GPU, dict(cuda=36, cpu=150), [KEEP, BITS, SLOTS, RECENT]),
    (dict(bank_chunks=6), GPU, dict(cuda=24.5, cpu=2), [KEEP, BITS, RETRIEVED, RECENT]),
    (dict(bank_chunks=30), CPU, dict(cpu=40), [CHUNKS, BITS]),
    (dict(mode="full", bank_chunks=30), GPU, dict(cuda=80, cpu=10), [CHUNKS]),
    (dict(mode="sliding", recent_frames=30), GPU, dict(cuda=30, cpu=10), [RECENT]),
]  # fmt: skip


@pytest.mark.parametrize("fields, device, free, names", CASES)
def test_a_refusal_names_the_parts_and_what_would_fit(fields, device, free, names, monkeypatch):
    config = LINGBOT.memory(**fields)
    message = refusal(monkeypatch, config, device, **free)
    needed = memory_bytes(config, torch.bfloat16, config.bank_chunks or 1).on(device.type)
    kind = re.search(r"free on (\w+), got ([\d.]+) GiB \((.*?)\)", message)
    assert f"{needed[kind[1]] / GIB:.1f}" == kind[2] and needed[kind[1]] > free[kind[1]] * 15 / 16 * GIB
    assert {"cuda": "current 3.6 GiB", "cpu": "host bank" if device == GPU else "current 3.6 GiB"}[kind[1]] in kind[3]
    changes = proposed(message)
    assert [next(iter(change)) for change in changes] == names
    assert len(message) < 600  # the command's longest line
    sizes = re.findall(r"\(([\d.]+) GiB(?: and ([\d.]+) GiB of host memory)?\)", message.split("enough would be")[1])
    for change, (on_device, on_host) in zip(changes, sizes, strict=True):
        changed = replace(config, **change)
        assert refusal(monkeypatch, changed, device, **free) == ""
        taken = changed.bytes()
        assert (f"{taken.device / GIB:.1f}", on_host or "0.0") == (on_device, f"{taken.host_bank / GIB:.1f}")
        for name, value in change.items():  # no more than is needed
            more = {"keep_ratio": lambda v: 2 * v, "bank": lambda v: "device", "bank_bits": lambda v: 2 * v}
            more = more.get(name, lambda v: v + 1)(value)
            if len(change) == 1:
                assert refusal(monkeypatch, replace(config, **{name: more}), device, **free) != ""


def test_a_window_that_shrinks_takes_a_bank_no_larger_with_it(monkeypatch):
    config = LINGBOT.memory(bank_chunks=6)
    changes = proposed(refusal(monkeypatch, config, GPU, cuda=24.5, cpu=2))
    assert {"retrieved_chunks": 5, "bank_chunks": 5} in changes
    kept = proposed(refusal(monkeypatch, LINGBOT.memory(bank_chunks=9), GPU, cuda=30, cpu=2))
    assert {"bank_chunks": 8} in kept and not any("retrieved_chunks" in change for change in kept)


def test_where_no_change_is_enough_all_of_them_are_named(monkeypatch):
    config = LINGBOT.memory(bank_chunks=20)
    least = LINGBOT.memory(bank_chunks=1, retrieved_chunks=1, recent_frames=0, keep_ratio=1 / 16)
    named = r"recent_frames=0, keep_ratio=0.0625, retrieved_chunks=1, bank_chunks=1 \((.*) GiB\)$"
    for free, enough in ((9, "all of these together would be"), (8, "nor are all of these")):
        message = refusal(monkeypatch, config, GPU, cuda=free, cpu=1)
        found = re.search(f"no one change is enough, {enough}: {named}", message)
        assert found[1] == f"{least.bytes().device / GIB:.1f}" and 8 < least.bytes().device / GIB < 9


def test_an_arena_leaves_a_sixteenth_of_the_host(monkeypatch):
    config = LINGBOT.memory(bank="host", bank_chunks=8)
    arena = config.bytes().host / GIB
    assert refusal(monkeypatch, config, GPU, cuda=80, cpu=arena * 1.01 * 16 / 15) == ""
    assert "free on cpu" in refusal(monkeypatch, config, GPU, cuda=80, cpu=arena * 0.99 * 16 / 15)
    on_device = LINGBOT.memory(bank_chunks=8)
    everything = sum(on_device.bytes().parts.values()) / GIB
    assert refusal(monkeypatch, on_device, CPU, cpu=everything * 1.0001) == ""  # not page-locked: all of it
    assert "free on cpu" in refusal(monkeypatch, on_device, CPU, cpu=everything * 0.9999)


def test_the_most_chunks_that_fit():
    config = LINGBOT.memory(bank_chunks=6)
    each = config.bytes(bank_chunks=7).device - config.bytes(bank_chunks=6).device
    for chunks in (6, 7, 40, 1000):
        for limit, found in ((config.bytes(bank_chunks=chunks).device, chunks), (config.bytes().device - 1, None)):
            assert room.most_bank_chunks(config, torch.bfloat16, lambda sizes, n=limit: sizes.device <= n) == found
    assert room.most_bank_chunks(config, torch.bfloat16, lambda sizes: True) == room.BANK_LIMIT == 1000
    more = replace(config, retrieved_chunks=1200, bank_chunks=1200)
    assert room.most_bank_chunks(more, torch.bfloat16, lambda sizes: True) == 1200  # what a window retrieves has room
    assert each == room.place_bytes(config, torch.bfloat16)
