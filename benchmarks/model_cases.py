"""What the chunk and rollout benches run: models with random weights, what steers them, and the memories compared.

What is counted of a pass, operations and bytes, is counted here, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from published_path import PublishedMemory
from torch.utils.flop_counter import FlopCounterMode

from worldkv_kernels import MemoryConfig, WorldMemory
from worldkv_kernels.actions import MOUSE_STEP, Actions, video_frames
from worldkv_kernels.memory.room import least_chunks, most_bank_chunks
from worldkv_kernels.models.lingbot_config import LingBotConfig
from worldkv_kernels.models.lingbot_world_fast import LingBotWorldFast
from worldkv_kernels.models.matrix_game_2 import MatrixGame2
from worldkv_kernels.models.matrix_game_config import MatrixGameConfig
from worldkv_kernels.models.rollout import Controls, WorldModel
from worldkv_kernels.models.small_world import SmallWorld, SmallWorldConfig
from worldkv_kernels.trajectory import latent_poses, load

# The memories that are compared. "published" is the rival, "official" the same window by way of the ops,
# "sliding_as_long" a sliding window of as many tokens as "worldkv" attends to once its window is full, "worldkv_eager"
# makes its passes without CUDA graphs, "worldkv_compiled" with fewer kernels between the products, and "worldkv_fp8" so
# with linear layers in FP8.
MODES = (
    "worldkv", "worldkv_eager", "worldkv_host", "worldkv_8_bits", "worldkv_host_4_bits", "official", "full", "sliding",
    "sliding_as_long", "sink_recent", "published", "worldkv_compiled", "worldkv_fp8",
)  # fmt: skip
# Modes that change the model, for those after them too; on a GPU.
CHANGED = {"worldkv_compiled": "compile_elementwise", "worldkv_fp8": "to_fp8"}
RIVALS = ("published",)
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
_RETRIEVED = 6  # chunks
_MARGIN = 8 << 30  # bytes of the device left for activations

Memory = WorldMemory | PublishedMemory
Config = SmallWorldConfig | LingBotConfig | MatrixGameConfig


@dataclass(frozen=True)
class ModelCase:
    """A model and its depth, None for all of it; `sizes` are other fields of its config, `variant` is one of the
    model's, None for the first."""

    model: str
    layers: int | None = None
    sizes: dict[str, Any] = field(default_factory=dict)
    variant: str | None = None

    @property
    def name(self) -> str:
        return f"{self.model} {self.variant}" if self.variant else self.model

    def config(self) -> Config:
        """The sizes. Raises ValueError on an unknown model."""
        if self.model not in MODELS:
            raise ValueError(f"--model must be one of {', '.join(MODELS)}, got {self.model!r}")
        variants, _ = MODELS[self.model]
        make = variants[self.variant] if self.variant else next(iter(variants.values()))
        return make(**self.sizes, **({"num_layers": self.layers} if self.layers else {}))

    def __str__(self) -> str:
        config = self.config()
        tokens = config.grid[0] * config.grid[1]
        return f"{self.name}, {config.num_layers} layers, {config.num_heads} heads, {tokens} tokens a frame"


