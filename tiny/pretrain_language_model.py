"""Pretrains the tiny world's language model from scratch, supervised only: no reward is ever seen here.

    python -m tiny.pretrain_language_model train   90 minutes of one CPU core; needs no other model
    python -m tiny.pretrain_language_model eval    scores what it learnt, with samples (--folder)

Training is deterministic from --seed on one machine and shows its progress. It writes a checkpoint to --work
every --save-every steps and resumes from it when started again. The result is a plain transformers folder,
tiny/vlm. The tasks are those of vlm_world.py.
"""

import random
from pathlib import Path

import torch
from transformers import AutoImageProcessor, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from rewards.prompts import load_prompts
from tiny import splits, vlm_world
from tiny.language_model import build_chat_tokenizer, build_image_processor, build_vlm, chat_inputs
from tiny.pretraining import fit, parse_options
from tiny.vlm_world import keeps_meaning

HERE = Path(__file__).parent
STEPS = 12000
SAMPLES = 8  # rewrites per prompt in the evaluation
TEMPERATURE_1 = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
GREEDY = {"do_sample": False}


def pretrain(args):
    """Trains the language model and saves it."""
    torch.manual_seed(args.seed)
    tokenizer = build_chat_tokenizer(args.seed)
    processor = build_image_processor()
    vlm = build_vlm(tokenizer)
    print(f"vlm: {vlm.num_parameters() / 1e6:.2f} M parameters, {len(tokenizer)} tokens")
    num_steps = args.steps or STEPS

    def loss_at(step):
        rng = random.Random(f"{args.seed}-vlm-{step}")
        easy = 0.4 if step < num_steps / 4 else 0.0
        loss = 0.0
        for sampler, rows in vlm_world.TASKS.values():  # one pass per task: its rows have similar lengths
            examples = [sampler(rng, easy)[:3] for _ in range(rows)]
            inputs = chat_inputs(tokenizer, processor, examples, "right")
            loss = loss + rows / vlm_world.BATCH * vlm(**inputs).loss
        return loss

    fit("vlm", [vlm], loss_at, args, num_steps, peak=2e-3, ema_decay=0.99)
    tokenizer.save_pretrained(args.folder)
    processor.save_pretrained(args.folder)
    vlm.half().save_pretrained(args.folder)


# ---- evaluation ----
class Answerer:
    """The model of a folder, which answers questions about images."""

    def __init__(self, folder):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.processor = AutoImageProcessor.from_pretrained(folder)
        self.vlm = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)

    @torch.no_grad()
    def answer(self, examples, options):
        """The model's replies to the questions of (image or None, question, ...) examples, a list of texts.

        options: of transformers' `generate`.
        """
        replies = []
        for first in range(0, len(examples), 128):
            batch = [(example[0], example[1], "") for example in examples[first : first + 128]]
            inputs = chat_inputs(self.tokenizer, self.processor, batch, "left")
            inputs.pop("labels")
            length = inputs["input_ids"].shape[1]
            ids = self.vlm.generate(**inputs, max_new_tokens=40, **options)[:, length:]
            replies += self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return replies

    def rewrite(self, examples, options):
        """As `answer`, but what stands between the answer tags of each reply."""
        return [inside_tags(reply) for reply in self.answer(examples, options)]


def inside_tags(reply):
    """What stands between the answer tags of a reply, "" where there are none."""
    if not reply.endswith("</answer>"):
        return ""
    return reply.removeprefix("<answer>").removesuffix("</answer>")


def mean(values):
    """The mean of a list of numbers or of truth values."""
    return sum(values) / len(values)


def evaluate(args):
    """Prints how well each task is done, with samples."""
    torch.manual_seed(args.seed)
    model = Answerer(args.folder)
    evaluate_rewrites(model, "dev", every=1)
    evaluate_rewrites(model, "dev_paraphrased", every=1)
    evaluate_rewrites(model, "dev_hard", every=1)
    evaluate_rewrites(model, "text_dev", every=1)
    rng = random.Random(f"{args.seed}-evaluation")  # training draws from other strings
    evaluate_captions(model, rng)
    for low, high in ((0.0, 0.3), (0.3, 0.6), (0.6, 1.0)):
        evaluate_refinements(model, rng, low, high)
    evaluate_edits(model, rng)


