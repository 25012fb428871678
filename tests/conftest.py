"""Runs the suite on a GPU where there is one, else on the CPU with Triton's interpreter."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

import pytest

# Most tensors here are small: a second thread costs more than it brings, and much more on a busy machine.
torch.set_num_threads(1)

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return DEVICE


def backends(op_backends) -> list[str]:
    """The backends of an op that this machine can run."""
    return [name for name, backend in op_backends.backends.items() if backend.unavailable(DEVICE) is None]


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """2-norm of the difference over the 2-norm of `want`; infinite where `got` is not finite but `want` is."""
    got, want = got.double().cpu(), want.double().cpu()
    if not torch.equal(torch.isfinite(got), torch.isfinite(want)):
        return float("inf")
    return ((got - want).norm() / want.norm().clamp_min(1e-300)).item()
