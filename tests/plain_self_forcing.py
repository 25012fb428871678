"""Self-Forcing's causal Wan model and its pipeline, and LongLive's changes to both, restated plainly.

Names of classes and parameters, signatures, cache dictionaries and the order of passes are the published ones; text and
image encoder, video autoencoder, the training path and all fixed sizes are left out. Nothing is fast or shared with
worldkv_kernels. The layers around self-attention are those of plain_lingbot.
"""

import math

import torch
from plain_lingbot import PATCH, WanCrossAttention, WanLayerNorm, WanRMSNorm, apply, attention, axis_angles, rotated
from plain_matrix_game_pipeline import FlowMatchScheduler
from torch import nn

STEPS = (1000, 600)
VISUAL_DIM = 20  # of the image encoder's tokens


class CausalWanSelfAttention(nn.Module):
    """Attention to a rolling cache, which keeps the first `sink_size` frames and the newest others."""

    def __init__(self, dim, num_heads, local_attn_size=-1, sink_size=0, qk_norm=True, eps=1e-6):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.local_attn_size = local_attn_size  # frames; -1: the cache holds the whole video
        self.sink_size = sink_size
        self.eps = eps
        self.max_attention_size = 32760 if local_attn_size == -1 else local_attn_size * 1560
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q = WanRMSNorm(dim, eps) if qk_norm else nn.Identity()
        self.norm_k = WanRMSNorm(dim, eps) if qk_norm else nn.Identity()

    def turned_qkv(self, x, grid_sizes, freqs, current_start):
        grid, heads = grid_sizes[0].tolist(), (self.num_heads, self.head_dim)
        start_frame = current_start // (grid[1] * grid[2])
        q, k = self.norm_q(self.q(x)).unflatten(2, heads), self.norm_k(self.k(x)).unflatten(2, heads)
        v = self.v(x).unflatten(2, heads)
        return rotated(q, grid, freqs, start_frame), rotated(k, grid, freqs, start_frame), v

    def place(self, kv_cache, tokens, current_end, sink):
        """Where the chunk's rows end in the cache, once it has lost its oldest ones, and how many those are."""
        new = current_end - kv_cache["global_end_index"].item()
        filled = kv_cache["local_end_index"].item()
        lost = max(0, filled + tokens - kv_cache["k"].shape[1]) if self.local_attn_size != -1 and new > 0 else 0
        return filled + new - lost, lost

    def forward(self, x, seq_lens, grid_sizes, freqs, block_mask, kv_cache=None, current_start=0, cache_start=None):
        q, k, v = self.turned_qkv(x, grid_sizes, freqs, current_start)
        sink = self.sink_size * int(grid_sizes[0][1] * grid_sizes[0][2])
        tokens, current_end = x.shape[1], current_start + x.shape[1]
        end, lost = self.place(kv_cache, tokens, current_end, sink)
        for name, rows in (("k", k), ("v", v)):
            kept = kv_cache[name][:, sink + lost : end - tokens + lost].clone()
            kv_cache[name][:, sink : sink + kept.shape[1]] = kept
            kv_cache[name][:, end - tokens : end] = rows
        kv_cache["global_end_index"].fill_(current_end)
        kv_cache["local_end_index"].fill_(end)
        seen = slice(max(0, end - self.max_attention_size), end)
        return apply(self.o, attention(q, kv_cache["k"][:, seen], kv_cache["v"][:, seen]).flatten(2))


class PairedSelfAttention(CausalWanSelfAttention):
    """LongLive's: what is to be written into the cache is returned, and written when all layers are done."""

    def forward(
        self, x, seq_lens, grid_sizes, freqs, block_mask, kv_cache=None, current_start=0, cache_start=None,
        sink_recache_after_switch=False,
    ):  # fmt: skip
        q, k, v = self.turned_qkv(x, grid_sizes, freqs, current_start)
        sink = self.sink_size * int(grid_sizes[0][1] * grid_sizes[0][2])
        tokens, current_end = x.shape[1], current_start + x.shape[1]
        again = current_end <= kv_cache["global_end_index"].item() and current_start > 0
        end, lost = self.place(kv_cache, tokens, current_end, sink)
        first = end - tokens if sink_recache_after_switch or not again else max(end - tokens, sink)
        after = {}
        for name, rows in (("k", k), ("v", v)):
            after[name] = kv_cache[name].clone()
            kept = after[name][:, sink + lost : end - tokens + lost].clone()
            after[name][:, sink : sink + kept.shape[1]] = kept
            after[name][:, first:end] = rows[:, first - end + tokens :]
        recent = max(sink, end - (self.max_attention_size - sink))
        seen = (torch.cat([after[name][:, :sink], after[name][:, recent:end]], dim=1) for name in ("k", "v"))
        return apply(self.o, attention(q, *seen).flatten(2)), (current_end, end, {**after, "again": again})


