"""Checkpoints: written so that a kill at any moment leaves a good one, and checked as they are read."""

import contextlib
import os
import shutil

import torch

from rewards import BadInput


def write_checkpoint(run_dir, state):
    """Saves a dict of tensors, numbers and containers of them, in place of the last checkpoint."""
    path = run_dir / "checkpoint" / "state.pt"
    path.parent.mkdir(exist_ok=True)
    torch.save(state, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def read_checkpoint(run_dir):
    """The state that `write_checkpoint` saved. Raises BadInput if it is missing or damaged."""
    path = run_dir / "checkpoint" / "state.pt"
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises anything
        raise BadInput(f"cannot resume: {path} is missing or damaged ({type(error).__name__})") from None


def restore_parameters(parameters, saved):
    """Copies saved tensors into parameters, both {name: tensor}. Raises BadInput unless they fit exactly."""
    expected = {name: parameter.shape for name, parameter in parameters.items()}
    found = {name: tensor.shape for name, tensor in saved.items()}
    if expected != found:
        wrong = sorted(name for name in expected | found if expected.get(name) != found.get(name))
        raise BadInput(f"cannot resume: the checkpoint does not fit the model, the first is {wrong[0]}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])


def restore_optimizer(optimizer, saved):
    """Restores an optimiser's state. Raises BadInput unless it fits the optimiser's parameters."""
    try:
        optimizer.load_state_dict(saved)
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"cannot resume: the optimiser's state does not fit ({error})") from None


@contextlib.contextmanager
def replace_folder(folder):
    """A folder to write into, which takes the place of `folder` when the block ends."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
