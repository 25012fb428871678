"""Sizes and noise levels of Matrix-Game-2.0's published variants."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass, field
from typing import Any

from ..memory.config import MemoryConfig
from ..tensor_file import abbreviated
from .action_module import ROWS, ActionConfig
from .checkpoint import check_fields
from .lingbot_config import flow_sigmas
from .wan import PATCH

# Steps 1000, 666, 333 and 1000, 750, 500, 250 of the published schedule, which counts down.
_THREE_STEPS = flow_sigmas((0, 334, 667), shift=5)
_FOUR_STEPS = flow_sigmas((0, 250, 500, 750), shift=5)

_OF_THE_ACTIONS: Any = None  # of recent_frames, where they are not given

# What the published configs may say and the model always does.
_PUBLISHED_CONSTANTS = {"model_type": "i2v", "sink_size": 0}
_PUBLISHED_ACTION_CONSTANTS = {
    "patch_size": list(PATCH), "qk_norm": True, "qkv_bias": False, "enable_keyboard": True,
    "vae_time_compression_ratio": ROWS,
}  # fmt: skip
_PUBLISHED_FIELDS = {
    "num_layers": "num_layers", "num_heads": "num_heads", "ffn_dim": "ffn_dim", "freq_dim": "frequency_dim",
    "out_dim": "latent_channels", "eps": "eps",
}  # fmt: skip
_PUBLISHED_ACTION_FIELDS = {
    "mouse_dim_in": "mouse_dim", "keyboard_dim_in": "keyboard_dim", "heads_num": "num_heads",
    "hidden_size": "embedding_dim", "windows_size": "seen_frames", "rope_theta": "rope_theta",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MatrixGameConfig:
    """Sizes of a MatrixGame2; the defaults are those of the "universal" variant, 1.3B, for 352 x 640 pixels.

    `grid` is (height, width) in tokens of one latent frame: 16 x 16 pixels each. `action_layers` are the blocks with
    an action module, of the sizes in `actions`. `sigmas`: the noise levels of the denoising passes. `sink_frames` and
    `recent_frames` (past ones, in latent frames) are the model's own window, `memory`'s default; by default no sink and
    what the actions' local_frames leave beside the current chunk.

    Raises ValueError when a size is below 1 or odd where it must be even, head_dim is not 64 or 128, an action layer
    is not a block, or the actions' local_frames are fewer than chunk_frames.
    """

    num_layers: int = 30
    num_heads: int = 12
    head_dim: int = 128
    ffn_dim: int = 8960
    grid: tuple[int, int] = (22, 40)
    chunk_frames: int = 3
    latent_channels: int = 16
    condition_channels: int = 20  # 4 of a mask, 16 of an encoded image
    image_tokens: int = 257
    image_dim: int = 1280
    frequency_dim: int = 256
    eps: float = 1e-6
    actions: ActionConfig = field(default_factory=ActionConfig)
    action_layers: tuple[int, ...] = tuple(range(15))
    sigmas: tuple[float, ...] = _THREE_STEPS
    sink_frames: int = 0
    recent_frames: int = _OF_THE_ACTIONS

    def __post_init__(self) -> None:
        sizes = ("ffn_dim", "latent_channels", "condition_channels", "image_tokens", "image_dim", "frequency_dim")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"MatrixGameConfig: {name} must be at least 1, got {getattr(self, name)}")
        if self.frequency_dim % 2:
            raise ValueError(f"MatrixGameConfig: frequency_dim must be even, got {self.frequency_dim}")
        strange = [layer for layer in self.action_layers if not 0 <= layer < self.num_layers]
        if strange:
            wanted = f"of blocks 0 to {self.num_layers - 1}"
            raise ValueError(f"MatrixGameConfig: action_layers must be {wanted}, got {', '.join(map(str, strange))}")
        if self.actions.local_frames < self.chunk_frames:
            raise ValueError(
                f"MatrixGameConfig: actions must have local_frames of at least chunk_frames={self.chunk_frames}, "
                f"got {self.actions.local_frames}"
            )
        if self.recent_frames is None:
            object.__setattr__(self, "recent_frames", self.actions.local_frames - self.chunk_frames)
        self.memory()  # checks the rest

    @classmethod
    def universal(cls, **overrides: Any) -> MatrixGameConfig:
        """Walks by W, S, A, D and looks by the mouse; a window of 6 frames."""
        return cls(**overrides)

    @classmethod
    def gta_drive(cls, **overrides: Any) -> MatrixGameConfig:
        """Drives by W, S and steers by the mouse; a window of 4 frames, which begins inside a chunk."""
        return cls(**{"actions": ActionConfig(keyboard_dim=2, local_frames=4), **overrides})

    @classmethod
    def templerun(cls, **overrides: Any) -> MatrixGameConfig:
        """Seven keys, one at a time, and no mouse; four passes; a window of 6 frames."""
        of_variant = dict(actions=ActionConfig(mouse_dim=0, keyboard_dim=7), sigmas=_FOUR_STEPS)
        return cls(**{**of_variant, **overrides})

    @classmethod
    def from_published(cls, fields: dict[str, Any], **overrides: Any) -> MatrixGameConfig:
        """The config that a published config.json describes.

        `sigmas`, which it lacks, are those of the variant, and so is the window where it lacks `local_attn_size`, as
        those beside the published weights of universal and gta_drive do. Raises ValueError when it lacks the sizes, or
        describes what the model has not.
        """
        of_actions = fields.get("action_config") or {}
        if not isinstance(of_actions, dict):
            got = reprlib.repr(of_actions)
            raise ValueError(f"MatrixGameConfig: config.json must have action_config an object, got {got}")
        for found, constants in ((fields, _PUBLISHED_CONSTANTS), (of_actions, _PUBLISHED_ACTION_CONSTANTS)):
            for name, wanted in constants.items():
                if name in found and found[name] != wanted:
                    got = reprlib.repr(found[name])
                    raise ValueError(f"MatrixGameConfig: config.json must have {name} {wanted}, got {got}")
        missing = [name for name in ("num_layers", "num_heads", "dim", "ffn_dim") if name not in fields]
        if missing:
            got = abbreviated([*fields])
            raise ValueError(f"MatrixGameConfig: config.json must have {', '.join(missing)}, got {got}")
        _check_published(fields, of_actions)
        sizes = {ours: of_actions[theirs] for theirs, ours in _PUBLISHED_ACTION_FIELDS.items() if theirs in of_actions}
        if "keyboard_hidden_dim" in of_actions and "heads_num" in of_actions:
            sizes["head_dim"] = of_actions["keyboard_hidden_dim"] // of_actions["heads_num"]
        if "rope_dim_list" in of_actions:
            sizes["rope_dim"] = of_actions["rope_dim_list"][0]
        if not of_actions.get("enable_mouse", True):
            sizes["mouse_dim"] = 0
        of_gta = cls.gta_drive().actions
        drives = sizes.get("keyboard_dim") == of_gta.keyboard_dim
        default_window = of_gta.local_frames if drives else ActionConfig().local_frames
        actions = ActionConfig(**sizes, local_frames=fields.get("local_attn_size", default_window))
        found = {ours: fields[theirs] for theirs, ours in _PUBLISHED_FIELDS.items() if theirs in fields}
        found["head_dim"] = fields["dim"] // fields["num_heads"]
        if "in_dim" in fields and "out_dim" in fields:
            found["condition_channels"] = fields["in_dim"] - fields["out_dim"]
        if "blocks" in of_actions:
            found["action_layers"] = tuple(of_actions["blocks"])
        found["sigmas"] = _THREE_STEPS if actions.mouse_dim else _FOUR_STEPS
        return cls(**{**found, "actions": actions, **overrides})

    @property
    def dim(self) -> int:
        return self.num_heads * self.head_dim

    def memory(self, **options: Any) -> MemoryConfig:
        """The MemoryConfig of this model, with `options` for the rest of its fields.

        By default chunks that leave the published window, which has no sink, are banked and retrieved.
        """
        of_model = dict(
            num_layers=self.num_layers, num_heads=self.num_heads, head_dim=self.head_dim, grid=self.grid,
            chunk_frames=self.chunk_frames, eps=self.eps,
            sink_frames=self.sink_frames, recent_frames=self.recent_frames,
        )  # fmt: skip
        return MemoryConfig(**{**of_model, **options})


def _check_published(fields: dict[str, Any], of_actions: dict[str, Any]) -> None:
    """Raise ValueError where a field that `from_published` reads is none that a model has."""
    op, numbers = "MatrixGameConfig", dict(least=0, kinds=(int, float))
    sizes = [name for name in (*_PUBLISHED_FIELDS, "dim", "in_dim", "local_attn_size") if name != "eps"]
    check_fields(op, fields, sizes)
    check_fields(op, fields, ["eps"], **numbers)
    of_one = [name for name in _PUBLISHED_ACTION_FIELDS if name not in ("mouse_dim_in", "rope_theta")]
    check_fields(op, of_actions, [*of_one, "keyboard_hidden_dim"])
    check_fields(op, of_actions, ["mouse_dim_in"], least=0)
    check_fields(op, of_actions, ["rope_theta"], **numbers)
    for name, fewest in (("blocks", 0), ("rope_dim_list", 1)):
        found = of_actions.get(name, [0])
        right = isinstance(found, list) and len(found) >= fewest and all(type(n) is int for n in found)
        if not right:
            raise ValueError(f"{op}: config.json must have {name} a list of integers, got {reprlib.repr(found)}")
