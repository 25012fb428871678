"""What a model's passes hold beside weights and memory: counted on tensors that have sizes and no storage."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..actions import Actions
from ..models.matrix_game_config import MatrixGameConfig
from ..models.rollout import Controls, WorldModel
from ..trajectory import DEFAULT_INTRINSICS


class Activations(NamedTuple):
    """Bytes."""

    held: int  # from chunk to chunk: what is computed once for a rollout and once for a chunk
    passing: int  # the most that a pass, or what prepares for it, takes on top of that


def activations(model: WorldModel, device_type: str = "meta") -> Activations:
    """Of the first chunk of a rollout of `model`, which is on a device of that type, and its first pass.

    The tensors that PyTorch allocates, without a library's workspace and what an allocator rounds up; the attention
    kernels' scores never exist. On "meta" nothing is computed or allocated.
    """
    config, frames = model.config, model.chunk_frames
    poses = np.tile(np.eye(4), (frames, 1, 1))
    controls = Controls(poses, np.tile(DEFAULT_INTRINSICS, (frames, 1)), _actions(config, frames))
    counter = _Allocated(device_type)
    counter.know(model.parameters())
    with torch.no_grad(), _AttentionAsOneOp(), counter:
        of_rollout = model.prepare_rollout(None, poses[0], (*model.sigmas, 0.0))
        of_chunk = model.prepare_chunk(of_rollout, 0, controls)
        latents = torch.empty((frames, *model.latent_shape), dtype=torch.float32, device=model.device)
        held = counter.held
        model.denoise(latents, 0, of_chunk, _NoMemory(config.num_heads, config.head_dim))
    return Activations(held, counter.most - held)


def _actions(config: Any, frames: int) -> Actions | None:
    """Nobody plays."""
    if not isinstance(config, MatrixGameConfig):
        return None
    rows, of = 4 * frames - 3, config.actions
    mouse = np.zeros((rows, of.mouse_dim), dtype=np.float32) if of.mouse_dim else None
    return Actions(mouse, np.zeros((rows, of.keyboard_dim), dtype=np.float32))


class _NoMemory:
    """In a memory's place: what attention gives back, and no storage of its own."""

    def __init__(self, num_heads: int, head_dim: int) -> None:
        self._heads = num_heads, head_dim

    def attend(self, layer: int, q: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        return torch.empty((len(q), *self._heads), dtype=q.dtype, device=q.device)


class _AttentionAsOneOp(TorchFunctionMode):
    """PyTorch's attention without a score in memory, as its kernels for a GPU compute it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


class _Allocated(TorchDispatchMode):
    """Counts the bytes of the storages that the ops inside make and that live: now, and the most so far."""

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.held = self.most = 0
        self._device_type = device_type
        self._known: set[int] = set()

    def know(self, tensors: Any) -> None:
        """These do not count; they must outlive the counting."""
        self._known.update(tensor.untyped_storage()._cdata for tensor in tensors)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, torch.Tensor) and made.device.type == self._device_type:
                storage = made.untyped_storage()
                if storage._cdata not in self._known:
                    self._known.add(storage._cdata)
                    self.held += storage.nbytes()
                    self.most = max(self.most, self.held)
                    weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return result

    def _freed(self, known: int, size: int) -> None:
        self._known.discard(known)
        self.held -= size
