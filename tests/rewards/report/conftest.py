"""Fixtures for the tests of what a run leaves behind."""

import hashlib
import json
import os
import traceback
from pathlib import Path

import miniature
import pytest

from rewards.command_line import execute


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder with prompt files and a model in which miniature.py runs."""
    monkeypatch.chdir(tmp_path)
    for name in ("train", "eval"):
        rows = [json.dumps({"prompt": f"{name} {number}"}) + "\n" for number in range(3)]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "weights.safetensors").write_bytes(bytes(1000))
    return tmp_path


@pytest.fixture
def finished_run(world):
    """The folder of a run of two iterations, from which a run of three can be resumed."""
    return miniature.train(miniature.Args(model="model"))


@pytest.fixture
def ends_in_one_line(capsys):
    """ends_in_one_line(args, code) -> the one line on stderr with which the run stops."""

    def check(args, code=2):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            execute(miniature.train, args)
        assert stopped.value.code == code
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return check


def hash_folder(folder):
    """{path of a file or folder: hash of its content}."""
    hashes = {}
    for path in sorted(Path(folder).rglob("*")):
        content = path.read_bytes() if path.is_file() else b"folder"
        hashes[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return hashes


def in_a_child(function):
    """Runs a function in a copy of this process; returns that one's exit code, negative for a signal."""
    child = os.fork()
    if child == 0:
        code = 70  # an exception that nobody expected
        try:
            function()
            code = 0
        except SystemExit as stopped:
            code = stopped.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)
