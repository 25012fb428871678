"""Runs the suite on a GPU where there is one, else on the CPU with Triton's interpreter.

WORLDKV_TEST_DEFAULT=meta, float64 or bfloat16 runs it under that default device or dtype of the process. What the code
of the tests makes is then still on the CPU and in float32: what it leaves to the defaults is not what they are about.
"""

import ctypes
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

import cuda_on_host
import numpy as np
import pytest
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from worldkv_kernels.ops.compress_chunk import BACKENDS as COMPRESS_BACKENDS
from worldkv_kernels.ops.norm_rope_append import BACKENDS as APPEND_BACKENDS
from worldkv_kernels.ops.segment_attention import BACKENDS as ATTENTION_BACKENDS

# Most tensors here are small: a second thread costs more than it brings, and much more on a busy machine.
torch.set_num_threads(1)

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
TESTS = Path(__file__).resolve().parent
BENCHMARKS = TESTS.parent / "benchmarks"


class UsualDefaults(TorchFunctionMode):
    """Torch's own default device and dtype for what is called by code of the tests."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # what is traced has no frames to look at
            return function(*args, **kwargs)
        caller = sys._getframe(1)
        while caller.f_back and caller.f_code.co_filename.startswith(os.path.dirname(torch.__file__)):
            caller = caller.f_back  # such as the parts of a torch.nn module
        if Path(caller.f_code.co_filename).parent != TESTS:
            return function(*args, **kwargs)
        if function in _device_constructors() and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "cpu"}
        of_process = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            return function(*args, **kwargs)
        finally:
            torch.set_default_dtype(of_process)


default = os.environ.get("WORLDKV_TEST_DEFAULT")
if default:
    UsualDefaults().__enter__()  # until the process ends
    if default == "meta":
        torch.set_default_device(default)
    else:
        torch.set_default_dtype(getattr(torch, default))


def pytest_configure(config):
    if DEVICE.type == "cpu" and importlib.util.find_spec("triton"):
        triton, numpy = version("triton"), np.__version__
        if triton.startswith("3.6.") and np.lib.NumpyVersion(numpy) >= "2.4.0":
            raise pytest.UsageError(
                f"the interpreter of triton 3.6 needs numpy below 2.4, got numpy {numpy}: pip install 'numpy<2.4'"
            )
        if triton.startswith("3.6."):
            fuse_multiply_add()


def fuse_multiply_add():
    """Has the interpreter of triton 3.6 round a tl.fma of fp32 once, as a GPU does and later interpreters do."""
    interpreter = importlib.import_module("triton.runtime.interpreter")

    def create_fma(self, x, y, z):
        exact = x.data.astype(np.float64) * y.data + z.data
        return interpreter.TensorHandle(exact.astype(x.data.dtype), z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = create_fma


@pytest.fixture(scope="session")
def device() -> torch.device:
    return DEVICE


@pytest.fixture
def one_thread():
    """For small tensors, which threads only slow down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def load(monkeypatch):
    """Imports a script of benchmarks/ by its bare name, as the scripts import each other; a test has them to itself."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for name, module in list(sys.modules.items()):
        if "." not in name and Path(getattr(module, "__file__", None) or "").parent == BENCHMARKS:
            del sys.modules[name]


def backends(op_backends) -> list[str]:
    """The backends of an op that this machine can run; on a CPU, what is in CUDA too, by way of `cuda_kernels`."""
    return [
        name
        for name, backend in op_backends.backends.items()
        if backend.unavailable(DEVICE) is None or (name == "cuda" and DEVICE.type == "cpu")
    ]


@pytest.fixture(scope="session")
def build_for_host(pytestconfig, tmp_path_factory):
    """Builds a folder of CUDA sources for the host. Kept in pytest's cache, if there is one, until a source changes."""
    reason = cuda_on_host.why_not()
    if reason:
        pytest.skip(f"CUDA sources cannot be built for the host: {reason}")
    cache = getattr(pytestconfig, "cache", None)  # None under -p no:cacheprovider
    folder = cache.mkdir("cuda_on_host") if cache else tmp_path_factory.mktemp("cuda_on_host")
    return partial(cuda_on_host.build, folder=folder)


@pytest.fixture(scope="session")
def host_module(build_for_host):
    """Stands for worldkv_kernels._cuda."""
    return cuda_on_host.load(build_for_host(cuda_on_host.CSRC))


@pytest.fixture(scope="session")
def small_kernels(build_for_host):
    """What is in tests/cuda_on_host/kernels."""
    return ctypes.CDLL(str(build_for_host(cuda_on_host.HERE / "kernels")))


@pytest.fixture
def cuda_kernels(request, monkeypatch):
    """Lets the backend "cuda" of the ops run where the tests run; skips where it cannot."""
    tables = [COMPRESS_BACKENDS, APPEND_BACKENDS, ATTENTION_BACKENDS]
    if DEVICE.type == "cuda":
        reason = tables[0].backends["cuda"].unavailable(DEVICE)
        if reason:
            pytest.skip(f"the CUDA kernels cannot run: {reason}")
        yield
        return
    module = request.getfixturevalue("host_module")
    module.seed(0)
    monkeypatch.setitem(sys.modules, "worldkv_kernels._cuda", module)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    for table in tables:
        here = replace(table.backends["cuda"], unavailable=lambda device: None)
        monkeypatch.setitem(table.backends, "cuda", here)
    yield
    for table in tables:
        table.forget()  # that "cuda" was chosen for a CPU


@pytest.fixture(autouse=True)
def cuda_kernels_where_backend_is_cuda(request):
    if getattr(request.node, "callspec", None) and request.node.callspec.params.get("backend") == "cuda":
        request.getfixturevalue("cuda_kernels")


def disassembled(cubin: Path) -> str:
    """The machine code of a cubin, as text; skips where there is no disassembler."""
    disassembler = shutil.which("nvdisasm")
    if disassembler is None and importlib.util.find_spec("triton"):
        packaged = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
        disassembler = str(packaged) if packaged.exists() else None
    if disassembler is None:
        pytest.skip("nvdisasm is neither on the PATH nor in triton's package")
    return subprocess.run([disassembler, str(cubin)], capture_output=True, text=True, check=True).stdout


def moved(x: torch.Tensor) -> torch.Tensor:
    """On the device with its strides and its place in memory, which `to` makes dense and aligned."""
    storage = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    return storage.to(DEVICE).as_strided(x.shape, x.stride(), x.storage_offset())


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """2-norm of the difference over the 2-norm of `want`; infinite where `got` is not finite but `want` is."""
    got, want = got.double().cpu(), want.double().cpu()
    if not torch.equal(torch.isfinite(got), torch.isfinite(want)):
        return float("inf")
    return ((got - want).norm() / want.norm().clamp_min(1e-300)).item()
