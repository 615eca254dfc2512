"""Resuming a run: every file, damaged in every way, is refused in one line, and nothing is written."""

import dataclasses
import errno
import fcntl
import json
import os
import shutil
import signal
import zipfile
from pathlib import Path

import miniature
import pytest
import torch

from conftest import hash_folder, in_a_child
from rewards import BadInput
from rewards.report import lock as lock_module
from rewards.report.inputs import fingerprint_model


@pytest.fixture
def is_refused(finished_run, ends_in_one_line):
    """is_refused(what) checks that the damaged run cannot be resumed; what: a part of the line."""

    def check(what):
        before = hash_folder(finished_run)
        line = ends_in_one_line(miniature.Args(resume=str(finished_run)))
        assert line.startswith("error: cannot resume") and what in line, line
        assert hash_folder(finished_run) == before

    return check


def test_an_undamaged_run_resumes_and_changes_no_file(finished_run):
    before = hash_folder(finished_run)
    assert miniature.train(miniature.Args(resume=str(finished_run))) == finished_run
    assert hash_folder(finished_run) == before


# === any file, damaged as a file ===

DAMAGES = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe" + path.read_bytes()[2:]),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "another format": lambda path: path.write_text("hello\n" * 10),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a dead link": lambda path: (path.unlink(), path.symlink_to("nowhere")),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["args.json", "metrics.jsonl", "checkpoint/state.pt"])
def test_a_damaged_file_is_refused_before_a_model_is_loaded(
    finished_run, is_refused, monkeypatch, name, damage
):
    monkeypatch.setattr(miniature, "make_model", lambda args: pytest.fail("loaded"))
    DAMAGES[damage](finished_run / name)
    is_refused("")


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name", ["samples/000000.png", "samples/000002.png", "reward.png", "before_after.png"]
)
def test_a_damaged_picture_is_made_again_or_left_out(finished_run, capsys, name, damage):
    DAMAGES[damage](finished_run / name)
    if damage == "a folder" and not name.startswith("samples"):
        (finished_run / name / "file").touch()  # a picture takes the place of a folder that is not empty
    miniature.train(miniature.Args(resume=str(finished_run)))
    assert "look at" in capsys.readouterr().out
    for picture in ("reward.png", "before_after.png"):
        assert (finished_run / picture).read_bytes().startswith(b"\x89PNG")


def test_a_run_without_its_samples_ends_well(finished_run):
    shutil.rmtree(finished_run / "samples")
    (finished_run / "before_after.png").unlink()
    miniature.train(miniature.Args(resume=str(finished_run)))
    assert not (finished_run / "before_after.png").exists()


def test_a_folder_that_is_no_run_is_refused(world, ends_in_one_line):
    for path in ("nowhere", ".", "train.jsonl"):
        assert "args.json is missing" in ends_in_one_line(miniature.Args(resume=path))


# === args.json ===


def change_args(run_dir, **changes):
    path = run_dir / "args.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


WRONG_VALUES = [None, True, -1, 1.5, float("nan"), float("inf"), 10**400, "x\0", "", [1], {}, "text", 3]


@pytest.mark.parametrize("field", dataclasses.fields(miniature.Args), ids=lambda field: field.name)
def test_a_wrong_value_of_any_flag_is_refused(finished_run, ends_in_one_line, field):
    good = (finished_run / "args.json").read_text()
    refused = 0
    for value in WRONG_VALUES:
        change_args(finished_run, **{field.name: value})
        args = miniature.Args(resume=str(finished_run))
        try:
            miniature.check_ranges(dataclasses.replace(args, **{field.name: value}))
        except BadInput:
            before = hash_folder(finished_run)
            assert f"--{field.name.replace('_', '-')} must" in ends_in_one_line(args)
            assert hash_folder(finished_run) == before
            refused += 1
        (finished_run / "args.json").write_text(good)
    assert refused >= 7


