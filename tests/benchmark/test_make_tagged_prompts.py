"""Prompts of three kinds, each with its own reward."""

from benchmark import make_tagged_prompts


def test_tagged_prompts_have_one_reward_each_and_as_many_lines_in_training():
    parts = make_tagged_prompts.kinds("train")
    for name, rows in parts.items():
        assert {row["reward"] for row in rows} == {name}
    geneval, ocr, jpeg = ({row["prompt"] for row in rows} for rows in parts.values())
    assert not geneval & ocr and not geneval & jpeg and not ocr & jpeg
    assert len(parts["geneval"]) == make_tagged_prompts.LINES
    files = make_tagged_prompts.files("train")
    assert {len(files[name]) for name in parts} == {make_tagged_prompts.LINES}
    assert files["two"] == files["geneval"] + files["ocr"] and files["all"] == files["two"] + files["jpeg"]


def test_evaluation_files_are_not_repeated():
    parts = make_tagged_prompts.kinds("dev")
    files = make_tagged_prompts.files("dev")
    assert {name: files[name] for name in parts} == parts
