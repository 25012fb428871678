"""LingBot-World-Fast, restated plainly, to test other code against; see plain_lingbot_pipeline for its pipeline.

Names of classes and parameters, signatures, cache dictionaries and the order of passes are the published ones; the
text encoder, the video autoencoder and the choice of dtypes are left out. Nothing is fast, nothing is shared with
worldkv_kernels. Linear layers compute in the dtype of their weights, all else in float32 (for weights in half
precision, as the published code has it, under autocast).
"""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

PATCH = (1, 2, 2)
POSITIONS = 1024
EVERYTHING = 1_000_000  # tokens: no limit


def axis_angles(pairs):
    """Angles of one axis of the rotary embedding, [positions, pairs], in float64."""
    frequencies = torch.tensor([10000.0 ** (-2 * i / (2 * pairs)) for i in range(pairs)], dtype=torch.float64)
    return torch.arange(POSITIONS, dtype=torch.float64)[:, None] * frequencies


def rotated(x, grid, freqs, start_frame):
    """x [batch, tokens, heads, head_dim], each token turned by its frame, row and column."""
    frames, height, width = grid
    pairs = x.shape[-1] // 2
    across = pairs // 3
    time, rows, columns = freqs.split([pairs - 2 * across, across, across], dim=1)
    frame, row, column = torch.tensor(
        [(frame, row, column) for frame in range(frames) for row in range(height) for column in range(width)]
    ).unbind(1)
    factors = torch.cat([time[start_frame + frame], rows[row], columns[column]], dim=1)  # [tokens, pairs]
    numbers = torch.view_as_complex(x.double().unflatten(-1, (pairs, 2)).contiguous())
    return torch.view_as_real(numbers * factors[:, None].to(x.device)).flatten(-2).to(x.dtype)