def test_flags_that_are_missing_or_unknown_are_refused(finished_run, is_refused):
    good = json.loads((finished_run / "args.json").read_text())
    for name in good:
        (finished_run / "args.json").write_text(json.dumps({key: good[key] for key in good if key != name}))
        is_refused({"algorithm": "another algorithm", "inputs": "made from"}.get(name, "args.json lacks"))
    for name, value, message in (
        ("sead", 1, "--sead"),
        ("algorithm", "fdfo", "another algorithm made it: fdfo"),
        ("algorithm", 3, "another algorithm"),
        ("inputs", 3, "made from"),
        ("num_iterations", 1, "after its end"),
    ):
        (finished_run / "args.json").write_text(json.dumps(good | {name: value}))
        is_refused(message)
    for text in ("[]", "3", "null", '{"seed": 1', "[" * 100_000, '{"seed": ' + "1" * 5000 + "}"):
        (finished_run / "args.json").write_text(text)
        is_refused("args.json")


def test_with_resume_anyway_a_missing_flag_has_its_default(finished_run):
    record = json.loads((finished_run / "args.json").read_text())
    record.pop("wandb_entity")
    record.pop("inputs")
    for inputs in ({}, {"inputs": 3}, {"inputs": {"the script": 3}}):
        (finished_run / "args.json").write_text(json.dumps(record | inputs))
        miniature.train(miniature.Args(resume=str(finished_run), resume_anyway=True))


# === metrics.jsonl ===

ROWS = {
    "not JSON": "{",
    "a number": "3",
    "a list": "[]",
    "null": "null",
    "blank": "",
    "no iteration": "{}",
    "the next iteration": '{"iteration": 2}',
    "the last iteration": '{"iteration": 0}',
    "iteration true": '{"iteration": true}',
    "iteration 1.0": '{"iteration": 1.0}',
    "a text": '{"iteration": 1, "eval/reward": "high"}',
    "a list in it": '{"iteration": 1, "eval/reward": [1]}',
    "a number too large": '{"iteration": 1, "eval/reward": ' + "9" * 400 + "}",
    "digits without end": '{"iteration": 1, "eval/reward": ' + "9" * 5000 + "}",
}


@pytest.mark.parametrize("row", ROWS)
def test_a_damaged_row_is_refused(finished_run, is_refused, row):
    lines = (finished_run / "metrics.jsonl").read_text().split("\n")
    lines[1] = ROWS[row]
    (finished_run / "metrics.jsonl").write_text("\n".join(lines))
    is_refused("line 2 of")


def test_missing_rows_are_refused(finished_run, is_refused):
    lines = (finished_run / "metrics.jsonl").read_text().splitlines()
    for kept in ("", lines[0], lines[0] + "\n" + lines[1]):
        for end in ("", "\n"):
            (finished_run / "metrics.jsonl").write_text(kept + end)
            is_refused("metrics.jsonl")


def test_rows_after_the_checkpoint_are_dropped_whatever_they_are(finished_run):
    good = (finished_run / "metrics.jsonl").read_bytes()
    for tail in (b'{"iteration": 3, "charts/', b"\xff\n", b'{"iteration": 7}\n'):
        (finished_run / "metrics.jsonl").write_bytes(good + tail)
        miniature.train(miniature.Args(resume=str(finished_run)))
        assert (finished_run / "metrics.jsonl").read_bytes() == good


# === the checkpoint ===


def change_state(run_dir, change):
    state = torch.load(run_dir / "checkpoint/state.pt", weights_only=True)
    change(state)
    torch.save(state, run_dir / "checkpoint/state.pt")


def state_of(state, number):
    return state["optimizer"]["state"][number]


