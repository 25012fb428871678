"""Matrix-Game-2.0's pipeline loops, restated plainly around the denoiser of plain_matrix_game.

Names, signatures, cache dictionaries and the order of passes are the published ones; the image encoder and the video
autoencoder are left out.
"""

from types import SimpleNamespace

import torch
from plain_matrix_game_actions import ROWS_A_FRAME
from torch import nn


class FlowMatchScheduler:
    """1000 noise levels from 1 down, shifted towards the noise; a timestep is a level times 1000."""

    def __init__(self, shift=5.0, steps=1000):
        plain = torch.linspace(1.0, 0.0, steps + 1)[:-1]
        self.sigmas = shift * plain / (1 + (shift - 1) * plain)
        self.timesteps = self.sigmas * 1000

    def sigma(self, timestep):
        """Of the level nearest to each of timestep [n], as [n, 1, 1, 1]."""
        nearest = (self.timesteps[None] - timestep.cpu()[:, None]).abs().argmin(dim=1)
        return self.sigmas[nearest].reshape(-1, 1, 1, 1).to(timestep.device)

    def add_noise(self, original_samples, noise, timestep):
        sigma = self.sigma(timestep)
        return ((1 - sigma) * original_samples + sigma * noise).to(noise.dtype)


class WanDiffusionWrapper(nn.Module):
    """The denoiser, whose flow is turned into a clean prediction; published checkpoints have its state dict's keys."""

    def __init__(self, model, timestep_shift=5.0):
        super().__init__()
        self.model = model.eval()
        self.scheduler = FlowMatchScheduler(timestep_shift)

    def get_scheduler(self):
        return self.scheduler

    def forward(
        self,
        noisy_image_or_video,
        conditional_dict,
        timestep,
        kv_cache=None,
        kv_cache_mouse=None,
        kv_cache_keyboard=None,
        crossattn_cache=None,
        current_start=None,
        cache_start=None,
    ):
        flow_pred = self.model(
            noisy_image_or_video.to(self.model.dtype),
            t=timestep,
            **conditional_dict,
            kv_cache=kv_cache,
            kv_cache_mouse=kv_cache_mouse,
            kv_cache_keyboard=kv_cache_keyboard,
            crossattn_cache=crossattn_cache,
            current_start=current_start,
            cache_start=cache_start,
        )
        frames = noisy_image_or_video.shape[2]
        sigma = self.scheduler.sigma(timestep.expand(-1, frames).flatten()).double()
        sigma = sigma.reshape(-1, 1, frames, 1, 1)
        pred_x0 = noisy_image_or_video.double() - sigma * flow_pred.double()
        return flow_pred, pred_x0.to(flow_pred.dtype)


def cond_current(conditional_dict, current_start_frame, num_frame_per_block, replace=None, mode="universal"):
    """What a block is given of the conditions: its latents' own part, and the actions from the start to its end.

    With `replace`, the block's rows are first overwritten in conditional_dict by one row, which is what was pressed.
    """
    end = current_start_frame + num_frame_per_block
    last_row = 1 + ROWS_A_FRAME * (end - 1)
    first_row = 1 + ROWS_A_FRAME * (current_start_frame - 1) if current_start_frame else 0
    new_cond = {
        "cond_concat": conditional_dict["cond_concat"][:, :, current_start_frame:end],
        "visual_context": conditional_dict["visual_context"],
    }
    for name in ("keyboard",) if mode == "templerun" else ("mouse", "keyboard"):
        rows = conditional_dict[f"{name}_cond"]
        if replace is not None:
            rows[:, first_row:last_row] = replace[name]
        new_cond[f"{name}_cond"] = rows[:, :last_row]
    return new_cond if replace is None else (new_cond, conditional_dict)


