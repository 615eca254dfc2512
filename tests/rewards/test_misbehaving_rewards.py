"""Every way in which a reward can misbehave, as a plain callable and as one value of its details.

What can be used is used, the rest is one line that names the reward, what came and what is wanted.
"""

import dataclasses
import fractions
import json
import math
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import flow_grpo
import rewards
from rewards import BadInput, RewardError, command_line
from rewards.weighted_sum import WeightedSum

ROOT = Path(__file__).resolve().parents[2]
NAN = math.nan
INF = math.inf
B = 3


class FromNumpy:
    """As jax's, cupy's and pandas' arrays, which NumPy can read."""

    def __init__(self, values):
        self.values = values

    def __array__(self, dtype=None, copy=None):
        return np.array(self.values, dtype=dtype)


def trained(values):
    """A tensor that requires grad and has a graph behind it."""
    return 2 * torch.tensor(values, requires_grad=True)


def quantized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        return torch.quantize_per_tensor(torch.ones(B), 1.0, 0, torch.qint8)


# {case: (what a reward returns for three images, the scores that are made of it)}
USABLE = {
    "float32": (torch.tensor([1.0, 2, 3]), [1, 2, 3]),
    "float64": (torch.tensor([1.0, 2, 3], dtype=torch.float64), [1, 2, 3]),
    "float16": (torch.tensor([1.0, 2, 3], dtype=torch.float16), [1, 2, 3]),
    "bfloat16": (torch.tensor([1.0, 2, 3], dtype=torch.bfloat16), [1, 2, 3]),
    "int64": (torch.tensor([1, 2, 3]), [1, 2, 3]),
    "uint8": (torch.tensor([1, 2, 3], dtype=torch.uint8), [1, 2, 3]),
    "bool": (torch.tensor([True, False, True]), [1, 0, 1]),
    "requires grad": (trained([1.0, 2, 3]), [2, 4, 6]),
    "a parameter": (torch.nn.Parameter(torch.tensor([1.0, 2, 3])), [1, 2, 3]),
    "not contiguous": (torch.arange(6.0)[::2], [0, 2, 4]),
    "expanded": (torch.tensor([5.0]).expand(3), [5, 5, 5]),
    "NaN": (torch.tensor([1.0, NAN, 3]), [1, NAN, 3]),
    "all NaN": (torch.full((3,), NAN), [NAN] * 3),
    "infinity": (torch.tensor([INF, 2, -INF]), [NAN, 2, NAN]),
    "beyond float32": (torch.tensor([1e300, 2, 3], dtype=torch.float64), [NAN, 2, 3]),
    "array of float64": (np.array([1.0, 2, 3]), [1, 2, 3]),
    "array of float32": (np.array([1, 2, 3], np.float32), [1, 2, 3]),
    "array of float16": (np.array([1, 2, 3], np.float16), [1, 2, 3]),
    "array of ints": (np.array([1, 2, 3]), [1, 2, 3]),
    "array of bools": (np.array([True, False, True]), [1, 0, 1]),
    "array in other byte order": (np.array([1, 2, 3], ">f4"), [1, 2, 3]),
    "array backwards": (np.array([3.0, 2, 1])[::-1], [1, 2, 3]),
    "read-only array": (np.broadcast_to(np.float32(2), 3), [2, 2, 2]),
    "something with __array__": (FromNumpy([1.0, 2, 3]), [1, 2, 3]),
    "list of floats": ([1.0, NAN, 3.0], [1, NAN, 3]),
    "list of ints": ([1, 2, 3], [1, 2, 3]),
    "list of bools": ([True, False, True], [1, 0, 1]),
    "list of NumPy's numbers": ([np.float32(1), np.int64(2), np.bool_(True)], [1, 2, 1]),
    "list of tensors": ([torch.tensor(1.0), torch.tensor(2), trained(3.0)], [1, 2, 6]),
    "list of fractions": ([fractions.Fraction(1, 2), 2, 3], [0.5, 2, 3]),
    "list with a huge number": ([10**400, 2, 3], [NAN, 2, 3]),
    "tuple": ((1.0, 2.0, 3.0), [1, 2, 3]),
}