STATES = {
    "no progress": lambda s: s.pop("progress"),
    "progress is a number": lambda s: s.update(progress=2),
    "no iteration": lambda s: s.update(progress={}),
    "iteration -1": lambda s: s.update(progress={"iteration": -1}),
    "iteration 1.0": lambda s: s.update(progress={"iteration": 1.0}),
    "iteration true": lambda s: s.update(progress={"iteration": True}),
    "iteration after the end": lambda s: s.update(progress={"iteration": 3}),
    "no weights": lambda s: s.pop("weights"),
    "weights None": lambda s: s.update(weights=None),
    "weights empty": lambda s: s["weights"].clear(),
    "a weight missing": lambda s: s["weights"].pop("bias"),
    "a weight too many": lambda s: s["weights"].update(scale=torch.ones(1)),
    "a weight renamed": lambda s: s["weights"].update(other=s["weights"].pop("bias")),
    "a weight is a number": lambda s: s["weights"].update(bias=0.0),
    "a weight of another shape": lambda s: s["weights"].update(bias=torch.zeros(3)),
    "a weight that broadcasts": lambda s: s["weights"].update(bias=torch.zeros(1)),
    "a weight of another type": lambda s: s["weights"].update(bias=torch.zeros(2, dtype=torch.bfloat16)),
    "no optimiser": lambda s: s.pop("optimizer"),
    "optimiser None": lambda s: s.update(optimizer=None),
    "no groups": lambda s: s["optimizer"]["param_groups"].clear(),
    "a group without settings": lambda s: s["optimizer"].update(param_groups=[{"params": [0, 1]}]),
    "a group of other parameters": lambda s: s["optimizer"]["param_groups"][0].update(params=[0]),
    "a setting of another type": lambda s: s["optimizer"]["param_groups"][0].update(betas="high"),
    "groups are no list": lambda s: s["optimizer"].update(param_groups=3),
    "no states": lambda s: s["optimizer"].pop("state"),
    "states empty": lambda s: s["optimizer"]["state"].clear(),
    "a state missing": lambda s: s["optimizer"]["state"].pop(1),
    "a state too many": lambda s: s["optimizer"]["state"].update({2: state_of(s, 1)}),
    "a state empty": lambda s: state_of(s, 1).clear(),
    "a state is a number": lambda s: s["optimizer"]["state"].update({1: 0}),
    "a moment missing": lambda s: state_of(s, 1).pop("exp_avg_sq"),
    "a moment too many": lambda s: state_of(s, 1).update(max_exp_avg_sq=torch.zeros(2)),
    "a moment of another shape": lambda s: state_of(s, 1).update(exp_avg=torch.zeros(1)),
    "a moment of another type": lambda s: state_of(s, 1).update(exp_avg=torch.zeros(2).half()),
    "a step that is no tensor": lambda s: state_of(s, 1).update(step=2),
    "a step of another shape": lambda s: state_of(s, 1).update(step=torch.zeros(2)),
}


@pytest.mark.parametrize("change", STATES)
def test_an_incomplete_or_foreign_checkpoint_is_refused(finished_run, is_refused, change):
    change_state(finished_run, STATES[change])
    is_refused("")


def test_a_checkpoint_that_is_no_dict_is_refused(finished_run, is_refused):
    for state in ([], torch.zeros(3), 3, None):
        torch.save(state, finished_run / "checkpoint/state.pt")
        is_refused("damaged")


def test_nothing_is_unpickled(finished_run, is_refused):
    torch.save({"progress": {"iteration": 2}, "weights": Path("x")}, finished_run / "checkpoint/state.pt")
    is_refused("damaged")


def test_any_flipped_bit_of_a_checkpoint_is_refused_or_changes_nothing(finished_run):
    path = finished_run / "checkpoint/state.pt"
    good = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        directory = archive.start_dir  # where the parts are listed: every bit of it; one of each byte before
    expected = str(miniature.report.read_checkpoint(finished_run))
    refused = 0
    for bit in [*range(3, 8 * directory, 8), *range(8 * directory, 8 * len(good))]:
        damaged = bytearray(good)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            assert str(miniature.report.read_checkpoint(finished_run)) == expected, bit
        except BadInput:
            refused += 1
    assert refused > 1000