class CausalWanAttentionBlock(nn.Module):
    def __init__(self, attention_class, dim, ffn_dim, num_heads, local_attn_size=-1, sink_size=0, qk_norm=True):
        super().__init__()
        self.norm1 = WanLayerNorm(dim)
        self.self_attn = attention_class(dim, num_heads, local_attn_size, sink_size, qk_norm)
        self.norm3 = WanLayerNorm(dim, elementwise_affine=True)
        self.cross_attn = WanCrossAttention(dim, num_heads, qk_norm)
        self.norm2 = WanLayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self, x, e, seq_lens, grid_sizes, freqs, context, context_lens, block_mask, kv_cache=None,
        crossattn_cache=None, current_start=0, cache_start=None, **recache,
    ):  # fmt: skip
        """x [1, tokens, dim]; e [1, noise levels, 6, dim], one level a frame or one for all."""
        e = (e + self.modulation[:, None]).repeat_interleave(x.shape[1] // e.shape[1], dim=1).unbind(dim=2)
        y = self.self_attn(
            self.norm1(x) * (1 + e[1]) + e[0], seq_lens, grid_sizes, freqs, block_mask, kv_cache, current_start,
            cache_start, **recache,
        )  # fmt: skip
        y, writes = y if isinstance(self.self_attn, PairedSelfAttention) else (y, None)
        x = x + y * e[2]
        x = x + self.cross_attn(self.norm3(x), context, context_lens, crossattn_cache)
        x = x + self.ffn(self.norm2(x) * (1 + e[4]) + e[3]) * e[5]
        return x if writes is None else (x, writes)


class CausalHead(nn.Module):
    def __init__(self, dim, out_dim):
        super().__init__()
        self.norm = WanLayerNorm(dim)
        self.head = nn.Linear(dim, math.prod(PATCH) * out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def forward(self, x, e):
        """x [1, tokens, dim], e [1, noise levels, dim]."""
        e = (e[:, :, None] + self.modulation[:, None]).repeat_interleave(x.shape[1] // e.shape[1], dim=1)
        return self.head(self.norm(x) * (1 + e[:, :, 1]) + e[:, :, 0])


class CausalWanModel(nn.Module):
    """The denoiser; sizes are arguments, so that small ones can be tested."""

    attention_class = CausalWanSelfAttention

    def __init__(
        self, model_type="t2v", text_len=512, in_dim=16, dim=1536, ffn_dim=8960, freq_dim=256, text_dim=4096,
        out_dim=16, num_heads=12, num_layers=30, local_attn_size=-1, sink_size=0, qk_norm=True,
    ):  # fmt: skip
        super().__init__()
        self.model_type, self.patch_size = model_type, PATCH
        self.text_len, self.freq_dim, self.out_dim, self.dim = text_len, freq_dim, out_dim, dim
        self.num_heads, self.local_attn_size = num_heads, local_attn_size
        self.patch_embedding = nn.Conv3d(in_dim, dim, kernel_size=PATCH, stride=PATCH)
        self.text_embedding = nn.Sequential(nn.Linear(text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(
            CausalWanAttentionBlock(self.attention_class, dim, ffn_dim, num_heads, local_attn_size, sink_size, qk_norm)
            for _ in range(num_layers)
        )
        self.head = CausalHead(dim, out_dim)
        if model_type == "i2v":
            self.img_emb = nn.Linear(VISUAL_DIM, dim)
        pairs = dim // num_heads // 2
        across = pairs // 3
        angles = torch.cat([axis_angles(n) for n in (pairs - 2 * across, across, across)], dim=1)
        self.freqs = torch.polar(torch.ones_like(angles), angles)  # an attribute, so that casts leave it alone
        self.block_mask = None
        self.num_frame_per_block = 1

    def forward(self, *args, **kwargs):
        assert kwargs.get("kv_cache") is not None, "the training path is left out"
        return self._forward_inference(*args, **kwargs)

    def _forward_inference(
        self, x, t, context, seq_len, clip_fea=None, y=None, kv_cache=None, crossattn_cache=None, current_start=0,
        cache_start=0, **recache,
    ):  # fmt: skip
        """The flow of x [videos, in_dim, frames, height, width] at t [1, frames], or [1, 1] for all frames.

        `recache` is LongLive's sink_recache_after_switch.
        """
        if y is not None:
            x = torch.cat([x, y], dim=1)
        x = self.patch_embedding(x)
        grid_sizes = torch.tensor([list(x.shape[2:])])
        x = x.flatten(2).transpose(1, 2)
        half = self.freq_dim // 2
        frequencies = torch.tensor([10000.0 ** (-i / half) for i in range(half)], dtype=torch.float64)
        angles = t.double()[..., None] * frequencies.to(t.device)
        e = self.time_embedding(torch.cat([angles.cos(), angles.sin()], dim=-1).to(x.dtype))
        e0 = self.time_projection(e).unflatten(2, (6, self.dim))
        padded = [torch.cat([text, text.new_zeros(self.text_len - len(text), text.shape[1])]) for text in context]
        context = self.text_embedding(torch.stack(padded))
        if clip_fea is not None:
            context = torch.cat([self.img_emb(clip_fea), context], dim=1)
        writes = []
        for index, block in enumerate(self.blocks):
            x = block(
                x, e=e0, seq_lens=torch.tensor([x.shape[1]]), grid_sizes=grid_sizes, freqs=self.freqs,
                context=context, context_lens=None, block_mask=self.block_mask, kv_cache=kv_cache[index],
                crossattn_cache=crossattn_cache[index], current_start=current_start, cache_start=cache_start,
                **recache,
            )  # fmt: skip
            if isinstance(x, tuple):
                writes.append(x[1])
                x = x[0]
        if writes:
            self._apply_cache_updates(kv_cache, writes)
        x = self.head(x, e)
        frames, height, width = grid_sizes[0].tolist()
        video = x.view(len(x), frames, height, width, *PATCH[1:], self.out_dim)
        return video.permute(0, 6, 1, 2, 4, 3, 5).reshape(len(x), self.out_dim, frames, 2 * height, 2 * width)


class PairedCausalWanModel(CausalWanModel):
    """LongLive's."""

    attention_class = PairedSelfAttention

    def _apply_cache_updates(self, kv_cache, writes):
        for cache, (global_end, local_end, after) in zip(kv_cache, writes, strict=True):
            cache["k"], cache["v"] = after["k"], after["v"]
            if not after["again"]:
                cache["global_end_index"].fill_(global_end)
                cache["local_end_index"].fill_(local_end)


class WanDiffusionWrapper(nn.Module):
    """The denoiser, whose flow is turned into a clean prediction."""

    def __init__(self, model, timestep_shift=5.0):
        super().__init__()
        self.model = model.eval()
        self.scheduler = FlowMatchScheduler(timestep_shift)

    def forward(
        self, noisy_image_or_video, conditional_dict, timestep, kv_cache=None, crossattn_cache=None,
        current_start=None, cache_start=None, **recache,
    ):  # fmt: skip
        """[videos, frames, channels, height, width] of noise -> the flow and the clean video, as much of each."""
        conditional_dict = dict(conditional_dict)
        flow = self.model(
            noisy_image_or_video.transpose(1, 2), t=timestep, context=conditional_dict.pop("prompt_embeds"),
            seq_len=32760, kv_cache=kv_cache, crossattn_cache=crossattn_cache, current_start=current_start,
            cache_start=cache_start, **conditional_dict, **recache,
        ).transpose(1, 2)  # fmt: skip
        sigma = self.scheduler.sigma(timestep.expand(-1, flow.shape[1]).flatten()).reshape(1, -1, 1, 1, 1).double()
        return flow, (noisy_image_or_video.double() - sigma * flow.double()).to(flow.dtype)


class CausalInferencePipeline:
    """The pipeline between the encoders and the decoder: noise in, clean latents out, block by block.

    Self-Forcing's: caches are made once, and a rollout begins by setting their indices to 0.
    """

    def __init__(self, generator, frame_seq_length, num_frame_per_block=3, context_noise=0):
        self.generator, self.frame_seq_length, self.context_noise = generator, frame_seq_length, context_noise
        self.num_frame_per_block = generator.model.num_frame_per_block = num_frame_per_block
        self.local_attn_size = generator.model.local_attn_size
        self.kv_cache1 = None

    @torch.no_grad()
    def inference(self, noise, conditional_dict, initial_latent=None, independent_first_frame=False):
        """Clean latents [videos, frames, channels, height, width]; those of initial_latent come first, as they are."""
        self._begin(noise)
        given = 0 if initial_latent is None else initial_latent.shape[1]
        sizes = [self.num_frame_per_block] * ((given + noise.shape[1]) // self.num_frame_per_block)
        if independent_first_frame:
            sizes = [1, *sizes]
        self.output = noise.new_zeros(len(noise), given + noise.shape[1], *noise.shape[2:])
        start = 0
        for frames in sizes:
            block = slice(start, start + frames)
            conditions = self._conditions(conditional_dict, start)
            if start < given:
                clean, level = initial_latent[:, block], torch.zeros(1, 1, dtype=torch.int64)
            else:
                clean = self._denoised(noise[:, start - given : start - given + frames], conditions, start)
                level = torch.ones(1, frames, dtype=torch.int64) * self.context_noise
            self.output[:, block] = clean
            self._pass(clean, conditions, level, start)
            start += frames
        return self.output

    def _conditions(self, conditional_dict, start_frame):
        """Those of a block; a pipeline whose prompt changes gives others."""
        return conditional_dict

    def _denoised(self, noisy, conditions, start_frame):
        for index, step in enumerate(STEPS):
            level = torch.ones(1, noisy.shape[1], dtype=torch.int64) * step
            clean = self._pass(noisy, conditions, level, start_frame)[1]
            if index + 1 < len(STEPS):
                drawn = torch.randn(clean.shape, generator=torch.Generator().manual_seed(start_frame)).to(clean)
                levels = torch.full((len(drawn) * drawn.shape[1],), STEPS[index + 1])
                noisy = self.generator.scheduler.add_noise(clean.flatten(0, 1), drawn.flatten(0, 1), levels)
                noisy = noisy.unflatten(0, clean.shape[:2])
        return clean

    def _pass(self, video, conditions, level, start_frame, **recache):
        return self.generator(
            video, conditions, level, kv_cache=self.kv_cache1, crossattn_cache=self.crossattn_cache,
            current_start=start_frame * self.frame_seq_length, **recache,
        )  # fmt: skip

    def _begin(self, noise):
        if self.kv_cache1 is None:
            self.kv_cache1, self.crossattn_cache = self.caches(noise)
        for cache in self.kv_cache1:
            cache["global_end_index"], cache["local_end_index"] = torch.tensor([0]), torch.tensor([0])
        self._forget_text()

    def _forget_text(self):
        for cache in self.crossattn_cache:
            cache["is_init"] = False

    def caches(self, noise):
        model = self.generator.model
        frames = 21 if self.local_attn_size == -1 else self.local_attn_size
        sizes = len(noise), frames * self.frame_seq_length, model.num_heads, model.dim // model.num_heads
        layers = range(len(model.blocks))
        kv_cache = [
            {
                **{name: torch.zeros(sizes, dtype=noise.dtype, device=noise.device) for name in ("k", "v")},
                "global_end_index": torch.tensor([0]),
                "local_end_index": torch.tensor([0]),
            }
            for _ in layers
        ]
        return kv_cache, [{"k": None, "v": None, "is_init": False} for _ in layers]


class InteractiveCausalInferencePipeline(CausalInferencePipeline):
    """LongLive's: other prompts from given frames on, at which the cache of the newest frames is made anew."""

    global_sink = True

    def __init__(self, *args, switches=(), **kwargs):
        """switches: (frame, prompt_embeds), in order."""
        super().__init__(*args, **kwargs)
        self.switches = list(switches)

    def _begin(self, noise):
        self.kv_cache1, self.crossattn_cache = self.caches(noise)
        self._left = list(self.switches)
        self._switched = {}

    def _conditions(self, conditional_dict, start_frame):
        if self._left and start_frame >= self._left[0][0]:
            self._switched = {"prompt_embeds": self._left.pop(0)[1]}
            self._recache_after_switch(self.output, start_frame, {**conditional_dict, **self._switched})
        return {**conditional_dict, **self._switched}

    def _recache_after_switch(self, output, current_start_frame, new_conditional_dict):
        if not self.global_sink:
            for cache in self.kv_cache1:
                cache["k"].zero_()
                cache["v"].zero_()
        self._forget_text()
        if current_start_frame == 0:
            return
        window = current_start_frame if self.local_attn_size == -1 else self.local_attn_size
        start = current_start_frame - min(window, current_start_frame)
        past = output[:, start:current_start_frame]
        self.generator.model.block_mask = "as in training, and not heeded where there is a cache"
        level = torch.zeros(1, past.shape[1], dtype=torch.int64)
        self._pass(past, new_conditional_dict, level, start, sink_recache_after_switch=not self.global_sink)
        self._forget_text()


class CausalDiffusionInferencePipeline(CausalInferencePipeline):
    """Self-Forcing's with guidance: two forwards a step, each with a cache of its own."""

    def _begin(self, noise):
        super()._begin(noise)
        self.of_negative = self.caches(noise)

    def _pass(self, video, conditions, level, start_frame):
        place = {"current_start": start_frame * self.frame_seq_length}
        flow, _ = super()._pass(video, conditions, level, start_frame)
        negative = {**conditions, "prompt_embeds": -conditions["prompt_embeds"]}
        kv_cache, crossattn_cache = self.of_negative
        away, _ = self.generator(video, negative, level, kv_cache=kv_cache, crossattn_cache=crossattn_cache, **place)
        flow = away + 3 * (flow - away)
        sigma = self.generator.scheduler.sigma(level.expand(-1, flow.shape[1]).flatten()).reshape(1, -1, 1, 1, 1)
        return flow, video - sigma * flow
