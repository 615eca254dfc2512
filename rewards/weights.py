"""Published weights: found on the hub or in a folder, loaded with none missing or left.

Everything here ends in BadInput with one line that names the cause, where a model is not there, is not what
it should be, or came only partly. Warnings of the libraries are kept from the terminal meanwhile.
"""

import contextlib
import errno
import json
import logging
import os
import re
import struct
from pathlib import Path

import torch
from diffusers.utils import logging as logging_of_diffusers
from huggingface_hub import errors as hub_errors
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from transformers.utils import logging as logging_of_transformers

from rewards.errors import BadInput

LIBRARIES = ("transformers", "diffusers", "huggingface_hub")  # names of their loggers
NO_MODELS = ("tokenizer", "processor", "feature_extractor")  # in names of components without a config.json
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


# === pipelines ===


class Config(dict):
    """A configuration. A key that is asked for and not there is a mistake in its file."""

    def __init__(self, values, source):
        super().__init__(values)
        self.source = source

    def __missing__(self, key):
        raise BadInput(f"{self.source} has no {key!r}: it is no such model's, or damaged")


def read_pipeline_configs(name):
    """The configurations of a diffusers pipeline, a folder or a hub id, without its weights.

    {"family": class of the pipeline, component: its configuration}; components that are absent are left out.
    Raises BadInput, naming the cause, where there is no such pipeline or a part of it is missing, and when a
    key is read that a configuration does not have.
    """
    index = read_config(name, "model_index.json")
    configs = Config({"family": index["_class_name"]}, index.source)
    for component, value in index.items():
        is_component = isinstance(value, list) and len(value) == 2 and value[0] is not None
        if not is_component or any(word in component for word in NO_MODELS):
            continue
        if component == "text_encoder_3" and is_left_out(name, component):
            continue
        file = "scheduler_config.json" if component == "scheduler" else "config.json"
        configs[component] = read_config(name, f"{component}/{file}")
    return configs


def is_left_out(name, component):
    """Whether a component's folder is not in a local folder: SD3 is often copied without its large T5."""
    return os.path.isdir(name) and not os.path.exists(Path(name, component))


def read_config(name, filename):
    """A JSON file of a folder or of a hub repository, as a `Config`."""
    path = file_from_hub(name, filename)
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"cannot load {name}: its {filename} is damaged ({first_line(error)})") from None
    if not isinstance(values, dict):
        raise BadInput(f"cannot load {name}: its {filename} is no JSON object")
    return Config(values, f"{filename} of {name}")


# === the hub ===


class Collector(logging.Handler):
    """Keeps the messages of loggers, instead of printing them."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@contextlib.contextmanager
def collect_messages():
    """A list that gets the libraries' warnings, which are not printed meanwhile."""
    collector = Collector()
    before = []
    for name in LIBRARIES:
        logger = logging.getLogger(name)
        before.append((logger, logger.level, logger.handlers, logger.propagate))
        logger.setLevel(logging.WARNING)
        logger.handlers = [collector]
        logger.propagate = False
    try:
        yield collector.messages
    finally:
        for logger, level, handlers, propagate in before:
            logger.setLevel(level)
            logger.handlers = handlers
            logger.propagate = propagate


@contextlib.contextmanager
def without_loading_bars():
    """Hides the bars of diffusers and transformers about the parts of a model. Those of downloads stay."""
    libraries = [logging_of_diffusers, logging_of_transformers]
    visible = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in visible:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in visible:
            library.enable_progress_bar()


def from_hub(load, name, **options):
    """load(name, ...), such as CLIPModel.from_pretrained; name is a hub id or a local folder.

    Raises BadInput, naming the cause, where that fails or leaves weights of the model unset.
    """
    check_name(name)
    with collect_messages() as messages, without_loading_bars():
        try:
            loaded = load(name, **options)
        except BadInput:
            raise
        except Exception as error:  # the libraries raise anything for damaged files
            misfit = find_weight(messages, "MISMATCH")
            cause = f"its weights do not fit its configuration, such as {misfit}"
            if not misfit:
                cause = find_cause(name, error)
            raise BadInput(f"cannot load {name}: {cause}") from error
    if not options.get("output_loading_info"):  # else the caller checks what is missing
        # The libraries fill a model's missing weights with random numbers, with no more than a warning.
        missing = find_weight(messages, "MISSING")
        if missing:
            raise BadInput(f"cannot load {name}: weights are missing in its files, such as {missing}")
    return loaded


