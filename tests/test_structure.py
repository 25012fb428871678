"""What stands on what: the ground floor knows nothing above it, and the ops nothing of the memory."""

import ast
from pathlib import Path

import pytest

import worldkv_kernels

PACKAGE = Path(worldkv_kernels.__file__).parent
GROUND_FLOOR = {
    "checks": set(),
    "ranges": set(),
    "replays": set(),
    "tensor_file": set(),
    "saved": {"__version__", "tensor_file"},
    "tables": set(),
    "rope": {"checks", "tables", "tracing"},
    "tracing": set(),
    "lazy": set(),
    "window": {"checks", "rope", "tables"},
    "poses": {"checks"},
    "actions": {"checks", "poses"},
    "trajectory": {"checks", "poses"},
    "worlds": set(),
}


def imported(path: Path) -> set[str]:
    """The package's own modules and folders that a file imports, by their first name below worldkv_kernels."""
    parents = path.relative_to(PACKAGE).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (*parents[: len(parents) - node.level + 1], *(node.module.split(".") if node.module else ()))
            found |= {base[0]} if base else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found |= {name.split(".")[1] for name in names if name.startswith("worldkv_kernels.")}
    return found


@pytest.mark.parametrize("module, below", GROUND_FLOOR.items())
def test_the_ground_floor_imports_nothing_above_it(module: str, below: set[str]) -> None:
    assert imported(PACKAGE / f"{module}.py") <= below


@pytest.mark.parametrize("folder, above", [
    ("ops", {"memory", "models", "integrations", "cli", "recall", "trajectory"}),
    ("reference", {"ops", "memory", "models", "integrations", "cli", "recall", "trajectory", "window"}),
    ("memory", {"models", "integrations", "cli", "recall", "trajectory"}),
    ("models", {"integrations", "cli", "recall"}),
    ("integrations", {"cli", "recall"}),
])  # fmt: skip
def test_no_floor_imports_one_above(folder: str, above: set[str]) -> None:
    files = list((PACKAGE / folder).glob("*.py"))
    assert files
    for path in files:
        assert not imported(path) & above, path.name


def test_the_window_is_still_found_where_it_was() -> None:
    from worldkv_kernels.memory.window import Segment, Window

    assert (Segment, Window) == (worldkv_kernels.Segment, worldkv_kernels.Window)
