"""python -m rewards: a folder of images is scored."""

import json
import re

import pytest
import torch
import tyro
from einops import rearrange
from PIL import Image

import rewards
from rewards import __main__ as score_folder
from rewards import command_line

NAN = float("nan")


def save_images(folder, *names, size=(8, 8)):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(folder / name)


def run_score_folder(*words):
    command_line.execute(score_folder.main, tyro.cli(score_folder.Args, args=[str(word) for word in words]))


def test_a_folder_of_images_is_scored(tmp_path, capsys, scenes):
    rows, images = scenes
    wanted = [content | {"prompt": f"scene {i}"} for i, (content, _) in enumerate(rows[:24])]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, wanted)))
    for i in range(24):
        shown = images[i if i % 2 else (i + 7) % 24]  # every second one is of another prompt
        pixels = (rearrange(shown, "c h w -> h w c") * 255).byte().numpy()
        folder = tmp_path / f"images/{i:05d}/samples"
        folder.mkdir(parents=True)
        for k in range(1 + i % 2):
            Image.fromarray(pixels).save(folder / f"{k:04d}.png")
    flags = ["--images", tmp_path / "images", "--prompts", tmp_path / "prompts.jsonl", "--batch-size", 5]
    run_score_folder("geneval", "jpeg:0.1", *flags, "--output", tmp_path / "scores.jsonl")
    table = capsys.readouterr().out.splitlines()
    record = json.loads(table[-1])
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    order = [i for i in range(24) for _ in range(1 + i % 2)]
    assert [line["prompt"] for line in lines] == [f"scene {i}" for i in order]
    assert record["images"] == 36 and record["unscored"] == 0
    strict = [line["geneval_strict"] for line in lines]
    assert all(value == 1 for i, value in zip(order, strict) if i % 2) and 0 in strict
    scores = record["scores"]["geneval_strict"]
    assert scores["all"] == pytest.approx(sum(strict) / 36)
    tags = sorted({row["tag"] for row in wanted})
    for tag in tags:
        values = [value for i, value in zip(order, strict) if wanted[i]["tag"] == tag]
        assert scores[tag] == pytest.approx(sum(values) / len(values))
    assert scores["mean of tags"] == pytest.approx(sum(scores[tag] for tag in tags) / len(tags))
    assert table[0].split()[:3] == ["reward", "geneval", "geneval_soft"]
    assert table[1].split()[0] == "all" and float(table[1].split()[4]) == pytest.approx(
        scores["all"], abs=1e-4
    )
    assert lines[0]["reward"] == pytest.approx(lines[0]["geneval"] + 0.1 * lines[0]["jpeg"], abs=1e-5)


def test_images_of_several_sizes_and_unscored_ones(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(rewards.REGISTRY, "picky", f"{__name__}:make_picky")
    (tmp_path / "prompts.txt").write_text("a\nb\nc\nd")
    for name, size in (("0.png", (8, 8)), ("1.png", (8, 8)), ("2.png", (9, 7)), ("3.png", (8, 8))):
        save_images(tmp_path, name, size=size)
    flags = ("--images", tmp_path, "--prompts", tmp_path / "prompts.txt", "--output", tmp_path / "out.jsonl")
    run_score_folder("picky", *flags)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["picky"] for line in lines] == [8, 8, None, 8]
    output = capsys.readouterr()
    record = json.loads(output.out.splitlines()[-1])
    counts = {"images": 4, "unscored": 1, "prompts_without_image": 0}
    assert record == counts | {"scores": {"picky": {"all": 8.0}}}
    assert output.err.strip() == "4 images, 1 per prompt"


def make_picky(metadata, device):
    """The width, NaN for an image that is no square."""
    return lambda images, prompts, metadata: torch.full(
        (len(images),), float(images.shape[3]) if images.shape[2] == images.shape[3] else NAN
    )


