"""Matrix-Game-2.0's action module, restated plainly, and the attention to rolling caches that all of it uses.

Names, signatures and cache dictionaries are the published ones; nothing is fast or shared with worldkv_kernels.
"""

import math

import torch
from torch import nn

PATCH = (1, 2, 2)
ROWS_A_FRAME = 4  # video frames, and so rows of actions, in a latent frame


def turned(x, angles):
    """x [..., tokens, heads, dim], its pairs (2i, 2i + 1) turned by angles [tokens, dim / 2], in float64."""
    numbers = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    factors = torch.polar(torch.ones_like(angles), angles)[:, None].to(x.device)
    return torch.view_as_real(numbers * factors).flatten(-2).to(x.dtype)


def attention(q, k, v):
    """Softmax attention of [batch, tokens, heads, dim], every query to every key."""
    weights = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) / math.sqrt(q.shape[-1])
    return torch.einsum("bhqk,bkhd->bqhd", weights.softmax(dim=-1), v.float()).to(q.dtype)


def roll_in(cache, k, v, current_end):
    """Write the newest k and v [batch, n, heads, dim] into a cache, and return where they end in it.

    What is new goes behind what is there, and the oldest makes room; what is there already is overwritten.
    """
    new, size = k.shape[1], cache["k"].shape[1]
    seen, filled = cache["global_end_index"].item(), cache["local_end_index"].item()
    evicted = 0
    if current_end > seen and filled + new > size:
        evicted = filled + new - size
        for name in ("k", "v"):
            cache[name][:, : filled - evicted] = cache[name][:, evicted:filled].clone()
    end = filled + (current_end - seen) - evicted
    cache["k"][:, end - new : end] = k
    cache["v"][:, end - new : end] = v
    cache["global_end_index"].fill_(current_end)
    cache["local_end_index"].fill_(end)
    return end


class ActionRMSNorm(nn.Module):
    """The action module's norm: it has a weight, and does not use it."""

    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x / (x.square().mean(dim=-1, keepdim=True) + self.eps).sqrt()


