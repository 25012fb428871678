"""Matrix-Game-2.0's causal denoiser, restated plainly, to test other code against.

Names of classes and parameters, signatures and cache dictionaries are the published ones. The training path is left
out, what is fixed there at 880 tokens a frame is an argument; nothing is fast or shared with worldkv_kernels.
All computes in the dtype of the weights but for attention and rotations, in float32 or wider.
"""

import math

import torch
from plain_matrix_game_actions import PATCH, ActionModule, attention, roll_in, turned
from torch import nn

POSITIONS = 1024
VISUAL_DIM = 1280  # of the image encoder's tokens


class WanRMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        mean_square = x.float().square().mean(dim=-1, keepdim=True)
        return (x.float() / (mean_square + self.eps).sqrt()).to(x.dtype) * self.weight


class WanLayerNorm(nn.LayerNorm):
    def __init__(self, dim, eps=1e-6, elementwise_affine=False):
        super().__init__(dim, eps=eps, elementwise_affine=elementwise_affine)


class CausalWanSelfAttention(nn.Module):
    """Attention to a rolling cache, of which the newest `max_attention_size` tokens are seen."""

    def __init__(self, dim, num_heads, local_attn_size=-1, sink_size=0, qk_norm=True, eps=1e-6, frame_seqlen=880):
        super().__init__()
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.local_attn_size = local_attn_size
        self.sink_size = sink_size
        self.qk_norm = qk_norm
        self.eps = eps
        self.max_attention_size = (15 if local_attn_size == -1 else local_attn_size) * frame_seqlen
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q = WanRMSNorm(dim, eps) if qk_norm else nn.Identity()
        self.norm_k = WanRMSNorm(dim, eps) if qk_norm else nn.Identity()

    def forward(self, x, seq_lens, grid_sizes, freqs, block_mask, kv_cache=None, current_start=0, cache_start=None):
        """x [batch, tokens, dim], grid_sizes (frames, rows, columns), freqs [positions, head_dim / 2] complex."""
        frames, height, width = grid_sizes.tolist()
        pairs = self.head_dim // 2
        across = pairs // 3
        first = current_start // (height * width)
        time, rows, columns = freqs.angle().split([pairs - 2 * across, across, across], dim=1)
        angles = torch.stack(
            [
                torch.cat([time[frame], rows[row], columns[column]])
                for frame in range(first, first + frames)
                for row in range(height)
                for column in range(width)
            ]
        )
        heads = (self.num_heads, self.head_dim)
        q = turned(self.norm_q(self.q(x)).unflatten(2, heads), angles)
        k = turned(self.norm_k(self.k(x)).unflatten(2, heads), angles)
        v = self.v(x).unflatten(2, heads)
        end = roll_in(kv_cache, k, v, current_start + x.shape[1])
        seen = slice(max(0, end - self.max_attention_size), end)
        return self.o(attention(q, kv_cache["k"][:, seen], kv_cache["v"][:, seen]).flatten(2))


