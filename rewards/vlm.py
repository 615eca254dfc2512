"""Rewards from a vision-language model of the Qwen-VL family that is asked about the image.

  vlm         does the image show the prompt? P(Yes) against P(No) as the next token, in [0, 1], one forward.
              FDFO's alignment reward (arXiv 2603.12893) is 100 times such a value: a weight, `vlm:100`
  vlm_judge   a judgement in words that ends with a score from 1 to 5, written greedily; NaN without a score

The questions are this project's own, so values compare only among themselves.
"""

import re

import torch
from einops import repeat
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from rewards.clip import normalise, precision, resize
from rewards.errors import BadInput
from rewards.weights import from_hub

IMAGE = "<|image_pad|>"  # stands in a chat for one patch of an image, after merging
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
QUESTION = (
    "Here is a description of an image: {prompt}\n"
    "Does the image show this, with every object, number, colour, position and text as described? "
    "Answer with Yes or No."
)
JUDGEMENT = (
    "Here is a description of an image: {prompt}\n"
    "Judge how well the image shows it. Name what is missing, wrong or badly drawn in one or two sentences. "
    "Then give a score from 1 (does not show it) to 5 (shows all of it, well drawn). "
    "End with a line of the form\nFinal Score: x"
)


def ask(question, prompt, marks=()):
    """Puts a prompt into a question, so that nothing in it is taken for a mark of the chat, as <|im_end|>.

    marks: further tokens of the model that are text in a prompt, such as <think>.
    """
    for mark in marks:
        prompt = prompt.replace(mark, f"{mark[0]} {mark[1:]}")
    return question.replace("{prompt}", prompt.replace("<|", "< |"))