def attention(q, k, v):
    """Softmax attention of [batch, tokens, heads, head_dim], every query to every key."""
    q, k, v = (x.float().transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(dim=-1)
    return (weights @ v).transpose(1, 2)


def apply(layer, x):
    """A linear layer in the dtype of its weights."""
    return layer(x.to(layer.weight.dtype))


def wide(layer, x):
    """A linear layer in float32, whatever its weights are, also under autocast."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.float(), layer.weight.float(), layer.bias.float())


class WanRMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        mean_square = x.float().square().mean(dim=-1, keepdim=True)
        return (x.float() / (mean_square + self.eps).sqrt()).to(x.dtype) * self.weight


class WanLayerNorm(nn.LayerNorm):
    def __init__(self, dim, eps=1e-6, elementwise_affine=False):
        super().__init__(dim, eps=eps, elementwise_affine=elementwise_affine)

    def forward(self, x):
        weight, bias = (None, None) if self.weight is None else (self.weight.float(), self.bias.float())
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class CausalWanSelfAttention(nn.Module):
    """Attention to the rolling cache, which keeps the first `sink_size` frames and the newest others."""

    def __init__(self, dim, num_heads, local_attn_size=-1, sink_size=0, qk_norm=True, eps=1e-6):
        super().__init__()
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.local_attn_size = local_attn_size  # frames; -1: the cache holds the whole video
        self.sink_size = sink_size
        self.qk_norm = qk_norm
        self.eps = eps
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q = WanRMSNorm(dim, eps) if qk_norm else nn.Identity()
        self.norm_k = WanRMSNorm(dim, eps) if qk_norm else nn.Identity()

    def forward(
        self,
        x,
        seq_lens,
        grid_sizes,
        freqs,
        kv_cache=None,
        current_start=0,
        max_attention_size=EVERYTHING,
        retrieval_kv=None,
    ):
        grid = grid_sizes[0].tolist()
        frame_tokens = grid[1] * grid[2]
        tokens = x.shape[1]
        heads = (self.num_heads, self.head_dim)
        q = self.norm_q(apply(self.q, x)).unflatten(2, heads)
        k = self.norm_k(apply(self.k, x)).unflatten(2, heads)
        v = apply(self.v, x).unflatten(2, heads)
        q = rotated(q, grid, freqs, current_start // frame_tokens)
        k = rotated(k, grid, freqs, current_start // frame_tokens)

        size = kv_cache["k"].shape[1]
        seen = kv_cache["global_end_index"].item()
        filled = kv_cache["local_end_index"].item()
        new = current_start + tokens - seen  # 0 when the chunk is already in the cache
        too_many = filled + new - size
        if self.local_attn_size != -1 and too_many > 0:
            sink = self.sink_size * frame_tokens
            for name in ("k", "v"):
                kept = kv_cache[name][:, sink + too_many : filled].clone()
                kv_cache[name][:, sink : sink + kept.shape[1]] = kept
            filled -= too_many
        end = filled + new
        kv_cache["k"][:, end - tokens : end] = k.to(kv_cache["k"].dtype)
        kv_cache["v"][:, end - tokens : end] = v.to(kv_cache["v"].dtype)
        kv_cache["global_end_index"].fill_(current_start + tokens)
        kv_cache["local_end_index"].fill_(end)

        first = max(0, end - max_attention_size)
        window_k, window_v = kv_cache["k"][:, first:end], kv_cache["v"][:, first:end]
        if retrieval_kv is not None:
            sink = self.sink_size * frame_tokens
            recent = max(sink, end - retrieval_kv["recent_frames"] * frame_tokens)
            window_k, window_v = (
                torch.cat([kv_cache[name][:, :sink], retrieval_kv[name], kv_cache[name][:, recent:end]], dim=1)
                for name in ("k", "v")
            )
        return apply(self.o, attention(q, window_k, window_v).flatten(2))


class WanCrossAttention(nn.Module):
    """Attention to the text, whose keys and values are computed in the first pass and kept."""

    def __init__(self, dim, num_heads, qk_norm=True, eps=1e-6):
        super().__init__()
        self.heads = (num_heads, dim // num_heads)
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q = WanRMSNorm(dim, eps) if qk_norm else nn.Identity()
        self.norm_k = WanRMSNorm(dim, eps) if qk_norm else nn.Identity()

    def forward(self, x, context, context_lens, crossattn_cache=None):
        q = self.norm_q(apply(self.q, x)).unflatten(2, self.heads)
        if not crossattn_cache["is_init"]:
            crossattn_cache["k"] = self.norm_k(apply(self.k, context)).unflatten(2, self.heads)
            crossattn_cache["v"] = apply(self.v, context).unflatten(2, self.heads)
            crossattn_cache["is_init"] = True
        return apply(self.o, attention(q, crossattn_cache["k"], crossattn_cache["v"]).flatten(2))


class CausalWanAttentionBlock(nn.Module):
    def __init__(self, dim, ffn_dim, num_heads, local_attn_size=-1, sink_size=0, qk_norm=True, eps=1e-6):
        super().__init__()
        self.local_attn_size = local_attn_size
        self.norm1 = WanLayerNorm(dim, eps)
        self.self_attn = CausalWanSelfAttention(dim, num_heads, local_attn_size, sink_size, qk_norm, eps)
        self.norm3 = WanLayerNorm(dim, eps, elementwise_affine=True)
        self.cross_attn = WanCrossAttention(dim, num_heads, qk_norm, eps)
        self.norm2 = WanLayerNorm(dim, eps)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        self.cam_injector_layer1 = nn.Linear(dim, dim)
        self.cam_injector_layer2 = nn.Linear(dim, dim)
        self.cam_scale_layer = nn.Linear(dim, dim)
        self.cam_shift_layer = nn.Linear(dim, dim)

    def forward(
        self,
        x,
        e,
        seq_lens,
        grid_sizes,
        freqs,
        context,
        context_lens,
        dit_cond_dict=None,
        kv_cache=None,
        crossattn_cache=None,
        current_start=0,
        max_attention_size=EVERYTHING,
        retrieval_kv=None,
    ):
        """x [1, tokens, dim], e [1, tokens, 6, dim]."""
        e = (e + self.modulation.float()).unbind(dim=2)
        y = self.self_attn(
            self.norm1(x).float() * (1 + e[1]) + e[0],
            seq_lens,
            grid_sizes,
            freqs,
            kv_cache,
            current_start,
            max_attention_size,
            retrieval_kv=retrieval_kv,
        )
        x = x + y * e[2]
        if dit_cond_dict is not None:
            camera = dit_cond_dict["c2ws_plucker_emb"]
            hidden = apply(self.cam_injector_layer2, F.silu(apply(self.cam_injector_layer1, camera))) + camera
            x = (1 + apply(self.cam_scale_layer, hidden)) * x + apply(self.cam_shift_layer, hidden)
        x = x + self.cross_attn(self.norm3(x), context, context_lens, crossattn_cache)
        y = self.norm2(x).float() * (1 + e[4]) + e[3]
        return x + apply(self.ffn[2], self.ffn[1](apply(self.ffn[0], y))) * e[5]


class CausalHead(nn.Module):
    def __init__(self, dim, out_dim, eps=1e-6):
        super().__init__()
        self.norm = WanLayerNorm(dim, eps)
        self.head = nn.Linear(dim, math.prod(PATCH) * out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def forward(self, x, e):
        shift, scale = (e[:, :, None] + self.modulation.float()).unbind(dim=2)
        return wide(self.head, self.norm(x).float() * (1 + scale) + shift)


class WanModelFast(nn.Module):
    """The denoiser; sizes are arguments, so that small ones can be tested."""

    def __init__(
        self,
        control_type="cam",
        text_len=512,
        in_dim=36,
        dim=5120,
        ffn_dim=13824,
        freq_dim=256,
        text_dim=4096,
        out_dim=16,
        num_heads=40,
        num_layers=40,
        local_attn_size=-1,
        sink_size=0,
        qk_norm=True,
        eps=1e-6,
    ):
        super().__init__()
        self.config = SimpleNamespace(dim=dim, num_heads=num_heads, num_layers=num_layers, sink_size=sink_size)
        self.patch_size = PATCH
        self.text_len, self.freq_dim, self.out_dim, self.dim = text_len, freq_dim, out_dim, dim
        self.local_attn_size = local_attn_size
        control_dim = {"cam": 6, "act": 7}[control_type]
        self.patch_embedding = nn.Conv3d(in_dim, dim, kernel_size=PATCH, stride=PATCH)
        self.patch_embedding_wancamctrl = nn.Linear(control_dim * 8 * 8 * math.prod(PATCH), dim)
        self.c2ws_hidden_states_layer1 = nn.Linear(dim, dim)
        self.c2ws_hidden_states_layer2 = nn.Linear(dim, dim)
        self.text_embedding = nn.Sequential(nn.Linear(text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(
            CausalWanAttentionBlock(dim, ffn_dim, num_heads, local_attn_size, sink_size, qk_norm, eps)
            for _ in range(num_layers)
        )
        self.head = CausalHead(dim, out_dim, eps)
        pairs = dim // num_heads // 2
        across = pairs // 3
        angles = torch.cat([axis_angles(n) for n in (pairs - 2 * across, across, across)], dim=1)
        self.freqs = torch.polar(torch.ones_like(angles), angles)  # an attribute, so that casts leave it alone

    def forward(
        self,
        x,
        t,
        context,
        seq_len,
        y=None,
        dit_cond_dict=None,
        kv_cache=None,
        crossattn_cache=None,
        current_start=0,
        max_attention_size=EVERYTHING,
        retrieval_kv=None,
    ):
        """The flow of x, a list of one video [16, frames, height, width], at t [1]."""
        x = [torch.cat([noisy, condition]) for noisy, condition in zip(x, y, strict=True)]
        weight = self.patch_embedding.weight
        x = [self.patch_embedding(video[None].to(weight.dtype)) for video in x]
        grid_sizes = torch.tensor([list(video.shape[2:]) for video in x])
        x = torch.cat([video.flatten(2).transpose(1, 2) for video in x])
        tokens = x.shape[1]
        seq_lens = torch.tensor([tokens])
        assert tokens <= seq_len

        half = self.freq_dim // 2
        frequencies = torch.tensor([10000.0 ** (-i / half) for i in range(half)], dtype=torch.float64)
        angles = t.double()[:, None] * frequencies.to(t.device)  # from the host in each pass, as published
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=1).float()[:, None].expand(-1, tokens, -1)
        e = wide(self.time_embedding[2], F.silu(wide(self.time_embedding[0], sinusoids)))
        e0 = wide(self.time_projection[1], F.silu(e)).unflatten(2, (6, self.dim))

        padded = [torch.cat([text, text.new_zeros(self.text_len - len(text), text.shape[1])]) for text in context]
        hidden = F.gelu(apply(self.text_embedding[0], torch.stack(padded)), approximate="tanh")
        context = apply(self.text_embedding[2], hidden)

        if dit_cond_dict is not None:
            camera = torch.cat([patches(video) for video in dit_cond_dict["c2ws_plucker_emb"]], dim=1)
            camera = apply(self.patch_embedding_wancamctrl, camera)
            hidden = F.silu(apply(self.c2ws_hidden_states_layer1, camera))
            dit_cond_dict = {"c2ws_plucker_emb": camera + apply(self.c2ws_hidden_states_layer2, hidden)}

        for layer, block in enumerate(self.blocks):
            x = block(
                x,
                e=e0,
                seq_lens=seq_lens,
                grid_sizes=grid_sizes,
                freqs=self.freqs,
                context=context,
                context_lens=None,
                dit_cond_dict=dit_cond_dict,
                kv_cache=kv_cache[layer],
                crossattn_cache=crossattn_cache[layer],
                current_start=current_start,
                max_attention_size=max_attention_size,
                retrieval_kv=retrieval_kv[layer] if retrieval_kv else None,
            )
        return [self.unpatchify(video, grid).float() for video, grid in zip(self.head(x, e), grid_sizes, strict=True)]

    def unpatchify(self, tokens, grid):
        """[tokens, 2 * 2 * channels], channels fastest -> [channels, frames, height, width]."""
        frames, height, width = grid.tolist()
        video = tokens.view(frames, height, width, *PATCH[1:], self.out_dim)
        return video.permute(5, 0, 1, 3, 2, 4).reshape(self.out_dim, frames, 2 * height, 2 * width)


def patches(video):
    """[1, channels, frames, height, width] -> [1, tokens, channels * 2 * 2], the place in the patch fastest."""
    _, channels, frames, height, width = video.shape
    video = video.reshape(channels, frames, height // 2, 2, width // 2, 2)
    return video.permute(1, 2, 4, 0, 3, 5).reshape(1, -1, channels * 4)