def _matrix_game(**sizes: Any) -> MatrixGameConfig:
    """As in the whole model, the first half of the blocks have action modules."""
    layers = sizes.get("num_layers", MatrixGameConfig.num_layers)
    return MatrixGameConfig(**{"action_layers": tuple(range(layers // 2)), **sizes})


# The config of each model's variants, the first by default, and the class.
MODELS = {
    "small_world": ({"small_world": SmallWorldConfig}, SmallWorld),
    "lingbot_world_fast": ({"fast": LingBotConfig.fast, "v2-1.3b": LingBotConfig.v2_1_3b}, LingBotWorldFast),
    "matrix_game_2": ({"universal": _matrix_game}, MatrixGame2),
}


def build(case: ModelCase, device: torch.device) -> WorldModel:
    """The case's model with random weights, bf16 on a GPU and fp32 on a CPU. Raises ValueError on an unknown model."""
    config = case.config()
    return MODELS[case.model][1].random(config, device=device, dtype=DTYPES[device.type])


def weights_of(case: ModelCase, dtype: torch.dtype) -> int:
    """Bytes of the weights of a case with `layers`, from its sizes: three layers and one tell what two more take."""
    few = [replace(case, layers=layers) for layers in (1, 3)]
    one, three = (weight_bytes(MODELS[case.model][1](of.config(), device="meta", dtype=dtype)) for of in few)
    return one + (case.layers - 1) * (three - one) // 2


def shape(model: WorldModel, window_tokens: int) -> dict[str, int]:
    config = model.config
    queries = config.chunk_frames * config.grid[0] * config.grid[1]
    return {"heads": config.num_heads, "layers": config.num_layers, "queries": queries, "tokens": window_tokens}


def controls_of(model: WorldModel, chunks: int) -> list[Controls]:
    """What steers so many chunks: the camera turns away and back over what it has seen, a degree a video frame."""
    step = model.chunk_frames
    half = 2 * step * chunks  # video frames
    poses, intrinsics = latent_poses(load(f"right*{half},left*{half}"))
    actions = None
    if isinstance(model.config, MatrixGameConfig):
        turn = np.repeat([MOUSE_STEP, -MOUSE_STEP], half)
        keyboard = np.zeros((2 * half, model.config.actions.keyboard_dim))
        actions = Actions(np.stack([0 * turn, turn], axis=1), keyboard)
    return [
        Controls(poses[at : at + step], intrinsics[at : at + step], actions and actions.until(video_frames(at + step)))
        for at in range(0, step * chunks, step)
    ]


def full_window(config: MemoryConfig) -> int:
    """Tokens attended to when as much is retrieved as can be."""
    whole = config.sink_chunks + config.recent_chunks + 1
    return whole * config.chunk_tokens + (config.retrieved_chunks * config.banked_tokens if config.has_bank else 0)


def memory_config(mode: str, model: WorldModel, chunks: int) -> MemoryConfig:
    """The memory of a mode with room for `chunks` chunks: a sink of one chunk, two recent ones, six retrieved and
    halved. Raises ValueError on an unknown mode."""
    config, frames = model.config, model.chunk_frames
    room = max(_RETRIEVED, chunks)
    if mode in ("official", "published"):
        return MemoryConfig.official(
            num_layers=config.num_layers, num_heads=config.num_heads, head_dim=config.head_dim, grid=config.grid,
            chunk_frames=frames, sink_frames=frames, retrieved_frames=_RETRIEVED * frames, recent_frames=2 * frames,
            keep_ratio=0.25, bank_chunks=room,
        )  # fmt: skip
    sizes = dict(
        sink_frames=frames, recent_frames=2 * frames, retrieved_chunks=_RETRIEVED, keep_ratio=0.25, bank_chunks=room
    )
    as_long = (full_window(config.memory(**sizes)) // config.memory().chunk_tokens - 1) * frames
    changes = {
        "worldkv": {},
        **{key: {} for key in ("worldkv_eager", *CHANGED)},
        "worldkv_host": {"bank": "host"},
        "worldkv_8_bits": {"bank_bits": 8},
        "worldkv_host_4_bits": {"bank": "host", "bank_bits": 4},
        "full": {"mode": "full"},
        "sliding": {"mode": "sliding"},
        "sliding_as_long": {"mode": "sliding", "recent_frames": as_long},
        "sink_recent": {"mode": "sink_recent"},
    }
    if mode not in changes:
        raise ValueError(f"--modes must be of {', '.join(MODES)}, got {mode!r}")
    return config.memory(**{**sizes, **changes[mode]})  # each mode with the defaults of its own, as rebase_time


def make_memory(mode: str, model: WorldModel, chunks: int, *, backend: str | None = None) -> Memory:
    """A mode's memory. On a GPU that cannot hold `chunks` chunks the bank holds those that fit and drops others, and
    "full" ends there; the published bank has no bound."""
    config = memory_config(mode, model, chunks)
    if mode == "published":
        return PublishedMemory(config, device=model.device, dtype=model.dtype)
    if model.device.type == "cuda" and (mode == "full" or (config.has_bank and config.bank == "device")):
        config = replace(config, bank_chunks=min(config.bank_chunks, _fitting(config, model)))
    return WorldMemory(config, device=model.device, dtype=model.dtype, backend=backend)


def _fitting(config: MemoryConfig, model: WorldModel) -> int:
    """How many chunks the bank, or the pool of mode "full", can hold in the device's free memory; at least one."""
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(model.device)[0] - _MARGIN
    least = least_chunks(config)
    return (
        most_bank_chunks(replace(config, bank_chunks=least), model.dtype, lambda sizes: sizes.device <= free) or least
    )


def _attention_flops(q: torch.Size, k: torch.Size, v: torch.Size, *args: Any, **options: Any) -> int:
    batch, heads, q_len, head_dim = q
    return 2 * batch * heads * q_len * k[2] * (head_dim + v[3])


# PyTorch's counter knows the attention kernels of a GPU alone.
_UNCOUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


def pass_flops(model: WorldModel, controls: Controls, window_tokens: int) -> int:
    """Operations of one denoising pass: its matrix products as PyTorch counts them, and attention over the window."""
    config = model.config
    alone = WorldMemory(
        config.memory(mode="sliding", recent_frames=0, sink_frames=0), device=model.device, dtype=model.dtype
    )
    with torch.no_grad():
        of_rollout = model.prepare_rollout(None, controls.poses[0], (1.0, 0.0))
        of_chunk = model.prepare_chunk(of_rollout, 0, controls)
        alone.begin_chunk(controls.poses)
        latents = torch.zeros((model.chunk_frames, *model.latent_shape), dtype=torch.float32, device=model.device)
        with FlopCounterMode(display=False, custom_mapping=_UNCOUNTED) as counter:
            model.denoise(latents, 0, of_chunk, alone)
    queries = config.chunk_frames * config.grid[0] * config.grid[1]
    attention = 4 * queries * config.num_heads * config.head_dim * window_tokens * config.num_layers
    return counter.get_total_flops() + attention


def weight_bytes(model: torch.nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in model.state_dict().values())


def pass_bytes(model: WorldModel, window_tokens: int) -> int:
    """The weights, and K and V of the window in every layer, once. Activations are not counted."""
    config = model.config
    row = 2 * config.num_heads * config.head_dim * model.dtype.itemsize
    return weight_bytes(model) + window_tokens * row * config.num_layers


def relative_errors(made: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    """||made - wanted|| / ||wanted|| over all chunks together, in float64."""
    a, b = (torch.cat([chunk.double().flatten() for chunk in chunks]) for chunks in (made, wanted))
    return ((a - b).norm() / b.norm()).item()


# Of the small cases: two layers, 24 tokens a frame.
SMALL_SIZES: dict[str, dict[str, Any]] = {
    "small_world": {"grid": (4, 6)},
    "lingbot_world_fast": {
        "num_heads": 2, "head_dim": 64, "ffn_dim": 256, "grid": (4, 6), "text_tokens": 8, "text_dim": 32,
    },
    "matrix_game_2": {
        "num_heads": 2, "head_dim": 64, "ffn_dim": 256, "grid": (4, 6), "image_tokens": 5, "image_dim": 32,
    },
}  # fmt: skip
