"""The memory in models' own code.

`integrations.lingbot` and `integrations.matrix_game` put a WorldMemory into the published code of their models by two
lines, and `integrations.attach(model)` into that of other causal video models made from Wan, Self-Forcing's and those
that came of it; the memory is made in the pipeline's first forward, where device, dtype and size are known. For another
model that makes video chunk by chunk with a KV cache, these are the calls:

| who | calls | when |
|---|---|---|
| the loop over chunks | `memory.begin_chunk(poses)` | before the first pass over a chunk |
| each layer's self-attention | `memory.attend(layer, q, k, v, q_weight, k_weight)` | in every pass |
| the loop over chunks | `memory.end_chunk()` | after the clean pass: its keys and values are now history |
| the loop over chunks | `memory.abort_chunk()` | when a pass fails; the chunk may be begun again |

`attend` takes q, k and v [tokens, heads * head_dim] as the projections give them, and returns [tokens, heads, head_dim]
for the output projection. It stands for the QK-norm (given no weights, there is none), the rotary embedding, the write
into the cache, and the attention. A pass covers one whole chunk of one video, every layer once, without gradients;
the layers and their sizes are the MemoryConfig's. Cross-attention and other caches stay the model's. With
`MemoryConfig(branches=2)` two videos along one path share a memory, or the two forwards of classifier-free guidance:
see `WorldMemory.attend`.

A pipeline whose loop is not to be changed says the same by the first token of each pass. `chunks.Chunks` turns that
into those calls and refuses what a memory cannot follow. Here SmallWorld is the model, and the loop a pipeline's:

```python
import torch
from worldkv_kernels import WorldMemory
from worldkv_kernels.integrations.chunks import Chunks
from worldkv_kernels.models.rollout import Controls, noise
from worldkv_kernels.models.small_world import SmallWorld
from worldkv_kernels.trajectory import latent_poses, load

poses, intrinsics = latent_poses(load("right*40,left*40"))  # of 21 latent frames, 7 chunks
model = SmallWorld.from_pretrained(device="cpu", dtype=torch.float32)
memory = WorldMemory(model.config.memory(bank_chunks=32), dtype=torch.float32)
chunks = Chunks("SmallWorld", memory, poses)

levels = (1.0, 0.9, 0.0)  # noise of the denoising passes, and of the clean one
tokens = memory.config.chunk_tokens
with torch.no_grad():
    of_rollout = model.prepare_rollout(None, poses[0], levels)
    for chunk in range(7):
        frames = slice(3 * chunk, 3 * chunk + 3)
        of_chunk = model.prepare_chunk(of_rollout, 3 * chunk, Controls(poses[frames], intrinsics[frames]))
        x = noise(0, chunk, 0, (3, *model.latent_shape))
        for step, level in enumerate(levels):
            with chunks.model_pass(chunk * tokens, timestep=1000 * level):  # begins and ends the chunks
                flow = model.denoise(x, step, of_chunk, chunks)             # its layers call chunks.attend
            x = x - (level - levels[step + 1]) * flow if level else x
print(chunks.stats()["chunks"])  # 7
```

diffusers (0.42.1) has no Wan model with a KV cache over chunks for an attention processor to attach to. Its
AnyFlowFARTransformer3DModel is causal, but keeps unrotated keys and old frames at another patch size.
"""

from typing import TYPE_CHECKING, Any

from ..lazy import submodule

if TYPE_CHECKING:
    from .causal import attach, detach

__all__ = ["attach", "detach"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(submodule(__name__, "causal"), name)
    return submodule(__name__, name)
