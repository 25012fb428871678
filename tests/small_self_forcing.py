"""A small Self-Forcing, plain, with what a rollout of it needs; for the tests of `attach`."""

import plain_self_forcing as plain
import torch
from plain_lingbot_pipeline import draw_weights

GRID, HEIGHT, WIDTH, CHANNELS = (2, 3), 4, 6, 4
FRAME_TOKENS = 6
CHUNKS = 6
TEXT, OTHER_TEXT = torch.randn(2, 1, 5, 24, generator=torch.Generator().manual_seed(1))
VIDEO = torch.randn(1, 3 * CHUNKS, CHANNELS, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(2))
GIVEN = torch.randn(1, 6, CHANNELS, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(3))


def make_model(window=-1, sink=0, *, kind=plain.CausalWanModel, **options):
    sizes = dict(
        text_len=7, in_dim=CHANNELS, out_dim=CHANNELS, dim=128, ffn_dim=96, freq_dim=16, text_dim=24, num_heads=2,
        num_layers=2, local_attn_size=window, sink_size=sink,
    )  # fmt: skip
    model = kind(**{**sizes, **options}).eval().requires_grad_(False)
    draw_weights(model)
    model.num_frame_per_block = 3  # as a pipeline leaves it
    return model


def pipeline(model, kind=plain.CausalInferencePipeline, **options):
    return kind(plain.WanDiffusionWrapper(model), FRAME_TOKENS, **options)


def generate(model_or_pipeline, chunks=CHUNKS, **options):
    """Latents [frames, channels, height, width] of the pipeline's own code."""
    is_model = isinstance(model_or_pipeline, torch.nn.Module)
    pipe = pipeline(model_or_pipeline) if is_model else model_or_pipeline
    return pipe.inference(VIDEO[:, : 3 * chunks], {"prompt_embeds": TEXT}, **options)[0]
