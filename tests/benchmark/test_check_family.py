"""The check of a fork's family: it passes for our files and finds each mistake that a port makes."""

import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from benchmark import check_family
from tiny.flux_model import build_flux

ROOT = Path(__file__).resolve().parents[2]
MISTAKES = {  # what stands in flow_grpo.py, and what is written in its place
    "the sign of the velocity": ("velocity[:, : rows * columns]", "-velocity[:, : rows * columns]"),
    "the scale of the time": ("timestep=timestep,  # in", "timestep=1000 * timestep,  # in"),
    "the order within a token": (
        '"b c (r p) (s q) -> b (r s) (c p q)"',
        '"b c (r p) (s q) -> b (r s) (p q c)"',
    ),
    "rows and columns": ('(r p) (s q)", r=rows, s=columns,', '(r p) (s q)", r=columns, s=rows,'),
    "no guidance": ("torch.full((len(x_t),), guidance_scale", "torch.full((len(x_t),), 1.0"),
    "the source at the image's positions": ("token_positions(1, rows", "token_positions(0, rows"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with an untrained tiny/flux, in which no weight is zero."""
    torch.manual_seed(0)
    pipe = build_flux(AutoencoderKL.from_pretrained(ROOT / "tiny/sd3/vae"))
    for parameter in pipe.transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    folder = tmp_path_factory.mktemp("flux")
    pipe.save_pretrained(folder)
    Image.effect_noise((64, 64), 80).convert("RGB").save(folder / "source.png")
    return folder


def check(file, model, *flags):
    return check_family.check(check_family.parse([str(file), "--model", str(model), *flags]))


@pytest.mark.parametrize("name", ["flow_grpo", "superflow", "fdfo", "promptrl"])
def test_our_files_draw_what_sd3_draws(name):
    times, pixels = check(ROOT / f"{name}.py", ROOT / "tiny/sd3", "--guidance-scale", "2")
    assert times <= 1e-5 and pixels <= 1


@pytest.mark.parametrize("flags", [("--width", "96"), ("--source", "source.png"), ()])
def test_our_files_draw_what_flux_draws(folder, monkeypatch, flags):
    monkeypatch.chdir(folder)
    times, pixels = check(ROOT / "flow_grpo.py", folder, "--guidance-scale", "2.5", *flags)
    assert times <= 1e-5 and pixels <= 1


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_fork_is_found(folder, tmp_path, monkeypatch, mistake):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    right, wrong = MISTAKES[mistake]
    source = (ROOT / "flow_grpo.py").read_text()
    assert source.count(right) == 1
    fork = tmp_path / f"fork_{list(MISTAKES).index(mistake)}.py"
    fork.write_text(source.replace(right, wrong))
    flags = ["--source", "source.png"] if "source" in mistake else ["--width", "96"]
    try:
        _, pixels = check(fork, folder, "--guidance-scale", "2.5", *flags)
    except RuntimeError:  # the shapes do not fit
        return
    assert pixels > 1


def test_another_size_is_refused_for_edits(folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit, match="--height equal to --width"):
        check(ROOT / "flow_grpo.py", folder, "--source", "source.png", "--width", "96")