def find_weight(messages, status):
    """The first weight that the libraries' messages say is MISSING or a MISMATCH, "" if there is none."""
    for message in messages:
        for line in message.split("\n"):
            row = re.match(rf"(.+?)\s+\| (?:\x1b\[\d+m)?{status}", line)  # of transformers' table
            if row:
                return row[1]
        listed = re.search(r"are newly initialized: \['([^']+)'", message)  # diffusers' of missing ones
        if listed and status == "MISSING":
            return listed[1]
    return ""


def file_from_hub(name, filename):
    """Path of one file of a local folder, or of a hub repository. BadInput where it is not there."""
    check_name(name)
    path = Path(name, filename)
    if os.path.isfile(path):  # unlike Path.is_file, it takes a name of any length
        return path
    if os.path.exists(name):
        raise BadInput(f"cannot load {name}: {describe_folder(Path(name), filename)}")
    return from_hub(lambda name: hf_hub_download(name, filename), name)


def check_name(name):
    """Raises BadInput for the name of a model that cannot be one."""
    if not str(name).strip() or "\0" in str(name):
        raise BadInput(f"{str(name)!r} is no name of a model: give a folder or a hub id")


def find_cause(name, error):
    """Why a model was not loaded and what to do about it, in one line."""
    if os.path.exists(name):
        fault = find_fault(Path(name))
        return fault or f"{first_line(error)} ({type(error).__name__})"
    causes = [error]
    while causes[-1] is not None:
        causes.append(causes[-1].__cause__ or causes[-1].__context__)
    causes.pop()
    for cause in causes:
        if isinstance(cause, hub_errors.GatedRepoError):
            return f"it is gated: accept its licence on https://huggingface.co/{name} and run `hf auth login`"
        if isinstance(cause, hub_errors.RepositoryNotFoundError):
            return f"the hub has no {name}, and there is no such folder; private models need `hf auth login`"
        if isinstance(cause, hub_errors.RemoteEntryNotFoundError):
            return f"the hub's {name} lacks a file: {first_line(cause)}"
        if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
            return "the disk is full"
    if looks_like_path(name):
        return "there is no such folder"
    if any(is_offline(cause) for cause in causes):
        return (
            f"the hub is not reachable and {name} is neither in its cache nor a folder: run `hf download "
            f"{name}` where there is a network, or give a local folder"
        )
    kind = type(error).__name__
    return f"{first_line(error)} ({kind}); try `hf download {name}`, or give a local folder"


def is_offline(error):
    """Whether an error is one of those without a network, or with the hub switched off."""
    kind = type(error).__name__
    return "Offline" in kind or "LocalEntryNotFound" in kind or "Connect" in kind


def looks_like_path(name):
    """Whether a name cannot be a hub id, owner/name, or is in a folder that is there."""
    name = str(name)
    is_id = re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) is not None
    return not is_id or os.path.isdir(Path(name).parent)


def first_line(error):
    """The beginning of an error's text."""
    lines = str(error).strip().split("\n")
    return lines[0][:160]


# === faults of a folder ===


def describe_folder(path, filename):
    """What a file or folder is that should be a model's folder with that file."""
    if path.is_file():
        return "it is a file, not a folder in diffusers' or transformers' format"
    incomplete = find_incomplete(path)
    if incomplete:
        return incomplete
    inner = sorted(path.glob(f"*/{filename}")) + sorted(path.glob(f"snapshots/*/{filename}"))
    if inner:
        return f"it has no {filename}, but {inner[0].parent} has: give that folder"
    if filename == "model_index.json":
        lora = sorted(path.glob("*lora*.safetensors")) + sorted(path.glob("adapter_config.json"))
        if lora:
            return f"it has no {filename}: it is no pipeline but a LoRA ({lora[0].name})"
        if (path / "config.json").is_file():
            return f"it has no {filename}: it is one model, not a whole pipeline"
        single = sorted(path.glob("*.safetensors"))
        if single:
            return f"it has no {filename}: {single[0].name} must first be converted to diffusers' format"
        return f"it has no {filename}, so it is no diffusers pipeline"
    return f"it has no {filename}"


