"""Pictures drawn with what a run has trained: of each of the five files, before and after."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import fdfo
import flow_grpo
import promptloop
import promptrl
import superflow
from benchmark import draw
from rewards import BadInput
from rewards.prompts import PromptFile, load_prompts, resolve_sources
from rewards.sources import load_source

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = PromptFile(["a red circle", "two stars"], [{}, {}])
RUNS = {  # name of a run: its file, and flags beside SMALL
    "flow_grpo": (flow_grpo, {"learning_rate": 0.01}),
    "superflow, LoRA": (superflow, {"learning_rate": 0.1, "lora_rank": 2, "pool": 1}),
    "fdfo": (fdfo, {"learning_rate": 0.01}),
    "promptrl": (promptrl, {"learning_rate": 0.01, "lm_learning_rate": 0.01, "sde_window": 2}),
    "promptrl, LoRA": (
        promptrl,
        {"lm_lora_rank": 2, "lm_learning_rate": 1e-3, "trained": "lm", "sde_window": 2},
    ),
    "promptloop": (promptloop, {"lm_learning_rate": 0.01, "num_refinements": 2}),
}
SMALL = {
    "num_iterations": 1,
    "num_prompts_per_iteration": 2,
    "num_images_per_prompt": 4,
    "num_inference_steps": 3,
    "eval_num_inference_steps": 3,
    "device": "cpu",
    "rewards": "test_draw:brightness",
}


def brightness(images, prompts, metadata):
    """A reward between 0 and 1 that no two images share."""
    return images.flatten(1).mean(dim=1)


@pytest.fixture(scope="module")
def make_run(tmp_path_factory):
    """A function that makes the run of a name once, and gives its folder."""
    runs = {}

    def make(name):
        if name not in runs:
            module, flags = RUNS[name]
            folder = tmp_path_factory.mktemp("run")
            (folder / "train.txt").write_text("\n".join(PROMPTS.prompts))
            flags = SMALL | flags | {"output_dir": str(folder), "prompts": str(folder / "train.txt")}
            flags["eval_prompts"] = flags["prompts"]
            runs[name] = module.train(module.Args(**flags))
        return runs[name]

    return make


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("name", RUNS)
def test_each_way_to_draw_gives_other_pictures(make_run, name):
    ways = draw.draw(make_run(name), PROMPTS)
    if "LoRA" in name and name.startswith("promptrl"):
        expected = ["before", "rewritten"]
    elif name.startswith("promptrl"):
        expected = ["before", "after", "rewritten"]
    else:
        expected = ["before", "refined" if name == "promptloop" else "after"]
    assert list(ways) == expected
    pictures = [images for _, images in ways.values()]
    for images in pictures:
        assert images.shape == (2, 3, 64, 64)
    if name == "promptrl, LoRA":  # its greedy rewrites still are the prompts
        assert ways["rewritten"][0] == PROMPTS.prompts and (pictures[0] == pictures[1]).all()
        return
    for first, second in zip(pictures, pictures[1:]):
        assert (first - second).abs().max() > 0.01


def test_the_pictures_are_those_of_the_runs_evaluation(make_run):
    """The trained model draws the prompts of the evaluation as the run itself drew them at its end."""
    run = make_run("flow_grpo")
    captions, images = draw.draw(run, PROMPTS)["after"]
    assert captions == PROMPTS.prompts
    args = flow_grpo.Args(model="tiny/sd3")
    pipe, transformer, _ = flow_grpo.load_model(args, torch.device("cpu"), torch.float32)
    transformer.load_state_dict(type(transformer).from_pretrained(run / "transformer").state_dict())
    noise = flow_grpo.draw_noise([0, 1], 1, (8, 8, 8), seed=0, iteration=0)
    embeds, pooled = flow_grpo.encode_prompts(pipe, PROMPTS.prompts, 0, {})
    conditions = flow_grpo.Conditions(embeds, pooled, None)
    sigmas = flow_grpo.get_sigmas(pipe.scheduler, 3, None)

    def velocity_at(x_t, t):
        return flow_grpo.predict_sd3_velocity(transformer, x_t, t, conditions, None, 1.0)

    x_0, _ = flow_grpo.rollout(velocity_at, noise, sigmas, (), 0.0, "flow")
    assert (flow_grpo.decode(pipe, x_0) - images).abs().max() < 1.01 / 255


def test_the_lora_of_the_language_model_is_the_runs(make_run):
    run = make_run("promptrl, LoRA")
    _, flags = draw.read_args(run)
    policy = draw.load_policy(promptrl, run, flags, torch.device("cpu"), torch.float32)
    saved = load_file(run / "lm_lora" / "adapter_model.safetensors")
    loaded = [parameter for name, parameter in policy.lm.named_parameters() if "lora_B" in name]
    expected = [tensor for name, tensor in saved.items() if "lora_B" in name]
    assert len(loaded) == len(expected) > 0
    assert all((tensor != 0).any() for tensor in expected)
    total = sum(parameter.double().sum() for parameter in loaded)
    assert total.item() == pytest.approx(sum(tensor.double().sum() for tensor in expected).item())


def test_the_sheet_has_a_line_for_each_way(make_run, tmp_path):
    ways = draw.draw(make_run("flow_grpo"), PROMPTS)
    draw.save(ways, tmp_path / "pictures.png")
    width, height = Image.open(tmp_path / "pictures.png").size
    assert width > 2 * 192 and height > 2 * 192


def test_what_is_no_run_is_an_error(tmp_path):
    with pytest.raises(BadInput, match="is not the folder of a run"):
        draw.draw(tmp_path, PROMPTS)
    with pytest.raises(BadInput, match="give prompts"):
        draw.prompts_of(draw.parse([str(tmp_path)]))


def test_prompts_come_from_the_command_line_or_a_file(tmp_path):
    assert draw.prompts_of(draw.parse(["run", "one", "two"])).prompts == ["one", "two"]
    rows = [{"prompt": f"prompt {number}"} for number in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["run", "--prompts", str(tmp_path / "a.jsonl")]
    assert draw.prompts_of(draw.parse(words)).prompts == [f"prompt {number}" for number in range(8)]


def test_of_edits_the_sources_are_shown_too(tmp_path):
    path = ROOT / "tiny/prompts/fold_0/edit_dev.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()[:2]]
    for row in rows:
        row["source"] = str((path.parent / row["source"]).resolve())
    prompts = tmp_path / "train.jsonl"
    prompts.write_text("\n".join(map(json.dumps, rows)))
    flags = {"model": "tiny/flux", "prompts": str(prompts), "eval_prompts": str(prompts)}
    args = flow_grpo.Args(**SMALL | flags | {"output_dir": str(tmp_path), "sde_window": 2})
    file = resolve_sources(str(prompts), load_prompts(str(prompts)))
    ways = draw.draw(flow_grpo.train(args), file)
    assert list(ways) == ["source", "before", "after"]
    captions, images = ways["source"]
    assert captions == [row["prompt"] for row in rows]
    for row, image in zip(rows, images):
        assert torch.equal(image, load_source(row["source"], 64))
