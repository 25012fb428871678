"""The first forward of a rollout makes the memory: it knows device, dtype and grid. What is wrong is said before."""

import weakref
from functools import partial

import plain_lingbot_pipeline as pipeline
import pytest
import small_matrix_game as small
import torch
from conftest import relative_error
from small_lingbot import GRID, POSES, TEXT, WORLDKV, caches, enable, forward, generate, make_model, pipeline_noise
from torch import nn

from worldkv_kernels.actions import parse_actions
from worldkv_kernels.integrations import lingbot, matrix_game, patched

OF_LINGBOT = (lingbot, make_model, {"poses": POSES})
OF_MATRIX_GAME = (matrix_game, small.plain_model, {})
BOTH = pytest.mark.parametrize("module, make, along", [OF_LINGBOT, OF_MATRIX_GAME], ids=["lingbot", "matrix_game"])


def clip(height, width, frames=6, seed=3):
    """The arguments of a rollout at so many latents."""
    generator = torch.Generator().manual_seed(seed)
    image, camera = (torch.randn(channels, frames, height, width, generator=generator) for channels in (20, 384))
    return TEXT, image, camera[None], pipeline_noise, [(1.0, 1000.0), (0.9, 900.0)]


@BOTH
def test_before_the_first_forward_there_is_no_memory(module, make, along):
    model = make()
    with module.enable(model, bank_chunks=9, **along) as handle:
        for ask in (handle.stats, lambda: handle.memory):
            with pytest.raises(RuntimeError, match="the memory is made in the first forward, got none yet"):
                ask()
        assert "enabled, no memory before the first forward" in repr(handle)
        handle.finish()
        handle.restart(**along)
    assert "disabled, no memory" in repr(handle)


