"""Published weights: found, loaded with none missing or left, or refused in one line."""

import errno
import json
import logging
import os
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from huggingface_hub import errors as hub_errors
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

import flow_grpo
import rewards
from rewards import BadInput, command_line, weights

ROOT = Path(__file__).resolve().parents[2]


def make_unloadable(metadata, device, model="nobody/has-this"):
    return weights.from_hub(CLIPModel.from_pretrained, model)


@pytest.mark.parametrize(
    "spec, named",
    [("unloadable", "nobody/has-this"), ("jpeg,clipscore@nobody/has-that:0.5", "nobody/has-that")],
)
def test_missing_weights_end_a_run_before_it_starts(tmp_path, monkeypatch, capsys, spec, named):
    monkeypatch.setitem(rewards.REGISTRY, "unloadable", f"{__name__}:make_unloadable")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(flow_grpo, "load_model", lambda *_: pytest.fail("the pipeline was loaded"))
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stopped:
        command_line.execute(flow_grpo.train, flow_grpo.Args(rewards=spec, output_dir=str(tmp_path / "runs")))
    assert stopped.value.code == 2 and not (tmp_path / "runs").exists()
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and named in line


def test_a_file_of_weights_cannot_run_code(tmp_path):
    class Code:
        def __reduce__(self):
            return (open, (str(tmp_path / "it ran"), "w"))

    torch.save({"weight": Code()}, tmp_path / "weights.pt")
    with pytest.raises(BadInput, match="weights.pt is no file of weights"):
        weights.read_state(tmp_path / "weights.pt")
    assert not (tmp_path / "it ran").exists()


# ---- a pipeline's folder ----
SOURCE = ROOT / "tiny/sd3"
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT_ENCODERS = ("text_encoder/model.safetensors", "text_encoder_2/model.safetensors")
LEFT_OUT = {"text_encoder_3": None, "tokenizer_3": None, "feature_extractor": None, "image_encoder": None}


@pytest.fixture
def folder(tmp_path):
    """A copy of the tiny pipeline whose files can be replaced."""
    shutil.copytree(SOURCE, tmp_path / "model", copy_function=os.link)
    return tmp_path / "model"


def load(folder):
    return weights.from_hub(StableDiffusion3Pipeline.from_pretrained, str(folder), **LEFT_OUT)


