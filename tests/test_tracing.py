"""What torch.compile is kept out of stays out of it, whether it ran before or is met first by the compiler."""

import subprocess
import sys

import pytest

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


WHAT_IT_CALLS = """
import sys
import torch
from worldkv_kernels.tracing import untraced

recursive = sys.argv[1] == "True"

def inner(x):
    return x + 1, torch.compiler.is_compiling()

function = untraced(lambda x: (inner(x), torch.compiler.is_compiling()), recursive)
(y, inner_traced), traced = torch.compile(lambda x: function(x * 2), backend="eager")(torch.ones(3))
assert y.tolist() == [3, 3, 3] and (traced, inner_traced) == (False, not recursive), (traced, inner_traced)
"""


def run(program, *arguments):
    """In a process of its own, as what the compiler does depends on all that it has met before."""
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nothing_is_imported_until_something_compiles():
    run(FIRST_IN_A_PROCESS)


@pytest.mark.parametrize("recursive", [True, False])
def test_what_it_calls_is_traced_where_it_may_be(recursive):
    run(WHAT_IT_CALLS, str(recursive))
