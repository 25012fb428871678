"""What the reference models of the Wan family have in common: how they are made, drawn, loaded and conditioned."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from . import fp8, wan
from .checkpoint import StoredTensor, check_parameters, load_parameters, read_config, read_layout

_MADE_LAYERS = 1000  # on the meta device, to tell what a checkpoint lacks; not so many as a config.json may ask for
_MASK_CHANNELS = 4  # of the image conditions: first of all, a latent frame's 4 video frames are given or not

Model = TypeVar("Model", bound="Denoiser")


class Denoiser(nn.Module, ABC):
    """A denoiser with the names of a published state dict; its subclasses are models.rollout.WorldModels.

    Args:
        config: of the subclass's Config; None for its defaults, the published sizes.
        device: also "meta".
        dtype: of the linear layers, and of the memory.
        hoist: compute once what does not change within a chunk or a rollout; False computes all of it in every pass,
            with the same result to the bit.
        seed: of the stand-ins for conditions that are not given.

    Made like this its parameters are uninitialised. See `random` and `from_pretrained`.
    """

    Config: ClassVar[Any]
    fp32_parameters: ClassVar[Sequence[str]] = wan.FP32_PARAMETERS  # parts of their names
    kept_by_fp8: ClassVar[Sequence[str]] = ()  # children of a block that to_fp8 leaves as they are

    def __init__(
        self,
        config: Any = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        hoist: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        config = config or self.Config()
        self.config = config
        self.hoist = hoist
        self.seed = seed
        self.chunk_frames = config.chunk_frames
        self.latent_shape = (config.latent_channels, wan.PATCH[1] * config.grid[0], wan.PATCH[2] * config.grid[1])
        self.sigmas = config.sigmas
        self.device = torch.empty(0, dtype=torch.uint8, device=device).device
        self.dtype = dtype
        dim, in_channels = config.dim, config.latent_channels + config.condition_channels
        with torch.device("meta"):
            self.patch_embedding = nn.Conv3d(in_channels, dim, wan.PATCH, wan.PATCH)
            self.time_embedding = wan.time_embedding(config.frequency_dim, dim)
            self.time_projection = wan.time_projection(dim)
            self.blocks: Sequence[Any] = nn.ModuleList(self._blocks())
            self.head = wan.Head(dim, config.latent_channels, config.eps)
            self._add_modules()
        wan.allocate(self, device=self.device, dtype=dtype, fp32=self.fp32_parameters)

    @classmethod
    def random(
        cls: type[Model],
        config: Any = None,
        seed: int = 0,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        hoist: bool = True,
    ) -> Model:
        """A model of random weights, drawn on the device, at a scale that keeps the residual stream bounded."""
        model = cls(config, device=device, dtype=dtype, hoist=hoist, seed=seed)
        wan.draw_parameters(model, seed, {**wan.residual_gains(model.config.num_layers), **model._gains()})
        return model

    @classmethod
    def from_pretrained(
        cls: type[Model],
        folder: str | Path,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        config: Any = None,
        hoist: bool = True,
        **config_overrides: Any,
    ) -> Model:
        """The model of a published checkpoint, see checkpoint.read_layout and load_parameters for what it may be.

        Args:
            folder: the one with the .safetensors files, or such a file.
            config: of the model; None for what the folder's config.json and the tensors' shapes say.
            config_overrides: fields of the config to change.

        Raises ValueError when there is neither a config nor a config.json, where that names no sizes of a model, and as
        read_layout and load_parameters; what does not fit is told before the model takes memory.
        """
        layout = read_layout(folder)
        if config is None:
            fields = read_config(folder)
            if not fields:
                raise ValueError(f"{cls.__name__}: {folder} must hold config.json where no config is given, got none")
            config = cls._published_config(fields, layout, config_overrides)
        else:
            config = replace(config, **config_overrides)
        if config.num_layers > max(len(layout), _MADE_LAYERS):
            raise ValueError(
                f"{cls.__name__}: checkpoint must hold the tensors of {config.num_layers} layers, got {len(layout)}"
            )
        check_parameters(cls.__name__, cls(config, device="meta", dtype=dtype, hoist=hoist), layout)
        model = cls(config, device=device, dtype=dtype, hoist=hoist)
        load_parameters(cls.__name__, model, layout)
        return model

    def compile_elementwise(self) -> None:
        """Make one kernel, by torch.compile, of what a block does between two matrix products: norms, gates, residuals.

        They round less in between, so that results differ within the rounding of the model's dtype. Compiled on first
        use, which takes some seconds, and on a CPU a compiler.
        """
        for module in self.modules():
            if isinstance(module, wan.Block):
                module.compiled = True

    def to_fp8(self) -> None:
        """Make the blocks' linear layers FP8 (E4M3), a scale a row of the weight and a token, in place and for good.

        Half the bytes of these weights and, on an H100, half the time of their products; what it costs in accuracy
        docs/models.md says. On a GPU `compile_elementwise` is part of it: rounding kernel by kernel takes longer than
        the products save. Raises ValueError for a dtype other than bfloat16, and on a GPU below compute capability 9.0.
        """
        if self.dtype != torch.bfloat16:
            raise ValueError(f"{type(self).__name__}.to_fp8: dtype must be torch.bfloat16, got {self.dtype}")
        on_gpu = self.device.type == "cuda"
        quantize = wan.elementwise(on_gpu, True).quantized
        for block in self.blocks:
            fp8.to_fp8(f"{type(self).__name__}.to_fp8", block, quantize, self.kept_by_fp8)
            block.in_fp8 = all(isinstance(layer, fp8.Fp8Linear) for layer in block.after_elementwise())
        if on_gpu:
            self.compile_elementwise()

    # --- what a subclass says ---

    @abstractmethod
    def _blocks(self) -> Iterable[nn.Module]:
        """The blocks, on the meta device."""

    @abstractmethod
    def _add_modules(self) -> None:
        """Set the modules that are not in every model, on the meta device."""

    @abstractmethod
    def _gains(self) -> dict[str, float]:
        """Gains of random weights, as of wan.draw_parameters, besides those of every block."""

    @classmethod
    @abstractmethod
    def _published_config(
        cls, fields: dict[str, Any], layout: Mapping[str, StoredTensor], overrides: dict[str, Any]
    ) -> Any:
        """The config that a config.json and the checkpoint's tensors describe."""

    # --- what a subclass uses ---

    def _camera_buffer(self) -> torch.Tensor:
        """For scale and shift of every layer's camera injection, [num_layers, 2, tokens, dim]."""
        config = self.config
        tokens = config.chunk_frames * math.prod(config.grid)
        return torch.empty(config.num_layers, 2, tokens, config.dim, dtype=self.dtype, device=self.device)

    def _image_conditions(self, image: torch.Tensor | None) -> torch.Tensor:
        """Mask and encoded image as [frames, condition_channels, height, width], from channels first.

        None for the stand-in: for frame 0 a mask of ones and normal numbers drawn from the seed, for all others, which
        are taken to be like frame 1, a mask of zeros and one other such draw.
        """
        if image is None:
            shape = (2, self.config.condition_channels, *self.latent_shape[1:])
            frames = wan.normal(shape, self.seed + 1)
            frames[0, :_MASK_CHANNELS], frames[1, :_MASK_CHANNELS] = 1, 0
        else:
            frames = image.transpose(0, 1)
        return frames.to(self.device, self.dtype)
