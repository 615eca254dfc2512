"""One process at a time writes to a run."""

import fcntl

from rewards import BadInput

HELD = {}  # {run folder: open file}. Closing a file gives its lock back, so it stays open.


def lock(run_dir):
    """Keeps other processes from this run. The kernel gives the lock back when this process ends, however it
    ends. Raises BadInput if another process has it."""
    key = run_dir.resolve()
    if key in HELD:  # this process resumes its own run
        return
    try:
        file = open(run_dir / "args.json", "r+b")  # for writing: NFS demands it of an exclusive lock
    except OSError as error:
        raise BadInput(f"cannot write to {run_dir}: {error.strerror}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise BadInput(f"{run_dir} is in use by another process: wait until that has ended") from None
    except OSError:  # a file system without locks
        pass
    HELD[key] = file


def unlock(run_dir):
    """Gives the lock back, if this process has it."""
    file = HELD.pop(run_dir.resolve(), None)
    if file is not None:
        file.close()
