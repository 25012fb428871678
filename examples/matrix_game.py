"""Matrix-Game-2.0 with a world memory: from an image and a player's actions to an mp4.

It runs the published pipeline, as inference.py loads it in the folder Matrix-Game-2 of
https://github.com/SkyworkAI/Matrix-Game at commit 3ceb3114b65ff2c70ce9c3d6cab207b340ebe650, with the memory in place of
its KV cache. It needs

  the repository  that folder of a checkout, in which this runs or to which --repo points, and its Python packages
                  beside worldkv_kernels: FlashAttention, pip install -r requirements.txt, python setup.py develop
  the weights     Skywork/Matrix-Game-2.0; the repository's README, under "Download checkpoints", says where they are
                  to be had
  a GPU           of 24 GB or more, says that README; worldkv plan --model matrix_game_2 --gpu 24 says how large a
                  bank fits

What a memory is worth is seen where the camera comes back: the published cache holds 6 latent frames, gta_drive's 4.
These two look to the right and back, with the memory and without it:

  python matrix_game.py --repo ~/Matrix-Game/Matrix-Game-2 --image street.png --actions "L*60,J*60" \\
      --bank-chunks 12 --out on.mp4
  python matrix_game.py --repo ~/Matrix-Game/Matrix-Game-2 --image street.png --actions "L*60,J*60" \\
      --no-memory --out off.mp4
"""

import argparse
import os
import sys
import time

import torch
from common import CHUNK, LEAST, check, check_gpu, held, lacks_packages, make_parser, read
from PIL import Image

from worldkv_kernels.actions import parse_actions, video_frames
from worldkv_kernels.integrations import matrix_game

# In the weights' folder, of each variant of the model.
CHECKPOINTS = {
    "universal": "base_distilled_model/base_distill.safetensors",
    "gta_drive": "gta_distilled_model/gta_keyboard2dim.safetensors",
    "templerun": "templerun_distilled_model/templerun_7dim_onlykey.safetensors",
}
IN_WEIGHTS = ("Wan2.1_VAE.pth", "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth", "xlm-roberta-large")
IN_REPO = ("inference.py", "pipeline/causal_inference.py", "utils/misc.py", "utils/visualize.py")


def main(argv=None):
    parser = make_parser(__doc__, repo="its folder Matrix-Game-2", weights="Matrix-Game-2.0", out="matrix_game.mp4")
    add = parser.add_argument
    add("--variant", choices=tuple(CHECKPOINTS), default="universal", help="of the model (default: %(default)s)")
    add("--actions", required=True,
        help="keys held for so many video frames, such as W*24,L*12,W+J*8; universal: W S A D walk, I K J L look; "
             "gta_drive: W S A D; templerun: W S Z C A D; Q is none")  # fmt: skip
    args = parser.parse_args(argv)
    config, checkpoint = f"configs/inference_yaml/inference_{args.variant}.yaml", CHECKPOINTS[args.variant]
    check(parser, args, of_repo=(*IN_REPO, config), of_weights=(checkpoint, *IN_WEIGHTS))
    image = read(parser, "--image", lambda path: Image.open(path).convert("RGB"), args.image, "an image")
    actions = read(parser, "--actions", lambda text: parse_actions(text, args.variant), args.actions, "keys and counts")
    rows = min(len(actions.keyboard), args.frames or len(actions.keyboard))
    if rows < LEAST:
        parser.error(
            f"--actions must be of {LEAST - 1} video frames at least, a chunk of {CHUNK} latent, got {rows - 1}"
        )
    chunks = (rows + 3) // (4 * CHUNK)
    actions = actions.until(video_frames(CHUNK * chunks))
    check_gpu(parser)

    sys.path.insert(0, str(args.repo))
    os.chdir(args.repo)  # its configurations name each other from there
    try:
        from inference import InteractiveGameInference
        from utils.misc import set_seed
        from utils.visualize import process_video
    except ImportError as error:
        lacks_packages(parser, args, error)

    print(f"loading {args.weights}", flush=True)
    set_seed(args.seed)
    paths = dict(checkpoint_path=str(args.weights / checkpoint), pretrained_model_path=str(args.weights))
    game = InteractiveGameInference(argparse.Namespace(config_path=config, **paths))
    handle = None
    if not args.no_memory:
        handle = matrix_game.enable(game.pipeline.generator.model, bank=args.bank, bank_chunks=args.bank_chunks)

    print(f"{chunks} chunks; the first one compiles what decodes them, and takes longer", flush=True)
    start = time.perf_counter()
    video = make(game, image, actions, args.variant)
    seconds = time.perf_counter() - start
    pressed = actions.keyboard if actions.mouse is None else (actions.keyboard, actions.mouse)
    icon = "assets/images/mouse.png"
    process_video(video, str(args.out), pressed, icon, mouse_scale=0.1, process_icon=False, mode=args.variant)
    print(f"{args.out}: {len(video)} frames in {seconds:.1f} s; {held(handle)}")


@torch.no_grad()
def make(game, image, actions, variant):
    """The video, uint8 [frames, height, width, 3], as inference.py makes it of actions that it draws."""
    device, dtype = game.device, game.weight_dtype
    image = game.frame_process(game._resizecrop(image, 352, 640))[None, :, None].to(device, dtype)
    unknown = torch.zeros_like(image).repeat(1, 1, len(actions.keyboard) - 1, 1, 1)
    video = torch.cat([image, unknown], dim=2)  # [1, 3, frames, height, width]
    encoded = game.vae.encode(video, device=device, tiled=True, tile_size=[44, 80], tile_stride=[23, 38])
    encoded = encoded.to(device, dtype)  # [1, 16, latent frames, 44, 80]
    mask = torch.zeros_like(encoded[:, :4])
    mask[:, :, 0] = 1
    given = {
        "cond_concat": torch.cat([mask, encoded], dim=1),
        "visual_context": game.vae.clip.encode_video(image).to(device, dtype),
        "keyboard_cond": torch.from_numpy(actions.keyboard)[None].to(device, dtype),
    }
    if actions.mouse is not None:
        given["mouse_cond"] = torch.from_numpy(actions.mouse)[None].to(device, dtype)
    noise = torch.randn(encoded.shape, device=device, dtype=dtype)
    parts = game.pipeline.inference(noise=noise, conditional_dict=given, mode=variant)
    video = torch.cat(parts, dim=1)[0].float()  # [frames, 3, height, width], -1 to 1
    return ((video + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


if __name__ == "__main__":
    main()
