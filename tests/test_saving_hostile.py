"""A saved memory with right checksums whose state is made up: refused, or a memory that can go on."""

import copy
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_rollouts import fuzz
from saved_files import KINDS, Parts, field, loaded, memory_of, put, refused, refused_or_goes_on, same_state

from worldkv_kernels import WorldMemory

NAN, HUGE = float("nan"), 10**30
VALUES = (
    None, True, False, -1, 0, 1, 7, 2**31 - 1, 2**31, 2**63, HUGE, -HUGE, 0.5, -0.5, 1e300, NAN, float("inf"), "", "x",
    "own", [], [0], {"tuple": []}, {"tuple": [1, 2]}, {"dict": []}, {"dict": [[0, 1]]}, {"dict": [["own", "x"]]},
    {"dict": [[[], 1]]}, {"dict": [1]}, {"tuple": 1}, {"rows": "no such"}, {"array": 3}, {"strange": 1}, {},
)  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def memory(kind):
    return memory_of(kind)


@pytest.fixture(scope="module")
def parts(memory, tmp_path_factory):
    file = tmp_path_factory.mktemp("saved") / "walk.worldkv"
    memory.save(file)
    return Parts(file)


def nodes(packed, way=()):
    """Ways to all values of JSON, outermost first."""
    yield way
    inside = packed.items() if isinstance(packed, dict) else enumerate(packed) if isinstance(packed, list) else ()
    for key, value in inside:
        yield from nodes(value, (*way, key))


def at(packed, way):
    for key in way:
        packed = packed[key]
    return packed


def with_value(parts, way, value):
    made = parts.copied()
    if way:
        at(made.tree, way[:-1])[way[-1]] = value
    else:
        made.state["tree"] = value
    return made


def test_the_parts_make_the_same_file_again(memory, parts, tmp_path):
    made = parts.copied()
    made.sum_up()
    assert made.state["sha256"] == parts.state["sha256"]
    assert same_state(loaded(made.write(tmp_path / "m")), memory)


def test_all_that_a_caller_may_do_is_in_one_of_the_files(tmp_path):
    memory = memory_of("turned")
    memory.save(tmp_path / "m")
    found = loaded(tmp_path / "m")
    assert found.pinned == memory.pinned == (0, 1) and found._unbanked == memory._unbanked == {8}
    assert found.config.retrieved_chunks == memory.config.retrieved_chunks == 1


def test_every_value_is_another(parts, tmp_path):
    """Each of JSON's values, a few others in turn; all of them: the slow test below."""
    for number, way in enumerate(nodes(parts.tree)):
        for value in VALUES[number % 16 :: 16]:
            refused_or_goes_on(with_value(parts, way, value).write(tmp_path / "m"), chunks=2)


@pytest.mark.slow
def test_every_value_is_each_of_the_others(parts, tmp_path):
    others = [*VALUES, *({kind: name} for name in list(parts.tensors)[-2:] for kind in ("rows", "array", "tensor"))]
    for way in nodes(parts.tree):
        for value in others:
            refused_or_goes_on(with_value(parts, way, value).write(tmp_path / "m"))


def dictionaries(packed):
    return [way for way in nodes(packed) if way and way[-1] == "dict"]


def test_keys_that_lack_or_are_more_or_others(parts, tmp_path):
    """Every key is needed, but where a default stands for it (of a config and what is in it), a bank dropped it, or it
    is of a chunk that received nothing."""
    file = tmp_path / "m"
    banked = [field(parts.tree, "bank", "chunks")["dict"]] if field(parts.tree, "bank") else []
    if '"received"' in json.dumps(parts.tree):
        banked += [field(parts.tree, "received", *of_last, "chunks")["dict"] for of_last in ((), ("last",))]
    for way in dictionaries(parts.tree):
        pairs = at(parts.tree, way)
        may_lack = pairs in banked or (len(way) > 1 and at(parts.tree, way[:2])[0] == "config")
        for place, (key, value) in enumerate(pairs):
            less = with_value(parts, way, pairs[:place] + pairs[place + 1 :]).write(file)
            if may_lack or key == "places":  # which is needed where the config has no bank_chunks
                refused_or_goes_on(less, chunks=2)
            else:
                refused(less)
            others = (None, -1, 10**9, 0.5, str(key), f"{key}x", True, [], key + 1 if type(key) is int else 0)
            for other in others[place % 3 :: 3]:
                renamed = with_value(parts, way, [*pairs[:place], [other, value], *pairs[place + 1 :]])
                refused_or_goes_on(renamed.write(file), chunks=2)
        if pairs:
            assert " twice" in refused(with_value(parts, way, [*pairs, pairs[0]]).write(file))
        refused_or_goes_on(with_value(parts, way, pairs[::-1]).write(file))
        refused_or_goes_on(with_value(parts, way, [*pairs, ["more", 1]]).write(file))


