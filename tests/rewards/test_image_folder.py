"""Whose prompt an image in a folder is: the layouts that tools leave, and those that cannot be told."""

import json
import os
import re

import pytest
from PIL import Image

from rewards import BadInput
from rewards.image_folder import describe_pairing, find_images, natural_order, pair_images

TWELVE = [f"prompt number {word}" for word in "a b c d e f g h i j k l".split()]


def save_images(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path.with_suffix(".png"))
        path.with_suffix(".png").rename(path)


def pair(folder, prompts, **options):
    """{name of an image: the number of its prompt}"""
    paths = find_images(folder)
    rows = pair_images(folder, paths, prompts, **options)
    return {path.relative_to(folder).as_posix(): row for path, row in zip(paths, rows)}


def numbered(pattern, numbers=range(12), first=0):
    """{name: prompt} of images named after their prompt's number."""
    return {pattern.format(number): number - first for number in numbers}


# Layouts as tools leave them, with where they were seen. {name of an image: number of its prompt}
SEVERAL = {
    # Numbers with zeros in front, and without: the order of such names as text is 0, 1, 10, 11, 2
    # (nod-ai/AMD-SHARK-Studio pull 1528, vLAR-group/NVFi issue 5).
    "zero-padded numbers": numbered("{:05d}.png"),
    "diffusers' examples, image_0 to image_11": numbered("image_{}.png"),
    "numbers alone, as .jpg": numbered("{}.jpg"),
    "numbers and endings mixed (edge-connect pull 8)": {
        f"{number:02d}.{'png' if number % 2 else 'jpg'}": number for number in range(12)
    },
    "ComfyUI counts from 1: ComfyUI_00001_.png": numbered("ComfyUI_{:05d}_.png", range(1, 13), first=1),
    "AUTOMATIC1111: number and seed": {
        f"{number:05d}-{3141592653 + number}.png": number for number in range(12)
    },
    "AUTOMATIC1111: number, seed and the beginning of the prompt": {
        f"{number:05d}-{271828 + number}-((best quality)), prom.png": number for number in range(12)
    },
    "InvokeAI: 000001.seed.png counts from 1": {
        f"{number:06d}.{98765432 + number}.png": number - 1 for number in range(1, 13)
    },
    "MIG-Bench: any name, then the number (issue 2)": {
        f"sdxl_cat_{number}.png": number for number in range(12)
    },
    "a version in the name": {f"sd3.5_image_{number}.png": number for number in range(12)},
    "seed, then prompt: 42_0.png": {f"42_{number}.png": number for number in range(12)},
    "Windows' copies": numbered("image ({}).png", range(1, 13), first=1),
    "GenEval's own folders": {
        f"{prompt:05d}/samples/{sample:04d}.png": prompt for prompt in range(12) for sample in range(4)
    },
    "GenEval's own folders, some of them": {
        f"{prompt:05d}/samples/0000.png": prompt for prompt in (3, 7, 11)
    },
    "a folder per prompt": {
        f"{prompt:05d}/{sample}.png": prompt for prompt in range(12) for sample in range(2)
    },
    "a folder per seed": {
        f"seed_{seed}/{prompt:05d}.png": prompt for seed in range(3) for prompt in range(12)
    },
    "a folder per model": {
        f"{model}/{prompt:05d}.png": prompt for model in ("flux", "sdxl") for prompt in range(12)
    },
    "prompt and sample: 0_0.png": {
        f"{prompt}_{sample}.png": prompt for prompt in range(12) for sample in range(4)
    },
    "rank, then prompt": {f"rank{number % 2}_{number}.png": number for number in range(12)},
    "the first ten of twelve": numbered("image_{}.png", range(10)),
    "0, 2 and 10 of twelve": numbered("{}.png", (0, 2, 10)),
    "T2I-CompBench: the prompt and a number (issue 18)": {
        f"{prompt}_{number:06d}.png": row for row, prompt in enumerate(TWELVE) for number in range(2)
    },
    "VBench: the prompt and a number": {f"{prompt}-0.png": row for row, prompt in enumerate(TWELVE)},
    "the prompt with underscores": {f"{p.replace(' ', '_')}.png": row for row, p in enumerate(TWELVE)},
    "the prompt in other case, without what file systems refuse": {
        f"{number}-{prompt.title()}!.png": number for number, prompt in enumerate(TWELVE)
    },
    "a folder named after the prompt (easydiffusion issue 38)": {
        f"{prompt}/{seed}.png": row for row, prompt in enumerate(TWELVE) for seed in (7, 4711)
    },
}