def test_each_rollout_of_another_size_has_a_memory_of_its_grid():
    model, sizes = make_model(), [(4, 6), (6, 4), (8, 4), (4, 6)]
    pipe = pipeline.WanI2VFast(model)
    wanted = [pipe.generate(*clip(*size)) for size in sizes]
    with lingbot.enable(model, mode="full", bank_chunks=9) as handle:
        memories = []
        for size, want in zip(sizes, wanted, strict=True):
            assert relative_error(pipe.generate(*clip(*size)), want) < 1e-5
            assert handle.memory.config.grid == (size[0] // 2, size[1] // 2) and handle.stats()["chunks"] == 2
            memories.append(handle.memory)
        assert len({id(memory) for memory in memories}) == 4
        pipe.generate(*clip(*sizes[-1]))
        assert handle.memory is memories[-1]


def test_matrix_game_at_another_size_than_the_published():
    model = small.plain_model()
    given = small.given_of(parse_actions("J*28,L*28"))
    with matrix_game.enable(model, matrix_game.memory_config(model, grid=small.GRID, bank_chunks=12)):
        wanted = small.latents(small.pipeline(model), given, 3)
    with matrix_game.enable(model, bank_chunks=12) as handle:
        assert torch.equal(small.latents(small.pipeline(model), given, 3), wanted)
        assert handle.memory.config.grid == small.GRID


def test_the_fields_are_those_of_a_config():
    model = make_model()
    with lingbot.enable(model, lingbot.memory_config(model, grid=GRID, **WORLDKV), poses=POSES) as handle:
        wanted, config = generate(model), handle.memory.config
    with enable(model, **WORLDKV) as handle:
        assert torch.equal(generate(model), wanted) and handle.memory.config == config


@pytest.mark.parametrize("fixed", [dict(grid=GRID), dict(config=True)])
def test_a_grid_that_is_given_is_kept_to(fixed):
    model = make_model()
    if fixed.pop("config", False):
        fixed["config"] = lingbot.memory_config(model, grid=GRID, mode="full", bank_chunks=9)
    else:
        fixed.update(mode="full", bank_chunks=9)
    with lingbot.enable(model, **fixed) as handle:
        with pytest.raises(ValueError, match=r"lingbot: x must be of \(3, 2, 3\) frames, .*got \(3, 3, 2\)"):
            forward(model, 0, video=[torch.zeros(16, 3, 6, 4)])
        with pytest.raises(RuntimeError, match="in the first forward, got none yet"):
            handle.stats()
        generate(model, 6)
        assert handle.stats()["chunks"] == 2


def test_a_forward_of_another_size_in_the_middle_of_a_rollout_is_refused():
    model, both = make_model(), caches()
    handle = enable(model, POSES[:6], **WORLDKV)
    for timestep in (1000.0, 0.0):
        forward(model, 0, timestep, both=both)
    with pytest.raises(ValueError, match=r"x must be of \(3, 2, 3\) .* or the rollout began, got \(3, 3, 2\)"):
        forward(model, 1, both=both, video=[torch.zeros(16, 3, 6, 4)])
    forward(model, 1, 0.0, both=both)
    assert handle.stats()["chunks"] == 2


def test_a_memory_that_does_not_fit_is_an_error_of_the_forward_and_of_each_one_after(monkeypatch):
    model = make_model()
    handle = enable(model, lambda chunk: POSES[3 * chunk : 3 * chunk + 3], **WORLDKV)
    first, before = generate(model, 6), weakref.ref(handle.memory)

    def free_bytes(device):
        assert before() is None
        return 1000

    monkeypatch.setattr("worldkv_kernels.memory.room.free_bytes", free_bytes)
    for _ in range(2):
        with pytest.raises(ValueError, match="WorldMemory: storage must fit"):
            forward(model, 0, video=[torch.zeros(16, 3, 6, 4)])
    monkeypatch.undo()
    assert torch.equal(generate(model, 6), first)


# --- device and dtype ---


@BOTH
def test_the_memory_is_made_where_the_latents_are(module, make, along, monkeypatch):
    """The weights may still be elsewhere when the model is enabled; and between rollouts they may go."""
    made = []

    class OnItsWay(Exception):
        """In place of a memory on a device that is not here."""

    def memory(config, *, device, dtype, backend):
        made.append((config.grid, str(device), dtype, backend))
        raise OnItsWay

    model = make()
    both = [{"k": torch.zeros(1, 1, 1, 1), "v": torch.zeros(1, 1, 1, 1)}]
    with module.enable(model, bank_chunks=9, backend="reference", **along):
        monkeypatch.setattr(patched, "WorldMemory", memory)
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: False)  # which knows of no "meta"
        for device in ("meta", "cpu"):
            with torch.device(device), pytest.raises(OnItsWay), torch.no_grad():
                model(x=torch.zeros(1, 16, 3, 4, 6), t=torch.zeros(1), context=[], seq_len=18, kv_cache=both) \
                    if module is lingbot else model(torch.zeros(1, 16, 3, 4, 6), t=None, kv_cache=both,
                                                    visual_context=None, cond_concat=None)  # fmt: skip
    assert made == [(GRID, "meta", torch.float32, "reference"), (GRID, "cpu", torch.float32, "reference")]


def test_a_model_cast_between_two_rollouts_is_followed():
    model, exact = make_model(), None
    with enable(model, **WORLDKV) as handle:
        exact = generate(model)
        model.bfloat16()
        handle.restart(POSES)
        assert relative_error(generate(model), exact) < 0.1
        assert handle.memory.dtype is torch.bfloat16
        model.float()


def test_under_autocast_the_memory_is_of_its_dtype():
    model = make_model()
    with enable(model) as handle, torch.autocast("cpu", torch.bfloat16):
        forward(model, 0)
        assert handle.memory.dtype is torch.bfloat16
    assert model.blocks[0].self_attn.q.weight.dtype is torch.float32


# --- what enable can know ---