@pytest.mark.parametrize("name", ["num_kv_heads", "branches"])
def test_a_file_that_says_nothing_of_kv_heads_or_branches_has_as_many_as_of_q_and_one(name, tmp_path):
    parts = of("pose", tmp_path)
    pairs = field(parts.tree, "config")["dict"]
    assert [name, 1] in pairs
    pairs.remove([name, 1])
    memory = loaded(parts.write(tmp_path / "m"))
    assert getattr(memory.config, name) == 1 and same_state(memory, memory_of("pose"))


def values_of(parts):
    def larger(inside):
        inside = st.lists(inside, max_size=3)
        pairs = st.lists(st.tuples(st.integers(-1, 9) | st.text(max_size=3), inside).map(list), max_size=3)
        return inside | inside.map(lambda made: {"tuple": made}) | pairs.map(lambda made: {"dict": made})

    named = st.sampled_from([{kind: name} for name in parts.tensors for kind in ("rows", "array", "tensor")] or [None])
    leaves = st.none() | st.booleans() | st.integers() | st.integers(-3, 20) | st.floats() | st.text(max_size=9) | named
    return st.recursive(leaves | st.sampled_from(VALUES), larger, max_leaves=6)


@st.composite
def mutated(draw, parts):
    """The parts with some values replaced, moved, removed, repeated, or a little larger or smaller."""
    made = parts.copied()
    for _ in range(draw(st.integers(1, 4))):
        ways = list(nodes(made.tree))
        way = draw(st.sampled_from(ways))
        what = draw(st.sampled_from(["replace", "replace", "copy", "remove", "repeat", "nudge"]))
        holder = at(made.tree, way[:-1]) if way else made.state
        key = way[-1] if way else "tree"
        if what == "copy":
            holder[key] = json.loads(json.dumps(at(made.tree, draw(st.sampled_from(ways)))))
        elif what == "nudge" and type(holder[key]) in (int, float):
            holder[key] += draw(st.sampled_from([-2, -1, 1, 2]))
        elif what in ("remove", "repeat") and isinstance(holder, list):
            holder[key : key + 1] = [holder[key]] * 2 if what == "repeat" else []
        else:
            holder[key] = copy.deepcopy(draw(values_of(parts)))  # what is drawn may be drawn again
    return made


