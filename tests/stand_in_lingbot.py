"""What stands for LingBot-World's published modules: their names and signatures, around the plain small model.

Text, image and video are turned into what the model takes, and back, in the simplest way that depends on all of them.
"""

import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import plain_lingbot_pipeline as plain
import torch
from small_lingbot import HEIGHT, WIDTH, make_model

MAX_AREA_CONFIGS = {"480*832": 480 * 832}
WAN_CONFIGS = {
    "i2v-A14B": SimpleNamespace(
        t5_checkpoint="models_t5_umt5-xxl-enc-bf16.pth", t5_tokenizer="google/umt5-xxl",
        vae_checkpoint="Wan2.1_VAE.pth", fast_noise_checkpoint="lingbot_world_fast", sample_shift=10.0, sample_fps=16,
    )
}  # fmt: skip
FILES = {
    "wan/__init__.py": "from stand_in_lingbot import WanI2VFast",
    "wan/image2video_fast.py": "",
    "wan/configs/__init__.py": "from stand_in_lingbot import MAX_AREA_CONFIGS, WAN_CONFIGS",
    "wan/utils/__init__.py": "",
    "wan/utils/utils.py": "from stand_in_lingbot import save_video",
}
WEIGHTS = ("models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/x", "Wan2.1_VAE.pth", "lingbot_world_fast/config.json")
PIPELINES = []  # all that were made


class WanI2VFast:
    def __init__(
        self,
        config,
        checkpoint_dir,
        device_id=0,
        rank=0,
        t5_fsdp=False,
        dit_fsdp=False,
        use_sp=False,
        t5_cpu=False,
        init_on_cpu=True,
        convert_model_dtype=False,
        pipe_dtype=torch.bfloat16,
        local_attn_size=-1,
        sink_size=0,
    ):
        names = (config.t5_checkpoint, config.t5_tokenizer, config.vae_checkpoint, config.fast_noise_checkpoint)
        assert "cam" in checkpoint_dir and all(Path(checkpoint_dir, name).exists() for name in names)
        self.local_attn_size, self.sink_size = local_attn_size, sink_size
        self.model = make_model(local_attn_size=local_attn_size, sink_size=sink_size)
        PIPELINES.append(self)

    def generate(
        self,
        input_prompt,
        img,
        action_path=None,
        chunk_size=3,
        max_area=480 * 832,
        frame_num=81,
        timesteps_index=(0, 179, 358, 679),
        shift=5.0,
        seed=-1,
        offload_model=True,
        max_sequence_length=512,
        max_attention_size=None,
    ):
        assert max_area == 480 * 832 and offload_model
        clip = torch.from_numpy(np.load(Path(action_path, "poses.npy")))
        intrinsics = np.load(Path(action_path, "intrinsics.npy"))[0]
        poses = plain.latent_poses(clip, frame_num, chunk_size)
        camera = plain.camera_embedding(poses, intrinsics, 8 * HEIGHT, 8 * WIDTH)
        context = torch.randn(5, 24, generator=torch.Generator().manual_seed(zlib.crc32(input_prompt.encode())))
        pixels = torch.from_numpy(np.asarray(img.resize((WIDTH, HEIGHT)), dtype=np.float32) / 127.5 - 1)
        known = torch.zeros(20, len(poses), HEIGHT, WIDTH)
        known[:4, 0], known[4:, 0] = 1, pixels.mean(dim=2)
        generator = torch.Generator().manual_seed(seed)
        latents = plain.WanI2VFast(self.model).generate(
            context, known, camera, lambda chunk, step, shape: torch.randn(shape, generator=generator),
            plain.schedule(timesteps_index, shift), chunk_size, window=self.local_attn_size, sink_size=self.sink_size,
            max_attention_size=max_attention_size,
        )  # fmt: skip
        return latents[:3].tanh().repeat_interleave(4, dim=1)[:, 3:]


def save_video(tensor, save_file=None, fps=30, suffix=".mp4", nrow=8, normalize=True, value_range=(-1, 1)):
    """An array, for the tests to read; as the published one, it raises nothing that is about the file."""
    assert fps == 16 and nrow == 1
    try:
        with open(save_file, "wb") as file:
            np.save(file, tensor[0].numpy())
    except OSError:
        return
