"""Rewards that read a vision-language model's state at a special token with a small head.

  hpsv3       human preference for an image of a prompt (arXiv 2508.03789), on Qwen2-VL 7B
  editreward  faithfulness and quality of an edit (arXiv 2509.26346), on Qwen2.5-VL 7B or MiMo-VL 7B: two
              questions with a head each, the mean. The prompt is the instruction, metadata["source"] the
              image before the edit, a path or a tensor (3, H, W) in [0, 1]

A head gives a mean and a spread; the reward is the mean, which has no bounds. The questions that the models
were trained with are their authors' text and no part of this project: they are read, not run, from the
authors' own files in the folder that the reward is given, `hpsv3@FOLDER`.
"""

import ast
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import AutoConfig, Qwen2_5_VLModel, Qwen2VLModel

from rewards import BadInput
from rewards.clip import precision
from rewards.vlm import ask, load_reader
from rewards.weights import file_from_hub, from_hub, from_state, load_exactly, read_state

MARK = "<|Reward|>"
PIXELS = 256 * 28 * 28  # every image is scaled to this many
MODELS = {"qwen2_vl": Qwen2VLModel, "qwen2_5_vl": Qwen2_5_VLModel}
HPSV3_QUESTIONS = [[("data_collator_qwen.py", name) for name in ("INSTRUCTION", "prompt_with_special_token")]]
EDIT_QUESTIONS = [
    [("prompts.py", question), ("data_collator_qwen_edit.py", "prompt_with_special_token")]
    for question in ("INSTRUCTION_EDIT_FOLLOWING", "INSTRUCTION_EDIT_QUALITY")
]


def source_image(metadata):
    """metadata["source"] as a tensor (3, H, W) in [0, 1]. ValueError when there is none or it is no image."""
    source = metadata.get("source")
    if isinstance(source, torch.Tensor):
        if source.ndim == 3 and len(source) == 3 and bool(((source >= 0) & (source <= 1)).all()):
            return source
        raise ValueError(f'"source" must be (3, H, W) in [0, 1], got {tuple(source.shape)} {source.dtype}')
    if not isinstance(source, str):
        raise ValueError('editreward needs "source" in the metadata, the path of the image that is edited')
    try:
        return torch.from_numpy(np.array(Image.open(source).convert("RGB"))).permute(2, 0, 1) / 255
    except OSError as error:  # missing, or no image
        raise ValueError(f"cannot read the source image {source} ({type(error).__name__})") from None


def reward_head(width):
    """State (B, width) -> mean and logarithm of the spread (B, 2). Dropout, idle here, keeps its number."""
    layers = nn.Linear(width, 1024), nn.ReLU(), nn.Identity(), nn.Linear(1024, 16), nn.ReLU()
    return nn.Sequential(*layers, nn.Linear(16, 2))


class HeadReward:
    """The reward: (B,) float32, the mean over questions of head(state at MARK)[0].

    model: a Qwen2VLModel or Qwen2_5_VLModel; reader: one that pads on the right; questions: one a head, with
    {text_prompt} and MARK in it; source: whether metadata["source"] is shown before the image.
    """

    def __init__(self, model, heads, reader, questions, source=False, batch_size=4):
        self.model, self.heads = model.eval().requires_grad_(False), heads.eval().requires_grad_(False)
        self.reader, self.source, self.batch_size = reader, source, batch_size
        self.questions = [question.replace("{text_prompt}", "{prompt}") for question in questions]
        self.mark = reader.tokenizer.convert_tokens_to_ids(MARK)

    def check(self, prompt, metadata):
        if self.source:
            source_image(metadata)

    def states(self, question, prompts, pictures):
        """B prompts and lists of images -> states at MARK (B, D), float32."""
        inputs = self.reader([ask(question, prompt) for prompt in prompts], pictures, self.model.device)
        # positions in a line, also for an image's patches: the authors' code shows the language model
        # embeddings alone, so that it cannot know of images
        positions = torch.arange(inputs["input_ids"].shape[1], device=self.model.device)
        inputs |= {"position_ids": positions.expand(3, len(prompts), -1), "use_cache": False}
        return self.model(**inputs).last_hidden_state[inputs["input_ids"] == self.mark].float()

    @torch.no_grad()
    def __call__(self, images, prompts, metadata):
        pictures = [[image] for image in images]
        for row, data in enumerate(metadata if self.source else []):
            try:
                pictures[row].insert(0, source_image(data))
            except ValueError as error:
                raise BadInput(f"row {row}: {error}") from None
        values = []
        for i in range(0, len(prompts), self.batch_size):
            part = slice(i, i + self.batch_size)
            states = [self.states(question, prompts[part], pictures[part]) for question in self.questions]
            scores = [head(state)[:, 0] for head, state in zip(self.heads, states)]
            values.append(torch.stack(scores).mean(0))
        return torch.cat(values).to(images.device)


