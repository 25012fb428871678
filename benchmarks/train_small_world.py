"""Train the weights of SmallWorld that the package holds, from nothing but a seed: about an hour on one CPU core.

    python -m benchmarks.train_small_world --out small_world

The model sees clips of drawn worlds, each chunk of them with at most the four chunks before it: a sliding window
without a gap, no sink, nothing retrieved, nothing pruned. What a memory does beyond that it was never shown.

Into --out go config.json and model.safetensors (bf16, what `from_pretrained` loads), log.jsonl, which ends with what
each memory is worth with these weights, and checkpoint.pt, with which the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from worldkv_kernels import WorldMemory, worlds
from worldkv_kernels.journeys import MODES, psnr, travel, truth, turn_and_return
from worldkv_kernels.models import wan
from worldkv_kernels.models.checkpoint import write_tensors
from worldkv_kernels.models.small_world import SmallWorld, SmallWorldConfig, pluecker_map, ray_features
from worldkv_kernels.rope import Rope3D

CHUNKS = 6  # of a clip
WORLDS = 8  # of the table at the end
# Seeds that no training has, in the low 32 bits: a CPU's generator takes no others.
VALIDATED, SHOWN = 2**30, 2**30 + 1
WINDOW = 4  # past chunks that a chunk attends to
MUON_RATE, ADAM_RATE = 0.02, 2e-3
WARM_UP = 100  # steps
CONSTANT = 0.4  # share of the steps after which the rates fall, in a line
LAST_RATE = 0.02  # of the rates, at the end
DECAY = 0.01
HOPS = 0.3  # share of the clips in which each chunk looks somewhere else
CONTEXT_NOISE = 0.2  # at most, in half of the chunks that are attended to: what is rolled out is never clean
SHIFT = 3.0  # of the noise levels, towards noise
PURE_NOISE = 0.1  # share of the chunks that are nothing but noise
MOST_PITCH = 28.0  # degrees
MOST_AWAY = 0.45  # of a camera that walks, from the middle of a world of radius 1


# --- clips ---


class Clips:
    """Endless clips of drawn worlds, a function of the seed; `moving` is the share of those whose camera walks."""

    def __init__(self, model: SmallWorld, moving: float, seed: int) -> None:
        self.config, self.moving = model.config, moving
        self.generator = torch.Generator(model.device).manual_seed(seed)
        self._drawn: dict[str, Any] = dict(generator=self.generator, dtype=torch.float32, device=model.device)

    def draw(self, clips: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents [clips, chunks, frames, channels, height, width] and ray features [clips, chunks, tokens, n]."""
        frames = self.config.chunk_frames
        drawn = worlds.draw_worlds(clips, self.generator)
        yaw, pitch = self._turns(clips, CHUNKS * frames)
        position = self._walks(clips, CHUNKS * frames)
        position *= (self._uniform(0, 1, clips, 1, 1) < self.moving).float()
        latents = worlds.encode(worlds.pictures(drawn, worlds.looking(yaw, pitch, position)))
        # The model is told of poses turned by a random angle, so that it cannot know a world by its longitudes.
        turn = self._uniform(0, 2 * math.pi, clips, 1)
        turned = worlds.looking(turn, torch.zeros_like(turn))[..., :3, :3] @ position[..., None]
        told = worlds.looking(yaw + turn, pitch, turned[..., 0]).flatten(0, 1).double().cpu().numpy()
        rays = pluecker_map(told, np.tile(worlds.INTRINSICS, (len(told), 1)), self.config.grid)
        features = ray_features(torch.from_numpy(rays), self.config.ray_octaves)
        features = features.view(clips, CHUNKS, -1, features.shape[-1]).to(latents.device)
        return latents.unflatten(1, (CHUNKS, frames)), features

    def noisy(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Chunks to attend to, chunks to denoise, and the noise levels [clips, chunks] of the latter."""
        lead = latents.shape[:2]
        u = self._uniform(0, 1, *lead)
        sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
        sigma = torch.where(self._uniform(0, 1, *lead) < PURE_NOISE, 1.0, sigma)
        of_context = self._uniform(0, CONTEXT_NOISE, *lead) * (self._uniform(0, 1, *lead) < 0.5)
        context = latents + _wide(of_context) * self._normal(latents.shape)
        return context, torch.lerp(latents, self._normal(latents.shape), _wide(sigma)), sigma

    def _turns(self, clips: int, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Yaw and pitch [clips, frames] in radians: turns that change and reverse, so that views come back."""

        def walk(most: float, change: float) -> torch.Tensor:
            step, steps = self._uniform(-most, most, clips), []
            for _ in range(frames):
                other, reverse = self._uniform(-most, most, clips), self._uniform(0, 1, clips) < change
                step = torch.where(self._uniform(0, 1, clips) < change, other, step)
                step = torch.where(reverse, -step, step)
                steps.append(step)
            return torch.stack(steps, dim=1).cumsum(1)

        yaw, pitch = walk(16, 0.12), walk(6, 0.2) + self._uniform(-MOST_PITCH, MOST_PITCH, clips, 1)
        pitch = ((pitch + MOST_PITCH) % (4 * MOST_PITCH) - 2 * MOST_PITCH).abs() - MOST_PITCH  # it turns back there
        hops = (self._uniform(0, 1, clips, 1) < HOPS).float()
        hop = self._uniform(-80, 80, clips, CHUNKS).repeat_interleave(frames // CHUNKS, 1)
        return torch.deg2rad(yaw * (1 - 0.5 * hops) + hop * hops), torch.deg2rad(pitch)

    def _walks(self, clips: int, frames: int) -> torch.Tensor:
        """Positions [clips, frames, 3], less than MOST_AWAY from the middle: straight lines, mostly level."""
        level = torch.tensor([0.1, 0.03, 0.1], dtype=torch.float32, device=self.generator.device)
        step, steps = level.new_zeros(clips, 3), []
        for frame in range(frames):
            other = self._normal((clips, 3)) * level
            changes = self._uniform(0, 1, clips, 1) < 0.2
            step = torch.where(changes | (frame == 0), other, step)
            steps.append(step)
        position = torch.stack(steps, dim=1).cumsum(1) + 0.2 * self._normal((clips, 1, 3))
        distance = position.norm(dim=-1, keepdim=True).clamp_min(1e-6)
        return position * MOST_AWAY * torch.tanh(distance / MOST_AWAY) / distance

    def _uniform(self, least: float, most: float, *shape: int) -> torch.Tensor:
        return least + (most - least) * torch.rand(shape, **self._drawn)

    def _normal(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, **self._drawn)


def _wide(of_chunks: torch.Tensor) -> torch.Tensor:
    return of_chunks[..., None, None, None, None]


# --- the batched pass ---


def denoise_clips(
    model: SmallWorld, context: torch.Tensor, noisy: torch.Tensor, sigma: torch.Tensor, features: torch.Tensor
) -> torch.Tensor:
    """x0 of all chunks of all clips at once, as a rollout with a sliding window of WINDOW chunks denoises them.

    Args: context and noisy as of Clips.noisy, sigma [clips, chunks], features as of Clips.draw. A chunk of `context`
    attends to itself and the chunks of context in its window, one of `noisy` to itself and the same. Returns the
    head's numbers, [clips, chunks, tokens, 2 * 2 * channels].
    """
    config = model.config
    clips, chunks = sigma.shape
    patches = wan.patchify(torch.stack([context, noisy]).flatten(0, 3)).unflatten(0, (2, clips, chunks, -1))
    x = wan.embed_patches(model.patch_embedding, patches)  # [2, clips, chunks, tokens, dim]
    levels = torch.stack([torch.zeros_like(sigma), sigma])
    time = model.time_embedding(wan.sinusoids(1000 * levels.flatten(), config.frequency_dim)).unflatten(0, levels.shape)
    projected = model.time_projection(time).unflatten(-1, (6, -1)).float()
    camera = model.embed_rays(features)
    turns = rotations(config, chunks, x.device)
    for number, block in enumerate(model.blocks):
        last = number == config.num_layers - 1
        shift, scale, gate, ff_shift, ff_scale, ff_gate = (block.modulation[0] + projected)[:, :, :, None].unbind(-2)
        y = modulated(x, shift, scale, config.eps)
        if last:  # of the context only keys and values are needed any more
            x, gate, ff_shift, ff_scale, ff_gate = (of[1:] for of in (x, gate, ff_shift, ff_scale, ff_gate))
        x = torch.addcmul(x, attend(block.self_attn, y, turns, only_noisy=last), gate)
        hidden = block.cam_injector_layer2(F.silu(block.cam_injector_layer1(camera))) + camera
        scale, shift = block.cam_scale_layer(hidden).float(), block.cam_shift_layer(hidden).float()
        x = torch.addcmul(shift, x, 1 + scale)
        x = torch.addcmul(x, block.ffn(modulated(x, ff_shift, ff_scale, config.eps)).float(), ff_gate)
    shift, scale = (model.head.modulation[0] + time[1][:, :, None].float())[..., None, :].unbind(2)
    return model.head.head(modulated(x[0], shift, scale, config.eps)).float()


def modulated(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale)


def attend(attention: wan.SelfAttention, y: torch.Tensor, turns: torch.Tensor, *, only_noisy: bool) -> torch.Tensor:
    """Self-attention of y [2, clips, chunks, tokens, dim], context and noisy -> the same, or [1, ...] of the noisy."""
    dtype = torch.bfloat16 if torch.is_autocast_enabled(y.device.type) else y.dtype

    def heads(x: torch.Tensor) -> torch.Tensor:
        # [.., clips, chunks, tokens, dim] -> [chunks][.., clips, heads, tokens, head_dim]
        return x.unflatten(-1, (attention.num_heads, -1)).permute(2, 0, 1, 4, 3, 5)

    def rotated(x: torch.Tensor, norm: wan.RMSNorm) -> torch.Tensor:
        x = heads(F.rms_norm(x.float(), x.shape[-1:], norm.weight, norm.eps))
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turns[:, None, None, None]).flatten(-2).to(dtype)

    q = rotated(attention.q(y[1:] if only_noisy else y), attention.norm_q)
    k, v = rotated(attention.k(y), attention.norm_k), heads(attention.v(y))
    q, k, v = q.unbind(0), k.unbind(0), v.unbind(0)
    attended = []
    for chunk, of_chunk in enumerate(q):
        window = range(max(0, chunk - WINDOW), chunk)
        keys, values = (
            torch.cat([*(x[past][:1].expand_as(of_chunk) for past in window), x[chunk][-len(of_chunk) :]], dim=-2)
            for x in (k, v)
        )
        scores = of_chunk * of_chunk.shape[-1] ** -0.5 @ keys.transpose(-1, -2)
        attended.append(scores.softmax(dim=-1) @ values)  # on a CPU faster than a fused attention's gradient
    return attention.o(torch.stack(attended, dim=2).transpose(-3, -2).flatten(-2)).float()


def rotations(config: SmallWorldConfig, chunks: int, device: torch.device) -> torch.Tensor:
    """Complex numbers that turn the pairs of a head, [chunks, tokens, head_dim / 2]: Rope3D at consecutive frames."""
    rope, (height, width) = Rope3D(config.head_dim), config.grid
    frames = chunks * config.chunk_frames
    positions = range(max(frames, height, width))
    table = torch.view_as_complex(torch.from_numpy(rope.table(positions)).to(device))  # [positions, pairs]
    parts = table.split(rope.pairs, dim=1)
    axes = [
        part[:size].view([size if axis == i else 1 for i in range(3)] + [-1]).expand(frames, height, width, -1)
        for axis, (part, size) in enumerate(zip(parts, (frames, height, width), strict=True))
    ]
    return torch.cat(axes, dim=-1).view(chunks, -1, config.head_dim // 2)


# --- the training ---


@torch.no_grad()
def initialise(model: SmallWorld, seed: int) -> None:
    """Weights of unit gain, residual layers of less, gates open, and self-attention keys as the queries are.

    So tokens of one direction attend to each other from the start: copying from the past is what is to be learned.
    """
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv3d):
            torch.nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            torch.nn.init.zeros_(module.bias)
    model.time_projection[1].weight.zero_()
    model.head.modulation.zero_()
    model.head.head.weight.mul_(0.1)
    for block in model.blocks:
        block.modulation.zero_()
        block.modulation[:, [2, 5]] = 1  # the gates
        for layer in (block.self_attn.o, block.ffn[2], block.cam_shift_layer):
            layer.weight.mul_(0.5)
        block.cam_scale_layer.weight.zero_()
        block.self_attn.k.load_state_dict(block.self_attn.q.state_dict())
        for norm in (block.self_attn.norm_q, block.self_attn.norm_k):
            norm.weight.fill_(1.5)


def as_patches(model: SmallWorld, latents: torch.Tensor) -> torch.Tensor:
    """Latents [clips, chunks, frames, channels, height, width] in the order of the head's numbers."""
    patches = wan.patchify(latents.flatten(0, 2)).unflatten(-1, (-1, math.prod(wan.PATCH)))
    return patches.transpose(-1, -2).reshape(*latents.shape[:2], -1, math.prod(patches.shape[-2:]))


def squared_error(model: SmallWorld, clips: Clips, count: int, sigma: float | None = None) -> torch.Tensor:
    """Of x0, [clips, chunks, tokens, 4, channels]; at `sigma` with clean chunks to attend to, or as in training."""
    latents, features = clips.draw(count)
    context, noisy, drawn = clips.noisy(latents)
    if sigma is not None:
        context, drawn = latents, torch.full_like(drawn, sigma)
        noisy = torch.lerp(latents, clips._normal(latents.shape), sigma)
    with torch.autocast(model.device.type, torch.bfloat16):
        clean = denoise_clips(model, context, noisy, drawn, features)
    return (clean - as_patches(model, latents)).square().unflatten(-1, (-1, latents.shape[3]))


def optimizers_of(model: SmallWorld) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for all else; biases and norms do not decay."""
    of_blocks = [p for name, p in model.named_parameters() if p.dim() == 2 and name.startswith("blocks.")]
    chosen = set(map(id, of_blocks))
    rest = [p for p in model.parameters() if id(p) not in chosen]
    groups = [
        {"params": [p for p in rest if p.dim() > 1], "weight_decay": DECAY},
        {"params": [p for p in rest if p.dim() == 1], "weight_decay": 0.0},
    ]
    return [
        torch.optim.Muon(of_blocks, lr=MUON_RATE, weight_decay=DECAY),
        torch.optim.AdamW(groups, lr=ADAM_RATE, betas=(0.9, 0.98)),
    ]


def share_of_rate(step: int, steps: int) -> float:
    """Of the learning rates: a warm-up, a plateau, and a line down."""
    falling = (1 - step / steps) / (1 - CONSTANT)
    return min(1.0, (step + 1) / WARM_UP, max(LAST_RATE, falling))


class Training:
    """A model in training, with all that a checkpoint has to hold."""

    def __init__(self, model: SmallWorld, steps: int, clips: int, moving: float, seed: int) -> None:
        self.recipe = dict(steps=steps, clips=clips, moving=moving, seed=seed, **asdict(model.config))
        del self.recipe["sigmas"]  # of a rollout: all noise levels are trained
        self.model, self.steps, self.clips = model, steps, clips
        self.data = Clips(model, moving, seed)
        initialise(model, seed)
        self.optimizers = optimizers_of(model)
        self._rates = [group["lr"] for group in self._groups()]
        self.step, self.seconds = 0, 0.0

    def advance(self) -> float:
        """One step; the loss before it."""
        started = time.perf_counter()
        for group, rate in zip(self._groups(), self._rates, strict=True):
            group["lr"] = rate * share_of_rate(self.step, self.steps)
        # Between the latents' own weighting, which is 1, and that of the pixels, which is the square.
        scales = torch.tensor(worlds.SCALES, dtype=torch.float32, device=self.model.device)
        loss = (squared_error(self.model, self.data, self.clips) * (scales / scales.mean())).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self.seconds += time.perf_counter() - started
        return loss.item()

    @torch.no_grad()
    def validate(self) -> dict[str, Any]:
        """PSNR of the pictures of 16 clips, always the same: of each chunk from pure noise, and of all at sigma 1/2."""
        scales = torch.tensor(worlds.SCALES, dtype=torch.float32, device=self.model.device)

        def psnr(sigma: float) -> torch.Tensor:
            clips = Clips(self.model, self.data.moving, seed=VALIDATED)
            of_pixels = (squared_error(self.model, clips, 16, sigma) * scales.square()).mean(dim=(0, 2, 3, 4)) / 3
            return -10 * torch.log10(of_pixels)  # 16 of 48 orthonormal coefficients: a third of the mean

        return {
            "from_noise_db": [round(x, 2) for x in psnr(1.0).tolist()],
            "half_db": round(psnr(0.5).mean().item(), 2),
        }

    def save(self, path: Path) -> None:
        state = {
            "recipe": self.recipe, "step": self.step, "seconds": self.seconds, "model": self.model.state_dict(),
            "optimizers": [of.state_dict() for of in self.optimizers], "generator": self.data.generator.get_state(),
        }  # fmt: skip
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def resume(self, path: Path) -> None:
        """Raises ValueError when the checkpoint is of another recipe."""
        state = torch.load(path, map_location=self.model.device, weights_only=True)
        if state["recipe"] != self.recipe:
            raise ValueError(f"--out must hold no checkpoint of another recipe, got {state['recipe']} in {path}")
        self.step, self.seconds = state["step"], state["seconds"]
        self.model.load_state_dict(state["model"])
        for optimizer, of in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(of)
        self.data.generator.set_state(state["generator"].cpu())

    def _groups(self) -> list[dict[str, Any]]:
        """Of parameters, with a rate each; load_state_dict puts others in their place."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]


def write_weights(model: SmallWorld, folder: Path) -> None:
    """config.json, and the parameters as bf16 in model.safetensors."""
    (folder / "config.json").write_text(json.dumps(asdict(model.config), indent=2) + "\n")
    weights = {name: weight.bfloat16() for name, weight in model.state_dict().items()}
    write_tensors(folder / "model.safetensors", weights)


def table(models: Mapping[str, SmallWorld]) -> dict[str, dict[str, float]]:
    """What each memory is worth with each of the models: PSNR of views seen again, the mean over unseen worlds."""
    drawn = worlds.draw_worlds(WORLDS, torch.Generator().manual_seed(SHOWN))
    found: dict[str, dict[str, float]] = {}
    for mode, options in MODES.items():
        for name, model in models.items():
            of_worlds = []
            for number, world in enumerate(drawn):
                journey = turn_and_return(30, number)
                config = model.config.memory(bank_chunks=30, **options)
                memory = WorldMemory(config, device=model.device, dtype=model.dtype)
                trip = travel(model, memory, world, journey, seed=number)
                again = list(journey.seen_again())
                of_worlds.append(psnr(trip.frames, truth(world, journey))[again].mean().item())
            found.setdefault(mode, {})[name] = round(sum(of_worlds) / len(of_worlds), 3)
            print(f"{mode}, {name} weights: {found[mode][name]:.2f} dB", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="a folder, made where there is none")
    add("--steps", type=int, default=4500, help="(default: %(default)s, about an hour on one core)")
    add("--clips", type=int, default=4, help="of a step (default: %(default)s)")
    add("--moving", type=float, default=0.0, help="share of the clips whose camera walks, too (default: %(default)s)")
    add("--seed", type=int, default=0, help="of weights and clips (default: %(default)s)")
    add("--threads", type=int, default=1, help="of the CPU (default: %(default)s)")
    add("--device", default="cpu")
    args = parser.parse_args()
    if min(args.steps, args.clips, args.threads) < 1:
        parser.error("--steps, --clips and --threads must be at least 1")
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    model = SmallWorld(SmallWorldConfig(), device=args.device, dtype=torch.float32).requires_grad_(True)
    training = Training(model, args.steps, args.clips, args.moving, args.seed)
    checkpoint = args.out / "checkpoint.pt"
    if checkpoint.exists():
        training.resume(checkpoint)
        print(f"going on from step {training.step} of {checkpoint}", flush=True)
    every, told = max(1, args.steps // 30), time.perf_counter()
    losses: list[float] = []
    with open(args.out / "log.jsonl", "a") as log:
        while training.step < args.steps:
            losses.append(training.advance())
            if time.perf_counter() - told > 2:
                left = training.seconds / training.step * (args.steps - training.step) / 60
                told_of = f"step {training.step}/{args.steps}, loss {losses[-1]:.4f}, {left:.0f} minutes left"
                print(f"\r{told_of}  ", end="", flush=True)
                told = time.perf_counter()
            if training.step % every == 0 or training.step == args.steps:
                line = {"step": training.step, "minutes": round(training.seconds / 60, 2),
                        "loss": round(sum(losses) / len(losses), 5), **training.validate()}  # fmt: skip
                losses.clear()
                print(f"\r\x1b[K{json.dumps(line)}" if sys.stdout.isatty() else json.dumps(line), flush=True)
                log.write(json.dumps(line) + "\n")
                log.flush()
                write_weights(model, args.out)  # first: a checkpoint of the last step writes none any more
                training.save(checkpoint)
        if '"psnr_db"' not in (args.out / "log.jsonl").read_text():
            print("what each memory is worth with these weights, in some minutes:", flush=True)
            stored = SmallWorld.from_pretrained(args.out, device=args.device, dtype=torch.float32)
            log.write(json.dumps({"psnr_db": table({"fp32": model, "bf16": stored})}) + "\n")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the same command goes on from the last line of the log")