def replace(path, content):
    path.unlink(missing_ok=True)  # it is a link to the original
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def truncate(path):
    content = path.read_bytes()
    replace(path, content[: len(content) // 2])


def edit_json(path, **changes):
    content = json.loads(path.read_text()) | changes
    replace(path, json.dumps({key: value for key, value in content.items() if value != "DELETE"}))


def edit_state(path, edit):
    state = edit(load_file(path))
    path.unlink()
    save_file(state, path, metadata={"format": "pt"})


def without_three(state):
    return dict(sorted(state.items())[3:])


def shard(folder, name):
    """Two files and an index in place of one file of weights."""
    path = folder / name
    state = load_file(path)
    path.unlink()
    names = sorted(state)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"{path.stem}-{number:05d}-of-00002.safetensors"
        save_file({key: state[key] for key in part}, path.parent / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (path.parent / f"{path.name}.index.json").write_text(json.dumps(index))


def make_variant(folder, *names):
    for name in names:
        path = folder / name
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))


def make_bin(folder, name):
    state = load_file(folder / name)
    (folder / name).unlink()
    torch.save(state, folder / name.replace("safetensors", "bin"))


def same_pipelines(a, b):
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        state = getattr(b, part).state_dict()
        for name, tensor in getattr(a, part).state_dict().items():
            if not torch.equal(tensor, state[name]):
                return False
    return True


@pytest.mark.parametrize(
    "edit",
    [
        lambda folder: None,
        lambda folder: shard(folder, TRANSFORMER),
        lambda folder: [shard(folder, name) for name in TEXT_ENCODERS],
        lambda folder: make_bin(folder, TRANSFORMER),
        lambda folder: (folder / "notes.incomplete").write_text(""),  # what fits is not looked at closer
        lambda folder: (folder / "text_encoder/model.fp16.safetensors").write_text("unused"),
    ],
    ids=[
        "as it is",
        "sharded transformer",
        "sharded text encoders",
        ".bin",
        "a stale file",
        "another variant",
    ],
)
def test_folders_of_other_kinds_load(folder, edit):
    edit(folder)
    assert same_pipelines(load(folder), load(SOURCE))


# {what: (how to make the folder so, what the line says)}
UNLOADABLE = {
    "no transformer": (lambda f: (f / TRANSFORMER).unlink(), "transformer has no weights: .*only in part"),
    "no VAE": (lambda f: (f / VAE).unlink(), "vae has no weights"),
    "no text encoder": (lambda f: (f / TEXT_ENCODERS[0]).unlink(), "text_encoder has no weights"),
    "unfinished": (
        lambda f: (f / TRANSFORMER).rename(f / f"{TRANSFORMER}.incomplete"),
        "only in part .*incomp",
    ),
    "unfinished, as the hub's client leaves it": (
        lambda f: [
            (f / VAE).unlink(),
            replace(f / ".cache/huggingface/download/vae/abc.incomplete", ""),
        ],
        r"only in part \(.cache/huggingface/download/vae/abc.incomplete\): run `hf download` again",
    ),
    "half a transformer": (
        lambda f: truncate(f / TRANSFORMER),
        "its transformer/diff.* is damaged or was down",
    ),
    "half a text encoder": (
        lambda f: truncate(f / TEXT_ENCODERS[1]),
        "its text_encoder_2/model.* is damaged",
    ),
    "an empty file": (lambda f: replace(f / TRANSFORMER, ""), "its transformer/diff.* is damaged"),
    "a pointer of Git LFS": (
        lambda f: replace(f / VAE, "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1\n"),
        "its vae/diffusion.* is damaged or was downloaded only in part",
    ),
    "zeros": (lambda f: replace(f / VAE, bytes(5000)), "its vae/diffusion.* is damaged"),
    "a missing shard": (
        lambda f: [
            shard(f, TRANSFORMER),
            (f / "transformer/diffusion_pytorch_model-00002-of-00002.safetensors").unlink(),
        ],
        "model-00002-of-00002.safetensors is missing: it was downloaded only in part",
    ),
    "a missing shard of a text encoder": (
        lambda f: [
            shard(f, TEXT_ENCODERS[0]),
            (f / "text_encoder/model-00001-of-00002.safetensors").unlink(),
        ],
        "model-00001-of-00002.safetensors is missing",
    ),
    "half an index": (
        lambda f: [shard(f, VAE), truncate(f / f"{VAE}.index.json")],
        "its vae/diffusion_pytorch_model.safetensors.index.json is damaged",
    ),
    "fp16 only": (
        lambda f: make_variant(f, TRANSFORMER, VAE, *TEXT_ENCODERS),
        'has weights of the variant fp16 only .*variant="fp16" in diffusers and save it to another folder',
    ),
    "fp16 only, one part": (
        lambda f: make_variant(f, TRANSFORMER),
        "transformer has weights of the variant fp",
    ),
    "a damaged config.json": (
        lambda f: replace(f / "transformer/config.json", '{"a": '),
        "its transformer/config.json is damaged",
    ),
    "no config.json": (lambda f: (f / "vae/config.json").unlink(), "config.json found in directory .*vae"),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), "scheduler"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer"),
    "another transformer's config": (
        lambda f: edit_json(f / "transformer/config.json", attention_head_dim=16),
        "norm_out.linear.bias expected shape",
    ),
    "more layers than weights": (
        lambda f: edit_json(f / "transformer/config.json", num_layers=9),
        "weights are missing in its files|expected shape",
    ),
    "another text encoder's config": (
        lambda f: edit_json(f / "text_encoder/config.json", hidden_size=48),
        "its weights do not fit its configuration, such as .*text_",
    ),
    "more layers in a text encoder than weights": (
        lambda f: edit_json(f / "text_encoder/config.json", num_hidden_layers=9),
        "weights are missing in its files, such as .*encoder.layers",
    ),
    "weights missing in the transformer": (
        lambda f: edit_state(f / TRANSFORMER, without_three),
        "weights are missing in its files, such as [a-z]",
    ),
    "weights missing in the VAE": (lambda f: edit_state(f / VAE, without_three), "weights are missing in"),
    "weights missing in a text encoder": (
        lambda f: edit_state(f / TEXT_ENCODERS[1], without_three),
        "weights are missing in its files, such as .*text_",
    ),
    "weights of another model": (
        lambda f: edit_state(f / TEXT_ENCODERS[0], lambda state: {"other.weight": torch.zeros(2)}),
        "weights are missing in its files",
    ),
    "an unknown class": (
        lambda f: edit_json(f / "model_index.json", transformer=["diffusers", "NoSuchModel"]),
        "no class `NoSuchModel`",
    ),
    "code of its own": (
        lambda f: edit_json(f / "model_index.json", transformer=["my_code", "Model"]),
        "my_code is not one of the libraries",
    ),
}


