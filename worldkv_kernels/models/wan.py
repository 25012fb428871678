"""What denoisers of the Wan family share: attention, modulated norms, embeddings, patches and the head.

Parameter names are those of the published state dicts. Linear layers run in the model's dtype; the residual stream, the
norms, the modulation and the head in fp32, unless a model is published otherwise. Tokens are [tokens, dim]: frames,
rows and columns in that order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..memory.world_memory import WorldMemory
from .fp8 import Rounded, quantized

PATCH = (1, 2, 2)  # frames, rows and columns of latents in a token
# What is held in fp32 whatever the model's dtype, by a part of its name.
FP32_PARAMETERS = ("time_embedding.", "time_projection.", "head.", "norm3.", "modulation")
_MOST_SHAPES = 256  # that a compiled function may be made for in a process
# The layers that write into the residual stream of a block.
RESIDUAL_LAYERS = ("self_attn.o", "cross_attn.o", "ffn.2")


class Elementwise(NamedTuple):
    """What stands between the matrix products of a block; see `elementwise`."""

    normed: Callable[..., torch.Tensor | Rounded]
    gated: Callable[..., torch.Tensor]
    gated_and_moved: Callable[..., torch.Tensor]
    gelu: Callable[[torch.Tensor], torch.Tensor | Rounded]
    quantized: Callable[[torch.Tensor], Rounded]


def _normed(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
    return modulated_norm(x, scale, shift, eps).to(dtype)


def _gated(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return torch.addcmul(x, y, gate)


def _gated_and_moved(
    x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor
) -> torch.Tensor:
    return moved(torch.addcmul(x, y, gate), scale, shift)


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu_by_sigmoid(x: torch.Tensor) -> torch.Tensor:
    """The same function, since (1 + tanh(u)) / 2 is sigmoid(2u), in fewer instructions where it is compiled."""
    wide = x.float()
    return (wide * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3))).to(x.dtype)


def _normed_in_fp8(*arguments: Any) -> Rounded:
    return quantized(_normed(*arguments))


_EAGER = Elementwise(_normed, _gated, _gated_and_moved, _gelu, quantized)


@lru_cache
def elementwise(compiled: bool, in_fp8: bool) -> Elementwise:
    """Eager, or each as one kernel by torch.compile: less rounding in between, so results differ in their last digits.
    In FP8, what goes into linear layers is rounded where it is made.

    A shape is compiled for by itself: a model has up to three of each, a process may have many models, and torch's own
    limit, 8 of a function, is an error past it.
    """
    functions = _EAGER._replace(gelu=_gelu_by_sigmoid) if compiled else _EAGER
    if in_fp8:
        functions = functions._replace(normed=_normed_in_fp8, gelu=lambda x, gelu=functions.gelu: quantized(gelu(x)))
    if not compiled:
        return functions
    torch._dynamo.config.recompile_limit = max(_MOST_SHAPES, torch._dynamo.config.recompile_limit)
    return Elementwise(*(torch.compile(function, fullgraph=True, dynamic=False) for function in functions))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) in fp32, rounded to x's dtype, then times the weight: Wan's QK-norm."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], None, self.eps) * self.weight


class _Projections(nn.Module):
    """The linear layers and the QK-norm of an attention."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = (RMSNorm(dim, eps) for _ in range(2))


class SelfAttention(_Projections):
    """Self-attention of a chunk over the window of a WorldMemory; norm and rotation are the memory's."""

    def forward(self, x: torch.Tensor, memory: WorldMemory, layer: int) -> torch.Tensor:
        """x [tokens, dim] in the memory's dtype -> [tokens, dim]; the chunk's keys and values go into the memory."""
        attended = memory.attend(layer, self.q(x), self.k(x), self.v(x), self.norm_q.weight, self.norm_k.weight)
        return self.o(attended.flatten(1))


