"""What stands for Matrix-Game-2.0's published modules: their names and signatures, around the plain small model.

Image and video are turned into what the model takes, and back, in the simplest way that depends on all of it.
"""

import os
from pathlib import Path

import numpy as np
import small_matrix_game as small
import torch
import torch.nn.functional as F
from plain_matrix_game import VISUAL_DIM
from plain_matrix_game_pipeline import CausalInferencePipeline

VARIANTS = {
    "universal": "base_distilled_model/base_distill.safetensors",
    "gta_drive": "gta_distilled_model/gta_keyboard2dim.safetensors",
    "templerun": "templerun_distilled_model/templerun_7dim_onlykey.safetensors",
}
FILES = {
    "inference.py": "from stand_in_matrix_game import InteractiveGameInference",
    "pipeline/causal_inference.py": "",
    "utils/misc.py": "from stand_in_matrix_game import set_seed",
    "utils/visualize.py": "from stand_in_matrix_game import process_video",
    **{f"configs/inference_yaml/inference_{variant}.yaml": variant for variant in VARIANTS},
}
CLIP = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
WEIGHTS = ("Wan2.1_VAE.pth", CLIP, "xlm-roberta-large/x", *VARIANTS.values())
GAMES = []  # all that were made
HEIGHT, WIDTH = 2 * small.GRID[0], 2 * small.GRID[1]  # of latents


class Pipeline(CausalInferencePipeline):
    def inference(
        self, noise, conditional_dict, initial_latent=None, return_latents=False, mode="universal", profile=False
    ):
        assert not return_latents and noise.shape[2] % self.num_frame_per_block == 0
        self.videos = []
        super().inference(noise, conditional_dict, initial_latent, mode=mode)
        return self.videos

    def _made(self, clean):
        """[1, frames, 3, height, width], from -1 to 1: of the first latent frame one, of each other one four."""
        video = clean[:, :3].tanh().repeat_interleave(4, dim=2)
        self.videos.append(video[:, :, 0 if self.videos else 3 :].transpose(1, 2))


class Encoders:
    """The wrapper of the video autoencoder, and of the image encoder, its `clip`."""

    def __init__(self):
        self.clip = self

    def encode(self, x, device, tiled=False, tile_size=(34, 34), tile_stride=(18, 16)):
        assert tiled and (list(tile_size), list(tile_stride)) == ([44, 80], [23, 38])
        frames = F.adaptive_avg_pool3d(x[:, :, ::4], (None, HEIGHT, WIDTH))
        return frames.mean(dim=1, keepdim=True).repeat(1, 16, 1, 1, 1)

    def encode_video(self, video):
        assert video.shape[2] == 1
        return F.adaptive_avg_pool1d(video.flatten()[None], VISUAL_DIM)[None].repeat(1, small.VISUAL_TOKENS, 1)


class InteractiveGameInference:
    def __init__(self, args):
        self.args = args
        self.device, self.weight_dtype = torch.device("cpu"), torch.float32
        variant = Path(args.config_path).read_text()  # where the process is, as the configurations are
        assert args.checkpoint_path == os.path.join(args.pretrained_model_path, VARIANTS[variant])
        model = small.plain_model(variant, 4 if variant == "gta_drive" else 6)
        self.pipeline = small.pipeline(model, Pipeline)
        self.pipeline.draw = lambda block, step, like: torch.randn_like(like)
        self.vae = Encoders()
        GAMES.append(self)

    def frame_process(self, image):
        pixels = torch.from_numpy(np.array(image.resize((64, 35)), dtype=np.float32))
        return pixels.permute(2, 0, 1) / 127.5 - 1

    def _resizecrop(self, image, th, tw):
        width, height = image.size
        wide, high = (width, int(width * th / tw)) if height / width > th / tw else (int(height * tw / th), height)
        left, top = (width - wide) / 2, (height - high) / 2
        return image.crop((left, top, left + wide, top + high))


def set_seed(seed, deterministic=False):
    torch.manual_seed(seed)


def process_video(
    input_video, output_video, config, mouse_icon_path, mouse_scale=1.0, mouse_rotation=0, process_icon=True,
    mode="universal",
):  # fmt: skip
    """An array, for the tests to read."""
    assert not process_icon and input_video.dtype == np.uint8
    keyboard, mouse = (config, None) if mode == "templerun" else config
    assert len(keyboard) == len(input_video) and (mouse is None or mouse.shape == (len(keyboard), 2))
    with open(output_video, "wb") as file:
        np.save(file, input_video)
