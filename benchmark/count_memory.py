"""Counts the GPU memory that training a LoRA of a published model takes, without a GPU and without weights.

    python -m benchmark.count_memory            # prints the table
    python -m benchmark.count_memory --write    # writes it into docs/gpu.md

The transformer runs on tensors without content (torch's FakeTensorMode), in bfloat16 under autocast with a
float32 LoRA, as in the algorithm files. Every tensor that autograd keeps for the backward pass is counted
once. With gradient checkpointing, the activations of one block, which are recomputed, come on top. On an
H200 the same passes took 44.0 GB where this counts 43.6, and 8.5 with checkpointing where this counts 8.5
(docs/gpu.md, SD3.5-medium, a batch of 16). The table leaves 2 GB of a card free, for what is not counted.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from peft import LoraConfig
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmark.gpu import FLUX_DEV, LORA_LAYERS, SD35_LARGE, SD35_MEDIUM
from benchmark.markdown import table
from benchmark.write_tables import fill

PAGE = Path(__file__).resolve().parent.parent / "docs" / "gpu.md"
LORA_RANK = 32
CARDS = (24, 48, 80)  # GB
SPARE = 2.0  # GB of a card that are left free
DECODED_IMAGE = 0.8  # GB per image of 512 x 512 pixels that the float32 autoencoder decodes, by arithmetic
AUTOENCODER = 0.3  # GB


class Setting(NamedTuple):
    """A model, and how it is used."""

    name: str
    config: dict
    resolution: int
    num_text_tokens: int
    has_source: bool = False


SETTINGS = [
    Setting("SD3.5-medium", SD35_MEDIUM, 512, 77 + 256),
    Setting("SD3.5-medium", SD35_MEDIUM, 1024, 77 + 256),
    Setting("SD3.5-large", SD35_LARGE, 512, 77 + 256),
    Setting("FLUX.1-dev", FLUX_DEV, 512, 512),
    Setting("FLUX.1-dev", FLUX_DEV, 1024, 512),
    Setting("FLUX.1-Kontext", FLUX_DEV, 512, 512, has_source=True),
    Setting("FLUX.1-Kontext", FLUX_DEV, 1024, 512, has_source=True),
]


class Memory(NamedTuple):
    """Bytes. Those of a batch grow with it in proportion."""

    weights: int  # bfloat16
    lora: int  # weights, gradients and two moments, float32
    saved: int  # activations of the batch, which the backward pass needs
    saved_with_checkpointing: int
    block: int  # activations of the batch in one block, which checkpointing recomputes


def build(config):
    """The transformer with a LoRA, without content: on the meta device."""
    family = FluxTransformer2DModel if "guidance_embeds" in config else SD3Transformer2DModel
    with torch.device("meta"):
        transformer = family(**config).requires_grad_(False)
        lora = LoraConfig(
            r=LORA_RANK,
            init_lora_weights="gaussian",
            target_modules=["attn." + name for name in LORA_LAYERS],
        )
        transformer.add_adapter(lora)
    return transformer.train()


def make_inputs(transformer, setting, batch_size):
    """The transformer's arguments, as in predict_sd3_velocity and predict_flux_velocity."""
    config = transformer.config
    side = setting.resolution // 8
    text = torch.empty(batch_size, setting.num_text_tokens, config.joint_attention_dim, dtype=torch.bfloat16)
    inputs = {
        "encoder_hidden_states": text,
        "pooled_projections": torch.empty(batch_size, config.pooled_projection_dim, dtype=torch.bfloat16),
        "timestep": torch.empty(batch_size),
    }
    if not isinstance(transformer, FluxTransformer2DModel):
        latents = torch.empty(batch_size, config.in_channels, side, side, dtype=torch.bfloat16)
        return inputs | {"hidden_states": latents}
    num_tokens = side * side // 4 * (2 if setting.has_source else 1)
    tokens = torch.empty(batch_size, num_tokens, config.in_channels, dtype=torch.bfloat16)
    return inputs | {
        "hidden_states": tokens,
        "guidance": torch.empty(batch_size),
        "img_ids": torch.empty(num_tokens, 3),
        "txt_ids": torch.empty(setting.num_text_tokens, 3),
    }