def find_fault(path):
    """What is wrong with the files of a folder, "" if nothing is seen."""
    if path.is_file():
        return "" if path.suffix in (".safetensors", ".pt", ".pth", ".bin") else "it is a file, not a folder"
    incomplete = find_incomplete(path)
    if incomplete:
        return incomplete
    for file in files_in(path, ".json"):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return f"its {file.relative_to(path)} is damaged"
        if file.name.endswith(".index.json") and isinstance(content, dict):
            shards = set(content.get("weight_map", {}).values())
            missing = sorted(shard for shard in shards if not (file.parent / shard).is_file())
            if missing:
                return f"{file.parent / missing[0]} is missing: it was downloaded only in part"
    for file in files_in(path, ".safetensors"):
        if not is_whole(file):
            return f"its {file.relative_to(path)} is damaged or was downloaded only in part"
    return find_folder_without_weights(path)


def files_in(path, ending):
    """The files with this ending in a folder and in its own folders, where a pipeline has its parts."""
    return sorted(path.glob(f"*{ending}")) + sorted(path.glob(f"*/*{ending}"))


def find_incomplete(path):
    """The first file that a download left unfinished, in words, "" if there is none."""
    cache = path / ".cache/huggingface/download"  # of `hf download --local-dir`
    unfinished = files_in(path, ".incomplete") + files_in(cache, ".incomplete")
    for file in unfinished[:1]:
        return f"it was downloaded only in part ({file.relative_to(path)}): run `hf download` again"
    return ""


def is_whole(path):
    """Whether a .safetensors file is as long as its header says."""
    with open(path, "rb") as file:
        start = file.read(8)
        if len(start) < 8:
            return False
        (length,) = struct.unpack("<Q", start)
        if length > path.stat().st_size:  # as in a pointer of Git LFS
            return False
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = max(entry["data_offsets"][1] for entry in header.values())
        except (ValueError, KeyError, TypeError, AttributeError):
            return False
    return path.stat().st_size == 8 + length + end


def find_folder_without_weights(path):
    """The first folder of a model that has a configuration and no weights, in words, "" if there is none."""
    for config in [path / "config.json"] + sorted(path.glob("*/config.json")):
        folder = config.parent
        if not config.is_file():
            continue
        files = [file.name for file in folder.iterdir() if file.suffix in (".safetensors", ".bin")]
        if not files:
            return f"{folder} has no weights: it was downloaded only in part"
        variants = [name for name in files if re.search(r"\.(fp16|bf16)\b", name)]
        if len(variants) == len(files):
            variant = re.search(r"\.(fp16|bf16)\b", variants[0])[1]
            return (
                f"{folder} has weights of the variant {variant} only ({variants[0]}): load the model with "
                f'variant="{variant}" in diffusers and save it to another folder'
            )
    return ""


# === state dicts ===


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


def read_state(path, key=None):
    """{name: tensor} of a .safetensors or a torch file, or of what stands in it under key.

    Nothing is unpickled. Raises BadInput for a file that is something else or damaged.
    """
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        if key is not None:
            state = state[key]
        if not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
            raise TypeError("not only tensors")
        return state
    except Exception as error:  # a damaged file raises anything
        raise BadInput(f"{path} is no file of weights, or damaged ({type(error).__name__})") from None


def load_exactly(module, state, source):
    """Loads a state dict into a module. BadInput, naming source, unless names and shapes are the module's."""
    expected = {name: tensor.shape for name, tensor in module.state_dict().items()}
    given = {name: tensor.shape for name, tensor in state.items()}
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