class ActionModule(nn.Module):
    """What the mouse and the keyboard add to the tokens, each place of the picture on its own."""

    def __init__(
        self,
        mouse_dim_in=2,
        keyboard_dim_in=6,
        hidden_size=128,
        img_hidden_size=1536,
        keyboard_hidden_dim=1024,
        mouse_hidden_dim=1024,
        vae_time_compression_ratio=ROWS_A_FRAME,
        windows_size=3,
        heads_num=16,
        patch_size=PATCH,
        qk_norm=True,
        qkv_bias=False,
        rope_dim_list=(8, 28, 28),
        rope_theta=256,
        mouse_qk_dim_list=(8, 28, 28),
        enable_mouse=True,
        enable_keyboard=True,
        local_attn_size=6,
        blocks=(),
    ):
        super().__init__()
        self.enable_mouse, self.enable_keyboard = enable_mouse, enable_keyboard
        self.local_attn_size = local_attn_size
        self.heads_num = heads_num
        self.rope_theta = rope_theta
        self.time_dims = mouse_qk_dim_list[0]  # the other axes have one position, 0, and turn nothing
        self.rows_a_frame, self.windows_size = vae_time_compression_ratio, windows_size
        window = vae_time_compression_ratio * windows_size  # rows
        hidden = {"q": mouse_hidden_dim, "k": keyboard_hidden_dim}
        if enable_mouse:
            c = hidden["q"]
            self.mouse_mlp = nn.Sequential(
                nn.Linear(mouse_dim_in * window + img_hidden_size, c),
                nn.GELU(approximate="tanh"),
                nn.Linear(c, c),
                nn.LayerNorm(c),
            )
            self.t_qkv = nn.Linear(c, 3 * c, bias=qkv_bias)
            self.img_attn_q_norm, self.img_attn_k_norm = (ActionRMSNorm(c // heads_num) for _ in range(2))
            self.proj_mouse = nn.Linear(c, img_hidden_size, bias=qkv_bias)
        if enable_keyboard:
            c = hidden["k"]
            self.keyboard_embed = nn.Sequential(
                nn.Linear(keyboard_dim_in, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
            )
            self.key_attn_q_norm, self.key_attn_k_norm = (ActionRMSNorm(c // heads_num) for _ in range(2))
            self.mouse_attn_q = nn.Linear(img_hidden_size, c, bias=qkv_bias)
            self.keyboard_attn_kv = nn.Linear(hidden_size * window, 2 * c, bias=qkv_bias)
            self.proj_keyboard = nn.Linear(c, img_hidden_size, bias=qkv_bias)

    def windows(self, rows, start_frame, frames):
        """What the frames see of the rows [batch, n, c] since the start of the video: [batch, frames, window * c].

        Frame f sees rows 4 f - 12 .. 4 f - 1, so the newest row, 4 f, is seen from the next frame on; rows before the
        first are like it.
        """
        window = self.rows_a_frame * self.windows_size
        seen = []
        for frame in range(start_frame, start_frame + frames):
            first = self.rows_a_frame * frame - window
            seen.append(torch.cat([rows[:, max(0, row)] for row in range(first, first + window)], dim=1))
        return torch.stack(seen, dim=1)

    def in_time(self, q, k, start_frame):
        """q and k [batch, frames, heads, dim], turned by their frames; only the first dims turn."""
        pairs = self.time_dims // 2
        frequencies = [self.rope_theta ** (-2 * i / self.time_dims) for i in range(pairs)]
        frequencies += [0.0] * (q.shape[-1] // 2 - pairs)
        frames = torch.arange(start_frame, start_frame + q.shape[1], dtype=torch.float64)
        angles = frames[:, None] * torch.tensor(frequencies, dtype=torch.float64)
        return turned(q, angles), turned(k, angles)

    def attend(self, q, k, v, cache, end_frame):
        end = roll_in(cache, k, v, end_frame)
        seen = slice(max(0, end - self.local_attn_size), end)
        return cache["k"][:, seen], cache["v"][:, seen]

    def forward(
        self,
        x,
        tt,
        th,
        tw,
        mouse_condition=None,
        keyboard_condition=None,
        block_mask_mouse=None,
        block_mask_keyboard=None,
        is_causal=False,
        kv_cache_mouse=None,
        kv_cache_keyboard=None,
        start_frame=0,
        use_rope_keyboard=True,
        num_frame_per_block=3,
    ):
        """x [batch, tt * th * tw, dim]; the conditions are [batch, rows from the start up to this block's end, c]."""
        assert is_causal and use_rope_keyboard and tt == num_frame_per_block
        batch, places = len(x), int(th) * int(tw)
        frames = keyboard_condition.shape[1] // self.rows_a_frame + 1
        assert keyboard_condition.shape[1] % self.rows_a_frame == 1 and frames == start_frame + num_frame_per_block

        def by_place(tokens):  # [batch, frames * places, c] -> [batch * places, frames, c]
            return tokens.unflatten(1, (tt, places)).transpose(1, 2).flatten(0, 1)

        def by_frame(tokens):
            return tokens.unflatten(0, (batch, places)).transpose(1, 2).flatten(1, 2)

        if self.enable_mouse and mouse_condition is not None:
            mouse = self.windows(mouse_condition, start_frame, num_frame_per_block).repeat_interleave(places, dim=0)
            hidden = self.t_qkv(self.mouse_mlp(torch.cat([by_place(x), mouse], dim=-1)))
            q, k, v = hidden.unflatten(2, (3, self.heads_num, -1)).unbind(dim=2)
            q, k = self.in_time(self.img_attn_q_norm(q), self.img_attn_k_norm(k), start_frame)
            k, v = self.attend(q, k, v, kv_cache_mouse, start_frame + num_frame_per_block)
            x = x + self.proj_mouse(by_frame(attention(q, k, v).flatten(2)))

        if self.enable_keyboard and keyboard_condition is not None:
            keys = self.windows(self.keyboard_embed(keyboard_condition), start_frame, num_frame_per_block)
            k, v = self.keyboard_attn_kv(keys).unflatten(2, (2, self.heads_num, -1)).unbind(dim=2)
            q = by_place(self.mouse_attn_q(x)).unflatten(2, (self.heads_num, -1))
            q, k = self.in_time(self.key_attn_q_norm(q), self.key_attn_k_norm(k), start_frame)
            k, v = self.attend(q, k, v, kv_cache_keyboard, start_frame + num_frame_per_block)
            k, v = (tensor.repeat_interleave(places, dim=0) for tensor in (k, v))
            x = x + self.proj_keyboard(by_frame(attention(q, k, v).flatten(2)))
        return x