@pytest.mark.parametrize(
    "name, changes, said",
    [
        ("beauty", {}, "unknown reward 'beauty'"),
        ("ocr", {}, "prompt 1 .*double quotes"),
        ("jpeg", {"--prompts": "none.txt"}, "none.txt does not exist"),
        ("jpeg", {"--images": "none"}, "--images none is missing"),
        ("jpeg", {"--images": "prompts.txt"}, "--images prompts.txt is a file"),
        ("jpeg", {"--images": "empty"}, "--images empty: 0 images"),
        ("jpeg", {"--prompts": "images"}, "images is a folder"),
        ("jpeg", {"--prompts": "three.txt"}, "--count-from"),
        ("jpeg", {"--prompts": "three.txt", "--number": "2"}, "2.png has no number"),
        ("jpeg", {"--prompts": "three.txt", "--in-order": None}, "1 images, 3 prompts"),
        ("jpeg:0", {}, "weight of reward 'jpeg' is zero"),
        ("jpeg", {"--batch-size": "0"}, "--batch-size"),
        ("jpeg", {"--output": "empty"}, "--output empty is a folder"),
        ("jpeg", {"--output": "none/x.jsonl"}, "--output none/x.jsonl: there is no folder none"),
        ("jpeg", {"--images": "broken"}, "no image can be read, such as broken/0.png .no image"),
    ],
)
def test_mistakes_end_the_scoring_with_one_line(tmp_path, monkeypatch, capsys, name, changes, said):
    monkeypatch.chdir(tmp_path)
    save_images(tmp_path / "images", "2.png")
    for folder in ("broken", "empty"):
        (tmp_path / folder).mkdir()
    (tmp_path / "broken/0.png").write_bytes((tmp_path / "images/2.png").read_bytes()[:40])
    (tmp_path / "three.txt").write_text("a\nb\nc\n")
    (tmp_path / "prompts.txt").write_text("a dog")
    flags = {"--images": "images", "--prompts": "prompts.txt"} | changes
    with pytest.raises(SystemExit) as stopped:
        words = [word for flag in flags.items() for word in flag if word is not None]
        run_score_folder(name, *words)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(f"error: .*{said}", line)


def test_a_broken_image_costs_itself_and_is_named(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a\nb\nc\nd\ne")
    save_images(tmp_path / "images", "0.png", "1.png", "2.png", "3.png")
    for name in ("1.png", "3.png"):
        path = tmp_path / "images" / name
        path.write_bytes(path.read_bytes()[:40])
    flags = ("--images", tmp_path / "images", "--prompts", tmp_path / "prompts.txt")
    run_score_folder("jpeg", *flags, "--output", tmp_path / "out.jsonl")
    output = capsys.readouterr()
    record = json.loads(output.out.splitlines()[-1])
    assert (record["images"], record["unscored"], record["prompts_without_image"]) == (4, 2, 1)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["jpeg"] is None for line in lines] == [False, True, False, True]
    assert [line["prompt"] for line in lines] == ["a", "b", "c", "d"]
    assert ["broken" in line for line in lines] == [False, True, False, True]
    assert record["scores"]["jpeg"]["all"] == pytest.approx(lines[0]["jpeg"])
    pairing, first, second = output.err.strip().splitlines()
    assert pairing == "4 images, 1 per prompt; 1 of 5 prompts have no image: 4 (counted from 0)"
    assert re.search("unscored: .*1.png cannot be read .no image", first) and "3.png" in second


def test_twelve_pictures_score_the_same_under_every_name(tmp_path, capsys, scenes):
    rows, images = scenes
    (tmp_path / "prompts.jsonl").write_text(
        "\n".join(json.dumps(content | {"prompt": f"scene {i}"}) for i, (content, _) in enumerate(rows[:12]))
    )
    for pattern in (
        "{:05d}.png",
        "image_{}.png",
        "42_{}.png",
        "{}_0.png",
        "scene {}.png",
        "ComfyUI_{:05d}_.png",
    ):
        folder = tmp_path / re.sub(r"\W", "", pattern)
        folder.mkdir()
        for i in range(12):
            pixels = (rearrange(images[i], "c h w -> h w c") * 255).byte().numpy()
            number = i + 1 if "ComfyUI" in pattern else i
            Image.fromarray(pixels).save(folder / pattern.format(number))
        run_score_folder("geneval", "--images", folder, "--prompts", tmp_path / "prompts.jsonl")
        record = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert record["scores"]["geneval_strict"]["all"] == 1, pattern


def test_a_reward_that_fails_ends_the_scoring_with_its_traceback_and_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(rewards.REGISTRY, "failing", f"{__name__}:make_failing")
    save_images(tmp_path, "0.png")
    (tmp_path / "prompts.txt").write_text("a")
    with pytest.raises(SystemExit) as stopped:
        run_score_folder("failing", "--images", tmp_path, "--prompts", tmp_path / "prompts.txt")
    assert stopped.value.code == 2
    text = capsys.readouterr().err
    assert "in fail_on_purpose" in text and "ZeroDivisionError" in text
    assert text.strip().splitlines()[-1].startswith("error: reward 'failing' failed with ZeroDivisionError")


def make_failing(metadata, device):
    def fail_on_purpose(images, prompts, metadata):
        return 1 / 0

    return fail_on_purpose