@pytest.mark.parametrize("examples", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_random_changes_of_the_state(examples, parts, tmp_path):
    went_on = []

    @fuzz(examples)
    @given(st.data())
    def check(data):
        told = refused_or_goes_on(data.draw(mutated(parts)).write(tmp_path / "m"))
        went_on.append(told is None)

    check()
    assert False in went_on and (examples < 1000 or True in went_on)


# --- one by one ---


def of(kind, tmp_path):
    memory_of(kind).save(tmp_path / "m")
    return Parts(tmp_path / "m")


REFUSED = [
    ("pose", ["next_chunk"], 9, r"first_whole must be one that 9 chunks leave, got 7"),
    ("pose", ["next_chunk"], 7, r"whole must be of chunks \[0\], got"),
    ("pose", ["first_whole"], 8, r"whole must be of chunks \[0\], got"),
    ("pose", ["first_whole"], 0, r"first_whole must be one that 8 chunks leave"),
    ("full", ["first_whole"], 3, r"first_whole must be one that 3 chunks leave"),
    ("pose", ["unbanked"], [0], r"unbanked must be of the chunks \[7\], got \[0\]"),
    ("pose", ["unbanked"], [True], r"unbanked must be of the chunks \[7\], got \[True\]"),
    ("full", ["unbanked"], [1], r"unbanked must be of the chunks \[\]"),
    ("pose", ["bank", "pinned"], [99], r"pinned must be of the chunks \[.*, got \[99\]"),
    ("pose", ["changed", "retrieved_chunks"], 3, r"retrieved_chunks must be from 0 to the configured 2, got 3"),
    ("pose", ["changed", "keep_ratio"], NAN, r"keep_ratio must be above 0"),
    ("full", ["changed", "recent_frames"], HUGE, r"recent_frames must be from 0 to the configured 2"),
    ("pose", ["next_chunk"], 10**18, r"next_chunk must be at most 1073741824, which the config has room for"),
    ("pose", ["next_chunk"], -1, r"next_chunk must be at least 0, got -1"),
    ("pose", ["next_chunk"], True, r"an integer was expected, got True"),
    ("without a rope", ["next_chunk"], 10**18, r"next_chunk must be at most 1073741824"),
    ("full", ["next_chunk"], 41, r"next_chunk must be at most 40"),
    ("pose", ["tokens_attended"], "many", r"an integer was expected, got 'many'"),
    ("pose", ["retrieved_total"], -1, r"retrieved_total must be at least 0"),
    ("pose", ["integrator"], {"tuple": [0, 0, 0, 0, 0]}, r"integrator must be None where retrieval is not by action"),
    ("action", ["integrator"], {"tuple": [0, 0, 0, 0, 0]}, r"integrator must be a state after 45 rows"),
    ("action", ["integrator"], {"tuple": [45, 0, 0, 0, HUGE]}, r"integrator must be a state after 45 rows"),
    ("action", ["integrator"], {"tuple": [45, 2**47, 0, 0, 0]}, r"integrator must be a state after 45 rows"),
    ("action", ["integrator"], {"tuple": [45, 0, 2**47, 0, 0]}, r"integrator must be a state after 45 rows"),
    ("action", ["integrator"], {"tuple": [45, 0, 0]}, r"integrator must be the five integers"),
    ("action", ["integrator"], {"tuple": [45, 0.0, 0, 0, 0]}, r"integrator must be the five integers"),
    ("sink_recent", ["integrator"], {"tuple": [37, 0, 0, 0, 0]}, r"integrator must be a state after 0 rows"),
    (
        "new",
        ["last_view"],
        {"tuple": [None, None, None, {"tuple": [0] * 5}]},
        r"last_view must be empty before chunk 0",
    ),
    ("pose", ["last_view"], {"tuple": [None, None, None, None]}, r"last_view must have poses in mode 'worldkv'"),
    ("full", ["last_view"], {"tuple": [None, None, 3, None]}, r"last_view must have no description in mode 'full'"),
    ("pose", ["descriptions"], {"dict": []}, r"descriptions must be of chunks \[0, 7\], got \{\}"),
    (
        "pose",
        ["descriptions"],
        {"dict": [[0, 1], [7, 1]]},
        r"descriptions must be of finite float64 \[4, 4\], got 'int'",
    ),
    ("full", ["descriptions"], {"dict": [[0, 1]]}, r"descriptions must be of chunks \[\], got"),
    ("full", ["bank"], {"dict": []}, r"bank must be None in mode 'full', got one"),
    ("pose", ["bank"], None, r"must be what save wrote, got TypeError"),
    ("pose", ["bank", "num_dropped"], -1, r"num_dropped must be at least 0"),
    ("fov", ["bank", "copied"], {"dict": [["hits", 1]]}, r"copied must be None or of hits, misses, copies_out"),
    ("fov", ["bank", "copied", "hits"], "1", r"an integer was expected, got '1'"),
    ("fov", ["bank", "copied", "misses"], -1, r"misses must be at least 0"),
    ("unbounded", ["places"], 0, r"bank_chunks must be None or at least 2"),
    ("unbounded", ["places"], HUGE, r"bank_chunks must be at most 2147483647"),
    ("pose", ["dtype"], "int8", r"must be what save wrote, got KeyError: 'int8'"),
    ("pose", ["dtype"], "float16", r"with whole.0 F16 \[1, 2, 4, 1, 64\], got BF16"),
    ("pose", ["config", "rope", "theta"], NAN, r"theta must be finite and above 1, got nan"),
    ("pose", ["config", "keep_ratio"], NAN, r"keep_ratio must be above 0 and at most 1, got nan"),
    ("pose", ["config", "retrieval", "arguments", "diversity"], NAN, r"diversity must be from 0 to 1, got nan"),
    ("pose", ["config", "retrieval", "class"], "os.system", r"must be what save wrote, got KeyError: 'os.system'"),
    ("pose", ["config", "retrieval"], {"dict": [["own", "os.system"]]}, r"retrieval must be a os.system"),
    ("fov", ["config", "retrieval", "arguments", "samples"], 2**31, r"samples must be from 1 to 65536"),
    ("action", ["config", "retrieval", "arguments", "integrator", "layout"], "x", r"layout must be"),
]


@pytest.mark.parametrize("kind, way, value, message", REFUSED)
def test_what_contradicts_itself_is_told(kind, way, value, message, tmp_path):
    parts = of(kind, tmp_path)
    field(parts.tree, *way)  # is there
    put(parts.tree, *way, value=value)
    assert re.search(message, refused(parts.write(tmp_path / "m")))


@pytest.mark.parametrize("chunks", [[3, 3, 4], [4, 3, 5], [3, 4, 99], [3, 4, 7], [-1, 3, 4], [0, 3, 4], ["3", 4, 5]])
def test_banks_of_chunks_that_cannot_be_there(chunks, tmp_path):
    """Banked are three of chunks 1 to 6, in order."""
    parts = of("pose", tmp_path)
    pairs = field(parts.tree, "bank", "chunks")["dict"]
    put(parts.tree, "bank", "chunks", value={"dict": [[c, pair[1]] for c, pair in zip(chunks, pairs, strict=True)]})
    told = refused(parts.write(tmp_path / "m"))
    assert "bank must hold up to 3 of the chunks that have left" in told or "3 twice" in told


def test_a_bank_of_more_than_it_holds(tmp_path):
    parts = of("pose", tmp_path)
    pairs = field(parts.tree, "bank", "chunks")["dict"]
    put(parts.tree, "bank", "chunks", value={"dict": [[c, pairs[0][1]] for c in (2, 3, 4, 5)]})
    assert "bank must hold up to 3 of the chunks that have left" in refused(parts.write(tmp_path / "m"))


@pytest.mark.parametrize("kind", ["pose", "fov", "full", "new", "sink_recent"])
@pytest.mark.parametrize(
    "fields",
    [
        dict(num_layers=2**30),
        dict(bank_chunks=2**31 - 1),
        dict(recent_frames=2**31 - 1),
        dict(sink_frames=2**31 - 1),
        dict(retrieved_chunks=10**9, bank_chunks=10**9, device_slots=10**9),
        dict(chunk_frames=2**31 - 1, sink_frames=0, recent_frames=0),
        dict(grid={"tuple": [2**31 - 1, 2**31 - 1]}),
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_terabytes_are_refused_before_anything_is_allocated(kind, fields, tmp_path, monkeypatch):
    unbounded = {"sink_recent": {"bank_chunks"}, "full": {"bank_chunks", "sink_frames", "recent_frames"}}
    if unbounded.get(kind, set()) & set(fields):  # what the mode ignores, or the rope bounds
        fields = {**fields, "num_layers": 2**30}
    parts = of(kind, tmp_path)
    for name, value in fields.items():
        put(parts.tree, "config", name, value=value)
    parts.write(tmp_path / "m")

    def allocates(*args, **options):
        raise AssertionError("nothing may be allocated")

    monkeypatch.setattr("worldkv_kernels.memory.storage.Pool", allocates)
    monkeypatch.setattr("worldkv_kernels.memory.storage.Bank", allocates)
    assert re.search(r"FILE: (WorldMemory: )?storage must fit the .* GiB that are free on cpu", refused(tmp_path / "m"))


def test_changes_that_do_not_fit_are_told_with_the_file(tmp_path):
    of("full", tmp_path)
    file = tmp_path / "m"
    assert len(WorldMemory.load(file, bank_chunks=3).window.segments) == 1
    for chunks, message in [(2, "next_chunk must be at most 2"), (0, "bank_chunks must be None or at least 1")]:
        with pytest.raises(ValueError, match=rf"^WorldMemory.load: {re.escape(str(file))}: .*{message}"):
            WorldMemory.load(file, bank_chunks=chunks)
    of("pose", tmp_path)
    with pytest.raises(ValueError, match=rf"^WorldMemory.load: {re.escape(str(file))}: .*storage must fit"):
        WorldMemory.load(file, bank_chunks=2**31 - 1)
    with pytest.raises(TypeError, match=r"MemoryConfig: bank_chunks must be an integer"):
        WorldMemory.load(file, bank_chunks="3")
