"""Checkpoints in the published layouts."""

import json
import struct

import pytest
import torch
from safetensors_files import NAMES, write, write_sharded
from torch import nn

from worldkv_kernels.models import checkpoint
from worldkv_kernels.models.checkpoint import load_parameters, read_config, read_layout


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
        ("no header", "must have a valid safetensors header, got JSONDecodeError"),
        ("a list", "must have a valid safetensors header, got TypeError"),
        ("no shape", r"must have a valid safetensors header, got KeyError\('shape'\)"),
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