def test_any_flipped_bit_of_a_tensor_is_refused(finished_run):
    path = finished_run / "checkpoint/state.pt"
    good = path.read_bytes()
    tensor = miniature.report.read_checkpoint(finished_run)["weights"]["weight"].numpy().tobytes()
    first = 8 * good.index(tensor)
    for bit in range(first, first + 8 * len(tensor)):
        damaged = bytearray(good)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(BadInput, match="checksum"):
            miniature.report.read_checkpoint(finished_run)


def test_restoring_changes_nothing_unless_all_fits(finished_run):
    state = miniature.report.read_checkpoint(finished_run)
    model, optimizer = miniature.make_model(miniature.Args(seed=5))
    parameters = dict(model.named_parameters())
    before = {name: parameter.clone() for name, parameter in parameters.items()}
    weights = dict(state["weights"], bias=torch.zeros(3))
    with pytest.raises(BadInput, match=r"bias in the checkpoint: \(3,\).*in the model: \(2,\)"):
        miniature.report.restore_parameters(parameters, weights)
    assert all(torch.equal(before[name], parameters[name]) for name in before)
    state["optimizer"]["state"][1]["exp_avg"] = torch.zeros(3)
    with pytest.raises(BadInput, match="exp_avg of parameter 1"):
        miniature.report.restore_optimizer(optimizer, state["optimizer"])
    assert not optimizer.state


# === what the run was made from ===


def add_paraphrases(world):
    shutil.copy(world / "eval.jsonl", world / "eval_paraphrased.jsonl")