def evaluate_rewrites(model, name, every):
    """Rewrites of a prompt file, parsed back. every: take every n-th distinct prompt."""
    prompts, metadata = load_prompts(splits.PROMPTS / "fold_0" / f"{name}.jsonl")
    last_rows = {}  # prompt -> the last row with it
    for row, prompt in enumerate(prompts):
        last_rows[prompt] = row
    rows = list(last_rows.values())[::every]
    questions = [(None, vlm_world.REWRITE.format(prompt=prompts[row])) for row in rows]
    greedy = model.rewrite(questions, GREEDY)
    repeated_questions = []
    for question in questions:
        repeated_questions += [question] * SAMPLES
    samples = model.rewrite(repeated_questions, TEMPERATURE_1)

    kept = []  # per prompt, the share of its rewrites that keep the meaning
    kept_greedy = []
    distinct = []
    unchanged = []
    for k, row in enumerate(rows):
        own = samples[k * SAMPLES : (k + 1) * SAMPLES]
        kept_own = [keeps_meaning(text, metadata[row]) for text in own]
        kept.append(mean(kept_own))
        kept_greedy.append(keeps_meaning(greedy[k], metadata[row]))
        distinct.append(len(set(own)))
        unchanged.append(own.count(prompts[row]) / SAMPLES)
    listed = [", " in text for text in samples]
    print(f"rewrite, {name}: {len(rows)} prompts,", end=" ")
    print(f"meaning kept {mean(kept):.3f}, greedy {mean(kept_greedy):.3f},", end=" ")
    print(f"{mean(distinct):.2f} distinct of {SAMPLES},", end=" ")
    print(f"listed {mean(listed):.2f}, unchanged {mean(unchanged):.2f}")
    tags = [metadata[row]["tag"] for row in rows]
    for tag in sorted(set(tags)):
        tagged = [share for share, other in zip(kept, tags) if other == tag]
        print(f"    {tag:14s} meaning kept {mean(tagged):.3f}")
    for k in range(0, len(rows), len(rows) // 6):
        shown = " | ".join(samples[k * SAMPLES :][:4])
        print(f"    {prompts[rows[k]]} -> {greedy[k]} | {shown}")


def evaluate_captions(model, rng):
    """Captions of new images, compared object by object with what was drawn."""
    examples = [vlm_world.sample_caption(rng) for _ in range(512)]
    replies = model.answer(examples, GREEDY)
    scenes = []  # (objects drawn, objects named)
    texts = []  # (text drawn, text read)
    for (_, _, answer, content), reply in zip(examples, replies):
        if content["tag"] == "text":
            read = reply.split('"')[1] if reply.count('"') == 2 else ""
            texts.append(([content["text"]], [read]))
        else:
            scenes.append((answer.split(", "), reply.split(", ")))
    print_captions("scenes", scenes)
    print_captions("texts", texts)


def print_captions(name, pairs):
    """One line about captions. pairs: (objects drawn, objects named); an object is 'colour class place'."""
    objects = []
    for drawn, named in pairs:
        objects += zip(drawn, named + [""] * len(drawn))
    exact = mean([drawn == named for drawn, named in pairs])
    counted = mean([len(drawn) == len(named) for drawn, named in pairs])
    shares = []
    for words in (1, 2, 4):  # the colour; the class as well; the place as well, which has up to two words
        same = [a.split(" ")[:words] == b.split(" ")[:words] for a, b in objects]
        shares.append(mean(same))
    color, shape, place = shares
    print(f"caption, {name}: {len(pairs)}, exact {exact:.3f},", end=" ")
    print(f"number of objects {counted:.3f},", end=" ")
    print(f"colour {color:.3f}, and class {shape:.3f},", end=" ")
    print(f"and place {place:.3f}")


def evaluate_refinements(model, rng, low, high):
    """Refinements given previews of images that are between `low` and `high` done."""
    examples = []
    while len(examples) < 256:
        example = vlm_world.sample_refine(rng)
        image, question, _, content = example
        if image is None or content["tag"] == "text":
            continue
        percent = int(question.split("%")[0].split()[-1])
        done = percent / 100
        if low <= done <= high:
            examples.append(example)
    texts = model.rewrite(examples, TEMPERATURE_1)
    kept = [keeps_meaning(text, example[3]) for text, example in zip(texts, examples)]
    same = []  # of the objects that a detailed reply lists, the share that a detailed answer lists too
    for example, text in zip(examples, texts):
        answer = inside_tags(example[2])
        if ", " in answer and ", " in text:
            named = text.split(", ")
            same.append(len(set(answer.split(", ")) & set(named)) / len(named))
    print(f"refine, {low:.1f} to {high:.1f} done: meaning kept {mean(kept):.3f},", end=" ")
    print(f"of the objects listed {mean(same):.3f} are as and where they should be")


def evaluate_edits(model, rng):
    """Rewritten instructions, compared with the three right answers."""
    examples = [vlm_world.sample_edit(rng) for _ in range(256)]
    texts = model.rewrite(examples, TEMPERATURE_1)
    right = [text in example[3] for text, example in zip(texts, examples)]
    print(f"edit: one of the three right answers {mean(right):.3f}")
    for example, text in list(zip(examples, texts))[:5]:
        instruction, exact_instruction, target = example[3]
        print(f"    {instruction} -> {text} (right: {exact_instruction} | {target})")


if __name__ == "__main__":
    stages = {"train": pretrain, "eval": evaluate}
    arguments = parse_options(__doc__, list(stages), ["vlm"])
    stages[arguments.stage](arguments)
