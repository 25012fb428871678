"""The action modules of Matrix-Game-2: mouse and keys steer the tokens of each latent frame.

Both branches attend in time only, from each place in the image to itself (mouse) or to the keys held (keyboard), over
the last `local_frames` latent frames, the chunk in the making included. Retrieval does not touch them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

ROWS = 4  # of actions, to a latent frame
_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class ActionConfig:
    """Sizes of the action modules; the defaults are those of the "universal" Matrix-Game-2.

    `mouse_dim` is 0 for a variant without a mouse. A latent frame sees the actions of `seen_frames` latent frames and
    attends to `local_frames`, its own chunk included. `rope_dim` of the head_dim channels are turned by the frame's
    number.

    Raises ValueError when a size is below 1 (`mouse_dim`: 0), or rope_dim is odd or above head_dim.
    """

    mouse_dim: int = 2
    keyboard_dim: int = 4
    num_heads: int = 16
    head_dim: int = 64
    embedding_dim: int = 128
    seen_frames: int = 3
    local_frames: int = 6
    rope_dim: int = 8
    rope_theta: float = 256.0

    def __post_init__(self) -> None:
        for field in ("keyboard_dim", "num_heads", "head_dim", "embedding_dim", "seen_frames", "local_frames"):
            if getattr(self, field) < 1:
                raise ValueError(f"ActionConfig: {field} must be at least 1, got {getattr(self, field)}")
        if self.mouse_dim < 0:
            raise ValueError(f"ActionConfig: mouse_dim must be at least 0, got {self.mouse_dim}")
        if not 2 <= self.rope_dim <= self.head_dim or self.rope_dim % 2:
            raise ValueError(f"ActionConfig: rope_dim must be even, 2 to {self.head_dim}, got {self.rope_dim}")

    @property
    def hidden_dim(self) -> int:
        return self.num_heads * self.head_dim


class ActionFrames(NamedTuple):
    """Where a chunk's frames stand in time."""

    turns: torch.Tensor  # of the chunk's frames, complex64 [frames, rope_dim / 2]
    rows: torch.Tensor  # where the chunk's frames go in an ActionCache, int64 [frames]
    attended: int  # how many frames there are to attend to: local_frames, but fewer at the start


class ActionCache(NamedTuple):
    """Keys and values of the mouse branch of one layer, a ring: latent frame f lies in row f % local_frames.

    The rows that a chunk writes are those of frames that it no longer attends to, so each pass over it finds the past
    as the pass before did, and it may be dropped and begun again.
    """

    keys: torch.Tensor  # [local_frames, locations, heads, head_dim]
    values: torch.Tensor


class ActionFeatures(NamedTuple):
    """What one layer makes of a chunk's actions, the same in every pass."""

    mouse: torch.Tensor | None  # the mouse's part of mouse_mlp's first layer, [frames, 1, hidden_dim]
    keys: torch.Tensor  # of the keyboard in the frames attended to, oldest first, [attended, heads, head_dim]
    values: torch.Tensor

    def until(self, attended: int) -> ActionFeatures:
        """With the first `attended` keys and values."""
        return ActionFeatures(self.mouse, self.keys[:attended], self.values[:attended])


def action_windows(actions: np.ndarray, first_frame: int, frames: int, seen_frames: int) -> np.ndarray:
    """The rows of actions [video frames, columns] that latent frames see, [frames, 4 * seen_frames, columns].

    Latent frame f sees rows 4 (f - seen_frames) .. 4f - 1, and row 0 in place of those before the start. So row 4f,
    the newest of the rows 4f - 3 .. 4f that frame f shows, is first seen by frame f + 1: as in the published code.
    """
    last = ROWS * np.arange(first_frame, first_frame + frames)[:, None]
    return actions[np.maximum(last + np.arange(-ROWS * seen_frames, 0), 0)]


def frame_turns(config: ActionConfig, first_frame: int, frames: int) -> torch.Tensor:
    """exp(i f theta^(-2j / rope_dim)) for frames f and pairs j, complex64 [frames, rope_dim / 2]; angles in float64."""
    exponents = -torch.arange(0, config.rope_dim, 2, dtype=torch.float64, device="cpu") / config.rope_dim
    positions = torch.arange(first_frame, first_frame + frames, dtype=torch.float64, device="cpu")
    angles = positions[:, None] * config.rope_theta**exponents
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)


