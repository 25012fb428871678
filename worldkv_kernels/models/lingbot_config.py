"""Sizes and noise levels of LingBot-World-Fast and of version 2."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..memory.config import MemoryConfig
from ..tensor_file import abbreviated
from .checkpoint import check_fields
from .wan import PATCH

CONTROL_CHANNELS = {"camera": 6, "action": 7}

# Fields of the published config.json, as Wan's own code and as diffusers call them.
_PUBLISHED_FIELDS = {
    "num_layers": "num_layers",
    "num_heads": "num_heads",
    "num_attention_heads": "num_heads",
    "attention_head_dim": "head_dim",
    "ffn_dim": "ffn_dim",
    "out_dim": "latent_channels",
    "out_channels": "latent_channels",
    "text_len": "text_tokens",
    "text_dim": "text_dim",
    "freq_dim": "frequency_dim",
    "num_frames_per_block": "chunk_frames",
    "eps": "eps",
}
# What the published configs may say and the model always does.
_PUBLISHED_CONSTANTS = {
    "patch_size": [list(PATCH)],
    "qk_norm": [True, "rms_norm_across_heads"],
    "cross_attn_norm": [True],
}


def flow_sigmas(steps: Sequence[int], shift: float, num_train_timesteps: int = 1000) -> tuple[float, ...]:
    """Noise levels of steps of a flow schedule: s = 1 - step / num_train_timesteps, then shift s / (1 + (shift - 1) s).

    Step 0 is pure noise, sigma 1. The published pipelines (a FlowUniPC schedule) start at s = 0.999 instead, give the
    model the whole part of 1000 sigma as its time, and take for sigma the first of the schedule with that whole part:
    up to 0.001 more or less in sigma and 1 less in time than what is used here, sigma as above and time 1000 sigma.
    """
    levels = [1 - step / num_train_timesteps for step in steps]
    return tuple(shift * level / (1 + (shift - 1) * level) for level in levels)


@dataclass(frozen=True, kw_only=True)
class LingBotConfig:
    """Sizes of a LingBotWorldFast; the defaults are those of LingBot-World-Fast, 14B, for 480 x 832 pixels.

    `grid` is (height, width) in tokens of one latent frame: 16 x 16 pixels each. `control`: "camera", or "action"
    for the variant steered by keys. `sigmas`: the noise levels of the denoising passes. `sink_frames` and
    `recent_frames` (past ones, in latent frames) are the model's own window, `memory`'s default. `intrinsics_size`:
    (height, width) in pixels of the image that intrinsics are given for; they are scaled to the grid's.

    Raises ValueError when a size is below 1, head_dim is not 64 or 128, or `control` is unknown.
    """

    num_layers: int = 40
    num_heads: int = 40
    head_dim: int = 128
    ffn_dim: int = 13824
    grid: tuple[int, int] = (30, 52)
    chunk_frames: int = 3
    latent_channels: int = 16
    condition_channels: int = 20  # 4 of a mask, 16 of an encoded image
    text_tokens: int = 512
    text_dim: int = 4096
    frequency_dim: int = 256
    control: Literal["camera", "action"] = "camera"
    eps: float = 1e-6
    sigmas: tuple[float, ...] = flow_sigmas((0, 179, 358, 679), shift=10)
    sink_frames: int = 3
    recent_frames: int = 6
    intrinsics_size: tuple[int, int] = (480, 832)

    def __post_init__(self) -> None:
        for field in ("ffn_dim", "latent_channels", "condition_channels", "text_tokens", "text_dim", "frequency_dim"):
            if getattr(self, field) < 1:
                raise ValueError(f"LingBotConfig: {field} must be at least 1, got {getattr(self, field)}")
        if self.frequency_dim % 2:
            raise ValueError(f"LingBotConfig: frequency_dim must be even, got {self.frequency_dim}")
        if self.control not in CONTROL_CHANNELS:
            raise ValueError(f"LingBotConfig: control must be 'camera' or 'action', got {self.control!r}")
        if len(self.intrinsics_size) != 2 or min(self.intrinsics_size) < 1:
            raise ValueError(f"LingBotConfig: intrinsics_size must be (height, width), got {self.intrinsics_size}")
        self.memory()  # checks the rest

    @classmethod
    def fast(cls, **overrides: Any) -> LingBotConfig:
        """LingBot-World-Fast, 14B."""
        return cls(**overrides)

    @classmethod
    def v2_14b(cls, **overrides: Any) -> LingBotConfig:
        """Version 2 at 14B, as it is launched: 4 evenly spaced steps with shift 10 (its function's own default is 5), a
        window of 18 frames, 6 of them the sink."""
        recent = max(0, 18 - 6 - overrides.get("chunk_frames", cls.chunk_frames))
        of_version = dict(sigmas=flow_sigmas((0, 250, 500, 750), shift=10), sink_frames=6, recent_frames=recent)
        return cls(**{**of_version, **overrides})

    @classmethod
    def v2_1_3b(cls, **overrides: Any) -> LingBotConfig:
        """Version 2 at 1.3B, whose published checkpoint has no config.json."""
        return cls.v2_14b(**{"num_layers": 30, "num_heads": 12, "ffn_dim": 8960, **overrides})

    @classmethod
    def from_published(cls, fields: dict[str, Any], **overrides: Any) -> LingBotConfig:
        """The config that a published config.json describes, in Wan's names or those of diffusers.

        Raises ValueError when it lacks the sizes, or describes what the model has not.
        """
        for field, known in _PUBLISHED_CONSTANTS.items():
            if field in fields and fields[field] not in known:
                got = reprlib.repr(fields[field])
                raise ValueError(f"LingBotConfig: config.json must have {field} {known[0]}, got {got}")
        sizes = [field for field in (*_PUBLISHED_FIELDS, "dim", "in_dim", "in_channels") if field != "eps"]
        check_fields("LingBotConfig", fields, sizes)
        check_fields("LingBotConfig", fields, ["eps"], least=0, kinds=(int, float))
        found = {ours: fields[theirs] for theirs, ours in _PUBLISHED_FIELDS.items() if theirs in fields}
        if "dim" in fields and "num_heads" in found:
            found["head_dim"] = fields["dim"] // found["num_heads"]
        in_channels = fields.get("in_dim", fields.get("in_channels"))
        if in_channels is not None and "latent_channels" in found:
            found["condition_channels"] = in_channels - found["latent_channels"]
        missing = [field for field in ("num_layers", "num_heads", "ffn_dim") if field not in {**found, **overrides}]
        if missing:
            raise ValueError(f"LingBotConfig: config.json must have {', '.join(missing)}, got {abbreviated([*fields])}")
        return cls(**{**found, **overrides})

    @property
    def dim(self) -> int:
        return self.num_heads * self.head_dim

    def memory(self, **options: Any) -> MemoryConfig:
        """The MemoryConfig of this model, with `options` for the rest of its fields."""
        of_model = dict(
            num_layers=self.num_layers, num_heads=self.num_heads, head_dim=self.head_dim, grid=self.grid,
            chunk_frames=self.chunk_frames, eps=self.eps,
            sink_frames=self.sink_frames, recent_frames=self.recent_frames,
        )  # fmt: skip
        return MemoryConfig(**{**of_model, **options})
