"""The process's default device and dtype change nothing: every tensor that the package makes names its own."""

import ast
import contextlib
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import test_models_lingbot_world_fast as lingbot
import test_models_matrix_game_2 as matrix_game
import torch
from safetensors_files import write
from tiny_memory import AWAY_AND_BACK, latents, tiny

from worldkv_kernels import Rope3D, RopeTable, Segment, Window
from worldkv_kernels.models.action_module import frame_turns
from worldkv_kernels.models.lingbot_camera import ray_map
from worldkv_kernels.models.rollout import noise
from worldkv_kernels.models.small_world import SmallWorld, SmallWorldConfig
from worldkv_kernels.ops.all import OPS
from worldkv_kernels.recall import Scene, to_values

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
DEFAULTS = (torch.device("meta"), torch.float64, torch.bfloat16)
FACTORIES = {
    "arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones", "rand",
    "randint", "randn", "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros",
}  # fmt: skip


@contextlib.contextmanager
def default(what):
    if isinstance(what, torch.device):
        with what:
            yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(what)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# --- what is written ---


def unnamed(source):
    """Lines with a factory of torch that leaves device or dtype to the process.

    Parameters and buffers are not meant: modules are made on the meta device, and get device and dtype at once.
    """
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    of_modules = [c for c in calls if ast.unparse(c.func).endswith(("nn.Parameter", ".register_buffer"))]
    later = {id(node) for call in of_modules for node in ast.walk(call)}
    for call in calls:
        name = ast.unparse(call.func)
        given = {keyword.arg for keyword in call.keywords}
        named = None in given or {"device", "dtype"} <= given  # None: of **options
        if name.startswith("torch.") and name[6:] in FACTORIES and id(call) not in later and not named:
            yield f"{call.lineno}: {ast.unparse(call)}"


def test_a_factory_without_device_or_dtype_is_found():
    source = "torch.zeros(3, dtype=x)\ntorch.ones(3, **o)\nnn.Parameter(torch.ones(3))\ntorch.arange(3, device=d)"
    assert list(unnamed(source)) == ["1: torch.zeros(3, dtype=x)", "4: torch.arange(3, device=d)"]


@pytest.mark.parametrize("folder", ["worldkv_kernels", "kernels", "benchmarks"])
def test_every_tensor_names_its_device_and_dtype(folder):
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    assert [f"{path.name}:{line}" for path in files for line in unnamed(path.read_text())] == []


# --- what comes out ---


def small_cases():
    for op in OPS:
        for kind in op.kinds:
            made = op.small_case(CPU, kind)(op.run("reference"))
            yield from ((f"{op.op} {kind} {output}", tensor) for output, tensor in made.items())


def windows():
    segments = [Segment(256, 300, 7), Segment(0, 1, -3), Segment(100, 128)]
    yield from zip("abcdef", Window(segments, device="cpu", rope=Rope3D(64)).tables, strict=True)
    yield "rope", RopeTable(Rope3D(64), (1, 3, 9), device="cpu", start_frame=7).table
    yield "chunk", Rope3D(64).chunk_table_on(CPU, (1, 3, 9), 7)


def window_tables():
    kernel = pytest.importorskip("worldkv_kernels.kernels.segment_attention", reason="triton is not installed")
    frequencies = torch.from_numpy(Rope3D(64)._frequencies)
    for given in (None, frequencies):
        tables = kernel.window_tables([(256, 300, 7 * (given is not None)), (0, 1, 0)], given, device="cpu")
        yield from zip("abcdef", tables, strict=True)


def memories():
    for bank in ("device", "host"):
        yield bank, latents(tiny(bank=bank, rebase_time=True), AWAY_AND_BACK[0][:24])


def models():
    for name, of_model in (("lingbot", lingbot), ("matrix_game", matrix_game)):
        yield name, torch.stack(of_model.latents_of(of_model.make_model(), chunks=2))


def inputs():
    yield "noise", noise(0, 1, 2, (3, 4))
    yield "turns", frame_turns(matrix_game.CONFIG.actions, 3, 4)
    poses, intrinsics = (x[:3] for x in AWAY_AND_BACK)
    yield "rays", ray_map(poses, intrinsics, (16, 24), intrinsics_size=(16, 24))


def recalled():
    scene = Scene(np.random.default_rng(0).random((64, 80, 3)), CPU)
    yield "keys", scene.keys(30.0)
    yield "values", to_values(scene.view(30.0))


@cache
def made_without(make):
    return list(make())


@pytest.mark.parametrize("what", DEFAULTS, ids=str)
@pytest.mark.parametrize("make", [small_cases, windows, window_tables, memories, models, inputs, recalled])
def test_the_same_bits_under_any_default(make, what):
    want = made_without(make)
    with default(what):
        got = list(make())
    assert [name for name, _ in got] == [name for name, _ in want]
    for (name, x), (_, y) in zip(got, want, strict=True):
        assert (x.device, x.dtype) == (y.device, y.dtype), name
        assert torch.equal(x.nan_to_num(nan=-1.0), y.nan_to_num(nan=-1.0)), name


@pytest.mark.parametrize("what", DEFAULTS, ids=str)
def test_checkpoints_under_any_default(what, tmp_path):
    model = lingbot.make_model()
    write(tmp_path / "model.safetensors", model.state_dict())
    with default(what):
        loaded = lingbot.LingBotWorldFast.from_pretrained(
            tmp_path, config=lingbot.CONFIG, device="cpu", dtype=torch.float32
        )
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_making_a_small_world_draws_nothing_from_the_global_generator():
    before = torch.get_rng_state()
    model = SmallWorld.random(SmallWorldConfig(num_layers=1), device="cpu", dtype=torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(parameter.requires_grad for parameter in model.parameters())


# --- the tests of the core, in a process with other defaults ---

CORE = (
    "window", "segment_attention", "norm_rope_append", "compress_chunk", "quantize_chunk", "world_memory", "bank",
    "backends", "vendoring",
)  # fmt: skip
# The quick ones that make most kinds of tensors.
TELLING = (
    "update_in_place or turning_the_query or mass_is_a_share or position_on or equal_scores or policy_object"
    " or attention_mass or costs_no_copy or wait_brings or wrong_kernel or the_check or tables_are or segments_that"
    " or groups_of_another or one_layer_without"
)


@pytest.mark.parametrize("name", ["meta", pytest.param("float64", marks=pytest.mark.slow), "bfloat16"])
def test_the_core_tests_pass_under_another_default(name):
    files = [f"test_{module}.py" for module in CORE]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", f"({TELLING}) and not cuda", *files],
        cwd=ROOT / "tests", env={**os.environ, "WORLDKV_TEST_DEFAULT": name}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 30