@pytest.mark.parametrize("edit, said", UNLOADABLE.values(), ids=UNLOADABLE)
def test_what_cannot_be_loaded_is_one_line_that_names_the_cause(folder, edit, said, capfd):
    edit(folder)
    capfd.readouterr()
    with pytest.raises(BadInput, match=said) as error:
        load(folder)
    line = str(error.value)
    assert line.startswith(f"cannot load {folder}: ") and "\n" not in line and len(line) < 500
    bars = re.compile(r"Load.*\d+(/\d+|it)|^\s*$")  # of what was loaded before
    assert [text for text in re.split(r"[\n\r]", capfd.readouterr().err) if not bars.search(text)] == []


# ---- its configurations ----
def test_the_configurations_are_those_in_the_folder():
    configs = weights.read_pipeline_configs(str(SOURCE))
    assert set(configs) == {"family", "scheduler", "text_encoder", "text_encoder_2", "transformer", "vae"}
    assert configs["family"] == "StableDiffusion3Pipeline"
    assert configs["transformer"] == json.loads((SOURCE / "transformer/config.json").read_text())
    assert configs["scheduler"]["_class_name"] == "FlowMatchEulerDiscreteScheduler"
    assert configs["transformer"].get("nothing") is None and "text_encoder_3" not in configs


def test_a_t5_that_was_not_copied_counts_as_absent(folder):
    t5 = {
        "text_encoder_3": ["transformers", "T5EncoderModel"],
        "tokenizer_3": ["transformers", "T5Tokenizer"],
    }
    edit_json(folder / "model_index.json", **t5)
    assert "text_encoder_3" not in weights.read_pipeline_configs(folder)
    replace(folder / "text_encoder_3/config.json", '{"d_model": 8}')
    assert weights.read_pipeline_configs(folder)["text_encoder_3"] == {"d_model": 8}


def test_a_key_that_a_configuration_lacks_is_named(folder):
    edit_json(folder / "transformer/config.json", patch_size="DELETE")
    configs = weights.read_pipeline_configs(folder)
    with pytest.raises(BadInput, match=f"transformer/config.json of {folder} has no 'patch_size'"):
        configs["transformer"]["patch_size"]
    with pytest.raises(BadInput, match="model_index.json of .* has no 'image_encoder'"):
        configs["image_encoder"]
    edit_json(folder / "model_index.json", _class_name="DELETE")
    with pytest.raises(BadInput, match="model_index.json of .* has no '_class_name'"):
        weights.read_pipeline_configs(folder)


