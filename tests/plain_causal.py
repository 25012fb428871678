"""A plain causal video transformer with a KV cache, for docs/one_op.md: what one would write first."""

import torch
import torch.nn.functional as F
from torch import nn

GRID, FRAMES, CHANNELS = (4, 6), 3, 8  # tokens of a frame, frames of a chunk, numbers of a token
CHUNK = FRAMES * GRID[0] * GRID[1]  # tokens
WINDOW = 3  # chunks, the current one included
LEVELS = (1.0, 0.5, 0.0)  # of noise, in the passes over a chunk: the last one, over what was made, is clean


def rotated(x, start_frame):
    """x [tokens, heads, head_dim], pairs of its numbers turned by frame, row and column, as Wan does."""
    pairs = x.shape[-1] // 2
    counts = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    places = torch.cartesian_prod(*(torch.arange(n) for n in (FRAMES, *GRID))) + torch.tensor([start_frame, 0, 0])
    turns = [10000.0 ** (-torch.arange(n, dtype=torch.float64) / n) for n in counts]
    angles = torch.cat([places[:, axis : axis + 1] * turns[axis] for axis in range(3)], dim=1)[:, None]
    turned = torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)

    def forward(self, x, layer, chunk, cache):
        """x [tokens, dim]; cache[layer] is a list of the rotated k and the v of each chunk so far."""
        q, k = self.norm_q(self.q(x)), self.norm_k(self.k(x))
        q, k, v = (rows.unflatten(1, (self.heads, -1)) for rows in (q, k, self.v(x)))
        q, k = rotated(q, FRAMES * chunk), rotated(k, FRAMES * chunk)
        cache[layer][chunk:] = [(k, v)]  # in place of what the pass before left of this chunk
        k, v = (torch.cat(rows) for rows in zip(*cache[layer][-WINDOW:], strict=True))
        q, k, v = (rows.transpose(0, 1)[None] for rows in (q, k, v))
        return self.o(F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1).flatten(1))


class CausalTransformer(nn.Module):
    def __init__(self, dim=128, heads=2, layers=2, attention=Attention):
        super().__init__()
        self.enter, self.leave = nn.Linear(CHANNELS + 1, dim), nn.Linear(dim, CHANNELS)
        self.attentions = nn.ModuleList(attention(dim, heads) for _ in range(layers))
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(dim, dim), nn.GELU()) for _ in range(layers))

    def forward(self, x, level, chunk, cache):
        """The flow of x [tokens, CHANNELS] at a noise level."""
        x = self.enter(F.pad(x, (0, 1), value=level))
        for layer, (attention, mlp) in enumerate(zip(self.attentions, self.mlps, strict=True)):
            x = x + attention(x, layer, chunk, cache)
            x = x + mlp(x)
        return self.leave(x)


@torch.no_grad()
def make_chunk(model, chunk, cache):
    """Tokens [CHUNK, CHANNELS] out of noise; the last pass leaves the clean keys and values in the cache."""
    x = torch.randn(CHUNK, CHANNELS, generator=torch.Generator().manual_seed(chunk))
    for level, following in zip(LEVELS, (*LEVELS[1:], 0.0), strict=True):
        x = x - (level - following) * model(x, level, chunk, cache)
    return x


def generate(model, chunks):
    cache = [[] for _ in model.attentions]
    return torch.stack([make_chunk(model, chunk, cache) for chunk in range(chunks)])
