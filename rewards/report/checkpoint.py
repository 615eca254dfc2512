"""Checkpoints: written so that a kill at any moment leaves a good one, and checked as they are read.

A checkpoint is one file: no part of it can be older than the rest. torch.save writes a ZIP archive with a
checksum (CRC-32) of each of its parts, which torch.load does not look at: it is verified here.

With --shard (FSDP2) a process holds its share of a tensor, a DTensor. A checkpoint has all tensors whole, so
that any number of processes can resume from it.
"""

import zipfile

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

from rewards import BadInput
from rewards.report.files import make_folder, write_aside

ADAM_STATE = {"step", "exp_avg", "exp_avg_sq"}  # what AdamW keeps of each parameter


class State(dict):
    """The contents of a checkpoint. A name that is not in it is bad input."""

    def __missing__(self, name):
        raise BadInput(f"cannot resume: the checkpoint has no {name!r}")


def is_first_process():
    """Whether this process is the one that writes files."""
    return not dist.is_initialized() or dist.get_rank() == 0


def put_together(state):
    """A nested dict, with the processes' shares put together to whole tensors on the CPU.

    Only the first process gets them, the others get None. All processes have to call it.
    """
    if isinstance(state, dict):
        return {name: put_together(value) for name, value in state.items()}
    if not isinstance(state, DTensor):
        return state
    whole = state.full_tensor()
    return whole.cpu() if is_first_process() else None


def share_out(tensor, parameter):
    """A process's share of a whole tensor, cut as a parameter is. All of it where the parameter is whole."""
    if not isinstance(parameter, DTensor):
        return tensor
    tensor = tensor.to(parameter.device)
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def write_checkpoint(run_dir, state):
    """Saves a dict of tensors, numbers and containers of them, in place of the last checkpoint.

    state["progress"] is a dict whose "iteration" is the last one that has been trained. The first process
    writes, and all have to call it.
    """
    state = put_together(state)
    if not is_first_process():
        return
    path = run_dir / "checkpoint" / "state.pt"
    make_folder(path.parent)
    with write_aside(path) as temporary:
        with open(temporary, "wb") as file:
            torch.save(state | {"num_tensors": count_tensors(state)}, file)


def read_checkpoint(run_dir):
    """The State that `write_checkpoint` saved. Raises BadInput if it is missing, damaged or not complete."""
    path = run_dir / "checkpoint" / "state.pt"
    if run_dir.is_dir() and not path.exists():
        raise BadInput(f"cannot resume: {run_dir} has no checkpoint, begin a new run")
    try:
        check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not isinstance(state.get("progress"), dict):
            raise ValueError("it does not say how far the run was")
        iteration = state["progress"].get("iteration")
        if type(iteration) is not int or iteration < 0:
            raise ValueError("its iteration is not a whole number")
        num_tensors = state.pop("num_tensors", None)
        if num_tensors != count_tensors(state):
            raise ValueError("it is not complete")
    except Exception as error:  # a damaged file raises anything
        reason = str(error).strip() or type(error).__name__
        raise BadInput(f"cannot resume: {path} is missing or damaged ({reason.splitlines()[0]})") from None
    return State(state)


def check_archive(path):
    """Raises an error unless a file is what torch.save wrote, by its checksums."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
        for part in archive.infolist():
            if part.external_attr:  # torch.load reads nothing of a part that seems to be a folder
                damaged = part.filename
    if damaged:
        raise ValueError(f"the checksum of {damaged} is wrong")


def count_tensors(value):
    """The number of tensors in a State, at all depths.

    Otherwise a missing part might not be noticed: an optimiser without a state looks as if it were new,
    and one may have taken no step for good reason.
    """
    if isinstance(value, torch.Tensor):
        return 1
    if isinstance(value, dict):
        return sum(count_tensors(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return sum(count_tensors(item) for item in value)
    return 0


def restore_parameters(parameters, saved):
    """Copies saved tensors into parameters, both {name: tensor}.

    Raises BadInput, and changes nothing, unless names, shapes and types are the same.
    """
    if not isinstance(saved, dict):
        raise BadInput("cannot resume: the checkpoint's weights are not tensors with names")
    for name in parameters | saved:
        if describe(parameters.get(name)) != describe(saved.get(name)):
            raise BadInput(
                f"cannot resume: the checkpoint does not fit the model. {name} in the checkpoint: "
                f"{describe(saved.get(name))}; in the model: {describe(parameters.get(name))}"
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(share_out(saved[name], parameter))


def describe(tensor):
    """What has to be the same of a saved tensor and its place in the model."""
    if not isinstance(tensor, torch.Tensor):
        return "missing"
    return f"{tuple(tensor.shape)} {tensor.dtype} {tensor.layout}"


def restore_optimizer(optimizer, saved):
    """Restores an AdamW's state. Raises BadInput, and changes nothing, unless it fits the parameters."""
    try:
        check_optimizer(optimizer, saved)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"cannot resume: the optimiser's state does not fit ({error})") from None
    parameters = all_parameters(optimizer)
    states = {}
    for number, state in saved["state"].items():
        states[number] = dict(state)
        for name in ("exp_avg", "exp_avg_sq"):
            states[number][name] = share_out(state[name], parameters[number])
    optimizer.load_state_dict(saved | {"state": states})


def all_parameters(optimizer):
    """The parameters of all groups of an optimiser, a list."""
    parameters = []
    for group in optimizer.param_groups:
        parameters += group["params"]
    return parameters


def check_optimizer(optimizer, saved):
    """Raises an error unless saved is the state of such an optimiser, before its first step or after it."""
    own_groups = optimizer.state_dict()["param_groups"]
    if len(saved["param_groups"]) != len(own_groups):
        raise ValueError(f"{len(saved['param_groups'])} groups of parameters instead of {len(own_groups)}")
    for group, own in zip(saved["param_groups"], own_groups):
        if group.keys() != own.keys() or group["params"] != own["params"]:
            raise ValueError("a group has other parameters or settings")
        for name, value in group.items():
            if name != "lr" and type(value) is not type(own[name]):
                raise ValueError(f"{name} is {value!r}")
    parameters = all_parameters(optimizer)
    if saved["state"] == {}:
        return
    if set(saved["state"]) != set(range(len(parameters))):
        raise ValueError(f"{len(saved['state'])} states for {len(parameters)} parameters")
    for number, parameter in enumerate(parameters):
        state = saved["state"][number]
        if state.keys() != ADAM_STATE:
            raise ValueError(f"the state of parameter {number} has {', '.join(state)}")
        if describe(state["step"]) != describe(torch.tensor(0.0)):
            raise ValueError(f"the step of parameter {number} is {describe(state['step'])}")
        for name in ("exp_avg", "exp_avg_sq"):
            if describe(state[name]) != describe(parameter):
                raise ValueError(f"{name} of parameter {number} is {describe(state[name])}")
