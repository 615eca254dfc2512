"""Cells of docs/results.md."""

import numpy as np

from benchmark import markdown


def test_verdicts():
    assert markdown.verdict(high=0.16, claim=1 / 6) == "holds here"
    assert markdown.verdict(high=0.9, claim=1 / 6).startswith("holds in part")
    assert markdown.verdict(high=1.0, claim=1 / 6) == "does not hold here"
    assert markdown.verdict(high=np.inf, claim=1 / 6) == "does not hold here"


def test_a_claim_of_the_other_sign_does_not_hold():
    assert markdown.direction(np.array([0.1, 0.2]), -1).startswith("does not hold here")
    assert markdown.direction(np.array([0.1, 0.2]), 1) == "holds here"
    assert markdown.direction(np.array([-0.1, 0.2]), 1).startswith("not seen here")


def test_cells():
    assert markdown.table(["a", "b"], [["1", "2"]]) == ["| a | b |", "| --- | --- |", "| 1 | 2 |"]
    assert markdown.share(0.5, 0.25, np.inf) == "50% [25%, not reached]"
    assert markdown.signed(np.array([0.5, 0.5])) == "+0.500 [+0.500, +0.500]"
    assert markdown.level(np.array([0.5, 0.5]), 1) == "0.5 [0.5, 0.5]"
    assert markdown.each_signed([0.5, -0.25]) == "+0.500, -0.250"
