"""What a run is made from: its script, prompt files and models. A resumed run must find them unchanged."""

import dataclasses
import hashlib
import json
import os
import re
from pathlib import Path

from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.file_download import repo_folder_name

from rewards import BadInput, parse_spec
from rewards.command_line import flag
from rewards.prompts import load_prompt_files

LARGEST_READ = 10_000_000  # bytes of a model's file that are read; of a larger one, also its size counts


def describe_inputs(args, script):
    """{what: fingerprint} of all that a run reads. A model that is not there yet is left out."""
    try:
        inputs = {"the script": digest(Path(script).read_bytes())}
        for name, file in load_prompt_files(args.prompts, args.eval_prompts).items():
            sizes = [os.path.getsize(row["source"]) for row in file.metadata if "source" in row]
            rows = json.dumps([file.prompts, file.metadata, sizes])
            inputs[f"the prompt file for {name}"] = digest(rows.encode())
        for where, name in find_names(args):
            fingerprint = fingerprint_model(name)
            if fingerprint:
                inputs[f"{where} {name}"] = fingerprint
    except OSError as error:
        raise BadInput(f"cannot read what the run is made from: {error}") from None
    return inputs


def find_changes(before, after):
    """The names of the inputs that are not what they were; both as from `describe_inputs`."""
    changes = []
    for name in before | after:
        to_be_downloaded = name.startswith("--") and name not in after
        if before.get(name) != after.get(name) and not to_be_downloaded:
            changes.append(name)
    return changes


def find_names(args):
    """[(flag, text)] of all texts among the flags, and of models in --rewards: some are names of models."""
    names = []
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if isinstance(value, str) and value:
            names.append((flag(field.name), value))
    for _, model in parse_spec(args.rewards).values():
        if model:
            names.append(("--rewards", model))
    return names


def fingerprint_model(name):
    """A text that changes with the model of this name: a folder, a file of weights, or a hub id. "" if it is
    none of these, or a hub id that was never downloaded."""
    path = Path(name)
    if path.suffix == ".safetensors" and os.path.isfile(path):
        return fingerprint_files(path.parent, [path])
    if os.path.isdir(path) and is_model(path):
        return fingerprint_files(path, path.rglob("*"))
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        folder = repo_folder_name(repo_id=name, repo_type="model")
        branch = Path(HF_HUB_CACHE, folder, "refs", "main")
        if branch.is_file():
            return branch.read_text().strip()  # the commit
    return ""


def is_model(folder):
    """Whether a folder has a model in it, or the weights of a LoRA."""
    configs = [folder / "model_index.json", folder / "config.json"]
    return any(path.is_file() for path in configs) or any(folder.glob("*.safetensors"))


def fingerprint_files(folder, paths):
    """A digest of names, sizes and contents; of a large file it is only the beginning that is read."""
    parts = []
    for path in sorted(paths):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)  # the notes of hub and version control
        if path.is_file() and not hidden:
            with open(path, "rb") as file:
                beginning = file.read(LARGEST_READ)
            parts.append(f"{name} {path.stat().st_size} {digest(beginning)}")
    return digest("\n".join(parts).encode())


def digest(data):
    return hashlib.sha256(data).hexdigest()