class Reader:
    """Makes a Qwen-VL model's inputs of questions about images.

    processor: an image processor of the family, for its numbers alone (patch size, mean, ...). pixels: the
    least and the most that an image is scaled to, keeping its shape. side: where short rows are padded.
    """

    def __init__(self, tokenizer, processor, pixels=(56 * 56, 512 * 512), side="left"):
        self.tokenizer = tokenizer
        self.processor = processor
        self.pixels = pixels
        self.side = side

    def ask(self, question, prompts):
        """B questions, with B prompts in them as plain text."""
        marks = [token for token in self.tokenizer.get_added_vocab() if token.startswith("<")]
        return [ask(question, prompt, marks) for prompt in prompts]

    def patches(self, image):
        """(3, H, W) in [0, 1] -> (rows * columns, 3 * T * p * p), and the grid (1, rows, columns)."""
        p = self.processor.patch_size
        m = self.processor.merge_size
        least, most = self.pixels
        height, width = smart_resize(image.shape[1], image.shape[2], p * m, least, most)
        pixels = resize(image[None], height, width)[0]
        pixels = normalise(pixels, self.processor.image_mean, self.processor.image_std)
        patches = repeat(
            pixels,
            # patches that are merged later stand together; an image is a film of T equal frames
            "c (rows m1 p1) (columns m2 p2) -> (rows columns m1 m2) (c t p1 p2)",
            m1=m,
            m2=m,
            p1=p,
            p2=p,
            t=self.processor.temporal_patch_size,
        )
        return patches, (1, height // p, width // p)

    def chat(self, question, grids):
        """The text of a chat in which a question follows images with these grids."""
        content = [{"type": "image"} for _ in grids]
        content.append({"type": "text", "text": question})
        message = {"role": "user", "content": content}
        text = self.tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        parts = text.split(IMAGE)
        if len(parts) != len(grids) + 1:
            raise BadInput(
                f"this model's chat template writes {len(parts) - 1} images where {len(grids)} are shown"
            )
        written = parts[0]
        for (_, rows, columns), part in zip(grids, parts[1:]):
            count = rows * columns // self.processor.merge_size**2
            written += IMAGE * count + part
        return written

    def __call__(self, questions, images, device):
        """questions: B texts; images: B lists of images (3, H, W). Returns the model's keyword arguments."""
        texts = []
        pixels = []
        grids = []
        for question, row in zip(questions, images):
            row_grids = []
            for image in row:
                patches, grid = self.patches(image.to(device))
                pixels.append(patches)
                row_grids.append(grid)
            texts.append(self.chat(question, row_grids))
            grids += row_grids
        tokens = self.tokenizer(
            texts,
            padding=True,
            padding_side=self.side,
            add_special_tokens=False,
            return_tensors="pt",
        ).to(device)
        is_image = tokens.input_ids == self.tokenizer.convert_tokens_to_ids(IMAGE)
        return {
            "input_ids": tokens.input_ids,
            "attention_mask": tokens.attention_mask,
            "pixel_values": torch.cat(pixels),
            "image_grid_thw": torch.tensor(grids, device=device),
            # without it the image's patches would silently get positions in a line, not in a plane
            "mm_token_type_ids": is_image.int(),
        }


class YesNo:
    """The reward P(Yes) / (P(Yes) + P(No)): (B,) float32 in [0, 1]."""

    def __init__(self, model, reader, batch_size=8):
        self.model = model.eval().requires_grad_(False)
        self.reader = reader
        self.batch_size = batch_size
        yes = reader.tokenizer.encode("Yes", add_special_tokens=False)
        no = reader.tokenizer.encode("No", add_special_tokens=False)
        if len(yes) != 1 or len(no) != 1:
            raise BadInput(f"vlm: the words Yes and No must be one token each, here they are {[yes, no]}")
        weight = model.get_output_embeddings().weight
        self.direction = weight[yes[0]].float() - weight[no[0]].float()

    @torch.no_grad()
    def __call__(self, images, prompts, metadata):
        values = []
        for start in range(0, len(prompts), self.batch_size):
            batch = slice(start, start + self.batch_size)
            questions = self.reader.ask(QUESTION, prompts[batch])
            inputs = self.reader(questions, images[batch, None], self.model.device)
            state = self.model.model(**inputs, use_cache=False).last_hidden_state[:, -1]
            # the difference of the two logits, in float32: bfloat16 logits near 20 come in steps of 1/8
            values.append((state.float() @ self.direction).sigmoid())
        return torch.cat(values).to(images.device)


def parse_score(text):
    """The last `Final Score: x` of a judgement, x in 1 to 5, as a float; NaN when there is none."""
    scores = re.findall(r"final score[\s*]*:[\s*]*(\d+(?:\.\d+)?)", text.lower())
    score = float(scores[-1]) if scores else float("nan")
    return score if 1 <= score <= 5 else float("nan")


class Judge:
    """The reward that the model writes down: (B,) float32 in 1 to 5, NaN for a row with no readable score."""

    def __init__(self, model, reader, batch_size=8, max_new_tokens=160):
        self.model = model.eval().requires_grad_(False)
        self.reader = reader
        self.batch_size = batch_size
        # greedy, whatever sampling and penalties the model's own generation settings ask for
        self.options = {
            "max_new_tokens": max_new_tokens,
            "do_sample": False,
            "repetition_penalty": 1.0,
            "temperature": None,
            "top_p": None,
            "top_k": None,
            "pad_token_id": reader.tokenizer.pad_token_id,
        }

    @torch.no_grad()
    def judgements(self, images, prompts):
        """What the model writes about each image: B texts."""
        texts = []
        for start in range(0, len(prompts), self.batch_size):
            batch = slice(start, start + self.batch_size)
            questions = self.reader.ask(JUDGEMENT, prompts[batch])
            inputs = self.reader(questions, images[batch, None], self.model.device)
            ids = self.model.generate(**inputs, **self.options)
            replies = ids[:, inputs["input_ids"].shape[1] :]
            texts += self.reader.tokenizer.batch_decode(replies, skip_special_tokens=True)
        return texts

    def __call__(self, images, prompts, metadata):
        scores = [parse_score(text) for text in self.judgements(images, prompts)]
        return torch.tensor(scores, dtype=torch.float32, device=images.device)


def load_reader(hub_id, **options):
    """A Reader for a hub repository or a folder. BadInput when it is of another family."""
    kind = from_hub(AutoConfig.from_pretrained, hub_id).model_type
    if kind not in FAMILIES:
        raise BadInput(f"{hub_id} is a {kind}; this reward reads {', '.join(FAMILIES)}")
    processor = from_hub(Qwen2VLImageProcessorPil.from_pretrained, hub_id)
    tokenizer = from_hub(AutoTokenizer.from_pretrained, hub_id)
    return Reader(tokenizer, processor, **options)


def load_model(hub_id, device):
    model = from_hub(AutoModelForImageTextToText.from_pretrained, hub_id, dtype=precision(device))
    return model.to(device)


def make_vlm(metadata, device, model="Qwen/Qwen2.5-VL-7B-Instruct"):
    reader = load_reader(model)
    return YesNo(load_model(model, device), reader)


def make_vlm_judge(metadata, device, model="Qwen/Qwen2.5-VL-7B-Instruct"):
    reader = load_reader(model)
    return Judge(load_model(model, device), reader)
