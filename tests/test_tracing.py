"""What torch.compile is kept out of stays out of it, whether it ran before or is met first by the compiler."""

import subprocess
import sys

import pytest
import torch

from worldkv_kernels.tracing import untraced

FIRST_IN_A_PROCESS = """
import sys
import torch
from worldkv_kernels.tracing import untraced

@untraced
def plain(x):
    return x + 1, torch.compiler.is_compiling()

assert plain(torch.zeros(3))[1] is False and "torch._dynamo" not in sys.modules
for function in (plain, untraced(lambda x: (x + 1, torch.compiler.is_compiling()))):
    y, traced = torch.compile(lambda x: function(x * 2), backend="eager")(torch.ones(3))
    assert y.tolist() == [3, 3, 3] and traced is False
"""


def test_nothing_is_imported_until_something_compiles():
    done = subprocess.run([sys.executable, "-c", FIRST_IN_A_PROCESS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("recursive", [True, False])
def test_what_it_calls_is_traced_where_it_may_be(recursive):
    def inner(x):
        return x + 1, torch.compiler.is_compiling()

    @torch.compile(backend="eager")
    def compiled(x):
        return function(x * 2)

    function = untraced(lambda x: (inner(x), torch.compiler.is_compiling()), recursive)
    (y, inner_traced), traced = compiled(torch.ones(3))
    assert y.tolist() == [3, 3, 3] and (traced, inner_traced) == (False, not recursive)