# {case: (what a reward returns for three images, how the line calls it)}
USELESS = {
    "None": (None, "None"),
    "a number": (1.0, "a float"),
    "an int": (1, "an? int"),
    "a 0-d tensor": (torch.tensor(1.0), r"a tensor of shape \(\)"),
    "a 0-d array": (np.array(1.0), r"an array of shape \(\)"),
    "NumPy's number": (np.float32(1), "a float32"),
    "shape (1,)": (torch.tensor([1.0]), r"a tensor of shape \(1,\)"),
    "shape (B, 1)": (torch.ones(B, 1), r"a tensor of shape \(3, 1\)"),
    "shape (1, B)": (torch.ones(1, B), r"a tensor of shape \(1, 3\)"),
    "shape (B, B)": (torch.ones(B, B), r"a tensor of shape \(3, 3\)"),
    "an array (B, 1)": (np.ones((B, 1)), r"an array of shape \(3, 1\)"),
    "one too few": (torch.ones(B - 1), r"a tensor of shape \(2,\)"),
    "one too many": (torch.ones(B + 1), r"a tensor of shape \(4,\)"),
    "empty": (torch.ones(0), r"a tensor of shape \(0,\)"),
    "complex": (torch.ones(B, dtype=torch.complex64), "complex64"),
    "an array of complex": (np.ones(B, complex), "complex128"),
    "sparse": (torch.ones(B).to_sparse(), "sparse_coo"),
    "meta": (torch.ones(B, device="meta"), r"a tensor of shape \(3,\)"),
    "quantized": (quantized(), "qint8"),
    "nested": (
        torch.nested.nested_tensor([torch.ones(1)] * B, layout=torch.jagged),
        "a tensor of shape",
    ),
    "an array of objects": (np.array([1.0, None, 3.0], object), "object"),
    "an array of texts": (np.array(["1", "2", "3"]), "<U1"),
    "an array of dates": (np.array(["2026-01-01"] * B, "datetime64[D]"), "datetime64"),
    "a text": ("1.0", "a str"),
    "bytes": (b"123", "a bytes"),
    "list, one too few": ([1.0, 2.0], "a list of 2"),
    "list, one too many": ([1.0] * 4, "a list of 4"),
    "list of texts": (["1", "2", "3"], "a list of 3, among them a str"),
    "list with None": ([1.0, None, 3.0], "a list of 3, among them a NoneType"),
    "list of lists": ([[1.0], [2.0], [3.0]], "a list of 3, among them a list"),
    "list of tensors (1,)": ([torch.ones(1)] * B, "a list of 3, among them a Tensor"),
    "list with complex": ([1.0, 2j, 3.0], "a list of 3, among them a complex"),
    "list of sparse": ([torch.ones(()).to_sparse()] * B, "a list of 3, among them a Tensor"),
    "a dict": ({0: 1.0, 1: 2.0, 2: 3.0}, "a dict"),
    "a set": ({1.0, 2.0, 3.0}, "a set"),
    "a generator": ((value for value in (1.0, 2.0, 3.0)), "a generator"),
    "a range": (range(B), "a range"),
    "a function": (len, "a builtin_function_or_method"),
    "a module": (torch.nn.Linear(1, 1), "a Linear"),
}


class Misbehaving:
    """A reward, and details of one, that returns or raises what it is given."""

    def __init__(self, value, key="odd"):
        self.value = value
        self.key = key

    def answer(self):
        if isinstance(self.value, BaseException):
            raise self.value.with_traceback(None)  # without that of an earlier test
        return self.value

    def __call__(self, images, prompts, metadata):
        return self.answer()


class MisbehavingDetails(Misbehaving):
    """The same as its own value in details, and for another key as one of their further values."""

    def details(self, images, prompts, metadata):
        found = {"odd": torch.ones(len(images))}
        found[self.key] = self.answer()
        return found


