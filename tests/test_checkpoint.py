"""Checkpoints in the published layouts."""

import json
import os
import random
import re
import struct

import pytest
import torch
from safetensors_files import NAMES, write, write_sharded
from torch import nn

from worldkv_kernels.models import checkpoint
from worldkv_kernels.models.checkpoint import load_parameters, read_config, read_layout
from worldkv_kernels.models.lingbot_world_fast import LingBotWorldFast
from worldkv_kernels.models.matrix_game_2 import MatrixGame2


class Small(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 2, bias=False)
        self.scale = nn.Parameter(torch.randn(()))
        self.to(dtype)


def same(module, tensors):
    state = module.state_dict()
    return state.keys() == tensors.keys() and all(
        torch.equal(state[k], t.to(state[k].dtype)) for k, t in tensors.items()
    )


@pytest.fixture
def tensors():
    torch.manual_seed(1)
    return {name: torch.randn(t.shape) for name, t in Small().state_dict().items()}


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("layout", ["file", "folder", "shards", "shards without an index"])
def test_every_layout_loads(tmp_path, tensors, layout, prefix):
    stored = {prefix + name: tensor for name, tensor in tensors.items()}
    path = tmp_path
    if layout.startswith("shards"):
        write_sharded(tmp_path, stored, 3)
        if layout.endswith("index"):
            (tmp_path / "diffusion_pytorch_model.safetensors.index.json").unlink()
    else:
        write(tmp_path / "base.safetensors", stored)
        path = tmp_path / "base.safetensors" if layout == "file" else tmp_path
    module = Small()
    load_parameters("Small", module, read_layout(path))
    assert same(module, tensors)


def test_a_prefix_that_some_names_lack_stays(tmp_path, tensors):
    write(tmp_path / "x.safetensors", {"model.a": tensors["a.weight"], "b": tensors["a.weight"]})
    assert set(read_layout(tmp_path)) == {"model.a", "b"}


@pytest.mark.parametrize("stored", NAMES)
@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pad", range(9))
def test_dtypes_and_any_alignment(tmp_path, tensors, stored, held, pad):
    tensors = {name: tensor.to(stored) for name, tensor in tensors.items()}
    write(tmp_path / "x.safetensors", tensors, pad=pad, metadata=pad % 2 == 0)
    module = Small(held)
    load_parameters("Small", module, read_layout(tmp_path))
    assert same(module, tensors)
    assert all(p.dtype == held for p in module.parameters())


def test_the_file_is_not_written_to(tmp_path, tensors):
    write(tmp_path / "x.safetensors", tensors)
    before = (tmp_path / "x.safetensors").read_bytes()
    module = Small()
    load_parameters("Small", module, read_layout(tmp_path))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert (tmp_path / "x.safetensors").read_bytes() == before


def test_tensors_are_mapped_not_read(tmp_path, tensors, monkeypatch):
    write_sharded(tmp_path, tensors, 2)
    layout = read_layout(tmp_path)
    mapped, from_file = [], torch.from_file
    monkeypatch.setattr(checkpoint.torch, "from_file", lambda f, **k: mapped.append(f) or from_file(f, **k))
    monkeypatch.setattr("builtins.open", None)  # the headers are known: nothing is opened to be read
    load_parameters("Small", Small(), layout)
    assert len(mapped) == 2


def test_ignored_names_may_be_there(tmp_path, tensors):
    write(tmp_path / "x.safetensors", {**tensors, "rope": torch.ones(4)})
    load_parameters("Small", Small(), read_layout(tmp_path), ignore=("rope",))


def test_an_empty_tensor_is_one(tmp_path):
    write(tmp_path / "x.safetensors", {"none": torch.empty(0, 3), "one": torch.ones(1)})
    layout = read_layout(tmp_path)
    assert layout["none"].shape == (0, 3)
    assert layout["none"].begin == layout["none"].end == layout["one"].begin


def test_all_faults_of_a_checkpoint_are_listed_and_nothing_is_copied(tmp_path, tensors):
    tensors = dict(tensors)
    del tensors["scale"]
    tensors["b.weight"] = tensors["b.weight"].T
    tensors.update({f"more.{i}": torch.zeros(1) for i in range(8)})
    write(tmp_path / "x.safetensors", tensors)
    module = Small()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(ValueError) as error:
        load_parameters("Small", module, read_layout(tmp_path))
    assert str(error.value) == (
        "Small: checkpoint must hold the 4 tensors of its config, got 1 missing: scale; 8 unexpected: more.0, more.1, "
        "more.2, more.3, more.4 and 3 more; 1 misshapen: b.weight [5, 2] for [2, 5]"
    )
    assert same(module, before)