class WanI2VCrossAttention(nn.Module):
    """Attention to the image, whose keys and values are computed in the first pass and kept."""

    def __init__(self, dim, num_heads, qk_norm=True, eps=1e-6):
        super().__init__()
        self.heads = (num_heads, dim // num_heads)
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q = WanRMSNorm(dim, eps) if qk_norm else nn.Identity()
        self.norm_k = WanRMSNorm(dim, eps) if qk_norm else nn.Identity()

    def forward(self, x, context, crossattn_cache):
        q = self.norm_q(self.q(x)).unflatten(2, self.heads)
        if not crossattn_cache["is_init"]:
            crossattn_cache["is_init"] = True
            crossattn_cache["k"] = self.norm_k(self.k(context)).unflatten(2, self.heads)
            crossattn_cache["v"] = self.v(context).unflatten(2, self.heads)
        return self.o(attention(q, crossattn_cache["k"], crossattn_cache["v"]).flatten(2))


class CausalWanAttentionBlock(nn.Module):
    def __init__(
        self,
        dim,
        ffn_dim,
        num_heads,
        local_attn_size=-1,
        sink_size=0,
        qk_norm=True,
        cross_attn_norm=True,
        action_config=None,
        block_idx=0,
        eps=1e-6,
        frame_seqlen=880,
    ):
        super().__init__()
        self.action_model = None
        if action_config and block_idx in action_config["blocks"]:
            self.action_model = ActionModule(**action_config, local_attn_size=local_attn_size)
        self.norm1 = WanLayerNorm(dim, eps)
        self.self_attn = CausalWanSelfAttention(dim, num_heads, local_attn_size, sink_size, qk_norm, eps, frame_seqlen)
        self.norm3 = WanLayerNorm(dim, eps, elementwise_affine=True) if cross_attn_norm else nn.Identity()
        self.cross_attn = WanI2VCrossAttention(dim, num_heads, qk_norm, eps)
        self.norm2 = WanLayerNorm(dim, eps)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self,
        x,
        e,
        seq_lens,
        grid_sizes,
        freqs,
        context,
        block_mask=None,
        block_mask_mouse=None,
        block_mask_keyboard=None,
        num_frame_per_block=3,
        use_rope_keyboard=False,
        mouse_cond=None,
        keyboard_cond=None,
        kv_cache=None,
        kv_cache_mouse=None,
        kv_cache_keyboard=None,
        crossattn_cache=None,
        current_start=0,
        cache_start=None,
        context_lens=None,
    ):
        """x [batch, tokens, dim]; e [batch, noise levels, 6, dim], one level a frame or one for all."""
        a_level = x.shape[1] // e.shape[1]  # tokens
        e = (e + self.modulation[:, None]).repeat_interleave(a_level, dim=1).unbind(dim=2)
        y = self.self_attn(
            self.norm1(x) * (1 + e[1]) + e[0],
            seq_lens,
            grid_sizes,
            freqs,
            block_mask,
            kv_cache,
            current_start,
            cache_start,
        )
        x = x + y * e[2]
        x = x + self.cross_attn(self.norm3(x), context, crossattn_cache)
        if self.action_model is not None:
            x = self.action_model(
                x,
                *grid_sizes,
                mouse_cond,
                keyboard_cond,
                block_mask_mouse,
                block_mask_keyboard,
                is_causal=True,
                kv_cache_mouse=kv_cache_mouse,
                kv_cache_keyboard=kv_cache_keyboard,
                start_frame=current_start // int(grid_sizes[1] * grid_sizes[2]),
                use_rope_keyboard=use_rope_keyboard,
                num_frame_per_block=num_frame_per_block,
            )
        return x + self.ffn(self.norm2(x) * (1 + e[4]) + e[3]) * e[5]