def saved_bytes(run, weights):
    """Bytes of what autograd keeps while run() makes a loss, without the weights themselves."""
    known = {weight.untyped_storage()._cdata for weight in weights}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage  # holding it keeps its number from being given to another one
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in kept.values())


def count(setting, batch_size):
    """The Memory of a setting."""
    saved = {}
    for checkpointing in (False, True):
        transformer = build(setting.config)
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        with FakeTensorMode():
            state = {}
            for name, parameter in transformer.named_parameters():
                dtype = torch.float32 if parameter.requires_grad else torch.bfloat16
                state[name] = torch.empty(parameter.shape, dtype=dtype, requires_grad=parameter.requires_grad)
            for name, buffer in transformer.named_buffers():
                state[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
            inputs = make_inputs(transformer, setting, batch_size)

            def run(transformer=transformer, state=state, inputs=inputs):
                with torch.autocast("cpu", torch.bfloat16):
                    torch.func.functional_call(transformer, state, kwargs=inputs)

            saved[checkpointing] = saved_bytes(run, state.values())
    trained = sum(weight.numel() for weight in state.values() if weight.requires_grad)
    frozen = sum(weight.numel() for weight in state.values() if not weight.requires_grad)
    blocks = [module for module in transformer.modules() if is_block(transformer, module)]
    return Memory(2 * frozen, 16 * trained, saved[False], saved[True], saved[False] // len(blocks))


def is_block(transformer, module):
    """Whether the module is one of the transformer's blocks, which are checkpointed one by one."""
    return type(module).__name__ in transformer._no_split_modules


def largest_micro_batch(memory, batch_size, resolution, card, checkpointing):
    """How many images per forward pass fit a card of so many GB. 0: none.

    The text encoders are off the card (--offload-text-encoders). Decoding and training do not happen at once.
    """
    fixed = (memory.weights + memory.lora) / 1e9 + AUTOENCODER + SPARE
    per_image = memory.saved / batch_size / 1e9
    if checkpointing:
        per_image = (memory.saved_with_checkpointing + memory.block) / batch_size / 1e9
    decoded = DECODED_IMAGE * (resolution / 512) ** 2
    return max(int((card - fixed) / max(per_image, decoded)), 0)


def rows():
    """The cells of the table, a row per setting."""
    batch_size = 2
    cells = []
    for setting in SETTINGS:
        memory = count(setting, batch_size)
        plain = memory.saved / batch_size / 1e9
        checkpointed = (memory.saved_with_checkpointing + memory.block) / batch_size / 1e9
        line = [
            setting.name,
            str(setting.resolution),
            f"{memory.weights / 1e9:.1f}",
            f"{memory.lora / 1e9:.1f}",
            f"{plain:.1f}",
            f"{checkpointed:.1f}",
        ]
        for card in CARDS:
            with_it = largest_micro_batch(memory, batch_size, setting.resolution, card, True)
            without = largest_micro_batch(memory, batch_size, setting.resolution, card, False)
            line.append(f"{with_it}, {without}" if with_it else "no")
        cells.append(line)
    return cells


def lines():
    """The table, as lines."""
    head = ["model", "pixels", "weights, GB", "LoRA, GB", "per image, GB", "per image, checkpointing, GB"]
    return table(head + [f"{card} GB" for card in CARDS], rows())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="write the table into docs/gpu.md")
    args = parser.parse_args()
    if args.write:
        PAGE.write_text(fill(PAGE.read_text(), "memory", lines()))
        print(f"wrote {PAGE}")
    else:
        print("\n".join(lines()))
