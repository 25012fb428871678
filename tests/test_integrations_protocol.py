"""The protocol for other models, run as it is documented."""

import re

import pytest
import torch

import worldkv_kernels.integrations as integrations
from worldkv_kernels import WorldMemory
from worldkv_kernels.models.rollout import Controls, noise


def example():
    (code,) = re.findall(r"```python\n(.*?)```", integrations.__doc__, flags=re.DOTALL)
    return code


def test_the_documented_example_runs_and_makes_what_the_memorys_own_calls_make(capsys):
    names = {}
    exec(compile(example(), "integrations", "exec"), names)
    assert capsys.readouterr().out == "7\n"

    model, poses, intrinsics, levels = (names[name] for name in ("model", "poses", "intrinsics", "levels"))
    memory = WorldMemory(names["memory"].config, dtype=torch.float32)
    with torch.no_grad():
        of_rollout = model.prepare_rollout(None, poses[0], levels)
        for chunk in range(7):
            frames = slice(3 * chunk, 3 * chunk + 3)
            of_chunk = model.prepare_chunk(of_rollout, 3 * chunk, Controls(poses[frames], intrinsics[frames]))
            memory.begin_chunk(poses[frames])
            x = noise(0, chunk, 0, (3, *model.latent_shape))
            for step, level in enumerate(levels):
                flow = model.denoise(x, step, of_chunk, memory)
                x = x - (level - levels[step + 1]) * flow if level else x
            memory.end_chunk()
    assert torch.equal(x, names["x"]) and memory.stats() == names["memory"].stats()
    assert memory.stats()["chunks_retrieved"] > 0


@pytest.mark.parametrize("name", re.findall(r"`memory\.(\w+)\(", integrations.__doc__))
def test_the_documented_calls_exist(name):
    assert callable(getattr(WorldMemory, name))