FORMS = {
    "callable": (Misbehaving, "odd", "reward 'odd'"),
    "details, its own value": (MisbehavingDetails, "odd", "reward 'odd'"),
    "details, another value": (MisbehavingDetails, "other", "details of reward 'odd' for 'other'"),
}
IMAGES = torch.rand(B, 3, 4, 4, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a", "b", "c"]


def score(reward, weight=1.0, images=IMAGES):
    return WeightedSum({"odd": (reward, weight)}).details(images, PROMPTS, [{}] * B)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", USABLE)
def test_what_is_a_row_of_numbers_is_used(case, form):
    value, expected = USABLE[case]
    make, key, _ = FORMS[form]
    details = score(make(value, key))
    scores = details[key]
    assert scores.dtype == torch.float32 and scores.shape == (B,) and not scores.requires_grad
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float32), equal_nan=True)
    torch.testing.assert_close(details["reward"], details["odd"], equal_nan=True)
    assert not details["reward"].requires_grad


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", USELESS)
def test_what_is_none_is_refused_in_one_line(case, form):
    value, called = USELESS[case]
    make, key, source = FORMS[form]
    with pytest.raises(RewardError) as error:
        score(make(value, key))
    line = str(error.value)
    assert re.match(
        f"{source} returned .*{called}.*; it must return a tensor, array or list of 3 numbers", line
    )
    assert "\n" not in line and isinstance(error.value, BadInput)


def test_one_image_needs_a_row_of_one_number():
    one = IMAGES[:1]
    total = WeightedSum({"odd": (Misbehaving([2.0]), 1.0)})
    assert total(one, ["a"], [{}]).tolist() == [2]
    with pytest.raises(RewardError, match=r"shape \(\)"):
        WeightedSum({"odd": (Misbehaving(torch.tensor(2.0)), 1.0)})(one, ["a"], [{}])


# ---- infinity ----
@pytest.mark.parametrize("form", FORMS)
def test_infinity_is_nan_with_one_warning_per_reward(form):
    make, key, source = FORMS[form]
    value = torch.tensor([INF, 1.0, -INF])
    reward = make(value, key)
    total = WeightedSum({"odd": (reward, 1.0)})
    with pytest.warns(UserWarning, match=f"{source} is infinite") as warned:
        for _ in range(3):
            details = total.details(IMAGES, PROMPTS, [{}] * B)
    assert len(warned) == 1
    assert details[key].isnan().tolist() == [True, False, True]
    assert value.isinf().sum() == 2  # the reward's own tensor is left alone


def test_a_sum_that_overflows_is_nan_with_a_warning():
    values = torch.tensor([3e38, 1.0, -3e38])
    total = WeightedSum({"odd": (Misbehaving(values), 1e9)})
    with pytest.warns(UserWarning, match="the weighted sum is infinite"):
        details = total.details(IMAGES, PROMPTS, [{}] * B)
    assert details["reward"].isnan().tolist() == [True, False, True]
    assert details["odd"].isfinite().all()


