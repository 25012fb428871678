"""The three ops on a device that is neither a CPU nor a GPU: a program for test_backends.py, in a process of its own.

PyTorch's key for devices of others is given one whose numbers lie in tensors of the CPU, and whose every operation is
the CPU's. That says that the ops are dispatched there, choose the reference, and read and write what is there.
"""

from functools import partial

import torch
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import worldkv_kernels
from worldkv_kernels.checks import as_device

_setup_privateuseone_for_python_backend("stand_in")
DEVICE = torch.device("stand_in", 0)


class There(torch.Tensor):
    """A tensor of the device, with its numbers in `here`. To the dispatcher it is always contiguous."""


def there_from(here):
    made = torch._C._acc.create_empty_tensor(list(here.shape), here.dtype)
    made.__class__ = There
    made.here = here
    return made


def on_the_cpu(op, *args, **kwargs):
    """Runs an operation of the device. What it writes to is returned as it came."""
    flat = pytree.tree_leaves((args, kwargs))
    of_here = {id(x.here): x for x in flat if isinstance(x, There)}
    wanted = kwargs.get("device") or next((x for x in args if isinstance(x, torch.device)), None)
    stays = wanted is None or torch.device(wanted).type == DEVICE.type

    def here(x):
        if isinstance(x, There):
            return x.here
        return torch.device("cpu") if isinstance(x, torch.device) else x

    def there(x):
        if not isinstance(x, torch.Tensor) or not stays or op is torch.ops.aten._copy_from.default:
            return x
        return of_here[id(x)] if id(x) in of_here else there_from(x)

    if op is torch.ops.aten._copy_from.default:  # what copy_ between devices comes down to
        here(args[1]).copy_(here(args[0]))
        return args[1]
    args, kwargs = pytree.tree_map(here, (args, kwargs))
    return pytree.tree_map(there, op(*args, **kwargs))


LIBRARY = torch.library.Library("_", "IMPL")
LIBRARY.fallback(on_the_cpu, "PrivateUse1")
ATEN = torch.library.Library("aten", "IMPL")
# What torch has for any device, and does by way of strides or of a result yet to be given a size: neither is told here.
OWN = (
    "abs", "remainder.Scalar", "arange", "arange.start", "arange.start_step", "slice.Tensor", "select.int",
    "transpose.int", "t", "permute", "split_with_sizes", "unbind.int", "unsqueeze", "squeeze.dim", "expand", "view",
    "alias", "detach",
)  # fmt: skip
for name in OWN:
    packet, overload = (name + ".default").split(".")[:2]
    ATEN.impl(name, partial(on_the_cpu, getattr(getattr(torch.ops.aten, packet), overload)), "PrivateUse1")


def outputs(to, device, backend):
    """What each op gives of the same inputs on a device, which `to` takes them to."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 12, 2, 64, generator=generator)
    pool = torch.randn(2, 300, 2, 64, generator=generator)
    rope = worldkv_kernels.Rope3D(64)
    k_pool, v_pool = to(pool[0].clone()), to(pool[1].clone())
    row = to(torch.randn(12, 128, generator=generator))
    queries = worldkv_kernels.norm_rope_append(
        row, row, row, k_pool, v_pool, 200, rope=rope, grid=(3, 2, 2), start_frame=5, backend=backend
    )
    window = worldkv_kernels.Window([(0, 150, 4, 0.5), (200, 30, -2, -1.0)], device=device, rope=rope, weighted=True)
    attended = worldkv_kernels.segment_attention(
        to(q), k_pool, v_pool, window, return_lse=True, return_mass=True, backend=backend
    )
    chunk = (to(x.unsqueeze(0)) for x in (k, v))
    kept = worldkv_kernels.compress_chunk(*chunk, frames=3, keep_ratio=0.5, backend=backend)
    return [queries, k_pool, v_pool, *attended, *(x for x in kept if x is not None)]


def main():
    wanted = outputs(lambda x: x, "cpu", "reference")
    got = outputs(there_from, DEVICE, None)
    for have, want in zip(got, wanted, strict=True):
        assert type(have) is There and have.device == DEVICE and torch.equal(have.here, want)
    try:  # of a memory nobody has said so
        as_device("WorldMemory", DEVICE)
        raise AssertionError("a memory on a device of another kind")
    except ValueError as error:
        assert "WorldMemory: device must be 'cpu' or a CUDA device" in str(error)
    pool = there_from(torch.zeros(30, 2, 64))
    window = worldkv_kernels.Window([(0, 9)], device=DEVICE)
    wants_gradient = there_from(torch.zeros(3, 2, 64)).requires_grad_()
    try:
        worldkv_kernels.segment_attention(wants_gradient, pool, pool, window)
    except ValueError as error:
        print(len(got), "outputs on", got[0].device, "of the same bits;", error)


main()