def test_a_dtype_that_is_no_plain_float_is_told(tmp_path, tensors, monkeypatch):
    monkeypatch.setitem(NAMES, torch.float16, "F8_E4M3")
    write(tmp_path / "x.safetensors", {**tensors, "scale": torch.ones((), dtype=torch.float16)})
    with pytest.raises(ValueError, match="got 1 of another dtype: scale F8_E4M3"):
        load_parameters("Small", Small(), read_layout(tmp_path))


def damage(kind, folder):
    file = folder / "diffusion_pytorch_model-00001-of-00002.safetensors"
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])

    def rewrite(header, data=raw[8 + size :]):
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + data)

    if kind == "truncated":
        file.write_bytes(raw[:-1])
    elif kind == "longer":
        file.write_bytes(raw + b"x")
    elif kind == "cut in the header":
        file.write_bytes(raw[: 8 + size // 2])
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "no header":
        file.write_bytes(struct.pack("<Q", 12) + b"not any JSON" + raw)
    elif kind == "a list":
        rewrite([1, 2])
    elif kind == "no shape":
        del header["a.weight"]["shape"]
        rewrite(header)
    elif kind == "shape of more":
        header["a.weight"]["shape"][0] += 1
        rewrite(header)
    elif kind == "gap":
        header["scale"]["data_offsets"] = [n + 4 for n in header["scale"]["data_offsets"]]
        rewrite(header, raw[8 + size :] + b"1234")
    elif kind == "overlap":
        header["scale"]["data_offsets"] = [n - 4 for n in header["scale"]["data_offsets"]]
        rewrite(header, raw[8 + size : -4])
    elif kind == "gone":
        file.unlink()
    elif kind == "index that lies":
        index.write_text(index.read_text().replace('"a.bias"', '"a.other"'))
    elif kind == "index outside":
        index.write_text(index.read_text().replace('"diffusion', '"../diffusion'))
    elif kind == "index without a map":
        index.write_text("{}")
    elif kind == "index of nothing":
        index.write_text("")
    elif kind == "two indices":
        (folder / "model.safetensors.index.json").write_text(index.read_text())
    elif kind == "one tensor twice":
        index.unlink()
        write(folder / "z.safetensors", {"a.bias": torch.zeros(5)})


@pytest.mark.parametrize(
    "kind, message",
    [
        ("truncated", r"00001-of-00002.safetensors must have the \d+ bytes that its header says, got \d+"),
        ("longer", r"must have the \d+ bytes that its header says, got \d+"),
        ("cut in the header", "must start with a safetensors header, got a file of"),
        ("empty", "must start with a safetensors header, got a file of 0 bytes"),
        ("no header", "the header of .*00001-of-00002.safetensors must be JSON, got Expecting value"),
        ("a list", "the header of .* must be a JSON object, got list"),
        ("no shape", "must give a.weight a dtype, a shape and two data_offsets, got {'data_offsets"),
        ("shape of more", r"must have a.weight F32 \[6, 3\] from byte \d+ on, got bytes"),
        ("gap", r"must have scale F32 \[\] from byte \d+ on, got bytes"),
        ("overlap", "must have .* from byte .* on, got bytes"),
        ("gone", "must hold what its index names, got no diffusion_pytorch_model-00001-of-00002"),
        ("index that lies", "must hold a.other as the index says, got a file without"),
        ("index outside", "must have a weight_map from tensors to files beside it"),
        ("index without a map", "must have a weight_map from tensors to files beside it"),
        ("index of nothing", "index.json must be JSON, got"),
        ("two indices", "must hold one index, got diffusion_pytorch_model.*, model.safetensors.index.json"),
        ("one tensor twice", "a.bias must be in one file, got it in .* and z.safetensors"),
    ],
)
def test_damaged_checkpoints_are_told(tmp_path, tensors, kind, message):
    ordered = {name: tensors[name] for name in ("a.weight", "a.bias", "scale", "b.weight")}
    write_sharded(tmp_path, ordered)
    read_layout(tmp_path)
    damage(kind, tmp_path)
    with pytest.raises(ValueError, match=message):
        read_layout(tmp_path)


def with_header(edit, file):
    """Rewrite a file's header by way of its text."""
    raw = file.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    text = edit(raw[8:end].decode()).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[end:])


DEEP = "[" * 100_000 + "]" * 100_000
LONG = "x" * 5000


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("[5, 3]", "[1e999, 3]", r"must give a.weight a dtype, a shape and two data_offsets, got {.*\[inf, 3\]"),
        ("[5, 3]", "[NaN, 3]", "must give a.weight a dtype"),
        ("[5, 3]", '["5", 3]', "must give a.weight a dtype"),
        ("[5, 3]", "[5.0, 3]", "must give a.weight a dtype"),
        ("[5, 3]", "[true, 15]", "must give a.weight a dtype"),
        ("[5, 3]", "[-5, -3]", "must give a.weight a dtype"),
        ("[5, 3]", f"[5, 3{', 1' * 100_000}]", "must give a.weight a dtype"),
        ("[5, 3]", f"[0, {10**30}]", "must give a.weight a dtype"),
        ("[5, 3]", DEEP, "the header of .* must be JSON, got"),
        ("[5, 3]", "[" * 300 + "]" * 300, "must give a.weight a dtype"),
        ("[5, 3]", f"[{'9' * 5000}, 3]", "the header of .* must be JSON, got"),
        ("[0, 60]", "[0, 60, 60]", "must give a.weight a dtype"),
        ("[0, 60]", "60", "must give a.weight a dtype"),
        ('"F32", "shape": [5, 3]', '["F32"], "shape": [5, 3]', "must give a.weight a dtype"),
        ('{"dtype": "F32", "shape": [5, 3], "data_offsets": [0, 60]}', "7", "must give a.weight a dtype.*, got 7"),
        ('"a.weight"', f'"{LONG}"', "must hold a.weight as the index says, got a file without"),
        ('"F32", "shape": [5, 3], "data_offsets": [0,', f'"{LONG}", "shape": [5, 3], "data_offsets": [4,',
         "must have a.weight x{200}[.]{3} .* got bytes"),
    ],
)  # fmt: skip
def test_headers_of_any_json_are_told(tmp_path, tensors, old, new, message):
    write_sharded(tmp_path, {name: tensors[name] for name in ("a.weight", "a.bias", "scale", "b.weight")})
    file = tmp_path / "diffusion_pytorch_model-00001-of-00002.safetensors"
    assert '"a.weight": {"dtype": "F32", "shape": [5, 3], "data_offsets": [0, 60]}' in file.read_bytes().decode("latin")
    with_header(lambda text: text.replace(old, new, 1), file)
    with pytest.raises(ValueError, match=message) as error:
        read_layout(tmp_path)
    assert file.name in str(error.value) and len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "text, message",
    [
        (DEEP, "must be JSON, got"),
        ("\ud800", "must be JSON"),
        (json.dumps({"weight_map": {"a": LONG}}), "must hold what its index names, got no x{200}[.]{3}$"),
        (json.dumps({"weight_map": {"a": "x\0y"}}), "must hold what its index names, got no x\0y"),
        (json.dumps({"weight_map": {"a": ""}}), "must hold what its index names, got no "),
        (json.dumps({"weight_map": {"a": ".."}}), "must hold what its index names, got no .."),
        (json.dumps({"weight_map": {"a": ["x"]}}), "must have a weight_map from tensors to files beside it"),
        (json.dumps({"weight_map": {LONG: "x.safetensors"}}), "must hold x{200}[.]{3} as the index says"),
    ],
)
def test_an_index_of_any_json_is_told(tmp_path, tensors, text, message):
    write(tmp_path / "x.safetensors", tensors)
    (tmp_path / "x.safetensors.index.json").write_text(text, errors="surrogatepass")
    with pytest.raises(ValueError, match=message) as error:
        read_layout(tmp_path)
    assert str(tmp_path) in str(error.value) and len(str(error.value)) < 1000