# ---- exceptions ----
EXCEPTIONS = [
    ZeroDivisionError("division by zero"),
    ValueError("several\nlines"),
    KeyError("tag"),
    RuntimeError("CUDA out of memory"),
    torch.OutOfMemoryError("CUDA out of memory"),
    AssertionError(),
    StopIteration(),
    FloatingPointError("underflow"),
    NotImplementedError("soon"),
    TimeoutError("the server"),
    SystemExit(0),
    RecursionError("too deep"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("exception", EXCEPTIONS, ids=lambda exception: type(exception).__name__)
def test_an_exception_shows_its_traceback_and_becomes_one_line(exception, form, capsys):
    make, key, _ = FORMS[form]
    with pytest.raises(RewardError) as error:
        score(make(exception, key))
    kind = type(exception).__name__
    assert str(error.value) == f"reward 'odd' failed with {kind}, its traceback is above"
    traceback = capsys.readouterr().err
    assert "in answer" in traceback and "raise self.value" in traceback and kind in traceback
    assert "weighted_sum.py" not in traceback  # theirs, not ours


def test_a_mistake_that_a_reward_explains_is_passed_on(capsys):
    with pytest.raises(BadInput, match="^row 1: no source$"):
        score(Misbehaving(BadInput("row 1: no source")))
    assert capsys.readouterr().err == ""


def test_ctrl_c_is_not_an_exception_of_the_reward():
    with pytest.raises(KeyboardInterrupt):
        score(Misbehaving(KeyboardInterrupt()))


# ---- details ----
class Fixed:
    """Details that are given, one after the other."""

    def __init__(self, *answers):
        self.answers = list(answers)

    def details(self, images, prompts, metadata):
        return self.answers.pop(0)


ONES = torch.ones(B)
BAD_DETAILS = {
    "None": (None, "returned None; it must return a dict"),
    "a tensor": (ONES, r"returned a tensor of shape \(3,\).*; it must return a dict"),
    "pairs": ([("odd", ONES)], "returned a list of 1.*; it must return a dict"),
    "empty": ({}, "lacks 'odd', its own value"),
    "without its own value": ({"other": ONES}, "lacks 'odd', its own value"),
    "a number as name": ({"odd": ONES, 3: ONES}, "has the name 3; names are text"),
    "None as name": ({"odd": ONES, None: ONES}, "has the name None; names are text"),
    "an empty name": ({"odd": ONES, "": ONES}, "has the name ''"),
    "a slash": ({"odd": ONES, "odd/a": ONES}, "has the name 'odd/a'"),
    "the name of the sum": ({"odd": ONES, "reward": ONES}, "has 'reward', a name already in use"),
    "the name of another reward": ({"odd": ONES, "first": ONES}, "has 'first', a name already in use"),
}


@pytest.mark.parametrize("details, said", BAD_DETAILS.values(), ids=BAD_DETAILS)
def test_details_must_be_a_dict_with_proper_names(details, said):
    total = WeightedSum({"first": (Misbehaving(ONES), 1.0), "odd": (Fixed(details), 1.0)})
    with pytest.raises(RewardError, match=f"details of reward 'odd' {said}") as error:
        total.details(IMAGES, PROMPTS, [{}] * B)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "later", [{"odd": ONES}, {"odd": ONES, "b": ONES}, {"odd": ONES, "a": ONES, "b": ONES}]
)
def test_details_have_the_same_names_at_every_call(later):
    reward = Fixed({"odd": ONES, "a": ONES}, {"a": ONES, "odd": ONES}, later)
    total = WeightedSum({"odd": (reward, 1.0)})
    total.details(IMAGES, PROMPTS, [{}] * B)
    total.details(IMAGES, PROMPTS, [{}] * B)  # another order is none
    with pytest.raises(RewardError, match="has odd.*; in earlier batches it was odd, a"):
        total.details(IMAGES, PROMPTS, [{}] * B)


# ---- what a reward does to its arguments ----
def draws(images, prompts, metadata):
    images.zero_()
    return torch.ones(B)


def draws_through_numpy(images, prompts, metadata):
    images.numpy()[:] = 0
    return torch.ones(B)


def edits_lists(images, prompts, metadata):
    prompts.clear()
    metadata.clear()
    return torch.ones(B)


def edits_metadata(images, prompts, metadata):
    for row in metadata:
        row["tag"] = "mine"
        row.pop("text", None)
    return torch.ones(B)


@pytest.mark.parametrize("reward", [draws, draws_through_numpy, edits_lists, edits_metadata])
def test_a_reward_cannot_change_what_the_others_see(reward):
    images = IMAGES.clone()
    prompts = list(PROMPTS)
    metadata = [{"text": "A1"}, {}, {"tag": "x"}]
    seen = []

    def sees(images, prompts, metadata):
        seen.append((images.clone(), list(prompts), [dict(row) for row in metadata]))
        return torch.ones(B)

    WeightedSum({"odd": (reward, 1.0), "sees": (sees, 1.0)}).details(images, prompts, metadata)
    for seen_images, seen_prompts, seen_metadata in [*seen, (images, prompts, metadata)]:
        assert torch.equal(seen_images, IMAGES)
        assert seen_prompts == PROMPTS and seen_metadata == [{"text": "A1"}, {}, {"tag": "x"}]


# ---- factories ----
def make_none(metadata, device):
    pass


def make_text(metadata, device):
    return "a reward"


def make_failing(metadata, device):
    raise KeyError("tag")


def make_exiting(metadata, device):
    raise SystemExit(0)


def make_without_arguments():
    return draws


class NoCall:
    details = {"odd": ONES}


def make_no_call(metadata, device):
    return NoCall()


class BadCheck:
    def check(self, prompt, metadata):
        raise KeyError("tag")

    def __call__(self, images, prompts, metadata):
        return ONES


def make_bad_check(metadata, device):
    return BadCheck()


FACTORIES = {
    "returns nothing": (f"{__name__}:make_none", "returned a NoneType, no reward"),
    "returns a text": (f"{__name__}:make_text", "returned a str, no reward"),
    "details is no method": (f"{__name__}:make_no_call", "returned a NoCall, no reward"),
    "fails": (f"{__name__}:make_failing", "failed with KeyError"),
    "exits": (f"{__name__}:make_exiting", "failed with SystemExit"),
    "takes no arguments": (f"{__name__}:make_without_arguments", "failed with TypeError"),
    "no such module": ("rewards.nowhere:make_odd", "failed with ModuleNotFoundError"),
    "no such function": (f"{__name__}:make_nothing", "failed with AttributeError"),
    "no function": (__name__, "failed with AttributeError"),
    "a check that fails": (f"{__name__}:make_bad_check", "failed with KeyError"),
}


@pytest.mark.parametrize("place, said", FACTORIES.values(), ids=FACTORIES)
def test_a_factory_that_makes_no_reward_is_one_line(place, said, monkeypatch, capsys):
    monkeypatch.setitem(rewards.REGISTRY, "odd", place)
    with pytest.raises(RewardError, match=f"'odd'.* {said}") as error:
        rewards.build("odd", ["a"], [{}])
    assert "\n" not in str(error.value)
    assert ("Traceback" in capsys.readouterr().err) == ("failed" in said)


def test_a_reward_that_misbehaves_on_the_black_image_of_a_tagged_file_is_one_line(monkeypatch):
    monkeypatch.setitem(rewards.REGISTRY, "odd", f"{__name__}:make_odd_details")
    metadata = [{"reward": "jpeg"}, {}]
    with pytest.raises(RewardError, match="reward 'odd' returned None"):
        rewards.build("odd,jpeg", ["a", "b"], metadata)


def make_odd_details(metadata, device):
    return MisbehavingDetails(None)


# ---- in a run ----
class Turning:
    """A good reward for some calls, then a misbehaving one."""

    def __init__(self, good_calls, value):
        self.good_calls = good_calls
        self.value = value
        self.calls = 0

    def __call__(self, images, prompts, metadata):
        self.calls += 1
        if self.calls <= self.good_calls:
            return images.mean(dim=(1, 2, 3))
        return Misbehaving(self.value).answer()


@pytest.mark.parametrize(
    "value, said",
    [(None, "returned None"), (torch.ones(1), r"shape \(1,\)"), (ZeroDivisionError(), "failed with ZeroDiv")],
)
def test_a_run_ends_with_one_line_and_keeps_its_checkpoint(tmp_path, monkeypatch, capsys, value, said):
    monkeypatch.chdir(ROOT)
    turning = Turning(6, value)
    monkeypatch.setitem(rewards.REGISTRY, "turning", f"{__name__}:make_turning")
    monkeypatch.setitem(globals(), "make_turning", lambda metadata, device: turning)
    lines = (ROOT / "tiny/prompts/fold_0/train.jsonl").read_text().splitlines()[:4]
    for name in ("train", "eval"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    args = flow_grpo.Args(
        rewards="turning",
        prompts=str(tmp_path / "train.jsonl"),
        output_dir=str(tmp_path / "runs"),
        num_prompts_per_iteration=2,
        num_images_per_prompt=2,
        micro_batch_size=2,
        num_inference_steps=3,
        eval_num_inference_steps=2,
        num_iterations=4,
        save_every=1,
        device="cpu",
    )
    with pytest.raises(SystemExit) as stopped:
        command_line.execute(flow_grpo.train, args)
    assert stopped.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(f"error: reward 'turning' .*{said}", last)
    (run_dir,) = (tmp_path / "runs").iterdir()
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [0, 1, 2]
    turning.good_calls = 10**9  # mended: the run goes on from its checkpoint
    flow_grpo.train(dataclasses.replace(args, resume=str(run_dir)))
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3, 4]
