"""A small Matrix-Game-2.0, plain, with what a rollout of it needs; for the tests of what agrees with it."""

from types import SimpleNamespace

import torch
from plain_matrix_game import VISUAL_DIM, CausalWanModel
from plain_matrix_game_pipeline import CausalInferencePipeline, WanDiffusionWrapper, published_args

from worldkv_kernels.models.rollout import noise

GRID = (2, 3)
FRAME_TOKENS = 6
CHUNK_TOKENS = 3 * FRAME_TOKENS
HEADS, HEAD_DIM, LAYERS = 2, 64, 2
DIM = HEADS * HEAD_DIM
VISUAL_TOKENS = 5
KEYS = {"universal": 4, "gta_drive": 2, "templerun": 7}


def published_config(variant, window=6, layers=LAYERS):
    """A config.json, with the published fields and small sizes."""
    action_config = {
        "blocks": [0], "enable_keyboard": True, "enable_mouse": variant != "templerun", "heads_num": 2,
        "hidden_size": 16, "img_hidden_size": DIM, "keyboard_dim_in": KEYS[variant], "keyboard_hidden_dim": 128,
        "mouse_dim_in": 2, "mouse_hidden_dim": 128, "mouse_qk_dim_list": [8, 28, 28], "patch_size": [1, 2, 2],
        "qk_norm": True, "qkv_bias": False, "rope_dim_list": [8, 28, 28], "rope_theta": 256,
        "vae_time_compression_ratio": 4, "windows_size": 3,
    }  # fmt: skip
    return {
        "action_config": action_config, "dim": DIM, "eps": 1e-6, "ffn_dim": 160, "freq_dim": 32, "in_dim": 36,
        "inject_sample_info": False, "local_attn_size": window, "model_type": "i2v", "num_heads": HEADS,
        "num_layers": layers, "out_dim": 16, "sink_size": 0, "text_len": 512,
    }  # fmt: skip


def plain_model(variant="universal", window=6, *, layers=LAYERS, frame_tokens=FRAME_TOKENS, seed=0):
    """A denoiser whose every parameter, unused norm weights and biases too, bears on what it should alone."""
    model = CausalWanModel(**published_config(variant, window, layers), frame_seqlen=frame_tokens)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(0.2 * drawn + (1 if name.endswith("weight") else 0))
            else:
                parameter.copy_(drawn / parameter[0].numel() ** 0.5)
    return model.requires_grad_(False).eval()


def draw(chunk, step, like):
    """The rollouts' noise before a step, for the pipeline."""
    return noise(0, chunk, step, like.shape).to(like.device)


def first_noise(chunks):
    """The rollouts' first noise of each chunk, for the pipeline."""
    shape = (3, 16, 2 * GRID[0], 2 * GRID[1])
    return torch.cat([noise(0, chunk, 0, shape) for chunk in range(chunks)]).transpose(0, 1)[None]


def actions_of(variant, chunks, seed=1):
    """Random mouse and keyboard conditions, [1, rows, columns]; a mouse of None for "templerun"."""
    rows = 4 * 3 * chunks - 3
    generator = torch.Generator().manual_seed(seed)
    keyboard = (torch.rand(1, rows, KEYS[variant], generator=generator) < 0.3).float()
    mouse = torch.randn(1, rows, 2, generator=generator) if variant != "templerun" else None
    return mouse, keyboard


def conditions(mouse, keyboard, seed=2):
    """The published conditional_dict for actions [1, rows, columns]."""
    generator = torch.Generator().manual_seed(seed)
    frames = (keyboard.shape[1] + 3) // 4
    given = {
        "cond_concat": torch.randn(1, 20, frames, 2 * GRID[0], 2 * GRID[1], generator=generator),
        "visual_context": torch.randn(1, VISUAL_TOKENS, VISUAL_DIM, generator=generator),
        "keyboard_cond": keyboard.clone(),
    }
    return given if mouse is None else {**given, "mouse_cond": mouse.clone()}


def given_of(actions, seed=2):
    """A conditional_dict of Actions."""
    columns = [None if rows is None else torch.as_tensor(rows)[None] for rows in actions]
    return conditions(*columns, seed=seed)


def pipeline(model, kind=CausalInferencePipeline, kv_cache_frames=None, frame_tokens=FRAME_TOKENS, **kwargs):
    """A published pipeline around a model, with the variant's steps and the rollouts' noise.

    With kv_cache_frames, its self-attention sees so many frames, whatever the model's window.
    """
    variant_steps = [1000, 666, 333] if hasattr(model.blocks[0].action_model, "t_qkv") else [1000, 750, 500, 250]
    args = published_args(frame_seq_length=frame_tokens, denoising_step_list=variant_steps)
    if kv_cache_frames is not None:
        args = SimpleNamespace(**vars(args), kv_cache_frames=kv_cache_frames)
        for block in model.blocks:
            block.self_attn.max_attention_size = kv_cache_frames * frame_tokens
    return kind(args, WanDiffusionWrapper(model), draw=draw, **kwargs)


@torch.no_grad()
def latents(pipe, given, chunks, mode="universal"):
    """What a pipeline makes: [frames, 16, height, width]."""
    device = pipe.generator.model.head.head.weight.device
    given = {name: rows.to(device) for name, rows in given.items()}
    return pipe.inference(first_noise(chunks).to(device), given, mode=mode)[0].transpose(0, 1)