@pytest.mark.parametrize("images", SEVERAL.values(), ids=SEVERAL)
def test_layouts_that_pair_by_themselves(tmp_path, images):
    save_images(tmp_path, *images)
    assert pair(tmp_path, TWELVE) == images


# What must not be guessed. {case: (names, what the line says)}
AMBIGUOUS = {
    "two images of prompt 42, or of prompts 0 and 1": (
        ("4_0.png", "4_1.png"),
        "prompt 4 by its 1. .*--number",
    ),
    "prompt and sample, incomplete": (("0_1.png", "1_1.png", "1_2.png"), "--number"),
    "prompts and samples, as many of both": (
        [f"{prompt}_{sample}.png" for prompt in range(12) for sample in range(12)],
        "prompt 0 .*--number",
    ),
    "counted from 0 or from 1": (("1.png", "2.png", "3.png"), "prompt 1 .* prompt 0 .*--count-from"),
    "one number": (("3.png",), "--count-from"),
    "a seed that happens to be a prompt's number": (("7-0003.png", "8-0004.png"), "--number"),
    "numbers that go on from an earlier run": ([f"{n:05d}.png" for n in range(5, 17)], "prompt 16, .* of 12"),
    "a running number of four images per prompt": (
        [f"image_{number}.png" for number in range(48)],
        "image_47.png would be of prompt 47, counted from 0, of 12",
    ),
    "COCO's numbers": (("000000000285.jpg", "000000000632.jpg"), "prompt 632, counted from 0, of 12"),
    "images for another prompt file, by their sample": (
        ("100_0.png", "101_1.png"),
        "prompt 0 by its 2. number.*--number",
    ),
    "HPSv2's folders, each of which counts from 0": (
        ("anime/00000.png", "anime/00001.png", "photo/00000.png", "photo/00001.png"),
        "start again at photo/00000.png",
    ),
    "times": ([f"outputs_202601051430{n:02d}.png" for n in range(12)], "prompt 20260105143011"),
    "random names": (
        ("3b241101-e2bb-4255-8caf-4136c566a962.png", "6fa459ea-ee8a-3ca4-894e-db77e160355e.png"),
        "no number .*--in-order",
    ),
    "hashes": (("9e107d9d372bb6826bd81d3542a419d6.png", "0cc175b9c0f1b6a831c399e269772661.png"), "no number"),
    "Midjourney": (("me_a_red_dog_3b241101-e2bb-4255-8caf-4136c566a962.png",), "no number"),
    "words": (("cat.png", "dog.png"), "cat.png has no number .*--in-order"),
    "as many words as prompts": ([f"{word}.png" for word in "abcdefghijkl"], "a.png has no number"),
    "the first copy has no number": (("image.png", "image (1).png"), "image.png has no number"),
    "a number in a word": (("1st.png", "2nd.png"), "1st.png has no number"),
    "GenEval's folders beyond the file": (("00012/samples/0000.png",), "prompt 12, counted from 0, of 12"),
    "DALL-E's names": (("DALL·E 2023-05-03 12.34.56 - a.png", "DALL·E 2023-05-03 12.34.57 - b.png"), "--"),
    "prompts' words, one of them cut off": (
        (*[f"{prompt}_0.png" for prompt in TWELVE[1:]], "prompt numb_0.png"),
        "--number|--count-from",
    ),
}