class CausalHead(nn.Module):
    def __init__(self, dim, out_dim, eps=1e-6):
        super().__init__()
        self.norm = WanLayerNorm(dim, eps)
        self.head = nn.Linear(dim, math.prod(PATCH) * out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def forward(self, x, e):
        """x [batch, tokens, dim], e [batch, noise levels, dim]."""
        e = (e[:, :, None] + self.modulation[:, None]).repeat_interleave(x.shape[1] // e.shape[1], dim=1)
        return self.head(self.norm(x) * (1 + e[:, :, 1]) + e[:, :, 0])


class MLPProj(nn.Module):
    def __init__(self, in_dim, out_dim):
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(in_dim),
            nn.Linear(in_dim, in_dim),
            nn.GELU(),
            nn.Linear(in_dim, out_dim),
            nn.LayerNorm(out_dim),
        )

    def forward(self, image_embeds):
        return self.proj(image_embeds)


class CausalWanModel(nn.Module):
    """The denoiser; sizes are arguments, so that small ones can be tested."""

    def __init__(
        self,
        model_type="i2v",
        patch_size=PATCH,
        text_len=512,
        in_dim=36,
        dim=1536,
        ffn_dim=8960,
        freq_dim=256,
        text_dim=4096,
        out_dim=16,
        num_heads=12,
        num_layers=30,
        local_attn_size=-1,
        sink_size=0,
        qk_norm=True,
        cross_attn_norm=True,
        action_config=None,
        eps=1e-6,
        inject_sample_info=False,
        frame_seqlen=880,
    ):
        super().__init__()
        self.patch_size = tuple(patch_size)
        self.dim, self.freq_dim, self.out_dim = dim, freq_dim, out_dim
        self.num_heads, self.num_layers = num_heads, num_layers
        self.local_attn_size = local_attn_size
        self.patch_embedding = nn.Conv3d(in_dim, dim, kernel_size=self.patch_size, stride=self.patch_size)
        self.time_embedding = nn.Sequential(nn.Linear(freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        block = (ffn_dim, num_heads, local_attn_size, sink_size, qk_norm, cross_attn_norm, action_config)
        self.blocks = nn.ModuleList(
            CausalWanAttentionBlock(dim, *block, block_idx=index, eps=eps, frame_seqlen=frame_seqlen)
            for index in range(num_layers)
        )
        self.head = CausalHead(dim, out_dim, eps)
        self.img_emb = MLPProj(VISUAL_DIM, dim)
        pairs = dim // num_heads // 2
        across = pairs // 3
        frequencies = [10000.0 ** (-i / n) for n in (pairs - 2 * across, across, across) for i in range(n)]
        angles = torch.outer(torch.arange(POSITIONS).double(), torch.tensor(frequencies, dtype=torch.float64))
        self.freqs = torch.polar(torch.ones_like(angles), angles)  # an attribute, so that casts leave it alone
        self.block_mask = self.block_mask_mouse = self.block_mask_keyboard = None
        self.use_rope_keyboard = True
        self.num_frame_per_block = 1

    @property
    def dtype(self):
        return self.patch_embedding.weight.dtype

    def forward(self, *args, **kwargs):
        assert kwargs.get("kv_cache") is not None, "the training path is left out"
        return self._forward_inference(*args, **kwargs)

    def _forward_inference(
        self,
        x,
        t,
        visual_context,
        cond_concat,
        mouse_cond=None,
        keyboard_cond=None,
        kv_cache=None,
        kv_cache_mouse=None,
        kv_cache_keyboard=None,
        crossattn_cache=None,
        current_start=0,
        cache_start=0,
    ):
        """The flow of x [batch, 16, frames, height, width] at t [batch, frames], or [batch, 1] for all frames."""
        x = self.patch_embedding(torch.cat([x, cond_concat], dim=1))
        grid_sizes = torch.tensor(x.shape[2:])
        x = x.flatten(2).transpose(1, 2)

        half = self.freq_dim // 2
        frequencies = torch.tensor([10000.0 ** (-i / half) for i in range(half)], dtype=torch.float64)
        angles = t.double()[..., None] * frequencies.to(t.device)  # from the host in each pass, as published
        e = self.time_embedding(torch.cat([angles.cos(), angles.sin()], dim=-1).to(x.dtype))
        e0 = self.time_projection(e).unflatten(2, (6, self.dim))
        context = self.img_emb(visual_context)

        for index, block in enumerate(self.blocks):
            x = block(
                x,
                e=e0,
                seq_lens=torch.tensor([x.shape[1]] * len(x)),
                grid_sizes=grid_sizes,
                freqs=self.freqs,
                context=context,
                mouse_cond=mouse_cond,
                context_lens=None,
                keyboard_cond=keyboard_cond,
                block_mask=self.block_mask,
                block_mask_mouse=self.block_mask_mouse,
                block_mask_keyboard=self.block_mask_keyboard,
                use_rope_keyboard=self.use_rope_keyboard,
                num_frame_per_block=self.num_frame_per_block,
                kv_cache=kv_cache[index],
                kv_cache_mouse=kv_cache_mouse[index],
                kv_cache_keyboard=kv_cache_keyboard[index],
                crossattn_cache=crossattn_cache[index],
                current_start=current_start,
                cache_start=cache_start,
            )
        return self.unpatchify(self.head(x, e), grid_sizes)

    def unpatchify(self, tokens, grid_sizes):
        """[batch, tokens, 2 * 2 * channels], channels fastest -> [batch, channels, frames, height, width]."""
        frames, height, width = grid_sizes.tolist()
        video = tokens.view(len(tokens), frames, height, width, *self.patch_size[1:], self.out_dim)
        return video.permute(0, 6, 1, 2, 4, 3, 5).reshape(len(tokens), self.out_dim, frames, 2 * height, 2 * width)