def move_to(folder, inner):
    for path in list(folder.iterdir()):
        target = folder / inner / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def leave_only(*names):
    def edit(folder):
        empty(folder)
        for name in names:
            replace(folder / name, "{}")

    return edit


WITHOUT_CONFIGS = {
    "no model_index.json": (
        lambda f: (f / "model_index.json").unlink(),
        "no model_index.json, so it is no diffu",
    ),
    "an empty folder": (empty, "no model_index.json, so it is no diffusers pipeline"),
    "half-downloaded": (
        lambda f: [(f / "model_index.json").unlink(), replace(f / "vae/x.safetensors.incomplete", "")],
        r"only in part \(vae/x.safetensors.incomplete\): run `hf download` again",
    ),
    "one folder too high": (
        lambda f: move_to(f, "sd3"),
        "no model_index.json, but .*model/sd3 has: give that",
    ),
    "a folder of the hub's cache": (
        lambda f: move_to(f, "snapshots/0a1b2c"),
        "but .*model/snapshots/0a1b2c has: give that folder",
    ),
    "one model": (leave_only("config.json", "model.safetensors"), "it is one model, not a whole pipeline"),
    "a LoRA": (
        leave_only("pytorch_lora_weights.safetensors"),
        "no pipeline but a LoRA .pytorch_lora_weights",
    ),
    "a LoRA of peft": (leave_only("adapter_config.json"), "no pipeline but a LoRA .adapter_config.json"),
    "one file": (leave_only("sd3_medium.safetensors"), "sd3_medium.safetensors must first be converted"),
    "damaged model_index.json": (
        lambda f: replace(f / "model_index.json", '{"_class_name": '),
        "its model_index.json is damaged .Expecting value",
    ),
    "an empty model_index.json": (
        lambda f: replace(f / "model_index.json", ""),
        "model_index.json is damaged",
    ),
    "a model_index.json that is no text": (
        lambda f: replace(f / "model_index.json", b"\xff\xfe\0"),
        "model_index.json is damaged",
    ),
    "a list": (lambda f: replace(f / "model_index.json", "[1]"), "its model_index.json is no JSON object"),
    "no transformer/config.json": (
        lambda f: (f / "transformer/config.json").unlink(),
        "no transformer/config.js",
    ),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), "no scheduler/scheduler_config.json"),
    "no VAE": (lambda f: shutil.rmtree(f / "vae"), "no vae/config.json"),
    "damaged vae/config.json": (lambda f: truncate(f / "vae/config.json"), "its vae/config.json is damaged"),
    "a file": (lambda f: [shutil.rmtree(f), f.write_text("")], "it is a file, not a folder"),
    "no folder": (shutil.rmtree, "there is no such folder"),
}


@pytest.mark.parametrize("edit, said", WITHOUT_CONFIGS.values(), ids=WITHOUT_CONFIGS)
def test_a_folder_that_is_no_pipeline_is_one_line_that_names_the_cause(folder, edit, said, offline):
    edit(folder)
    with pytest.raises(BadInput, match=said) as error:
        weights.read_pipeline_configs(str(folder))
    assert str(error.value).startswith(f"cannot load {folder}: ") and "\n" not in str(error.value)


# ---- the hub ----
@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def raised(kind, message="the hub says no", cause=None):
    error = kind.__new__(kind)
    Exception.__init__(error, message)
    error.__cause__ = cause
    return error


class ConnectError(Exception):
    """As httpx's, whichever of its packages is installed."""


