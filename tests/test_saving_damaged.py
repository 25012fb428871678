"""A saved memory that is cut short, altered or made to harm is refused, by a ValueError that names the file."""

import json
import os
import pickle
import re
import struct

import numpy as np
import pytest
import safetensors_files
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_rollouts import fuzz
from saved_files import KINDS, Parts, loaded, memory_of, refused, refused_or_goes_on, same_state

from worldkv_kernels import WorldMemory


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def memory(kind):
    return memory_of(kind)


@pytest.fixture(scope="module")
def saved(memory, tmp_path_factory):
    file = tmp_path_factory.mktemp("saved") / "walk.worldkv"
    memory.save(file)
    return file


@pytest.fixture(scope="module")
def parts(saved):
    return Parts(saved)


def altered(file, position, bits):
    """With these bits of a byte turned over, in place; again, and it is as it was."""
    with open(file, "r+b") as opened:
        opened.seek(position)
        (byte,) = opened.read(1)
        opened.seek(position)
        opened.write(bytes([byte ^ bits]))


# --- cut short and altered ---


def places_to_cut(saved, parts):
    """Ends of the length, the header, and of the first and last tensor, and bytes beside them."""
    whole, tensors = saved.stat().st_size, [len(data) for _, _, data in parts.tensors.values()]
    ends = {0, 8, parts.data_begin, whole}
    if tensors:
        ends |= {parts.data_begin + tensors[0], whole - tensors[-1], whole - tensors[-1] // 2}
    return sorted({end + by for end in ends for by in (-2, -1, 0, 1, 2) if 0 <= end + by < whole} | {whole // 2})


def test_cut_short_at_every_kind_of_place(saved, parts, tmp_path):
    content, file = saved.read_bytes(), tmp_path / "cut"
    for length in places_to_cut(saved, parts):
        file.write_bytes(content[:length])
        assert re.search(r"must start with a safetensors header|must have the \d+ bytes", refused(file)), length
    for more in (b"\0", b" ", content):
        file.write_bytes(content + more)
        assert "must have the" in refused(file)


def test_cut_short_anywhere(saved, tmp_path):
    content, file = saved.read_bytes(), tmp_path / "cut"

    @fuzz(100)
    @given(st.integers(0, len(content) - 1), st.binary(max_size=9))
    def check(length, more):
        file.write_bytes(content[:length] + more)
        if file.read_bytes() != content:
            refused(file)

    check()


def check_flips(file, parts, memory, flips):
    """Each (byte, bit) turned over is noticed, or in what says who wrote the file."""
    told_by, changed = file.read_bytes().index(b'"written_by"'), set()
    free = range(told_by, told_by + len(f'"written_by": {json.dumps(parts.metadata["written_by"])}'))
    for position, bit in flips:
        altered(file, position, 1 << bit)
        found = loaded(file)
        if not isinstance(found, str):
            assert same_state(found, memory), f"bit {bit} of byte {position} is not noticed"
            changed.add(position)
        altered(file, position, 1 << bit)
    assert changed <= set(free)


def test_a_bit_turned_over(saved, parts, memory, tmp_path):
    file = tmp_path / "flipped"
    file.write_bytes(saved.read_bytes())
    every = [(position, position * 5 % 8) for position in range(file.stat().st_size)]
    check_flips(file, parts, memory, every[:100] + every[100 :: max(1, len(every) // 500)])


@pytest.mark.slow
def test_every_bit_of_the_header_and_one_of_every_byte_turned_over(saved, parts, memory, tmp_path):
    file = tmp_path / "flipped"
    file.write_bytes(saved.read_bytes())
    check_flips(file, parts, memory, [(position, bit) for position in range(parts.data_begin) for bit in range(8)])
    of_data = range(parts.data_begin, file.stat().st_size)
    check_flips(file, parts, memory, [(position, position * 5 % 8) for position in of_data])


def test_some_bytes_of_the_file_are_others(saved, memory, tmp_path):
    content, file = saved.read_bytes(), tmp_path / "altered"
    places = st.integers(0, len(content) - 1)

    @fuzz(150)
    @given(places, st.binary(min_size=1, max_size=20), places)
    def check(first, other, source):
        for piece in (other, content[source : source + len(other)]):  # noise, and a piece of the file itself
            file.write_bytes((content[:first] + piece + content[first + len(piece) :])[: len(content)])
            found = loaded(file)
            assert isinstance(found, str) or same_state(found, memory)

    check()


def test_tensors_without_numbers_are_checked_too(tmp_path):
    """Nothing but its checksum says of which shape an array of no numbers was."""
    file, policy = tmp_path / "empty", Empty()
    memory = memory_of("pose").fork()
    memory.config.__dict__["retrieval"] = policy  # told by its description alone
    memory._last_view = memory._last_view._replace(description=np.empty((0, 4)))
    memory.save(file)
    at = file.read_bytes().index(b'"shape":[0,4]') + len('"shape":[0,')
    altered(file, at, 1)
    with pytest.raises(ValueError, match=r"last_view.2 of another checksum"):
        WorldMemory.load(file, retrieval=policy)


class Empty:
    needs_intrinsics = False

    def describe(self, poses, intrinsics):
        return np.empty((0, 4))

    def select(self, current, candidates, budget):
        return []

    def drop(self, candidates):
        return candidates[0][0]


# --- what is no saved memory ---


class Writes:
    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return os.mknod, (self.file,)


def test_what_is_no_saved_memory(tmp_path):
    file, planted = tmp_path / "m", tmp_path / "planted"
    assert "must be a file that save wrote" in refused(file)
    assert "must be a file that save wrote" in refused(tmp_path)
    contents = [b"", b"{}", b"\0" * 8, b"\xff" * 64, struct.pack("<Q", 2) + b"{}", struct.pack("<Q", 4) + b"[{}]"]
    for content in [*contents, pickle.dumps(Writes(planted))]:
        file.write_bytes(content)
        refused(file)
    torch.save({"weights": Writes(planted)}, file)
    refused(file)
    assert not planted.exists()
    safetensors_files.write(file, {"weight": torch.ones(2, 3)})
    assert "must be of format 'worldkv memory', got 'pt'" in refused(file)
    safetensors_files.write(file, {"weight": torch.ones(2, 3)}, metadata=False)
    assert "must be of format 'worldkv memory', got None" in refused(file)
    pickle.loads(pickle.dumps(Writes(planted)))  # which would have written
    assert planted.exists()


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("format", "worldkv rollout", "must be of format 'worldkv memory', got 'worldkv rollout'"),
        ("format", "pt" * 500, "must be of format 'worldkv memory', got 'ptpt"),
        ("version", "2", "must be of version 1, got '2'"),
        ("version", "1.0", "must be of version 1, got '1.0'"),
        ("version", 1, "must have metadata of strings"),
        ("format", None, "must have metadata of strings"),
    ],
)
def test_of_another_kind_or_version(name, value, message, parts, tmp_path):
    other = parts.copied()
    other.metadata[name] = value
    assert message in refused(other.write(tmp_path / "m"))
    del other.metadata[name]
    assert f"must be of {name}" in refused(other.write(tmp_path / "m"))


@pytest.mark.parametrize("kind", ["pose"], indirect=True)  # it is read alike in all
@pytest.mark.parametrize("depth", [200, 900, 5_000, 1_000_000])
@pytest.mark.parametrize("opening, closing", [("[", "]"), ('{"tuple":[', "]}"), ('{"dict":[["a",', "]]}")])
def test_nested_too_deep(depth, opening, closing, parts, tmp_path):
    deep = opening * depth + closing * depth
    refused(parts.write(tmp_path / "m", state=deep))
    refused(parts.write(tmp_path / "m", state=f'{{"sha256":{{}},"tree":{deep}}}'))
    refused(
        parts.write(tmp_path / "m", state=json.dumps(parts.state).replace('"next_chunk",', f'"next_chunk",{deep},'))
    )
    file, header = tmp_path / "m", deep.encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    refused(file)


@pytest.mark.parametrize("state", ["", "null", "[]", "{}", "3", '"a"', '{"tree":1,"sha256":2}', "\ud800", "9" * 5000])
def test_a_state_that_is_none(state, parts, tmp_path):
    refused(parts.write(tmp_path / "m", state=state))


def test_names_that_come_twice(parts, tmp_path):
    file, text = tmp_path / "m", json.dumps(parts.state)
    assert "'sha256' twice" in refused(parts.write(file, state='{"sha256": {}, ' + text[1:]))
    one, two = '["next_chunk", ', '["next_chunk", 1], ["next_chunk", '
    assert "'next_chunk' twice" in refused(parts.write(file, state=text.replace(one, two)))
    parts.write(file)
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + length].replace(b"{", b'{"__metadata__": {}, ', 1)
    file.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])
    assert "'__metadata__' twice" in refused(file)


# --- tensors that are others, with the right checksums ---


def test_tensors_of_another_name_shape_or_dtype(parts, tmp_path):
    file = tmp_path / "m"
    for name, (dtype, shape, data) in parts.tensors.items():
        others = {
            "shape": (dtype, [*shape, 1], data),
            "turned": (dtype, shape[::-1], data),
            "flat": (dtype, [-1], data),
        }
        others["short"] = (dtype, shape, data[:-1])
        others["bytes"] = ("U8", [len(data)], data)
        other = {"BF16": "F16", "F16": "BF16", "F32": "I32", "F64": "I64", "U8": "I8"}
        others["dtype"] = (other[dtype], shape, data)
        others["strange"] = ("F4", shape, data)
        for what, other in others.items():
            if other == (dtype, shape, data):
                continue
            made = parts.copied()
            made.tensors[name] = other
            made.sum_up()
            if what == "dtype" and name == "last_view.1":  # intrinsics may be integers
                assert not isinstance(loaded(made.write(file)), str)
            else:
                assert "must" in refused(made.write(file)), (what, name)
        made = parts.copied()
        made.tensors = {f"{key}x" if key == name else key: value for key, value in made.tensors.items()}
        assert "must be of the tensors that its state names" in refused(made.write(file))
        made.sum_up()
        assert f"no tensor '{name}'" in refused(made.write(file))
        del made.tensors[f"{name}x"]
        refused(made.write(file))
    made = parts.copied()
    made.tensors["more"] = ("F32", [1], b"1234")
    assert "must be of the tensors that its state names" in refused(made.write(file))


def test_numbers_of_tensors_that_are_not_finite(parts, kind, tmp_path):
    """Descriptions have to be finite; rows, and contents, need not be, as a model may make none."""
    of_rows = ("BF16", "U8", "F32") if kind == "content" else ("BF16", "U8")
    for name, (dtype, shape, data) in parts.tensors.items():
        made = parts.copied()
        made.tensors[name] = (dtype, shape, b"\xff" * len(data))  # NaN, in every dtype of floats
        made.sum_up()
        told = refused_or_goes_on(made.write(tmp_path / "m"))
        assert (told is None) == (dtype in of_rows), name


def test_descriptions_that_are_no_poses(parts, kind, tmp_path):
    for name, (dtype, shape, _) in parts.tensors.items():
        if shape == [4, 4] and kind != "official":
            for numbers in (np.zeros((4, 4)), np.full((4, 4), 1e200), np.diag([1.0, 1, -1, 1]), 2 * np.eye(4)):
                made = parts.copied()
                made.tensors[name] = (dtype, shape, numbers.tobytes())
                made.sum_up()
                assert "poses must be" in refused(made.write(tmp_path / "m"))