def read_text(path, name):
    """The text of a constant of a Python file, which is read, not run. BadInput when there is none."""
    try:
        lines = ast.parse(path.read_text(encoding="utf-8")).body
        lines = [
            line for line in lines if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == name
        ]
        return ast.literal_eval(lines[-1].value)
    except (SyntaxError, ValueError, IndexError):
        raise BadInput(f"{path} has no text {name}: take the authors' file as it is") from None


def read_questions(folder, questions, origin):
    """The texts of the questions, each of several constants joined. BadInput when a file is missing."""
    for path in (Path(folder or "", file) for question in questions for file, _ in question):
        if not folder or not path.is_file():
            raise BadInput(
                f"the questions that this reward's model was trained with are missing: put {path.name} of "
                f"{origin} into a folder and name it, REWARD@FOLDER; the weights may be in it too"
            )
    return ["".join(read_text(Path(folder, file), name) for file, name in part) for part in questions]


def split_state(state):
    """A checkpoint with old or new transformers' names -> tensors of the model, tensors of its heads."""
    model, heads = {}, {}
    for name, tensor in state.items():
        if name.startswith("rm_head"):  # one: rm_head.0.weight; two: rm_heads.head_1.0.weight
            heads[re.sub(r"^(rm_head|rm_heads\.head_(\d+))\.", lambda m: f"{m[2] or 0}.", name)] = tensor
        elif name != "lm_head.weight":
            name = re.sub(r"^model\.visual\.", "visual.", name)
            model[re.sub(r"^model\.(language_model\.)?", "language_model.", name)] = tensor
    return model, heads


def load(folder, hub_id, file, base, questions, device, source=False):
    """The reward. The weights come from the folder if they are there, else from hub_id; configuration and
    tokenizer of the model that they were trained from come from the folder if it has them, else from base.
    """
    base = folder if Path(folder, "config.json").is_file() else base
    reader = load_reader(base, pixels=(PIXELS, PIXELS), side="right")
    reader.tokenizer.add_tokens([MARK], special_tokens=True)
    config = from_hub(AutoConfig.from_pretrained, base)
    if config.model_type not in MODELS:
        raise BadInput(f"{base} is a {config.model_type}; this reward reads {', '.join(MODELS)}")
    path = Path(folder, file) if Path(folder, file).is_file() else file_from_hub(hub_id, file)
    state, head_state = split_state(read_state(path))
    config.get_text_config().vocab_size = len(reader.tokenizer)  # the authors cut the table to its used rows
    heads = nn.ModuleList(reward_head(config.get_text_config().hidden_size) for _ in questions)
    heads = load_exactly(heads, head_state, path).to(device, torch.float32)
    model = from_state(MODELS[config.model_type], config, state, path).to(device, precision(device))
    return HeadReward(model, heads, reader, questions, source)


def make_hpsv3(metadata, device, model=None):
    """model: a folder with the authors' data_collator_qwen.py."""
    questions = read_questions(model, HPSV3_QUESTIONS, "the authors' package hpsv3 (hpsv3/dataset)")
    base = "Qwen/Qwen2-VL-7B-Instruct"
    return load(model, "MizzenAI/HPSv3", "HPSv3.safetensors", base, questions, device)


def make_editreward(metadata, device, model=None):
    """model: a folder with the authors' prompts.py and data_collator_qwen_edit.py."""
    origin = "the GitHub repository TIGER-AI-Lab/EditReward (EditReward/dataset)"
    questions, base = read_questions(model, EDIT_QUESTIONS, origin), "Qwen/Qwen2.5-VL-7B-Instruct"
    hub_id = "TIGER-Lab/EditReward-Qwen2.5-VL-7B"
    return load(model, hub_id, "model.safetensors", base, questions, device, source=True)
