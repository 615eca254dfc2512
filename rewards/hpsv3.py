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
import os
import re
from pathlib import Path

import torch
from einops import rearrange
from torch import nn
from transformers import AutoConfig, Qwen2_5_VLModel, Qwen2VLModel

from rewards.clip import precision
from rewards.errors import BadInput
from rewards.image_file import read_image
from rewards.vlm import load_reader
from rewards.weights import file_from_hub, from_hub, from_state, load_exactly, read_state

MARK = "<|Reward|>"
PIXELS = 256 * 28 * 28  # every image is scaled to this many
MODELS = {"qwen2_vl": Qwen2VLModel, "qwen2_5_vl": Qwen2_5_VLModel}
# Per question, the authors' files and the constants in them whose texts are joined.
HPSV3_QUESTIONS = [
    [
        ("data_collator_qwen.py", "INSTRUCTION"),
        ("data_collator_qwen.py", "prompt_with_special_token"),
    ],
]
EDIT_QUESTIONS = [
    [
        ("prompts.py", "INSTRUCTION_EDIT_FOLLOWING"),
        ("data_collator_qwen_edit.py", "prompt_with_special_token"),
    ],
    [
        ("prompts.py", "INSTRUCTION_EDIT_QUALITY"),
        ("data_collator_qwen_edit.py", "prompt_with_special_token"),
    ],
]


def source_image(metadata):
    """metadata["source"] as a tensor (3, H, W) in [0, 1]. ValueError when there is none or it is no image."""
    source = metadata.get("source")
    if isinstance(source, torch.Tensor):
        in_range = (source >= 0) & (source <= 1)
        if source.ndim == 3 and len(source) == 3 and bool(in_range.all()):
            return source
        raise ValueError(f'"source" must be (3, H, W) in [0, 1], got {tuple(source.shape)} {source.dtype}')
    if not isinstance(source, str):
        raise ValueError('editreward needs "source" in the metadata, the path of the image that is edited')
    try:
        pixels = torch.from_numpy(read_image(source))
    except ValueError as error:  # missing, or no image
        raise ValueError(f"cannot read the source image {source} ({error})") from None
    return rearrange(pixels, "h w c -> c h w") / 255


def reward_head(width):
    """State (B, width) -> mean and logarithm of the spread (B, 2). Dropout, idle here, keeps its number."""
    return nn.Sequential(
        nn.Linear(width, 1024),
        nn.ReLU(),
        nn.Identity(),
        nn.Linear(1024, 16),
        nn.ReLU(),
        nn.Linear(16, 2),
    )


class HeadReward:
    """The reward: (B,) float32, the mean over questions of head(state at MARK)[0].

    model: a Qwen2VLModel or Qwen2_5_VLModel; reader: one that pads on the right; questions: one per head,
    with {text_prompt} and MARK in it; source: whether metadata["source"] is shown before the image.
    """

    def __init__(self, model, heads, reader, questions, source=False, batch_size=4):
        self.model = model.eval().requires_grad_(False)
        self.heads = heads.eval().requires_grad_(False)
        self.reader = reader
        self.source = source
        self.batch_size = batch_size
        self.questions = [question.replace("{text_prompt}", "{prompt}") for question in questions]
        self.mark = reader.tokenizer.convert_tokens_to_ids(MARK)

    def check(self, prompt, metadata):
        if self.source:
            source_image(metadata)

    def states(self, question, prompts, pictures):
        """B prompts and lists of images -> states at MARK (B, D), float32."""
        questions = self.reader.ask(question, prompts)
        inputs = self.reader(questions, pictures, self.model.device)
        # positions in a line, also for an image's patches: the authors' code shows the language model
        # embeddings alone, so that it cannot know of images
        positions = torch.arange(inputs["input_ids"].shape[1], device=self.model.device)
        inputs["position_ids"] = positions.expand(3, len(prompts), -1)
        states = self.model(**inputs, use_cache=False).last_hidden_state
        return states[inputs["input_ids"] == self.mark].float()

    @torch.no_grad()
    def __call__(self, images, prompts, metadata):
        pictures = [[image] for image in images]
        if self.source:
            for row, data in enumerate(metadata):
                try:
                    pictures[row].insert(0, source_image(data))
                except ValueError as error:
                    raise BadInput(f"row {row}: {error}") from None
        values = []
        for start in range(0, len(prompts), self.batch_size):
            batch = slice(start, start + self.batch_size)
            scores = []
            for head, question in zip(self.heads, self.questions):
                state = self.states(question, prompts[batch], pictures[batch])
                scores.append(head(state)[:, 0])
            values.append(torch.stack(scores).mean(0))
        return torch.cat(values).to(images.device)