class CrossAttention(_Projections):
    """Attention to a context of text or image tokens, whose keys and values are computed once and passed in."""

    def keys_values(self, context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of context [n, dim], as [1, heads, n, head_dim]."""
        return self._split(self.norm_k(self.k(context))), self._split(self.v(context))

    def forward(self, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """x [tokens, dim], attending to all of what `keys_values` gave -> [tokens, dim]."""
        q = self._split(self.norm_q(self.q(x)))
        return self.o(F.scaled_dot_product_attention(q, keys, values)[0].transpose(0, 1).flatten(1))

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(1, (self.num_heads, -1)).transpose(0, 1)[None]


class Block(nn.Module):
    """The parts of a block, each of which takes the residual stream x [tokens, dim] fp32 and returns the next one.

    A model may keep the stream in another dtype, then with modulation in that dtype, too. `modulation` arguments are
    [6, dim] fp32 as `modulated_by` gives them: shift, 1 + scale and gate of the self-attention, then those of the
    feed-forward.
    """

    # What `elementwise` is made for, see Denoiser.compile_elementwise and to_fp8.
    compiled = in_fp8 = False

    def __init__(self, dim: int, ffn_dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.self_attn = SelfAttention(dim, num_heads, eps)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU("tanh"), nn.Linear(ffn_dim, dim))
        self.modulation = nn.Parameter(torch.zeros(1, 6, dim))

    def modulated_by(self, projected: torch.Tensor) -> torch.Tensor:
        """The block's modulation at a noise level, from `time_projection`'s [6, dim], with 1 added to the scales."""
        e = (self.modulation[0] + projected).float()
        e[1::3] += 1
        return e

    def attend(self, x: torch.Tensor, modulation: torch.Tensor, memory: WorldMemory, layer: int) -> torch.Tensor:
        """Self-attention: x + gate * self_attn(norm(x) * (1 + scale) + shift)."""
        return self.elementwise.gated(x, self._attended(x, modulation, memory, layer), modulation[2])

    def feed_forward(self, x: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
        """Feed-forward: x + gate * ffn(norm(x) * (1 + scale) + shift)."""
        shift, scale, gate = modulation[3:]
        hidden = self.ffn[0](self.elementwise.normed(x, scale, shift, self.eps, self.dtype))
        return self.elementwise.gated(x, self.ffn[2](self.elementwise.gelu(hidden)), gate)

    def _attended(self, x: torch.Tensor, modulation: torch.Tensor, memory: WorldMemory, layer: int) -> torch.Tensor:
        shift, scale, _ = modulation[:3]
        return self.self_attn(self.elementwise.normed(x, scale, shift, self.eps, self.dtype), memory, layer)

    @property
    def elementwise(self) -> Elementwise:
        return elementwise(self.compiled, self.in_fp8)

    def after_elementwise(self) -> tuple[nn.Module, ...]:
        """The linear layers whose inputs `normed` and `gelu` make."""
        return (self.self_attn.q, self.self_attn.k, self.self_attn.v, self.ffn[0], self.ffn[2])

    @property
    def dtype(self) -> torch.dtype:
        """Of what goes into the linear layers, but in FP8, and comes out."""
        return self.ffn[0].bias.dtype


class TextBlock(Block):
    """A block that also attends to a context of text or image tokens."""

    def __init__(self, dim: int, ffn_dim: int, num_heads: int, eps: float) -> None:
        super().__init__(dim, ffn_dim, num_heads, eps)
        self.norm3 = nn.LayerNorm(dim, eps)
        self.cross_attn = CrossAttention(dim, num_heads, eps)

    def cross_attend(self, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Cross-attention: x + cross_attn(norm3(x))."""
        weight, bias = self.norm3.weight.to(x.dtype), self.norm3.bias.to(x.dtype)
        return x + self.cross_attn(self.elementwise.normed(x, weight, bias, self.eps, self.dtype), keys, values)

    def after_elementwise(self) -> tuple[nn.Module, ...]:
        return (*super().after_elementwise(), self.cross_attn.q)


class CameraBlock(Block):
    """A block whose tokens are scaled and shifted by what the camera sees."""

    def __init__(self, dim: int, ffn_dim: int, num_heads: int, eps: float) -> None:
        super().__init__(dim, ffn_dim, num_heads, eps)
        self.cam_injector_layer1, self.cam_injector_layer2 = (nn.Linear(dim, dim) for _ in range(2))
        self.cam_scale_layer, self.cam_shift_layer = (nn.Linear(dim, dim) for _ in range(2))

    def camera_scale_shift(self, camera: torch.Tensor, *, out: torch.Tensor) -> None:
        """Scale (without the 1) and shift of the camera embedding [tokens, dim], into out [2, tokens, dim]."""
        hidden = self.cam_injector_layer2(F.silu(self.cam_injector_layer1(camera))) + camera
        for layer, into in zip((self.cam_scale_layer, self.cam_shift_layer), out, strict=True):
            if isinstance(layer, nn.Linear):
                torch.addmm(layer.bias, hidden, layer.weight.T, out=into)
            else:
                into.copy_(layer(hidden))

    def attend_and_move(
        self, x: torch.Tensor, modulation: torch.Tensor, memory: WorldMemory, layer: int,
        scale: torch.Tensor, shift: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """`attend`, then the camera's injection, see `moved`."""
        attended = self._attended(x, modulation, memory, layer)
        return self.elementwise.gated_and_moved(x, attended, modulation[2], scale, shift)


class Head(nn.Module):
    """From tokens to patches of flow, in fp32."""

    def __init__(self, dim: int, channels: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.head = nn.Linear(dim, math.prod(PATCH) * channels)
        self.modulation = nn.Parameter(torch.zeros(1, 2, dim))

    def modulated_by(self, embedded: torch.Tensor) -> torch.Tensor:
        """Shift and 1 + scale [2, dim] at a noise level, from `time_embedding`'s [dim]."""
        e = (self.modulation[0] + embedded).float()
        e[1] += 1
        return e

    def forward(self, x: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
        """x [tokens, dim] fp32, modulation as of `modulated_by` -> [tokens, 2 * 2 * channels] in the head's dtype."""
        shift, scale = modulation
        return self.head(modulated_norm(x, scale, shift, self.eps).to(self.head.weight.dtype))


def moved(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """(1 + scale) * x + shift in fp32, where 1 + scale would lose digits in the model's dtype."""
    return x + torch.addcmul(shift, x, scale)


def modulated_norm(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float) -> torch.Tensor:
    """Layer norm of x [tokens, dim] times scale [dim] plus shift [dim], all fp32, in one kernel.

    The scale is the whole factor: 1 + e of a modulation, or the weight of an affine norm.
    """
    return F.layer_norm(x, x.shape[-1:], scale, shift, eps)


def text_embedding(text_dim: int, dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))


def time_embedding(frequency_dim: int, dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(frequency_dim, dim), nn.SiLU(), nn.Linear(dim, dim))


def time_projection(dim: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))


def sinusoids(positions: torch.Tensor, dim: int) -> torch.Tensor:
    """Cosines, then sines, of positions [n] at dim / 2 frequencies 10000^(-2i / dim), fp32 [n, dim]; in float64."""
    half = dim // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=positions.device) / half)
    angles = positions.double()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


def patchify(latents: torch.Tensor) -> torch.Tensor:
    """[frames, channels, height, width] -> [tokens, channels * 2 * 2]: channels, then rows and columns of a patch.

    This is the order of a patch-embedding Conv3d's weight, so channels may be concatenated after it, too.
    """
    frames, channels, height, width = latents.shape
    patches = latents.reshape(frames, channels, height // PATCH[1], PATCH[1], width // PATCH[2], PATCH[2])
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(0, 2)


def unpatchify(patches: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """[tokens, 2 * 2 * channels] of the head, channels fastest -> [frames, channels, 2 * grid[0], 2 * grid[1]]."""
    patches = patches.reshape(-1, *grid, *PATCH[1:], patches.shape[1] // math.prod(PATCH))
    return patches.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def embed_patches(embedding: nn.Conv3d, patches: torch.Tensor) -> torch.Tensor:
    """The patch-embedding Conv3d of patches [tokens, channels * 2 * 2] as one GEMM -> [tokens, dim] fp32."""
    weight = embedding.weight.flatten(1)
    return F.linear(patches.to(weight.dtype), weight, embedding.bias).float()


def allocate(
    module: nn.Module, *, device: torch.device | str, dtype: torch.dtype, fp32: Sequence[str] = FP32_PARAMETERS
) -> None:
    """Give a module that was made on the meta device uninitialised parameters, without gradients, on `device`.

    Those whose name contains one of `fp32` are fp32, the others of `dtype`.
    """
    for prefix, owner in module.named_modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            wide = any(part in f"{prefix}.{name}" for part in fp32)
            empty = torch.empty(parameter.shape, dtype=torch.float32 if wide else dtype, device=device)
            owner.register_parameter(name, nn.Parameter(empty, requires_grad=False))


def normal(shape: Sequence[int], seed: int) -> torch.Tensor:
    """Standard normal fp32 numbers on the CPU, from a generator of their own."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device="cpu")


@torch.no_grad()
def draw_parameters(module: nn.Module, seed: int, gains: Mapping[str, float]) -> None:
    """Draw all parameters where they lie, one after the other, so that no second copy of the weights exists.

    Matrices get variance 1 / fan-in, times the square of the first gain in `gains` whose key is part of the layer's
    name; biases and the weights of norms stay close to 0 and 1. Keys of a self-attention are drawn as its queries, so
    that tokens alike in content attend to each other, as in a trained model. The numbers depend on seed, device type,
    dtype and shapes.
    """
    parameters = list(module.named_parameters())
    generator = torch.Generator(parameters[0][1].device).manual_seed(seed)
    for name, parameter in parameters:
        if name.endswith("bias"):
            parameter.normal_(0, 0.02, generator=generator)
        elif name.endswith("modulation"):
            parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
        elif parameter.dim() == 1:  # of a norm
            parameter.normal_(1, 0.1, generator=generator)
        else:
            gain = next((gain for part, gain in gains.items() if part in name), 1.0)
            parameter.normal_(0, gain / math.sqrt(parameter[0].numel()), generator=generator)
    for owner in module.modules():
        if isinstance(owner, SelfAttention):
            for of_keys, of_queries in ((owner.k, owner.q), (owner.norm_k, owner.norm_q)):
                of_keys.load_state_dict(of_queries.state_dict())


def residual_gains(num_layers: int) -> dict[str, float]:
    """Gains that keep the variance of the residual stream from growing with the depth of a random model."""
    return dict.fromkeys(RESIDUAL_LAYERS, 1 / math.sqrt(len(RESIDUAL_LAYERS) * num_layers))