class ActionModule(nn.Module):
    """x + mouse branch, then + keyboard branch, with the names of the published state dict.

    The published norms of queries and keys have a weight that they do not apply; it is loaded and not applied here.
    They round after every step in the model's dtype, here once, after fp32; the rotation is in fp32 in both.
    """

    def __init__(self, dim: int, config: ActionConfig) -> None:
        super().__init__()
        self.config = config
        hidden, seen_rows = config.hidden_dim, ROWS * config.seen_frames
        if config.mouse_dim:
            self.mouse_mlp = nn.Sequential(
                nn.Linear(dim + seen_rows * config.mouse_dim, hidden), nn.GELU("tanh"),
                nn.Linear(hidden, hidden), nn.LayerNorm(hidden),
            )  # fmt: skip
            self.t_qkv = nn.Linear(hidden, 3 * hidden, bias=False)
            self.img_attn_q_norm, self.img_attn_k_norm = (_UnusedWeight(config.head_dim) for _ in range(2))
            self.proj_mouse = nn.Linear(hidden, dim, bias=False)
        embedding = config.embedding_dim
        self.keyboard_embed = nn.Sequential(
            nn.Linear(config.keyboard_dim, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        self.key_attn_q_norm, self.key_attn_k_norm = (_UnusedWeight(config.head_dim) for _ in range(2))
        self.mouse_attn_q = nn.Linear(dim, hidden, bias=False)
        self.keyboard_attn_kv = nn.Linear(seen_rows * embedding, 2 * hidden, bias=False)
        self.proj_keyboard = nn.Linear(hidden, dim, bias=False)

    def features(self, mouse: torch.Tensor | None, keyboard: torch.Tensor, turns: torch.Tensor) -> ActionFeatures:
        """What does not depend on x.

        Args:
            mouse: windows of the chunk's frames, [frames, 4 * seen_frames, mouse_dim]; None without a mouse.
            keyboard: windows of the frames attended to, [attended, 4 * seen_frames, keyboard_dim].
            turns: of the frames attended to, as of `frame_turns`.
        """
        if mouse is not None:
            first = self.mouse_mlp[0]
            of_mouse = first.weight[:, first.in_features - mouse[0].numel() :]
            mouse = F.linear(mouse.flatten(1), of_mouse, first.bias)[:, None]
        embedded = self.keyboard_embed(keyboard).flatten(1)
        keys, values = self._heads(self.keyboard_attn_kv(embedded), 2).unbind(1)
        return ActionFeatures(mouse, _normed_and_turned(keys, turns[:, None]), values)

    def forward(
        self, x: torch.Tensor, features: ActionFeatures, frames: ActionFrames, cache: ActionCache | None
    ) -> torch.Tensor:
        """x [frames * locations, dim], frame after frame -> the same; the chunk's rows of the cache are written.

        All in the module's dtype. `cache` is None without a mouse, features and frames of the same chunk.
        """
        if features.mouse is not None:
            x = self._moved_by_mouse(x, features.mouse, frames, cache)
        q = self._heads(self.mouse_attn_q(x)).unflatten(0, (len(frames.turns), -1))
        q = _normed_and_turned(q, frames.turns[:, None, None]).flatten(0, 1)
        # The keys held are the same at all locations, so all tokens are queries of one attention.
        of_heads = (tensor.transpose(0, 1)[None] for tensor in (q, features.keys, features.values))
        attended = F.scaled_dot_product_attention(*of_heads)[0].transpose(0, 1)
        return torch.addmm(x, attended.flatten(1), self.proj_keyboard.weight.T)

    def _moved_by_mouse(
        self, x: torch.Tensor, mouse: torch.Tensor, frames: ActionFrames, cache: ActionCache
    ) -> torch.Tensor:
        num_frames, dim = len(mouse), x.shape[1]
        of_tokens = self.mouse_mlp[0].weight[:, :dim].T.expand(num_frames, -1, -1)
        hidden = torch.baddbmm(mouse, x.view(num_frames, -1, dim), of_tokens)  # [frames, locations, hidden_dim]
        hidden = self.mouse_mlp[3](self.mouse_mlp[2](F.gelu(hidden, approximate="tanh")))
        qkv = self._heads(self.t_qkv(hidden), 3)  # [frames, locations, 3, heads, head_dim]
        q, k = _normed_and_turned(qkv[:, :, :2], frames.turns[:, None, None, None]).unbind(2)
        cache.keys.index_copy_(0, frames.rows, k)
        cache.values.index_copy_(0, frames.rows, qkv[:, :, 2])
        keys, values = cache.keys[: frames.attended], cache.values[: frames.attended]
        # [locations, heads, frames, head_dim]
        of_locations = (tensor.permute(1, 2, 0, 3) for tensor in (q, keys, values))
        attended = F.scaled_dot_product_attention(*of_locations).permute(2, 0, 1, 3)
        return torch.addmm(x, attended.reshape(len(x), -1), self.proj_mouse.weight.T)

    def _heads(self, x: torch.Tensor, parts: int = 0) -> torch.Tensor:
        """[..., (parts *) hidden_dim] -> [..., (parts,) heads, head_dim]."""
        split = (parts,) if parts else ()
        return x.unflatten(-1, (*split, self.config.num_heads, self.config.head_dim))


class _UnusedWeight(nn.Module):
    """A norm's weight that published state dicts hold and the published code does not apply."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))


def _normed_and_turned(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """RMSNorm of x [..., heads, head_dim] over head_dim, rounded; then its first pairs turned, in fp32."""
    normed = F.rms_norm(x, x.shape[-1:], None, _EPS)
    first = normed[..., : 2 * turns.shape[-1]]
    pairs = torch.view_as_complex(first.float().unflatten(-1, (-1, 2)))
    first.copy_(torch.view_as_real(pairs * turns).flatten(-2))
    return normed