@pytest.mark.parametrize("names, said", AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_what_cannot_be_told_is_one_line(tmp_path, names, said):
    save_images(tmp_path, *names)
    with pytest.raises(BadInput, match=said) as error:
        pair(tmp_path, TWELVE)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "names, options, rows",
    [
        (("4_0.png", "4_1.png"), {"number": 1, "count_from": "0"}, [4, 4]),
        (("4_0.png", "4_1.png"), {"number": -1}, [0, 1]),
        (("4_0.png", "4_1.png"), {"number": 2}, [0, 1]),
        (("00001_0.png", "00001_1.png", "00003.webp"), {"number": 1, "count_from": "0"}, [1, 1, 3]),
        (("1.png", "2.png", "3.png"), {"count_from": "0"}, [1, 2, 3]),
        (("1.png", "2.png", "3.png"), {"count_from": "1"}, [0, 1, 2]),
        (("1/grid.png", "1/x.png"), {"count_from": "0"}, [1, 1]),
        (("anime/0.png", "anime/1.png", "photo/0.png"), {"number": 1}, [0, 1, 0]),
        (("100_0.png", "101_1.png"), {"number": -1}, [0, 1]),
        (("00002/samples/0001.png",), {"number": -1, "count_from": "1"}, [0]),
    ],
)
def test_flags_say_how_to_read_the_names(tmp_path, names, options, rows):
    save_images(tmp_path, *names)
    assert list(pair(tmp_path, TWELVE, **options).values()) == rows


def test_in_order_pairs_by_the_natural_order_of_names(tmp_path):
    save_images(tmp_path, "img2 b.png", "C.JPEG", "img10 a.jpg")
    assert pair(tmp_path, TWELVE[:3], in_order=True) == {"C.JPEG": 0, "img2 b.png": 1, "img10 a.jpg": 2}
    with pytest.raises(BadInput, match="--in-order needs one image per prompt: 3 images, 12 prompts"):
        pair(tmp_path, TWELVE, in_order=True)


@pytest.mark.parametrize(
    "num_prompts, rows, options",
    [
        (3, {"C.JPEG": 0, "a.jpg": 1, "b.png": 2}, {"in_order": True}),
        (3, {"1st.png": 0, "2.png": 1, "3.png": 2}, {"in_order": True}),  # the first starts with a word
        (11, {"2.png": 2, "10.png": 10, "0.png": 0}, {}),
        (4, {"00001_0.png": 1, "00001_1.png": 1, "00003.webp": 3}, {"number": 1, "count_from": "0"}),
        (3, {"00000/samples/0000.png": 0, "00000/samples/0001.png": 0, "2/samples/1.png": 2}, {}),
        (2, {"1/grid.png": 1, "1/x.png": 1}, {"count_from": "0"}),
    ],
)
def test_pairing_tells_whose_prompt_an_image_is(tmp_path, num_prompts, rows, options):
    save_images(tmp_path, *rows)
    (tmp_path / "notes.txt").write_text("")
    if (tmp_path / "00000").exists():
        save_images(tmp_path, "00000/grid.png")  # GenEval's overview of the samples
    assert pair(tmp_path, TWELVE[:num_prompts], **options) == rows
    if options:
        with pytest.raises(BadInput):  # what the flags say must not be guessed
            pair(tmp_path, TWELVE[:num_prompts])


@pytest.mark.parametrize(
    "names, said",
    [
        ((), "0 images"),
        (("a.png", "b.png"), "a.png has no number"),
        (("0.png", "3.png"), "prompt 3, counted from 0, of 3"),
    ],
)
def test_pairing_refuses_to_guess(tmp_path, names, said):
    save_images(tmp_path, *names)
    with pytest.raises(BadInput, match=said):
        pair(tmp_path, TWELVE[:3])


def test_all_images_are_of_the_only_prompt(tmp_path):
    save_images(tmp_path, "42_7.png", "cat.png", "a/b/c.webp")
    assert set(pair(tmp_path, ["a cat"]).values()) == {0}


def test_names_that_spell_two_prompts_are_not_paired_by_words(tmp_path):
    save_images(tmp_path, "a dog_0.png", "a cat_1.png")
    assert pair(tmp_path, ["a dog", "a cat"]) == {"a dog_0.png": 0, "a cat_1.png": 1}
    assert pair(tmp_path, ["a cat", "a dog"]) == {"a dog_0.png": 1, "a cat_1.png": 0}  # words before numbers
    assert pair(tmp_path, ["a dog", "a cat", "A dog!"]) == {"a dog_0.png": 0, "a cat_1.png": 1}
    with pytest.raises(
        BadInput, match="a cat_1.png spells prompt 2, but by a number .* of prompt 1: .*--number"
    ):
        pair(tmp_path, ["a dog", "A dog!", "a cat", "a cow"])