def test_names_of_any_kind_are_no_checkpoint(tmp_path, tensors):
    for name in (LONG, "a\0b", "/dev/null"):
        with pytest.raises(ValueError, match=r"must be an existing folder or .safetensors file"):
            read_layout(tmp_path / name)
        assert read_config(tmp_path / name) == {}
    for folder in ("x.safetensors", "x.safetensors.index.json", "config.json"):
        (tmp_path / folder).mkdir()
    os.mkfifo(tmp_path / "y.safetensors")  # to open it would wait for a writer
    with pytest.raises(ValueError, match=r"must hold .safetensors files, got none$"):
        read_layout(tmp_path)
    assert read_config(tmp_path) == {}


@pytest.mark.parametrize("left", [None, 0, 100])
def test_a_file_cut_short_after_its_header_was_read_is_told(tmp_path, tensors, left):
    write_sharded(tmp_path, tensors)
    layout, module = read_layout(tmp_path), Small()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    cut = tmp_path / "diffusion_pytorch_model-00002-of-00002.safetensors"
    size = cut.stat().st_size
    if left is None:
        cut.unlink()
    else:
        os.truncate(cut, left)
    with pytest.raises(ValueError) as error:
        load_parameters("Small", module, layout)
    assert str(error.value) == f"Small: {cut} must have the {size} bytes that its header says, got {left or 0} by now"
    assert same(module, before)


