"""examples/self_forcing.py from its arguments to a video, over stand-ins at the places of the published modules."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import small_self_forcing as small
import torch
from torch import nn

from worldkv_kernels.integrations import attach


class Pipeline(nn.Module):
    """Self-Forcing's, with its encoder and decoder, around the small model."""

    def __init__(self, args, device):
        super().__init__()
        assert args == ["configs/default_config.yaml", "configs/self_forcing_dmd.yaml"] and device == "cpu"
        self.inner = small.pipeline(small.make_model())
        self.generator, self.local_attn_size = self.inner.generator, -1

    def inference(self, noise, text_prompts):
        self.inner.local_attn_size = self.local_attn_size
        conditions = {"prompt_embeds": (small.TEXT * len(text_prompts[0])).to(noise.dtype)}
        return self.inner.inference(noise, conditions)[:, :, :3].float().sigmoid()


@pytest.fixture
def example(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    weights = {f"model.{name}": 1.01 * value for name, value in small.make_model().state_dict().items()}
    torch.save({"generator_ema": weights}, "checkpoints/self_forcing_dmd.pt")
    written = {}
    for name, module in {
        "omegaconf": SimpleNamespace(OmegaConf=SimpleNamespace(load=lambda name: name, merge=lambda *all: list(all))),
        "pipeline": SimpleNamespace(CausalInferencePipeline=Pipeline),
        "torchvision": SimpleNamespace(),
        "torchvision.io": SimpleNamespace(write_video=lambda path, video, fps: written.update({path: (video, fps)})),
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[1] / "examples"), *sys.path])
    monkeypatch.delitem(sys.modules, "self_forcing", raising=False)
    module = importlib.import_module("self_forcing")
    monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(module, "LATENT", (small.CHANNELS, small.HEIGHT, small.WIDTH))
    with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(True):
        yield module, written
    monkeypatch.delitem(sys.modules, "self_forcing")


def test_it_makes_what_the_pipeline_makes_with_the_memory_attached(example, capsys):
    module, written = example
    module.main(["--prompt", "A cat.", "--frames", "21", "--out", "cat.mp4"])
    assert capsys.readouterr().out == "cat.mp4: 21 frames; 6 chunks brought back\n"
    ((path, (video, fps)),) = written.items()
    assert (path, fps, video.dtype, video.shape) == ("cat.mp4", 16, torch.uint8, (21, 4, 6, 3))

    torch.manual_seed(0)
    pipe = Pipeline(["configs/default_config.yaml", "configs/self_forcing_dmd.yaml"], "cpu")
    pipe.generator.load_state_dict(torch.load("checkpoints/self_forcing_dmd.pt")["generator_ema"])
    pipe.to(dtype=torch.bfloat16)
    noise = torch.randn(1, 21, small.CHANNELS, small.HEIGHT, small.WIDTH, dtype=torch.bfloat16)
    own = pipe.inference(noise, ["A cat."])
    attach(pipe.generator.model)
    wanted = pipe.inference(noise, ["A cat."])
    assert torch.equal(video.permute(0, 3, 1, 2), (255 * wanted[0]).byte()) and not torch.equal(own, wanted)
