"""Contents: what chunks are known by where retrieval is by content."""

from __future__ import annotations

import numpy as np
import torch

from ..poses import as_real


class Contents:
    """The mean of each frame's keys in layer 0, of the pass made last over each branch, on its way to the host.

    Keys as the projection gives them, before norm and rotation: the mean knows nothing of where and when. Taken in
    every pass, since the memory does not know which is the last: layer 0 is the first of a pass, so the means are on
    the host while the device is at the layers behind, and who reads them does not let it stand still. Not so where the
    pass was a captured graph's, or compiled: an event inside cannot be waited for, and that behind it is.
    """

    @torch.inference_mode(False)  # what is made in inference mode could not be rewritten outside of it
    def __init__(self, shape: tuple[int, int, int], device: torch.device) -> None:
        """`shape`: (branches, chunk_frames, numbers of a key)."""
        self._on_device = torch.empty(shape, dtype=torch.float32, device=device)
        on_gpu = device.type == "cuda"
        self._on_host = torch.empty(shape, dtype=torch.float32, pin_memory=on_gpu, device="cpu")
        self._copied = torch.cuda.Event() if on_gpu else None
        self._noted = False  # whether the event stands for the last copy

    def take(self, k: torch.Tensor, branch: int = 0) -> None:
        """Layer 0's keys [tokens, kv_heads * head_dim] of a pass over a branch."""
        means = self._on_device[branch]
        torch.mean(k.unflatten(0, (len(means), -1)), dim=1, dtype=torch.float32, out=means)
        self._on_host.copy_(self._on_device, non_blocking=True)
        self._noted = False
        if self._copied is None or torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
            return
        self._note()

    def replayed(self) -> None:
        """A captured pass has taken them anew."""
        self._noted = False

    def of_chunk(
        self, given: object, query: np.ndarray | None, asked: bool, before: np.ndarray | None
    ) -> np.ndarray | None:
        """What the chunk that ends is known by, fp32 [vectors, dim]: what is given; or its query, as those before it,
        and where there is none if the caller `asked`; or its keys, which are still to be `read`: None.

        Raises ValueError or TypeError as WorldMemory.end_chunk says.
        """
        branches, frames, numbers = self._on_device.shape
        of_keys = frames, branches * numbers
        if given is not None:
            made = as_content("end_chunk", "content", given, ("vectors", "dim"), before)
            if asked and len(query) != made.shape[1]:
                wanted = f"[vectors, {len(query)}] as the query is"
                raise ValueError(f"end_chunk: content must be {wanted}, got {list(made.shape)}")
            return made
        either = before is None or before.shape == of_keys == (1, len(query))  # of keys or queries, by their shape
        if asked if either else len(before) == 1:
            return query[None]
        if before is not None and before.shape != of_keys:
            raise ValueError(f"end_chunk: content must be {list(before.shape)} as in the chunks before, got None")
        self.end()
        return None

    def end(self) -> None:
        """The chunk is ended: what was taken last is its own."""
        if self._copied is not None and not self._noted:
            self._note()

    def read(self) -> np.ndarray:
        """Of the chunk ended last, fp32 [chunk_frames, branches * numbers of a key]; waits for them on the host."""
        if self._copied is not None:
            self._copied.synchronize()
        return np.concatenate(self._on_host.numpy(), axis=1)

    def _note(self) -> None:
        self._copied.record(torch.cuda.current_stream(self._on_device.device))
        self._noted = True


def as_content(op: str, name: str, given: object, axes: tuple[str, ...], like: np.ndarray | None) -> np.ndarray:
    """A vector of a caller's own, or several, as fp32 of these axes: ("dim",) or ("vectors", "dim"). Where there are
    contents before, each is `like` this one, [vectors, dim].

    Raises ValueError naming `op` and `name` on another shape, and on NaN, infinity or what is too large; TypeError on
    what is no array of real numbers.
    """
    shape = list(axes) if like is None else list(like.shape[-len(axes) :])
    wanted = f"[{', '.join(map(str, shape))}]"
    with np.errstate(over="ignore"):
        array = as_real(op, name, f"an array {wanted}", given).astype(np.float32)
    if array.ndim != len(axes) or not array.size or (like is not None and list(array.shape) != shape):
        before = "" if like is None else " as in the chunks before"
        raise ValueError(f"{op}: {name} must be {wanted}{before}, got {list(array.shape)}")
    if not np.isfinite(array).all():
        raise ValueError(f"{op}: {name} must be finite in fp32, got {array[~np.isfinite(array)][0]}")
    return array