HOSTILE = [b"", *rb'1e999 -1 NaN null true [] {} [[[[1]]]] 999999999999999999999 "x" "\u0000" \xff'.split()]


def test_a_checkpoint_of_any_bytes_loads_or_is_a_value_error(tmp_path, tensors):
    """Edits of bytes and of whole values, each in one file of a checkpoint."""
    draw = random.Random(0)
    write_sharded(tmp_path, tensors)
    (tmp_path / "config.json").write_text('{"dim": 5120, "eps": 1e-06}')
    files = sorted(tmp_path.iterdir())
    loaded = 0
    for _ in range(120):
        file = draw.choice(files)
        raw = file.read_bytes()
        edited = bytearray(raw)
        for _ in range(draw.randint(1, 3)):
            values = [*re.finditer(rb"\d+|\[[^][]*\]|\"[^\"]*\"", edited[8:])]
            if values and draw.random() < 0.5:
                value = draw.choice(values)
                edited[8 + value.start() : 8 + value.end()] = draw.choice(HOSTILE)
            elif edited:
                edited[draw.randrange(len(edited))] = draw.randrange(256)
        if draw.random() < 0.8 and file.suffix == ".safetensors":  # the length of the header as it has become
            length = int.from_bytes(raw[:8], "little") + len(edited) - len(raw)
            edited[:8] = max(0, length).to_bytes(8, "little")
        file.write_bytes(edited[: draw.randrange(len(edited) + 1)] if draw.random() < 0.1 else edited)
        try:
            read_config(tmp_path)
            load_parameters("Small", Small(), read_layout(tmp_path))
            loaded += 1
        except ValueError as error:
            assert len(str(error)) < 2000
        file.write_bytes(raw)
    assert 0 < loaded < 120


def test_where_there_is_no_checkpoint(tmp_path, tensors):
    with pytest.raises(ValueError, match=r"must be an existing folder or .safetensors file, got .*nowhere"):
        read_layout(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"must hold .safetensors files, got none$"):
        read_layout(tmp_path)
    (tmp_path / "transformers").mkdir()
    write(tmp_path / "transformers" / "x.safetensors", tensors)
    with pytest.raises(ValueError, match=r"must hold .safetensors files, got none; its folders transformers have some"):
        read_layout(tmp_path)


def test_config(tmp_path):
    assert read_config(tmp_path) == {}
    (tmp_path / "config.json").write_text('{"dim": 5120}')
    assert read_config(tmp_path) == {"dim": 5120}
    (tmp_path / "config.json").write_text("[5120]")
    with pytest.raises(ValueError, match=r"config.json must be a JSON object, got list"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json must be JSON, got"):
        read_config(tmp_path)


@pytest.mark.parametrize("model, tensor, shape, config", [
    (LingBotWorldFast, "patch_embedding_wancamctrl.weight", [], {"dim": 64}),
    (MatrixGame2, "blocks.0.action_model.keyboard_embed.0.weight", [1, 1], {"dim": 64, "action_config": [1]}),
])  # fmt: skip
def test_what_a_model_reads_off_a_checkpoint_may_be_of_any_shape(tmp_path, model, tensor, shape, config):
    header = json.dumps({tensor: {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json|checkpoint"):
        model.from_pretrained(tmp_path, device="cpu", dtype=torch.float32)


def test_tensors_written_are_those_read(tmp_path):
    file = tmp_path / "some.safetensors"
    tensors = {
        "a": torch.randn(3, 5).half(), "odd": torch.randn(7).double(), "b.c": torch.randn(2, 4).T.bfloat16(),
        "one": torch.tensor(4.0), "none": torch.empty(0, 3),
    }  # fmt: skip
    for _ in range(2):  # the second time over the first
        checkpoint.write_tensors(file, tensors)
        got = checkpoint.read_tensors(file)
        assert list(got) == list(tensors)
        assert all(got[name].dtype == x.dtype and torch.equal(got[name], x) for name, x in tensors.items())
        assert [path.name for path in tmp_path.iterdir()] == ["some.safetensors"]
    (header,) = struct.unpack("<Q", file.read_bytes()[:8])
    assert header % 8 == 0
    checkpoint.write_tensors(file, {"empty": torch.empty(0)})
    assert checkpoint.read_tensors(file)["empty"].shape == (0,)
    write(file, {"x": torch.randn(2)}, pad=3)
    file.write_bytes(file.read_bytes().replace(b'"F32"', b'"I32"'))
    with pytest.raises(ValueError, match="must hold F64, F32, F16, BF16, got x I32"):
        checkpoint.read_tensors(file)
