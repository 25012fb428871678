"""Self-Forcing with a memory: from a prompt to an mp4 of any length.

Run it in a checkout of https://github.com/guandeh17/Self-Forcing, commit 33593df3e81fa3ec10239271dd2c100facac6de1, with
its packages (requirements.txt) and its weights (README, under "Download checkpoints"), on a GPU of 40 GB or more:

  python self_forcing.py --prompt "A cat walks through a garden." --frames 84 --out on.mp4

Past chunks that look like the last frame made come back; nothing but the prompt is needed. Other pipelines of the
family take the same one line, `attach`.
"""

import argparse
import sys
from pathlib import Path

import torch

from worldkv_kernels.integrations import attach

DEVICE, LATENT = "cuda", (16, 60, 104)  # channels, height and width of a latent frame


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", required=True, help="what is seen")
    parser.add_argument("--frames", type=int, default=84, help="latent frames, a multiple of 3 (default: %(default)s)")
    parser.add_argument("--out", default="self_forcing.mp4", help="the video (default: %(default)s)")
    args = parser.parse_args(argv)
    sys.path.insert(0, str(Path.cwd()))
    from omegaconf import OmegaConf
    from pipeline import CausalInferencePipeline
    from torchvision.io import write_video

    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    configs = [OmegaConf.load(f"configs/{name}.yaml") for name in ("default_config", "self_forcing_dmd")]
    pipeline = CausalInferencePipeline(OmegaConf.merge(*configs), device=DEVICE)
    weights = torch.load("checkpoints/self_forcing_dmd.pt", map_location="cpu")
    pipeline.generator.load_state_dict(weights["generator_ema"])
    pipeline.to(device=DEVICE, dtype=torch.bfloat16)

    memory = attach(pipeline.generator.model)
    pipeline.local_attn_size = 0  # latent frames of the cache that the memory stands in for: it is not allocated

    noise = torch.randn(1, args.frames, *LATENT, device=DEVICE, dtype=torch.bfloat16)
    video = pipeline.inference(noise=noise, text_prompts=[args.prompt])
    write_video(args.out, (255 * video[0]).byte().permute(0, 2, 3, 1).cpu(), fps=16)
    print(f"{args.out}: {video.shape[1]} frames; {memory.stats()['chunks_retrieved']} chunks brought back")


if __name__ == "__main__":
    main()