def read_text(path, name):
    """The text of a constant of a Python file, which is read, not run. BadInput when there is none."""
    text = None
    try:
        for line in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == name:
                text = ast.literal_eval(line.value)  # the last one counts
    except (SyntaxError, ValueError):
        text = None
    if not isinstance(text, str):
        raise BadInput(f"{path} has no text {name}: take the authors' file as it is")
    return text


def read_questions(folder, questions, origin):
    """The texts of the questions, each of several constants joined. BadInput when a file is missing."""
    texts = []
    for parts in questions:
        text = ""
        for file, name in parts:
            path = Path(folder or "", file)
            if not folder or not os.path.isfile(path):
                raise BadInput(
                    f"the questions that this reward's model was trained with are missing: put {file} of "
                    f"{origin} into a folder and name it, REWARD@FOLDER; the weights may be in it too"
                )
            text += read_text(path, name)
        texts.append(text)
    return texts


def split_state(state):
    """A checkpoint with old or new transformers' names -> tensors of the model, tensors of its heads."""
    model = {}
    heads = {}
    for name, tensor in state.items():
        if name.startswith("rm_head"):  # one: rm_head.0.weight; two: rm_heads.head_1.0.weight
            name = re.sub(r"^rm_head\.", "0.", name)
            heads[re.sub(r"^rm_heads\.head_(\d+)\.", r"\1.", name)] = tensor
        elif name != "lm_head.weight":
            name = re.sub(r"^model\.visual\.", "visual.", name)
            model[re.sub(r"^model\.(language_model\.)?", "language_model.", name)] = tensor
    return model, heads


def load(folder, hub_id, file, base, questions, device, source=False):
    """The reward. The weights come from the folder if they are there, else from hub_id; configuration and
    tokenizer of the model that they were trained from come from the folder if it has them, else from base.
    """
    base = folder if os.path.isfile(Path(folder, "config.json")) else base
    reader = load_reader(base, pixels=(PIXELS, PIXELS), side="right")
    reader.tokenizer.add_tokens([MARK], special_tokens=True)
    config = from_hub(AutoConfig.from_pretrained, base)
    if config.model_type not in MODELS:
        raise BadInput(f"{base} is a {config.model_type}; this reward reads {', '.join(MODELS)}")
    path = Path(folder, file)
    if not os.path.isfile(path):
        path = file_from_hub(hub_id, file)
    state, head_state = split_state(read_state(path))
    config.get_text_config().vocab_size = len(reader.tokenizer)  # the authors cut the table to its used rows
    width = config.get_text_config().hidden_size
    heads = nn.ModuleList(reward_head(width) for _ in questions)
    heads = load_exactly(heads, head_state, path).to(device, torch.float32)
    model = from_state(MODELS[config.model_type], config, state, path)
    return HeadReward(model.to(device, precision(device)), heads, reader, questions, source)


def make_hpsv3(metadata, device, model=None):
    """model: a folder with the authors' data_collator_qwen.py."""
    origin = "the authors' package hpsv3 (hpsv3/dataset)"
    questions = read_questions(model, HPSV3_QUESTIONS, origin)
    base = "Qwen/Qwen2-VL-7B-Instruct"
    return load(model, "MizzenAI/HPSv3", "HPSv3.safetensors", base, questions, device)


def make_editreward(metadata, device, model=None):
    """model: a folder with the authors' prompts.py and data_collator_qwen_edit.py."""
    origin = "the GitHub repository TIGER-AI-Lab/EditReward (EditReward/dataset)"
    questions = read_questions(model, EDIT_QUESTIONS, origin)
    base = "Qwen/Qwen2.5-VL-7B-Instruct"
    hub_id = "TIGER-Lab/EditReward-Qwen2.5-VL-7B"
    return load(model, hub_id, "model.safetensors", base, questions, device, source=True)
