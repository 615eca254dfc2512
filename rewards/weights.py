"""Published weights: found on the hub or in a folder, loaded with none missing or left."""

import json
import re
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file

from rewards import BadInput

OPEN_CLIP_NAMES = (  # applied in this order
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^text_projection$", "text_projection.weight"),
    (r"^visual\.(class_embedding)$", r"vision_model.embeddings.\1"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^(token_embedding)\.", r"text_model.embeddings.\1."),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"\.attn\.", ".self_attn."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.c_fc\.", ".fc1."),
    (r"\.c_proj\.", ".fc2."),
)


def read_pipeline_configs(name):
    """The configurations of a diffusers pipeline, a folder or a hub id, without its weights.

    {"family": class of the pipeline, component: its configuration}; components that are absent are left out.
    Raises BadInput, naming the cause, where there is no such pipeline.
    """
    index = from_hub(DiffusionPipeline.load_config, name)
    configs = {"family": index["_class_name"]}
    for component, value in index.items():
        if isinstance(value, list) and value[0] is not None and "tokenizer" not in component:
            file = "scheduler_config.json" if component == "scheduler" else "config.json"
            configs[component] = json.loads(Path(file_from_hub(name, f"{component}/{file}")).read_text())
    return configs


def from_hub(load, name, *args, **options):
    """load(name, ...), such as CLIPModel.from_pretrained; name is a hub id or a local folder.

    Raises BadInput when the weights are neither in the local cache nor to be downloaded.
    """
    try:
        return load(name, *args, **options)
    except (OSError, ValueError) as error:  # what the libraries raise without network, file, access or sense
        reason = str(error).strip().split("\n")[0][:120]
        raise BadInput(
            f"cannot load {name}: run `hf download {name}` where there is a network, or give a local folder "
            f"({reason})"
        ) from None


def file_from_hub(name, filename):
    """Path of one file of a local folder, or of a hub repository."""
    path = Path(name, filename)
    return path if path.is_file() else from_hub(lambda name: hf_hub_download(name, filename), name)


def from_open_clip(state):
    """The tensors of an open_clip ViT under transformers' names for CLIPModel."""
    converted = {}
    for name, tensor in state.items():
        for pattern, replacement in OPEN_CLIP_NAMES:
            name = re.sub(pattern, replacement, name)
        if name.endswith("_projection.weight"):
            tensor = tensor.T.contiguous()  # open_clip multiplies from the right
        if ".in_proj_" in name:  # query, key and value in one
            for letter, part in zip("qkv", tensor.chunk(3)):
                converted[name.replace("in_proj_", f"{letter}_proj.")] = part.contiguous()
        else:
            converted[name] = tensor
    return converted


def read_state(path):
    """{name: tensor} of a .safetensors or a torch file; nothing is unpickled. BadInput when it is neither."""
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises anything
        raise BadInput(f"{path} is no file of weights, or damaged ({type(error).__name__})") from None


def load_exactly(module, state, source):
    """Loads a state dict into a module. BadInput, naming source, unless names and shapes are the module's."""
    expected, given = ({name: t.shape for name, t in part.items()} for part in (module.state_dict(), state))
    wrong = sorted(name for name in expected | given if expected.get(name) != given.get(name))
    if wrong:
        raise BadInput(
            f"{source} does not fit {type(module).__name__}: {len(wrong)} tensors are missing, unknown or of "
            f"another shape, the first is {wrong[0]}"
        )
    module.load_state_dict(state, assign=True)
    return module


def from_state(cls, config, state, source, **options):
    """A transformers model with these tensors, in their precision; errors as in `load_exactly`."""
    with torch.device("meta"):  # no memory, no time for random weights that go at once
        load_exactly(cls(config, **options), state, source)
    # once more through transformers, which also fills the buffers that no file has
    return cls.from_pretrained(None, config=config, state_dict=state, **options)
