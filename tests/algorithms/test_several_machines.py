"""torchrun on two machines, played by two torchruns that meet on this one, and what a dead process does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import flow_grpo
from small_runs import ROOT, command, free_port, metrics

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def torchrun(flags, *options):
    """Starts flow_grpo.py by torchrun, in the background."""
    launcher = [sys.executable, "-m", "torch.distributed.run", *options]
    words = launcher + command("flow_grpo.py", flags)[1:]
    return subprocess.Popen(
        words, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_two_machines_give_what_two_processes_on_one_give(small, tmp_path):
    """The documented command: the same on both machines, but for the number of the machine."""
    flags = small(num_iterations=2, num_prompts_per_iteration=4, output_dir=str(tmp_path / "two"))
    port = str(free_port())
    machines = []
    for number in ("0", "1"):
        options = ["--nnodes=2", "--nproc_per_node=1", f"--node_rank={number}"]
        machines.append(torchrun(flags, *options, "--master_addr=127.0.0.1", f"--master_port={port}"))
    outputs = [machine.communicate(timeout=300)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    (two_machines,) = Path(flags["output_dir"]).iterdir()
    flags["output_dir"] = str(tmp_path / "one")
    one = torchrun(flags, "--nproc_per_node=2", f"--master_port={free_port()}")
    output, _ = one.communicate(timeout=300)
    assert one.returncode == 0, output
    (one_machine,) = Path(flags["output_dir"]).iterdir()
    assert metrics(two_machines) == metrics(one_machine)


def workers(launcher):
    """{rank: process id} of the processes that a torchrun has started."""
    found = {}
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    for child in children:
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        for variable in variables:
            if variable.startswith(b"RANK="):
                found[int(variable.removeprefix(b"RANK="))] = int(child)
    return found


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads the processes' ranks from /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_when_a_process_dies_all_end_and_one_process_resumes(small, tmp_path, rank):
    flags = small(num_iterations=6, num_prompts_per_iteration=4, save_every=1)
    flags["output_dir"] = str(tmp_path / "runs")
    Path(flags["output_dir"]).mkdir()  # else it comes and goes while the run checks that it can be written
    launcher = torchrun(flags, "--nproc_per_node=2", f"--master_port={free_port()}")
    while launcher.poll() is None:
        runs = list(Path(flags["output_dir"]).glob("*/checkpoint/state.pt"))
        if runs and len(metrics(runs[0].parents[1])) >= 2:
            break
        time.sleep(0.01)
    processes = workers(launcher)
    assert sorted(processes) == [0, 1], "the run ended before a process was killed"
    os.kill(processes[rank], signal.SIGKILL)
    output, _ = launcher.communicate(timeout=120)
    assert launcher.returncode != 0, output
    assert not any(Path(f"/proc/{process}").exists() for process in processes.values())
    (run_dir,) = Path(flags["output_dir"]).iterdir()
    flow_grpo.train(flow_grpo.Args(resume=str(run_dir)))
    assert [row["iteration"] for row in metrics(run_dir)] == list(range(7))
