"""What a model scores before any training: the settings, and the images that they are measured on."""

import json

import pytest
import torch
from diffusers import AutoencoderKL

import flow_grpo
from benchmark import measure_baselines
from rewards.prompts import load_prompts, resolve_sources
from tiny import splits, world
from tiny.flux_model import build_flux


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    """A folder with an untrained tiny/flux, in which no weight is zero."""
    torch.manual_seed(0)
    pipe = build_flux(AutoencoderKL.from_pretrained("tiny/sd3/vae"))
    for parameter in pipe.transformer.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("flux")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def edits():
    path = splits.PROMPTS / "fold_0" / "edit_dev.jsonl"
    return resolve_sources(path, load_prompts(path))


def test_scripted_instructions_say_where(edits):
    """Without one place, a scripted instruction is the plain one. The place is that of the object."""
    scripted = measure_baselines.scripted_instructions(edits)
    for plain, exact, row in zip(edits.prompts, scripted, edits.metadata, strict=True):
        # The longest name first: "top" is also the beginning of "top left".
        names = sorted(world.PLACE_WORDS, key=len, reverse=True)
        (place, *_) = [name for name in names if exact.replace(f" {name}", "", 1) == plain]
        kept_places = [world.place(64 * x, 64 * y) for x, y in (kept["center"] for kept in row["keep"])]
        if row["tag"] == "add":
            assert exact == f"{plain} {place}" and place not in kept_places
        elif row["tag"] in ("recolour", "replace"):
            assert place in kept_places
        elif row["tag"] == "move":
            assert place != row["include"][0]["place"]


def test_best_of_takes_the_image_with_the_best_reward():
    rewards = torch.tensor([[0.1, 0.9], [0.3, 0.2], [0.2, 0.5], [0.8, 0.6], [0.5, 0.5]])
    strict = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    assert measure_baselines.best_of(rewards, strict, 2).tolist() == [[1, 1], [0, 1]]
    assert measure_baselines.best_of(rewards, strict, 4).tolist() == [[0, 1]]


def test_flux_draws_what_the_algorithm_files_draw(flux, edits):
    """The same images from the same noise as the sampler of flow_grpo.py, at a guidance scale, for edits."""
    model = measure_baselines.Model(flux)
    assert model.edits and model.latent_shape == (8, 8, 8)
    prompts = edits.prompts[:2]
    metadata = edits.metadata[:2]
    noise = flow_grpo.draw_noise([0, 1], 1, model.latent_shape, seed=0, iteration=0)[:, 0]
    with torch.no_grad():
        images = model.draw(model.pipe, prompts, metadata, noise, 2.0)
        embeds, pooled = flow_grpo.encode_prompts(model.pipe, prompts, 0, {})
        sources = flow_grpo.encode_sources(model.pipe, metadata, 64, {})
        conditions = flow_grpo.Conditions(embeds, pooled, sources)
        sigmas = flow_grpo.get_sigmas(model.pipe.scheduler, 10, 16)
        network = model.pipe.transformer

        def velocity_at(x_t, t):
            return flow_grpo.predict_flux_velocity(network, x_t, t, conditions, None, 2.0)

        x_0, _ = flow_grpo.rollout(velocity_at, noise[:, None], sigmas, (), 0.0, "flow")
        expected = flow_grpo.decode(model.pipe, x_0)
    assert (images - expected).abs().max() < 0.51 / 255  # decode rounds to bytes
    assert (images[0] - images[1]).abs().max() > 0.01


@pytest.mark.parametrize("name", ["tiny/sd3", "flux"])
def test_the_record_of_a_model(name, flux, tmp_path, monkeypatch):
    """Every setting, on two rows of each file: a digit for each row and noise, and the mean of the digits."""
    prompts = tmp_path / "prompts"
    (prompts / "fold_0").mkdir(parents=True)
    (prompts / "sources").symlink_to(splits.PROMPTS / "sources")
    for ending in ("dev", "dev_paraphrased", "dev_hard", "text_dev", "edit_dev", "edit_reworded_dev"):
        rows = (splits.PROMPTS / "fold_0" / f"{ending}.jsonl").read_text().splitlines()
        (prompts / "fold_0" / f"{ending}.jsonl").write_text("\n".join(rows[:2]) + "\n")
    monkeypatch.setattr(splits, "PROMPTS", prompts)
    monkeypatch.setattr(measure_baselines, "NUM_BASE_NOISES", 4)
    monkeypatch.setattr(measure_baselines, "BEST_OF", (2,))
    folder = flux if name == "flux" else name
    words = ["--model", str(folder), "--split", "dev", "--noises", "1", "--results", str(tmp_path)]
    measure_baselines.measure(measure_baselines.parse(words))
    (path,) = (tmp_path / "baselines").glob("*/fold-0-dev.json")
    record = json.loads(path.read_text())
    scales = ["1.5", "2", "3", "4"] if name == "flux" else ["1.5", "2", "3"]
    drawing = ["base", *[f"guidance {scale}" for scale in scales], "scripted", "scripted, guidance 2"]
    drawing.append("best of 2")
    assert list(record["settings"]) == [*drawing, "paraphrased", "hard"]
    assert list(record["ocr"]) == ["1", *scales]
    if name == "flux":
        assert list(record["edits"]) == [*drawing, "reworded", "reworded, best of 2"]
    else:
        assert "edits" not in record
    for settings in (record["settings"], record.get("edits", {})):
        for own in settings.values():
            digits = [int(digit) for noise in own["images"] for digit in noise]
            assert own["strict"] == pytest.approx(sum(digits) / len(digits))
    assert [len(noise) for noise in record["settings"]["base"]["images"]] == [2] * 4
    assert len(record["settings"]["best of 2"]["images"]) == 2
