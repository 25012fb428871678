"""Several copies of the package in one process: each runs its own code, and the first one's ops stay as they are."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

PRELUDE = """
import sys
import torch
import worldkv_kernels as first

torch.manual_seed(0)
K, V = torch.randn(2, 12, 2, 64)

def compress(package, backend=None):
    return package.compress_chunk(K, V, frames=3, keep_ratio=0.25, backend=backend)

def attend(package):
    window = package.Window([(0, 7), (9, 3)], device="cpu")
    return package.segment_attention(K, K, V, window)

def spy(package):  # whose implementation runs
    ran = []
    for op in ("segment_attention", "compress_chunk"):
        table = sys.modules[f"{package.__name__}.ops.{op}"].BACKENDS
        for name in set(table.backends) & {"sdpa", "reference"}:
            table.loaded[name] = lambda *x, run=table.run(name), op=op, **y: ran.append(op) or run(*x, **y)
    return ran

of_first, want, attended = spy(first), compress(first), attend(first)
compiled = torch.compile(lambda k, v: first.compress_chunk(k, v, frames=3, keep_ratio=0.25).k + 1, backend="aot_eager")
assert torch.equal(compiled(K, V), want.k + 1)
first_op = torch.ops.worldkv.compress_chunk
of_first.clear()
"""

CHECK = """
assert second is not first and second.compress_chunk is not first.compress_chunk
of_second = spy(second)
assert all(map(torch.equal, compress(second), want)) and torch.equal(attend(second), attended)
assert of_second == ["compress_chunk", "segment_attention"] and not of_first
assert torch.equal(compiled(K, V), want.k + 1) and torch.equal(compress(first).k, want.k)
assert of_first == ["compress_chunk"] * 2
assert torch.ops.worldkv.compress_chunk is first_op
out = [torch.empty_like(x) for x in want]
torch.ops.worldkv_2.compress_chunk(K, V, *out, 3, 1, True, 0, "nearest", 0.95, 0.125, "auto")
assert all(map(torch.equal, out, want)) and len(of_second) == 3
again = torch.compile(lambda k, v: second.compress_chunk(k, v, frames=3, keep_ratio=0.25).k, backend="aot_eager")
assert torch.equal(again(K, V), want.k) and len(of_second) == 4
"""

ANEW = """
def without():
    for name in [name for name in sys.modules if name.split(".")[0] == "worldkv_kernels"]:
        del sys.modules[name]

without()
import worldkv_kernels as second
"""

ONCE_MORE = """
import gc, importlib
without()
import worldkv_kernels as third
importlib.reload(sys.modules["worldkv_kernels.ops.backends"])
gc.collect()
assert torch.equal(compress(third).k, want.k) and torch.ops.worldkv_3.compress_chunk
"""


def run(program: str, *paths: Path) -> None:
    # Who runs is counted: a comparison at first use would run as well.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "WORLDKV_SELF_CHECK": "0"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_imported_anew():
    run(PRELUDE + ANEW + CHECK + ONCE_MORE, ROOT)


def test_a_vendored_copy_beside_the_original(tmp_path):
    vendored = tmp_path / "game" / "memory_kernels"
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "worldkv_kernels", vendored, ignore=ignored)
    shutil.copytree(ROOT / "kernels", vendored / "kernels", ignore=ignored, dirs_exist_ok=True)
    (tmp_path / "game" / "__init__.py").write_text("")
    names = 'assert sys.modules["game.memory_kernels.ops.cuda"]._EXTENSION == "game.memory_kernels._cuda"\n'
    names += "import game.memory_kernels.integrations.lingbot\n"
    names += "from game.memory_kernels.models.small_world import WEIGHTS, SmallWorld\n"
    names += f"assert str(WEIGHTS).startswith({str(vendored)!r})\n"
    names += 'assert SmallWorld.from_pretrained(device="cpu", dtype=torch.float32).config.num_layers == 4\n'
    run(PRELUDE + "import game.memory_kernels as second\n" + CHECK + names, tmp_path, ROOT)


RELOAD = """
import importlib
for name in ("compress_chunk", "segment_attention", "norm_rope_append", "backends", "compress_chunk"):
    module = importlib.reload(sys.modules[f"worldkv_kernels.ops.{name}"])
first.compress_chunk = module.compress_chunk
assert torch.equal(compress(first).k, want.k) and not of_first  # the new module's table chose
assert torch.equal(compiled(K, V), want.k + 1) and first_op is torch.ops.worldkv.compress_chunk
"""


def test_modules_of_ops_reloaded_in_place():
    """As IPython's autoreload does."""
    run(PRELUDE + RELOAD, ROOT)
