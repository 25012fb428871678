"""Checkpoints of the published sizes, as files of holes: every tensor's name, shape and place, and no data on disk."""

import json
import math
import struct

import pytest
import torch
from safetensors_files import NAMES

from worldkv_kernels.models.lingbot_config import LingBotConfig
from worldkv_kernels.models.lingbot_world_fast import LingBotWorldFast
from worldkv_kernels.models.matrix_game_2 import MatrixGame2
from worldkv_kernels.models.matrix_game_config import MatrixGameConfig

SHARD_BYTES = 2 << 30
CONFIGS = {
    "LingBot-World-Fast": (LingBotWorldFast, LingBotConfig.fast()),
    "LingBot-World-Fast, keys": (LingBotWorldFast, LingBotConfig.fast(control="action")),
    "LingBot-World 2, 14B": (LingBotWorldFast, LingBotConfig.v2_14b()),
    "LingBot-World 2, 1.3B": (LingBotWorldFast, LingBotConfig.v2_1_3b()),
    "Matrix-Game-2.0, universal": (MatrixGame2, MatrixGameConfig.universal()),
    "Matrix-Game-2.0, gta_drive": (MatrixGame2, MatrixGameConfig.gta_drive()),
    "Matrix-Game-2.0, templerun": (MatrixGame2, MatrixGameConfig.templerun()),
}


def write_holes(folder, state, prefix):
    """Shards of up to SHARD_BYTES with an index; past its header, a file is a hole of the right length."""
    shards, size = [{}], 0
    for name, tensor in state.items():
        length = tensor.numel() * tensor.element_size()
        if size and size + length > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][prefix + name] = {
            "dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [size, size + length],
        }  # fmt: skip
        size += length
    placed = {}
    for number, header in enumerate(shards, 1):
        file = folder / f"model-{number:05}-of-{len(shards):05}.safetensors"
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # tensors that start between elements would be copied, holes and all
        with open(file, "wb") as opened:
            opened.write(struct.pack("<Q", len(text)) + text)
            opened.truncate(8 + len(text) + max(entry["data_offsets"][1] for entry in header.values()))
        placed.update(dict.fromkeys(header, file.name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    return len(shards)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_published_state_dict_goes_through_from_pretrained(name, tmp_path):
    kind, config = CONFIGS[name]
    state = kind(config, device="meta", dtype=torch.bfloat16).state_dict()
    total = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    shards = write_holes(tmp_path, state, "model." if kind is MatrixGame2 else "")
    assert shards >= math.ceil(total / SHARD_BYTES)
    loaded = kind.from_pretrained(tmp_path, config=config, device="meta", dtype=torch.bfloat16)
    assert loaded.config == config
    assert {n: (t.shape, t.dtype) for n, t in loaded.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in state.items()
    }
    left_out = next(reversed(state))
    write_holes(tmp_path, {n: t for n, t in state.items() if n != left_out}, "")
    with pytest.raises(ValueError, match=rf"{kind.__name__}: .* got 1 missing: {left_out}$"):
        kind.from_pretrained(tmp_path, config=config, device="meta", dtype=torch.bfloat16)