def test_prompts_that_end_in_numbers_are_spelled_whole(tmp_path):
    prompts = ["route 66", "route", "3 dogs"]
    save_images(tmp_path, "route 66.png", "route 66_1.png", "route_66_0.png", "00007 3 dogs.png")
    found = {"00007 3 dogs.png": 2, "route 66.png": 0, "route 66_1.png": 0, "route_66_0.png": 0}
    assert pair(tmp_path, prompts) == found


def test_genevals_folders_say_what_they_were_made_for(tmp_path):
    for row, prompt in enumerate(TWELVE[:3]):
        save_images(tmp_path, f"{row:05d}/samples/0000.png", f"{row:05d}/grid.png")
        (tmp_path / f"{row:05d}/metadata.jsonl").write_text(json.dumps({"prompt": prompt, "tag": "x"}))
    assert list(pair(tmp_path, TWELVE).values()) == [0, 1, 2]
    with pytest.raises(BadInput, match="'prompt number b', but prompt 1 is 'prompt number c'.*another order"):
        pair(tmp_path, [TWELVE[0], TWELVE[2], TWELVE[1]])
    for damaged in ("", "{", "[]", '{"tag": "x"}'):
        (tmp_path / "00001/metadata.jsonl").write_text(damaged)
        assert list(pair(tmp_path, TWELVE).values()) == [0, 1, 2]


def test_what_is_no_sample_is_left_out(tmp_path):
    wanted = ["0.png", "1.JPG", "sub/2.webp"]
    save_images(tmp_path, *wanted)
    others = [
        "._0.png",  # of macOS (alinlab/CSI issue 31)
        "__MACOSX/0.png",
        ".ipynb_checkpoints/0-checkpoint.png",
        ".thumbnails/1.png",
        "grid-0000.png",  # of Stable Diffusion's scripts
        "grid_1.png",
    ]
    save_images(tmp_path, *others)
    for name in ("notes.txt", "3.mp4", ".DS_Store", "Thumbs.db", "3.png.txt"):
        (tmp_path / name).write_text("")
    (tmp_path / "4.png").mkdir()
    found = [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)]
    assert found == wanted


def test_a_grid_counts_where_there_is_nothing_else(tmp_path):
    save_images(tmp_path, "a/grid.png", "b/grid.png", "b/samples/0.png")
    assert [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)] == [
        "a/grid.png",
        "b/samples/0.png",
    ]
    save_images(tmp_path / "only", "grid-0000.png")
    assert len(find_images(tmp_path / "only")) == 1


@pytest.mark.parametrize(
    "folder, said",
    [
        ("none", "is missing"),
        ("a" * 5000, "is missing"),
        ("a\0b", "is missing"),
        ("file.png", "is a file"),
        ("empty", "0 images .*png"),
    ],
)
def test_a_folder_without_images_is_one_line(tmp_path, folder, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.png").write_text("")
    with pytest.raises(BadInput, match=said):
        find_images(tmp_path / folder)


def test_a_folder_that_cannot_be_read_is_one_line(tmp_path, monkeypatch):
    def walk(folder, onerror):
        onerror(PermissionError(13, "Permission denied", str(folder / "sub")))

    monkeypatch.setattr(os, "walk", walk)
    with pytest.raises(BadInput, match="sub cannot be read .Permission denied."):
        find_images(tmp_path)


def test_natural_order_sorts_numbers_by_value(tmp_path):
    names = ["a1.png", "a2.jpg", "a10.png", "b.png", "b1/2.png", "b1/10.png", "b²/1.png", "1.png", "01.png"]
    ordered = sorted((tmp_path / name for name in names), key=natural_order)
    found = [path.relative_to(tmp_path).as_posix() for path in ordered]
    assert found.index("a2.jpg") < found.index("a10.png") and found.index("b1/2.png") < found.index(
        "b1/10.png"
    )
    assert found[0] in ("1.png", "01.png")


def test_prompts_without_an_image_are_counted_and_named():
    assert describe_pairing([0, 1, 2], 3) == "3 images, 1 per prompt"
    assert describe_pairing([0, 0, 2], 3) == (
        "3 images, 1 to 2 per prompt; 1 of 3 prompts have no image: 1 (counted from 0)"
    )
    assert re.search("99 of 100 prompts have no image: 0, 1, .*, 9, ... ", describe_pairing([50], 100))