HUB_ERRORS = {
    "gated": (
        OSError("You are trying to access a gated repo."),
        hub_errors.GatedRepoError,
        "it is gated: accept its licence on https://huggingface.co/org/name and run `hf auth login`",
    ),
    "not found": (
        OSError("org/name is not a local folder"),
        hub_errors.RepositoryNotFoundError,
        "the hub has no org/name, and there is no such folder; private models need `hf auth login`",
    ),
    "no such file": (
        OSError("no file"),
        hub_errors.RemoteEntryNotFoundError,
        "the hub's org/name lacks a file: the hub says no",
    ),
    "offline": (OSError("x"), hub_errors.OfflineModeIsEnabled, "not reachable .*`hf download org/name`"),
    "not in the cache": (OSError("x"), hub_errors.LocalEntryNotFoundError, "not reachable"),
    "no connection": (OSError("x"), ConnectError, "the hub is not reachable and org/name is neither"),
    "no connection, by requests": (OSError("x"), ConnectionError, "the hub is not reachable"),
    "anything": (
        ValueError("something\nelse"),
        KeyError,
        r"something \(ValueError\); try `hf download org/name`",
    ),
    "silence": (RuntimeError(), KeyError, r"RuntimeError"),
}


@pytest.mark.parametrize("error, cause, said", HUB_ERRORS.values(), ids=HUB_ERRORS)
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_the_hubs_errors_are_told_apart(error, cause, said, depth):
    if depth == 0 and cause not in (KeyError,):
        error = raised(cause)
    elif depth > 0:
        error.__cause__ = raised(cause)
    if depth == 2:
        error.__cause__ = raised(OSError, "between", error.__cause__)

    def load(name):
        raise error

    with pytest.raises(BadInput, match=f"^cannot load org/name: .*{said}") as found:
        weights.from_hub(load, "org/name")
    assert "\n" not in str(found.value)


def test_a_full_disk_is_named():
    def load(name):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(BadInput, match="cannot load org/name: the disk is full"):
        weights.from_hub(load, "org/name")


@pytest.mark.parametrize(
    "name", ["./none", "/none/at/all", "none", "none/", "a/b/c", "..", "tiny/sd4", "a\\b", "a" * 5000]
)
def test_a_path_is_not_taken_for_a_hub_id(name, offline, monkeypatch, tmp_path):
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    said = "no model_index.json" if name == ".." else "there is no such folder"
    with pytest.raises(BadInput, match=f"cannot load {re.escape(name)}: .*{said}"):
        weights.read_pipeline_configs(name)


@pytest.mark.parametrize("name", ["", " ", "a\0b"])
def test_what_is_no_name_is_one_line(name):
    for load in (weights.read_pipeline_configs, lambda name: weights.from_hub(print, name)):
        with pytest.raises(BadInput, match="is no name of a model"):
            load(name)


def test_a_mistake_inside_is_passed_on():
    def load(name):
        raise BadInput("a mistake")

    with pytest.raises(BadInput, match="^a mistake$"):
        weights.from_hub(load, "org/name")
    with pytest.raises(KeyboardInterrupt):
        weights.from_hub(lambda name: (_ for _ in ()).throw(KeyboardInterrupt()), "org/name")


def test_loggers_are_as_before_after_an_error():
    loggers = [logging.getLogger(name) for name in weights.LIBRARIES]
    before = [(logger.level, list(logger.handlers), logger.propagate) for logger in loggers]
    with pytest.raises(ZeroDivisionError), weights.collect_messages() as messages:
        logging.getLogger("transformers.somewhere").warning("a warning")
        with weights.collect_messages() as inner:
            logging.getLogger("diffusers").warning("another")
        raise ZeroDivisionError
    assert messages == ["a warning", "another"] and inner == ["another"]
    assert [(logger.level, list(logger.handlers), logger.propagate) for logger in loggers] == before


# ---- LoRAs ----
@pytest.fixture(scope="module")
def lora():
    """The tensors of a LoRA, as diffusers saves them."""
    pipe = load(SOURCE)
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=["attn.to_q", "attn.to_k"])
    pipe.transformer.add_adapter(config)
    return {f"transformer.{name}": t for name, t in get_peft_model_state_dict(pipe.transformer).items()}


def save_lora(folder, state, name="pytorch_lora_weights.safetensors"):
    folder.mkdir(exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / name)
    return str(folder)