class CausalInferencePipeline(nn.Module):
    """The pipeline between the encoders and the decoder: noise in, clean latents out, block by block.

    args: denoising_step_list, num_frame_per_block and context_noise as in the published configurations,
    frame_seq_length (880 there), and kv_cache_frames where the self-attention's cache is to be of another length than
    the window.
    draw(block, step, like) gives the noise that is added before each step but the first.
    """

    def __init__(self, args, generator, draw=lambda block, step, like: torch.randn_like(like)):
        super().__init__()
        self.generator = generator
        self.draw = draw
        self.scheduler = generator.get_scheduler()
        timesteps = torch.cat([self.scheduler.timesteps, torch.zeros(1)])
        self.denoising_step_list = timesteps[1000 - torch.tensor(args.denoising_step_list)]
        self.args = args
        self.num_transformer_blocks = len(generator.model.blocks)
        self.frame_seq_length = args.frame_seq_length
        self.num_frame_per_block = args.num_frame_per_block
        self.local_attn_size = generator.model.local_attn_size
        self.generator.model.num_frame_per_block = self.num_frame_per_block

    def inference(self, noise, conditional_dict, initial_latent=None, return_latents=True, mode="universal"):
        """Clean latents [batch, 16, frames, height, width]; those of initial_latent come first, as they are."""
        self._initialize(len(noise), noise.dtype, noise.device)
        blocks = [noise] if initial_latent is None else [initial_latent, noise]
        given = 0 if initial_latent is None else initial_latent.shape[2]
        output = torch.zeros_like(torch.cat(blocks, dim=2))
        start_frame = 0
        while start_frame < output.shape[2]:
            frames = slice(start_frame, start_frame + self.num_frame_per_block)
            if start_frame < given:
                clean = initial_latent[:, :, frames]
                condition = cond_current(conditional_dict, start_frame, self.num_frame_per_block, mode=mode)
                self._pass(clean, condition, torch.zeros(len(noise), 1, device=noise.device), start_frame)
            else:
                block = noise[:, :, start_frame - given : start_frame - given + self.num_frame_per_block]
                clean = self._block(block, self._condition(conditional_dict, start_frame, mode), start_frame)
            output[:, :, frames] = clean
            start_frame += self.num_frame_per_block
            self._made(clean)
        return output

    def _condition(self, conditional_dict, start_frame, mode):
        return cond_current(conditional_dict, start_frame, self.num_frame_per_block, mode=mode)

    def _made(self, clean):
        """Where the published pipeline decodes a block."""

    def _block(self, noisy_input, condition, start_frame):
        """The denoising passes and the clean one, all at the same place."""
        frames = torch.ones(noisy_input.shape[0], noisy_input.shape[2], device=noisy_input.device)
        for index, current_timestep in enumerate(self.denoising_step_list):
            denoised_pred = self._pass(noisy_input, condition, frames * current_timestep, start_frame)
            if index < len(self.denoising_step_list) - 1:
                flat = denoised_pred.transpose(1, 2).flatten(0, 1)  # [batch * frames, 16, height, width]
                fresh = self.draw(start_frame // self.num_frame_per_block, index + 1, flat)
                next_timestep = self.denoising_step_list[index + 1].to(flat.device).expand(len(flat))
                noisy = self.scheduler.add_noise(flat, fresh, next_timestep)
                noisy_input = noisy.unflatten(0, (len(denoised_pred), -1)).transpose(1, 2)
        self._pass(denoised_pred, condition, frames * self.args.context_noise, start_frame)
        return denoised_pred

    def _pass(self, latents, condition, timestep, start_frame):
        return self.generator(
            noisy_image_or_video=latents,
            conditional_dict=condition,
            timestep=timestep,
            kv_cache=self.kv_cache1,
            kv_cache_mouse=self.kv_cache_mouse,
            kv_cache_keyboard=self.kv_cache_keyboard,
            crossattn_cache=self.crossattn_cache,
            current_start=start_frame * self.frame_seq_length,
        )[1]

    def _initialize(self, batch, dtype, device="cpu"):
        """New, empty caches."""
        attention = self.generator.model.blocks[0].self_attn
        window = self.local_attn_size
        frames = getattr(self.args, "kv_cache_frames", window)

        def empty(rows, length, heads, dim):
            return [
                {
                    "k": torch.zeros(rows, length, heads, dim, dtype=dtype, device=device),
                    "v": torch.zeros(rows, length, heads, dim, dtype=dtype, device=device),
                    "global_end_index": torch.tensor([0], device=device),
                    "local_end_index": torch.tensor([0], device=device),
                }
                for _ in range(self.num_transformer_blocks)
            ]

        action = next(block.action_model for block in self.generator.model.blocks if block.action_model is not None)
        of_action = (window, action.heads_num, action.keyboard_attn_kv.out_features // 2 // action.heads_num)
        self.kv_cache1 = empty(batch, frames * self.frame_seq_length, attention.num_heads, attention.head_dim)
        self.kv_cache_keyboard = empty(batch, *of_action)
        self.kv_cache_mouse = empty(batch * self.frame_seq_length, *of_action)
        self.crossattn_cache = [{"k": None, "v": None, "is_init": False} for _ in range(self.num_transformer_blocks)]


class CausalInferenceStreamingPipeline(CausalInferencePipeline):
    """The interactive pipeline: before each block it asks what is pressed, `get_current_action(mode)`."""

    def __init__(self, args, generator, get_current_action, **kwargs):
        super().__init__(args, generator, **kwargs)
        self.get_current_action = get_current_action

    def _condition(self, conditional_dict, start_frame, mode):
        pressed = self.get_current_action(mode)
        return cond_current(conditional_dict, start_frame, self.num_frame_per_block, replace=pressed, mode=mode)[0]


def published_args(**changes):
    """The published configuration "universal", with changes."""
    args = {"denoising_step_list": [1000, 666, 333], "num_frame_per_block": 3, "context_noise": 0}
    return SimpleNamespace(**(args | {"frame_seq_length": 880} | changes))
