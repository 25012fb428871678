"""Writes checkpoints in the published layouts, byte by byte as the safetensors format says."""

import json
import struct

import torch

NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write(file, tensors, *, pad=0, metadata=True):
    """One safetensors file; `pad` spaces end its header, which moves the data."""
    header, data = {"__metadata__": {"format": "pt"}} if metadata else {}, b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode() + b" " * pad
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_sharded(folder, tensors, shards=2, name="diffusion_pytorch_model"):
    names, weight_map = list(tensors), {}
    for shard in range(shards):
        file = f"{name}-{shard + 1:05}-of-{shards:05}.safetensors"
        write(folder / file, {key: tensors[key] for key in names[shard::shards]})
        weight_map.update(dict.fromkeys(names[shard::shards], file))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{name}.safetensors.index.json").write_text(json.dumps(index))