def test_a_lora_that_fits_is_added(lora, tmp_path):
    pipe = load(SOURCE)
    weights.load_lora(pipe, save_lora(tmp_path / "lora", lora))
    assert weights.count_lora_weights(pipe.transformer) == len(lora)
    values = dict(pipe.transformer.named_parameters())
    name = "transformer_blocks.0.attn.to_q.lora_A"
    assert torch.equal(values[f"{name}.default_0.weight"], lora[f"transformer.{name}.weight"])


def rename(state, old, new):
    return {name.replace(old, new, 1): tensor for name, tensor in state.items()}


def damage(folder):
    (path,) = Path(folder).iterdir()
    truncate(path)


USELESS_LORAS = {
    "peft's own format": (
        lambda s: rename(s, "transformer.", "base_model.model."),
        "matches no layer of SD3Tra",
    ),
    "no prefix": (lambda s: rename(s, "transformer.", ""), "matches no layer of SD3Transformer2DModel"),
    "of a U-Net": (lambda s: rename(s, "transformer.", "unet."), "matches no layer"),
    "other layers": (lambda s: rename(s, "transformer_blocks", "blocks"), "Target modules .*blocks"),
    "one name is wrong": (
        lambda s: {("transformer.typo." + n if "0.attn.to_q.lora_A" in n else n): t for n, t in s.items()},
        "fits SD3Transformer2DModel only in part: .*unexpected keys",
    ),
    "another width": (
        lambda s: {name: (torch.zeros(2, 9) if "lora_A" in name else t) for name, t in s.items()},
        "cannot load .*Error.s. in loading state_dict",
    ),
    "no LoRA": (lambda s: {"transformer.x_embedder.weight": torch.zeros(3)}, "Invalid LoRA checkpoint"),
}


@pytest.mark.parametrize("edit, said", USELESS_LORAS.values(), ids=USELESS_LORAS)
def test_a_lora_that_does_not_fit_is_one_line(lora, tmp_path, edit, said):
    with pytest.raises(BadInput, match=said) as error:
        weights.load_lora(load(SOURCE), save_lora(tmp_path / "lora", edit(lora)))
    assert str(tmp_path / "lora") in str(error.value) and "\n" not in str(error.value)


def test_a_lora_that_is_damaged_or_not_there_is_one_line(lora, tmp_path, offline):
    folder = save_lora(tmp_path / "lora", lora)
    damage(folder)
    with pytest.raises(BadInput, match="its pytorch_lora_weights.safetensors is damaged"):
        weights.load_lora(load(SOURCE), folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="no file named pytorch_lora_weights"):
        weights.load_lora(load(SOURCE), str(tmp_path / "empty"))
    for name, said in ((str(tmp_path / "none"), "there is no such folder"), ("org/lora", "not reachable")):
        with pytest.raises(BadInput, match=said):
            weights.load_lora(load(SOURCE), name)


# ---- files of tensors ----
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
@pytest.mark.parametrize("content", [b"", b"no weights", bytes(100), b"\x80\x02}q\x00."])
def test_a_file_that_holds_no_tensors_is_one_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=f"{name} is no file of weights, or damaged") as error:
        weights.read_state(tmp_path / name)
    assert "\n" not in str(error.value)


def test_what_a_file_holds_besides_tensors_is_refused(tmp_path):
    tensors = {"a": torch.ones(2)}
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "a.pt")
    with pytest.raises(BadInput, match="a.pt is no file of weights"):
        weights.read_state(tmp_path / "a.pt")
    assert weights.read_state(tmp_path / "a.pt", "state_dict").keys() == {"a"}
    for key in ("nothing", "epoch"):
        with pytest.raises(BadInput, match="a.pt is no file of weights"):
            weights.read_state(tmp_path / "a.pt", key)
    with pytest.raises(BadInput, match="none.pt is no file of weights"):
        weights.read_state(tmp_path / "none.pt")
