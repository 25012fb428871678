"""A stand-in for CUDA graphs where there is no GPU.

As a graph does, a recording repeats the operations of one call on the tensors of that call: what was a number on the
host then stays as it was, and what lies in a tensor is read where it lay. A number read from a tensor is refused, as it
is in a capture.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default)


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in READS:
            raise RuntimeError(f"{func} reads a tensor on the host, inside a capture")
        made = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, made))
        return made


def recorded(function):
    """A function that repeats what `function` does."""
    recorder = _Recorder()
    with recorder:
        function()

    def replay():
        with torch.autocast("cpu", enabled=False):  # what was recorded is what autocast had made of it
            for func, args, kwargs, made in recorder.calls:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(made), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)

    return replay
