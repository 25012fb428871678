"""What torch.compile is kept out of."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def untraced(function: Function, recursive: bool = True) -> Function:
    """torch.compiler.disable, which as a decorator imports all of torch.compile, as long as importing torch takes.

    Here that waits for the first call after something else has imported it: before, nothing can be tracing.
    """
    disabled = code = None

    @wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        nonlocal disabled
        if disabled is None:
            if "torch._dynamo" not in sys.modules:
                return function(*args, **options)
            disabled = torch.compiler.disable(function, recursive)
            torch._dynamo.eval_frame.skip_code(code)  # nor is this frame compiled, anew for each function
        return disabled(*args, **options)

    code = call.__code__  # not by its name above: a function that holds itself holds its closure until a collection
    return cast(Function, call)
