"""How a run's files are written: aside, under a temporary name in the same folder, then moved into place.

So a kill, a Ctrl-C or a full disk at any moment leaves the last good file, whole. What may be left beside it
is a temporary file; resuming the run removes it.
"""

import contextlib
import errno
import os
import re
import shutil

from rewards.command_line import CannotWrite


@contextlib.contextmanager
def write_aside(path):
    """A temporary path to write a file or folder to, which takes the place of `path` when the block ends.

    Raises CannotWrite, and leaves `path` as it was, where the disk is full or does not allow it.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        remove(temporary)
        yield temporary
        synchronise(temporary)
        move(temporary, path)
    except Exception as error:
        cause = find_cause(error)
        if cause is None:
            raise
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        raise CannotWrite(describe_failure(path, temporary, cause)) from None
    finally:
        with contextlib.suppress(OSError):
            remove(temporary)


@contextlib.contextmanager
def replace_folder(folder):
    """A folder to write into, which takes the place of `folder` when the block ends."""
    with write_aside(folder) as temporary:
        temporary.mkdir()
        yield temporary


def make_folder(folder):
    """Makes a folder, unless it is there."""
    if not folder.is_dir():
        with replace_folder(folder):
            pass


def write_text(path, text):
    """Writes a text file in UTF-8."""
    with write_aside(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def move(temporary, path):
    """Puts a new file or folder in the place of another."""
    if path.is_dir():
        # No folder can take the place of another in one step. A kill between these two leaves both under
        # temporary names; the checkpoint holds the same weights, and a resumed run exports them again.
        old = path.with_name(path.name + ".old.tmp")
        remove(old)
        os.replace(path, old)
        try:
            os.replace(temporary, path)
        except BaseException:
            if not path.exists():
                os.replace(old, path)
            raise
        remove(old)
    else:
        os.replace(temporary, path)


def synchronise(path):
    """Waits until a file, or all files in a folder, are on the disk: a moved file must not be an empty one
    after a power cut."""
    files = [path]
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.is_file()]
    for file in files:
        with open(file, "rb") as opened:
            try:
                os.fsync(opened.fileno())
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # some file systems cannot
                    raise


def remove(path):
    """Removes a file or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(run_dir):
    """Removes what a killed process was writing."""
    for pattern in ("*.tmp", "samples/*.tmp", "scores/*.tmp", "checkpoint/*.tmp"):
        for path in run_dir.glob(pattern):
            remove(path)


def find_cause(error):
    """The OSError or KeyboardInterrupt that made a library's writing fail, None if it was something else.

    torch.save, interrupted, raises an error of its own about a file that is not whole.
    """
    while error is not None:
        if isinstance(error, OSError | KeyboardInterrupt):
            return error
        number = re.search(r"\(os error (\d+)\)", str(error))  # as safetensors says it
        if number:
            return OSError(int(number[1]), os.strerror(int(number[1])))
        error = error.__cause__ or error.__context__
    return None


def describe_failure(path, temporary, error):
    """One line about a file or folder that could not be written. Removes what there is of it."""
    line = f"cannot write {path}: {error.strerror or error}"
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return line
    # What was written until then, or the last version: some libraries remove what they could not finish.
    needed = max(size_of(temporary), size_of(path))
    remove(temporary)
    free = shutil.disk_usage(path.parent).free
    return f"{line}; it needs at least {needed / 1e6:.1f} MB, and {free / 1e6:.1f} MB are free"


def size_of(path):
    """Bytes of a file, or of all files in a folder; 0 if there is none."""
    return sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())
