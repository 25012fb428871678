"""What the examples share: arguments, what is wrong with them, and what a memory held."""

import argparse
from pathlib import Path

import torch

CHUNK = 3  # latent frames
LEAST = 4 * CHUNK - 3  # video frames of a first chunk


def make_parser(description, *, repo, weights, out):
    """With the arguments of both examples. `repo` says which folder of a checkout, `weights` where they are in it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--repo", type=Path, default=Path("."), help=f"{repo} (default: the folder that this runs in)")
    add("--weights", type=Path, help=f"their folder (default: {weights} in --repo)")
    add("--image", type=Path, required=True, help="the first frame")
    add("--frames", type=at_least(LEAST), help="video frames at most (default: all that there are controls for)")
    add("--bank", choices=("device", "host"), default="device", help="where the past lies (default: %(default)s)")
    add("--bank-chunks", type=at_least(1), help="chunks that it holds (default: what half of the free memory does)")
    add("--no-memory", action="store_true", help="the published KV cache instead")
    add("--out", type=Path, default=Path(out), help="the video (default: %(default)s)")
    add("--seed", type=at_least(0), default=42, help="of the noise (default: %(default)s)")
    parser.set_defaults(weights_in_repo=weights)
    return parser


def at_least(least):
    def integer(text):
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return int(text)

    return integer


def check(parser, args, *, of_repo, of_weights):
    """Make the paths absolute, and end with an error where a file is missing or a video cannot be written."""
    args.repo, args.image, args.out = args.repo.absolute(), args.image.absolute(), args.out.absolute()
    args.weights = (args.repo / args.weights_in_repo if args.weights is None else args.weights).absolute()
    for name, folder, files in (("--repo", args.repo, of_repo), ("--weights", args.weights, of_weights)):
        missing = next((file for file in files if not (folder / file).exists()), None)
        if missing is not None:
            parser.error(f"{name} must be a folder with {missing}, got {folder}, which has none")
    if args.out.suffix != ".mp4" or args.out.is_dir():
        parser.error(f"--out must be a file whose name ends in .mp4, got {args.out}")
    folder = args.out.parent
    read(parser, "--out", lambda out: folder.mkdir(parents=True, exist_ok=True), args.out, "in a folder of its own")


def read(parser, argument, how, source, wanted):
    """how(source), or an error that names the argument."""
    try:
        return how(source)
    except (OSError, ValueError) as error:
        parser.error(f"{argument} must be {wanted}, got {source}: {error}")


def check_gpu(parser):
    if not torch.cuda.device_count():
        parser.error("a GPU that CUDA can use must be there, got none")


def lacks_packages(parser, args, error):
    parser.error(f"--repo's packages must be installed, pip install -r {args.repo}/requirements.txt, got: {error}")


def held(handle):
    """What the memory held, in a line."""
    if handle is None:
        return "without a memory"
    stats = handle.stats()
    return (
        f"memory: {stats['chunks']} chunks made, {stats['chunks_banked']} banked, {stats['chunks_dropped']} dropped, "
        f"{stats['chunks_retrieved']} brought back; {stats['device_bytes'] / 2**30:.2f} GiB on the GPU, "
        f"{stats['host_bytes'] / 2**30:.2f} GiB in host memory"
    )
