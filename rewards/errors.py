"""The mistakes that end a run with one line. Imports no other module of the project: all may raise them."""

import traceback


class BadInput(ValueError):
    """A mistake of the caller's, with one line that says what is wrong and what to do about it."""


class RewardError(BadInput):
    """A reward that failed or returned something other than one number per image."""


def reward_failure(name, error):
    """The RewardError for an exception of a reward's own code, whose traceback is printed here."""
    frames = error.__traceback__
    if frames.tb_next is not None:
        frames = frames.tb_next  # without the caller's
    traceback.print_exception(type(error), error, frames)
    return RewardError(f"reward {name!r} failed with {type(error).__name__}, its traceback is above")