@BOTH
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bank_chunk": 9}, TypeError, "bank_chunk must be an argument of enable or a field of Memory"),
        ({"keep_ratio": 2}, ValueError, "keep_ratio must be above 0 and at most 1, got 2"),
        ({"bank_chunks": 0}, ValueError, "bank_chunks must be None or at least 1, got 0"),
        ({"num_layers": 3}, ValueError, "config's num_layers must be the model's 2, got 3"),
        ({"dtype": torch.int8}, TypeError, "enable: dtype must be bfloat16, .* got torch.int8"),
        ({"backend": "cudnn"}, ValueError, "enable: backend must be one of .*reference, got 'cudnn'"),
        ({"grid": (2, 0)}, ValueError, r"grid must be \(height, width\) of at least 1 token each.* got \(2, 0\)"),
        ({"grid": (480, 832)}, ValueError, r"in tokens of 16 x 16 .* \(480, 832\): as pixels it would be \(30, 52\)"),
        ({"poses": 2 * POSES}, ValueError, "poses must be rigid"),
        ({"poses": None, "retrieval": "pose"}, ValueError, "poses must be given"),
    ],
)  # fmt: skip
def test_errors_that_enable_knows_come_from_enable(module, make, along, options, error, message):
    model = make()
    with pytest.raises(error, match=message):
        module.enable(model, **{**along, **options})
    assert "forward" not in model.__dict__ and "forward" not in model.blocks[0].self_attn.__dict__


@BOTH
def test_a_config_comes_with_all_of_its_fields(module, make, along):
    model = make()
    config = module.memory_config(model, grid=GRID, bank_chunks=9)
    with pytest.raises(TypeError, match=r"enable: grid, keep_ratio must be left out where a config is given"):
        module.enable(model, config, grid=GRID, keep_ratio=1.0, **along)
    pixels = module.memory_config(model, grid=(352, 640), bank_chunks=9)
    with pytest.raises(ValueError, match=r"got \(352, 640\): as pixels it would be \(22, 40\)"):
        module.enable(model, pixels, **along)


# --- the model in a wrapper ---


class Wrapper(nn.Module):
    """As FSDP, around model and blocks: made after the model was set to eval mode, it is in training mode itself."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        """With containers of its own, whose tensors are the caller's."""
        if isinstance(kwargs["kv_cache"], list):
            kwargs["kv_cache"] = [dict(cache) for cache in kwargs["kv_cache"]]
        return self.module(*args, **kwargs)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


def wrap(model):
    for layer, block in enumerate(model.blocks):
        model.blocks[layer] = Wrapper(block)
    return Wrapper(model)


def shard(model):
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy

    blocks = partial(lambda_auto_wrap_policy, lambda_fn=lambda module: module in model.blocks)
    return FullyShardedDataParallel(model, auto_wrap_policy=blocks, device_id=torch.device("cpu"))


def shard_each(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    for block in model.blocks:
        fully_shard(block.self_attn, mesh=mesh)
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP")
@pytest.mark.parametrize("wrap", [wrap, shard, shard_each])
def test_a_wrapped_model_is_patched_and_restored(wrap, one_process):
    model = make_model()
    wanted = generate(model, 6)
    wrapped = wrap(model)
    with lingbot.enable(wrapped, poses=POSES, mode="full", bank_chunks=9) as handle:
        both = caches()
        forward(wrapped, 0, both=both)
        assert both[0][0]["k"].numel() == 0  # the pipeline's own cache is free, not a copy of it
        assert relative_error(generate(wrapped, 6), wanted) < 1e-5
        assert handle.stats()["chunks"] == 2
        wrapped.train()
        with pytest.raises(RuntimeError, match="the model must be in eval mode"):
            forward(wrapped, 0)
        wrapped.eval()
    assert torch.equal(generate(wrapped, 6), wanted)
    lingbot.enable(wrapped, mode="full", bank_chunks=9)
    lingbot.disable(wrapped)
    assert not any("forward" in module.__dict__ for module in wrapped.modules())
