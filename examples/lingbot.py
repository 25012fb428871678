"""LingBot-World-Fast with a world memory: from a prompt, an image and a camera's way to an mp4.

It runs the published pipeline, wan.WanI2VFast of https://github.com/robbyant/lingbot-world at commit
a43bec7f8091c83e9b30b16b912f6fc906236fa6, with the memory in place of its KV cache. It needs

  the repository  a checkout, in which this runs or to which --repo points, and its Python packages beside
                  worldkv_kernels: pip install -r requirements.txt, pip install flash-attn --no-build-isolation
  the weights     lingbot-world-base-cam with lingbot-world-fast in its folder lingbot_world_fast; the
                  repository's README, under "Model Download" and "Fast Inference", says where they are to be had
  a GPU           of 80 GB or more: worldkv plan --model lingbot_world_fast --gpu 80 --host 128 says which bank fits

What a memory is worth is seen where the camera comes back. These two look away and back, with it and without it:

  python lingbot.py --repo ~/lingbot-world --image room.jpg --prompt "A quiet room." \\
      --trajectory "right*90,left*90" --bank host --bank-chunks 12 --out on.mp4
  python lingbot.py --repo ~/lingbot-world --image room.jpg --prompt "A quiet room." \\
      --trajectory "right*90,left*90" --no-memory --window 21 --out off.mp4

The published cache holds the whole clip, 1.2 GiB a latent frame. --window 21 bounds it to the tokens of the memory's
own window: 3 latent frames from the start, 6 half chunks brought back, 6 recent frames and the 3 being made.
"""

import logging
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import CHUNK, LEAST, at_least, check, check_gpu, held, lacks_packages, make_parser, read
from PIL import Image

from worldkv_kernels import trajectory
from worldkv_kernels.integrations import lingbot

IN_REPO = ("wan/image2video_fast.py", "wan/configs/__init__.py", "wan/utils/utils.py")
IN_WEIGHTS = ("models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl", "Wan2.1_VAE.pth", "lingbot_world_fast/config.json")


def main(argv=None):
    parser = make_parser(__doc__, repo="the checkout", weights="lingbot-world-base-cam", out="lingbot.mp4")
    parser.add_argument("--prompt", required=True, help="what is seen")
    parser.add_argument("--trajectory", required=True,
        help="moves such as right*90,left*90, a degree or a step a video frame, or a folder with poses.npy [n, 4, 4] "
             "and intrinsics.npy of 480 x 832 pixels")  # fmt: skip
    parser.add_argument("--window", type=at_least(CHUNK),
        help="with --no-memory, latent frames of the cache (default: the whole clip)")  # fmt: skip
    args = parser.parse_args(argv)
    check(parser, args, of_repo=IN_REPO, of_weights=IN_WEIGHTS)
    if "cam" not in str(args.weights):  # by the path the pipeline tells weights that take poses from others
        parser.error(f"--weights must be a path with 'cam' in it, as the pipeline wants it, got {args.weights}")
    if args.window is not None and not args.no_memory:
        parser.error(f"--window must go with --no-memory, got {args.window} without it")
    image = read(parser, "--image", lambda path: Image.open(path).convert("RGB"), args.image, "an image")
    camera = read(parser, "--trajectory", trajectory.load, args.trajectory, "moves or a folder of poses")
    given = min(len(camera.poses), args.frames or len(camera.poses))
    if given < LEAST:
        parser.error(f"--trajectory must be of {LEAST} video frames at least, a chunk of {CHUNK} latent, got {given}")
    poses = lingbot.latent_poses(camera.poses, given, chunk_frames=CHUNK)
    check_gpu(parser)

    sys.path.insert(0, str(args.repo))
    try:
        from wan import WanI2VFast
        from wan.configs import MAX_AREA_CONFIGS, WAN_CONFIGS
        from wan.utils.utils import save_video
    except ImportError as error:
        lacks_packages(parser, args, error)

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)  # of the pipeline, too
    logging.info(f"loading {args.weights}, which takes a while")
    config = WAN_CONFIGS["i2v-A14B"]
    pipe = WanI2VFast(config=config, checkpoint_dir=str(args.weights), local_attn_size=args.window or -1)
    handle = None
    if not args.no_memory:
        pipe.local_attn_size = 0  # latent frames of the cache that the memory stands in for: it is not allocated
        handle = lingbot.enable(pipe.model, poses=poses, bank=args.bank, bank_chunks=args.bank_chunks)

    logging.info(f"{len(poses) // CHUNK} chunks: first the prompt and the image are encoded, at last all is decoded")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder, "poses.npy"), camera.poses)
        np.save(Path(folder, "intrinsics.npy"), camera.intrinsics)
        video = pipe.generate(
            args.prompt, image, action_path=folder, chunk_size=CHUNK, max_area=MAX_AREA_CONFIGS["480*832"],
            frame_num=given, shift=config.sample_shift, seed=args.seed, offload_model=True,
        )  # fmt: skip
    seconds = time.perf_counter() - start
    logging.info(f"writing {args.out}")
    args.out.unlink(missing_ok=True)
    save_video(tensor=video[None], save_file=str(args.out), fps=config.sample_fps, nrow=1)
    if not args.out.exists():  # save_video logs what goes wrong, and returns
        parser.error(f"--out must be a file that can be written, got {args.out}: see above")
    print(f"{args.out}: {video.shape[1]} frames in {seconds:.1f} s; {held(handle)}")


if __name__ == "__main__":
    main()
