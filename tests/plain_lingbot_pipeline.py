"""The pipeline loop of LingBot-World-Fast, restated plainly: camera, noise schedule, caches and the order of passes."""

import itertools
import math

import torch


def latent_poses(clip, frame_num, chunk_size=3):
    """What the pipeline makes of a clip's poses [n, 4, 4], one a video frame: one a latent frame of whole chunks."""
    clip = clip[: min((frame_num - 1) // 4 * 4 + 1, (len(clip) - 1) // 4 * 4 + 1)]
    count = (len(clip) - 1) // 4 + 1
    count -= count % chunk_size
    poses = []
    for index in range(count):
        at = index * (len(clip) - 1) / (count - 1)
        before = min(int(at), len(clip) - 2)
        pose = torch.eye(4, dtype=torch.float64)
        pose[:3, 3] = torch.lerp(clip[before, :3, 3], clip[before + 1, :3, 3], at - before)
        pose[:3, :3] = quaternion_matrix(
            slerp(*(quaternion(clip[i, :3, :3]) for i in (before, before + 1)), at - before)
        )
        poses.append(pose)
    return torch.stack(poses)


def quaternion(rotation):
    """w, x, y, z of a rotation of less than 180 degrees."""
    w = math.sqrt(1 + rotation.trace().item()) / 2
    twice = torch.stack(
        [rotation[2, 1] - rotation[1, 2], rotation[0, 2] - rotation[2, 0], rotation[1, 0] - rotation[0, 1]]
    )
    return torch.cat([torch.tensor([w], dtype=torch.float64), twice / (4 * w)])


def quaternion_matrix(q):
    w, x, y, z = (q / q.norm()).tolist()
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return torch.tensor(rows, dtype=torch.float64)


def slerp(one, other, part):
    """Between two unit quaternions, on the shorter of the two arcs."""
    if one @ other < 0:
        other = -other
    angle = math.acos(min(1.0, (one @ other).item()))
    if angle < 1e-8:
        return torch.lerp(one, other, part)
    return (math.sin((1 - part) * angle) * one + math.sin(part * angle) * other) / math.sin(angle)


def camera_embedding(c2ws, intrinsics, height, width, keys=None):
    """What the pipeline tells the model of the camera: [1, 384, frames, height / 8, width / 8], in pixels; or 448.

    c2ws [frames, 4, 4] and the intrinsics [4] of a 480 x 832 image; keys [frames, 4], held down or not. Each pose is
    taken relative to the frame before, the first to itself; the longest of these steps becomes 1. A pixel's channels
    are the camera's position (with keys: none) and the direction of its ray, then the keys; 8 x 8 pixels are folded
    into the channels of one.
    """
    steps = [torch.eye(4, dtype=torch.float64)]
    for before, after in itertools.pairwise(c2ws):
        steps.append(torch.linalg.inv(before.double()) @ after.double())
    longest = max(step[:3, 3].norm().item() for step in steps)
    fx, fy, cx, cy = (float(number) for number in intrinsics)
    fx, cx, fy, cy = fx * width / 832, cx * width / 832, fy * height / 480, cy * height / 480
    frames = []
    for index, step in enumerate(steps):
        position = step[:3, 3] / longest if longest > 0 else step[:3, 3]
        pixels = torch.empty(height, width, 7 if keys is not None else 6, dtype=torch.float64)
        for v in range(height):
            for u in range(width):
                ray = torch.tensor([(u + 0.5 - cx) / fx, (v + 0.5 - cy) / fy, 1.0], dtype=torch.float64)
                ray = step[:3, :3] @ (ray / ray.norm())
                pixels[v, u] = torch.cat([position, ray] if keys is None else [ray, keys[index].double()])
        folded = pixels.view(height // 8, 8, width // 8, 8, -1).permute(4, 1, 3, 0, 2)  # channels, 8, 8, height, width
        frames.append(folded.flatten(0, 2))
    return torch.stack(frames, dim=1)[None].float()


@torch.no_grad()
def draw_weights(model, seed=0):
    """Random weights under which attention, modulation and the camera all matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.normal_(generator=generator)
        if name.endswith("bias"):
            parameter.mul_(0.1)
        elif name.endswith("modulation"):
            parameter.mul_(0.5)
        elif parameter.dim() == 1:
            parameter.mul_(0.2).add_(1)
        else:
            parameter.div_(parameter[0].numel() ** 0.5)
    for block in model.blocks:  # tokens alike attend to each other, as in a trained model
        block.self_attn.k.load_state_dict(block.self_attn.q.state_dict())


def schedule(indices=(0, 179, 358, 679), shift=10.0, steps=1000):
    """Sigma and timestep of the sampler's passes: the timesteps are cut to whole numbers, the sigmas are not."""
    sigmas = []
    for index in indices:
        plain = (1 - 1 / steps) * (1 - index / steps)
        sigmas.append(shift * plain / (1 + (shift - 1) * plain))
    return [(sigma, float(int(steps * sigma))) for sigma in sigmas]


class WanI2VFast:
    """The pipeline between the encoders and the decoder: noise in, clean latents out, chunk by chunk."""

    def __init__(self, model):
        self.model = model

    def caches(self, kv_size, dtype, device="cpu"):
        config = self.model.config
        head_dim = config.dim // config.num_heads
        self_caches = [
            {
                "k": torch.zeros(1, kv_size, config.num_heads, head_dim, dtype=dtype, device=device),
                "v": torch.zeros(1, kv_size, config.num_heads, head_dim, dtype=dtype, device=device),
                "global_end_index": torch.tensor([0]),
                "local_end_index": torch.tensor([0]),
            }
            for _ in range(config.num_layers)
        ]
        cross_caches = [{"k": None, "v": None, "is_init": torch.tensor(0)} for _ in range(config.num_layers)]
        return self_caches, cross_caches

    def prompt(self, context, chunk, crossattn_cache):
        """The context of a chunk; a pipeline whose prompt changes gives another, and has its keys and values made."""
        return context

    @torch.no_grad()
    def generate(self, *arguments, **options):
        """Clean latents [16, frames, height, width]; arguments as those of `passes`."""
        weight = self.model.blocks[0].self_attn.v.weight
        self.dtype = weight.dtype
        with torch.autocast(weight.device.type, dtype=torch.bfloat16, enabled=self.dtype is torch.bfloat16):
            return self.passes(*arguments, **options)

    def passes(
        self,
        context,
        y,
        c2ws_plucker_emb,
        noise,
        sampler=None,
        chunk_size=3,
        window=-1,
        sink_size=0,
        max_attention_size=None,
        retrieval_kv=None,
    ):
        """Chunk by chunk: a denoising pass at each noise level, then a clean one.

        context [text tokens, text_dim]; y [20, frames, height, width], mask and image latents; c2ws_plucker_emb
        [1, 384 or 448, frames, height, width]; noise(chunk, step, shape); sampler: (sigma, timestep) of the denoising
        passes; window: frames of the rolling cache with the chunk being made, the first sink_size of them kept, or -1.
        """
        sampler = sampler or schedule()
        _, frames, height, width = y.shape
        frame_tokens = height * width // 4
        kv_size = frame_tokens * (min(window, frames) if window > -1 else frames)
        self.model.local_attn_size = window
        for block in self.model.blocks:
            block.local_attn_size = block.self_attn.local_attn_size = window
            block.self_attn.sink_size = sink_size
        kv_cache, crossattn_cache = self.caches(kv_size, self.dtype, y.device)
        clean_chunks = []
        for chunk, first in enumerate(range(0, frames, chunk_size)):
            kwargs = {
                "context": [self.prompt(context, chunk, crossattn_cache)],
                "seq_len": chunk_size * frame_tokens,
                "y": [y[:, first : first + chunk_size]],
                "dit_cond_dict": {"c2ws_plucker_emb": (c2ws_plucker_emb[:, :, first : first + chunk_size],)},
                "kv_cache": kv_cache,
                "crossattn_cache": crossattn_cache,
                "current_start": first * frame_tokens,
                "max_attention_size": kv_size if max_attention_size is None else max_attention_size,
            }
            if retrieval_kv is not None:
                kwargs["retrieval_kv"] = retrieval_kv
            shape = (self.model.out_dim, chunk_size, height, width)
            latent = noise(chunk, 0, shape)
            for step, (sigma, timestep) in enumerate(sampler):
                flow = self.model(x=[latent], t=torch.tensor([timestep], dtype=torch.float64).to(y.device), **kwargs)[0]
                clean = latent - sigma * flow
                if step + 1 < len(sampler):
                    next_sigma = sampler[step + 1][0]
                    latent = (1 - next_sigma) * clean + next_sigma * noise(chunk, step + 1, shape)
            clean_chunks.append(clean)
            self.model(x=[clean], t=torch.tensor([0.0], dtype=torch.float64).to(y.device), **kwargs)
        return torch.cat(clean_chunks, dim=1)