CHANGES = {
    "the prompt file for train": lambda world: (world / "train.jsonl").write_text('{"prompt": "other"}'),
    "the prompt file for eval": lambda world: (world / "eval.jsonl").open("a").write('{"prompt": "x"}\n'),
    "the prompt file for eval_paraphrased": add_paraphrases,
    "--model model": lambda world: (world / "model/config.json").write_text("[]"),
    "--model model ": lambda world: (world / "model/vae").write_text("new"),
    "--model model  ": lambda world: (world / "model/weights.safetensors").write_bytes(bytes(999)),
    "--model model   ": lambda world: (world / "model/weights.safetensors").write_bytes(b"1" * 1000),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_inputs_are_refused_and_resumed_anyway(finished_run, world, is_refused, capsys, name):
    CHANGES[name](world)
    is_refused(f"{name.strip()} changed since the run began. To resume all the same, add --resume-anyway")
    miniature.train(miniature.Args(resume=str(finished_run), resume_anyway=True))
    assert capsys.readouterr().err == f"note: {name.strip()} changed since the run began\n"


def test_a_changed_script_is_refused(finished_run, is_refused, monkeypatch, tmp_path):
    changed = tmp_path / "new" / "miniature.py"
    changed.parent.mkdir()
    changed.write_text(Path(miniature.__file__).read_text() + "\n# changed\n")
    monkeypatch.setattr(miniature, "__file__", str(changed))
    is_refused("the script changed since the run began")


def test_a_model_on_the_hub_is_known_by_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr("rewards.report.inputs.HF_HUB_CACHE", str(tmp_path))
    assert fingerprint_model("someone/model") == ""
    branch = tmp_path / "models--someone--model" / "refs" / "main"
    branch.parent.mkdir(parents=True)
    branch.write_text("abc123\n")
    assert fingerprint_model("someone/model") == "abc123"


def test_a_text_of_any_kind_may_stand_in_a_flag(world):
    for text in ("a" * 5000, "two\nlines", "runs/" * 1000, "{prompt}", "/", ".", "someone/nothing"):
        assert fingerprint_model(text) == ""


def test_hidden_files_of_a_model_do_not_count(world):
    before = fingerprint_model("model")
    (world / "model/.cache").mkdir()
    (world / "model/.cache/notes").write_text("downloaded today")
    assert fingerprint_model("model") == before != ""


def test_other_flags_are_named_as_ignored(finished_run, capsys):
    miniature.train(miniature.Args(resume=str(finished_run), seed=3, learning_rate=0.5, model="model"))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: ignored") and line.endswith("--seed 3, --learning-rate 0.5")


# === one process at a time ===


def test_a_run_in_use_is_refused_until_the_other_process_is_dead(finished_run):
    lock_module.unlock(finished_run)
    ready, write_ready = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            lock_module.lock(finished_run)
            os.write(write_ready, b"x")
            signal.pause()
        finally:
            os._exit(1)
    try:
        os.read(ready, 1)
        before = hash_folder(finished_run)
        with pytest.raises(BadInput, match="in use by another process"):
            miniature.train(miniature.Args(resume=str(finished_run)))
        assert hash_folder(finished_run) == before
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    miniature.train(miniature.Args(resume=str(finished_run)))


def test_a_new_run_is_locked_from_its_beginning_to_its_end(world, monkeypatch):
    codes = []
    write = miniature.report.Log.write

    def resume_meanwhile(log, *arguments):
        write(log, *arguments)
        codes.append(in_a_child(lambda: resume_elsewhere(log.run_dir)))

    def resume_elsewhere(run_dir):
        lock_module.HELD.clear()  # another process knows nothing of it
        try:
            lock_module.lock(run_dir)
        except BadInput:
            raise SystemExit(3) from None

    monkeypatch.setattr(miniature.report.Log, "write", resume_meanwhile)
    run_dir = miniature.train(miniature.Args())
    assert codes == [3, 3, 3]
    assert in_a_child(lambda: resume_elsewhere(run_dir)) == 0


def test_a_file_system_without_locks_is_no_obstacle(finished_run, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    miniature.train(miniature.Args(resume=str(finished_run)))


def test_a_run_that_cannot_be_written_to_is_refused(finished_run, monkeypatch):
    def no_rights(path, mode):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(lock_module, "open", no_rights, raising=False)
    before = hash_folder(finished_run)
    with pytest.raises(BadInput, match="cannot write to .*: Permission denied"):
        miniature.train(miniature.Args(resume=str(finished_run)))
    assert hash_folder(finished_run) == before


# === a new folder ===


def test_runs_that_begin_in_the_same_second_have_folders_of_their_own(world, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda form: "20260101-120000")
    names = [miniature.train(miniature.Args()).name for _ in range(3)]
    first = "miniature-jpeg-1-20260101-120000"
    assert names == [first, f"{first}-2", f"{first}-3"]


def test_a_folder_that_cannot_be_made_is_refused_and_none_is_left(world, ends_in_one_line):
    (world / "file").touch()
    before = hash_folder(world)
    for output_dir in ("file", "file/runs", "a" * 300, "/proc/runs", "b/" + "a" * 300):
        line = ends_in_one_line(miniature.Args(output_dir=output_dir))
        assert line.startswith(f"error: --output-dir {output_dir}: cannot make a folder there")
        assert hash_folder(world) == before


@pytest.fixture
def tracking_set_up_anew():
    """W&B reads its environment once per process: what a test sets must not stay for the next one."""
    import wandb

    wandb.teardown()
    yield
    wandb.teardown()


def test_tracking_without_a_key_is_refused_and_no_folder_is_left(
    world, ends_in_one_line, monkeypatch, tracking_set_up_anew
):
    monkeypatch.setenv("HOME", str(world))
    monkeypatch.setenv("NETRC", str(world / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr("wandb.login", lambda prompt: False)
    assert "not logged in" in ends_in_one_line(miniature.Args(track=True))
    assert not (world / "runs").exists()


def test_tracking_that_does_not_start_leaves_no_folder(
    world, ends_in_one_line, monkeypatch, tracking_set_up_anew
):
    import wandb

    def fail(**options):
        raise wandb.errors.CommError("no network\nat all")

    monkeypatch.setattr("wandb.init", fail)
    monkeypatch.setattr("wandb.login", lambda prompt: True)
    assert "--track: no network at all" in ends_in_one_line(miniature.Args(track=True))
    assert not list(world.glob("runs/*"))
