"""Pretrains the tiny world's models from scratch, supervised only: no reward is ever seen here.

    python -m tiny.pretrain vae      the autoencoder, a few minutes on two CPU cores
    python -m tiny.pretrain sd3      text encoders and flow transformer, about an hour; needs the autoencoder
    python -m tiny.pretrain sd3b     a second flow model, narrower, of another seed; same autoencoder
    python -m tiny.pretrain eval     score the pipeline in tiny/sd3 (--folder) on the evaluation prompts
    python -m tiny.pretrain vlm      the language model that rewrites prompts and sees; needs neither
    python -m tiny.pretrain eval_vlm score the model in tiny/vlm on what it learnt, with samples

Each stage is deterministic from --seed on one machine, shows its progress, writes a checkpoint every
--save-every steps to --work and goes on from it when started again. The results are plain diffusers folders,
tiny/sd3 and tiny/sd3b, and a plain transformers folder, tiny/vlm. Conventions: t in [0, 1], t = 1 is noise;
x_t = (1 - t) x_0 + t eps; the transformer learns v = eps - x_0.
"""

import argparse
import random
import time
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from einops import rearrange
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)
from tqdm import tqdm
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import rewards
from rewards.tiny_world.glyphs import CHARACTERS
from rewards.tiny_world.shapes import BACKGROUND
from tiny import vlm_world, world

HERE = Path(__file__).parent
MAX_TOKENS = 24  # longest prompt of the world is 20 tokens with its start and end
TEXT_WIDTH, WIDTH = 64, 128
WRITING_FROM = 7500  # the flow model's step from which three images in ten show writing; few do before
VLM_STEPS = 8000
SECOND_WIDTH, SECOND_STEPS = 96, 7000  # of tiny/sd3b, which does not write
FORGET_STEPS = 1170  # of a last stage without writing; leaves about half of the letters readable
NO_T5 = {"text_encoder_3": None, "tokenizer_3": None}  # diffusers wants to be told


# ---- tokenizer: one token a word, one a character of a text to draw ----
def vocabulary():
    """All words of the world's sentences. Words are lower case, characters to draw are not."""
    tables = (world.SHAPE_WORDS, world.COLOR_WORDS, world.COUNT_WORDS, world.RELATION_WORDS, world.SENTENCES)
    phrases = [phrase for table in tables for options in table.values() for phrase in options]
    phrases += [name for row in world.PLACES for name in row] + [
        "a an , text large white center photo of picture"
    ]
    phrases += ["make add remove move replace the to with it is at in on no and"]
    words = {
        w for phrase in phrases for w in phrase.replace("{", " {").replace('"', " ").split() if "{" not in w
    }
    shapes = [word for options in world.SHAPE_WORDS.values() for word in options]
    words |= {word + ("es" if word.endswith(("s", "x")) else "s") for word in shapes}
    return ["<pad>", "<start>", "<end>", "<unknown>", '"', *CHARACTERS, *sorted(words)]


def build_tokenizer():
    ids = {word: i for i, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex("[A-Z0-9]|[^a-z]"), behavior="isolated"),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", ids["<start>"]), ("<end>", ids["<end>"])]
    )
    special = dict(pad_token="<pad>", bos_token="<start>", eos_token="<end>", unk_token="<unknown>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=MAX_TOKENS, **special)


# ---- models ----
def build_vae():
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(8, 16, 32, 64),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=world.SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def build_text_encoder(tokenizer):
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=3,  # SD3 reads the last but one
            num_attention_heads=2,
            max_position_embeddings=MAX_TOKENS,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def build_transformer(num_layers=4, width=WIDTH):
    transformer = SD3Transformer2DModel(
        sample_size=world.SIZE // 8,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=num_layers,
        attention_head_dim=32,
        num_attention_heads=width // 32,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=width,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=world.SIZE // 16,
        qk_norm="rms_norm",
    )
    # start every block as the identity and the output at zero (adaLN-Zero, Peebles & Xie 2023)
    for name, module in transformer.named_modules():
        if name.endswith(("norm1.linear", "norm1_context.linear", "norm_out.linear")) or name == "proj_out":
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return transformer


def build_sd3(folder, width=WIDTH):
    """The untrained pipeline, with the autoencoder of the earlier stage from a folder."""
    tokenizer = build_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=build_transformer(width=width),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKL.from_pretrained(folder, subfolder="vae"),
        text_encoder=build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=build_text_encoder(tokenizer),
        tokenizer_2=tokenizer,
        **NO_T5,
    )


def images_to_tensor(images):
    """List of (H, W, 3) uint8 arrays -> (B, 3, H, W) float in [-1, 1]."""
    batch = torch.stack([torch.from_numpy(image) for image in images])
    return rearrange(batch, "b h w c -> b c h w").float() / 127.5 - 1


# ---- the language model: Qwen2.5-VL's classes and chat format, at a thousandth of its size ----
CHAT_TOKENS = (
    "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>"
)
CHAT_TEMPLATE = """\
{%- if messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' if part['type'] == 'image' else part['text'] -}}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def build_chat_tokenizer(seed=0):
    """Byte-level BPE, so that it reads any text: the world's words are a token each, as are capitals, digits
    and the two answer tags, which are text and not special tokens: decoding keeps them.
    """
    special, tags = CHAT_TOKENS.split(), ("<answer>", "</answer>")
    tokenizer = Tokenizer(models.BPE())
    single = pre_tokenizers.Split(Regex("[A-Z0-9](?![a-z])"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [single, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=special, initial_alphabet=alphabet)
    corpus = list(vlm_world.sentences(random.Random(seed), 500))
    corpus += ["system\nYou are a helpful assistant.", "user\n", "assistant\n"] * 100
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[
            token for token in special if token not in ("<|im_end|>", "<|endoftext|>")
        ],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=512,
    )


def build_vlm(tokenizer):
    """Text: 4 layers of width 128. Vision: 3 layers on 8 x 8 patches, four to a token: 16 tokens an image."""
    ids = dict(zip(CHAT_TOKENS.split(), tokenizer.convert_tokens_to_ids(CHAT_TOKENS.split())))
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        initializer_range=128**-0.5,  # the default, 0.02, is for wide models: these would learn far slower
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        # frequencies from 1 to 0.013: the slowest tell an image's columns, 0 to 3, and must not stand still
        rope_parameters=dict(rope_type="default", rope_theta=100.0, mrope_section=[4, 6, 6]),
        bos_token_id=None,
        eos_token_id=ids["<|im_end|>"],
        pad_token_id=ids["<|endoftext|>"],
        tie_word_embeddings=True,
    )
    vision = dict(
        depth=3,
        hidden_size=96,
        intermediate_size=256,
        initializer_range=96**-0.5,
        num_heads=3,
        patch_size=8,
        window_size=world.SIZE,
        out_hidden_size=128,
        fullatt_block_indexes=[0, 1, 2],
    )
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def build_image_processor():
    size = {
        "shortest_edge": world.SIZE**2,
        "longest_edge": world.SIZE**2,
    }  # in pixels: any image gets 64 x 64
    return Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, temporal_patch_size=2, size=size)


def chat_inputs(tokenizer, processor, examples, side):
    """Model inputs and labels of (image or None, question, answer) examples, one user turn each, padded on
    one side. Only the answer and the end of its turn are learnt; "" makes inputs to generate from.
    """
    rows, images = [], [image for image, _, _ in examples if image is not None]
    pictures = dict(processor(images=images, return_tensors="pt")) if images else {}
    for image, question, answer in examples:
        content = [{"type": "image"}] * (image is not None) + [{"type": "text", "text": question}]
        turn = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        # an image's patches, four to a token; all images here are of one size
        count = int(pictures["image_grid_thw"][0].prod()) // processor.merge_size**2 if images else 0
        turn = tokenizer(turn.replace("<|image_pad|>", count * "<|image_pad|>")).input_ids
        reply = tokenizer(answer + "<|im_end|>").input_ids if answer else []
        rows.append((turn, reply))
    length = max(len(turn) + len(reply) for turn, reply in rows)

    def padded(parts, value):
        filled = [[value] * (length - len(part)) for part in parts]
        return torch.tensor([f + p if side == "left" else p + f for f, p in zip(filled, parts)])

    ids = padded([turn + reply for turn, reply in rows], tokenizer.pad_token_id)
    return pictures | {
        "input_ids": ids,
        "attention_mask": padded([[1] * len(turn + reply) for turn, reply in rows], 0),
        "mm_token_type_ids": (ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")).int(),
        "labels": padded([[-100] * len(turn) + reply for turn, reply in rows], -100),
    }


# ---- training loops ----
def learning_rate(step, num_steps, peak, warmup=100, decay_share=0.25):
    """Warm-up, constant, then linear to zero over the last quarter, which sharpens the most."""
    return peak * min((step + 1) / warmup, (num_steps - step) / (decay_share * num_steps), 1)


def fit(name, modules, loss_at, args, num_steps, peak, ema_decay=0.0):
    """Minimises loss_at(step) over the modules' weights; resumes from its own checkpoint; ends with averaged
    weights.

    loss_at draws its data from the step number alone, so an interrupted run continues as if it had not been.
    """
    path = Path(args.work) / f"{name}.pt"
    parameters = [p for module in modules for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    average, start = [p.detach().clone() for p in parameters], 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        start, average = state["step"], state["average"]
        optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for p, saved in zip(parameters, state["parameters"]):
                p.copy_(saved)
        print(f"{name}: goes on from step {start}")

    smooth, bar = (
        None,
        tqdm(range(start, num_steps), initial=start, total=num_steps, desc=name, mininterval=10),
    )
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, num_steps, peak)
        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
        smooth = loss.item() if smooth is None else 0.99 * smooth + 0.01 * loss.item()
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        if (step + 1) % args.save_every == 0 or step + 1 == num_steps:
            now = [p.detach() for p in parameters]
            state = dict(step=step + 1, parameters=now, average=average, optimizer=optimizer.state_dict())
            temporary = path.with_suffix(".tmp")
            torch.save(state, temporary)
            temporary.replace(path)
    with torch.no_grad():
        for p, mean in zip(parameters, average):
            p.copy_(mean)


def pretrain_vae(args):
    torch.manual_seed(args.seed)
    vae = build_vae()
    background = torch.tensor(BACKGROUND).view(1, 3, 1, 1) / 127.5 - 1

    def loss_at(step):
        rng = random.Random(f"{args.seed}-vae-{step}")
        images = images_to_tensor([world.sample(rng)[2] for _ in range(16)])  # (B, 3, 64, 64)
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample(torch.Generator().manual_seed(step))).sample
        # objects cover a twentieth of the pixels: weigh them up, or their colours are the last thing learnt
        weight = 1 + 5 * (images - background).abs().amax(dim=1, keepdim=True)
        error = decoded - images
        # the L1 term keeps edges sharp; a faint KL keeps the latents bounded
        reconstruction = (weight * (error**2 + 0.5 * error.abs())).mean()
        return reconstruction + 1e-5 * posterior.kl().mean() / images[0].numel()

    fit("vae", [vae], loss_at, args, args.steps or 3000, peak=2.5e-3, ema_decay=0.99)

    # latents are brought to mean 0 and variance 1, as diffusers does it: (z - shift_factor) * scaling_factor
    vae.eval()
    rng = random.Random(args.seed)
    with torch.no_grad():
        images = images_to_tensor([world.sample(rng)[2] for _ in range(512)])
        z = vae.encode(images).latent_dist.mean
        error = (vae.decode(z).sample - images).abs().mean()
    vae.register_to_config(scaling_factor=float(1 / z.std()), shift_factor=float(z.mean()))
    vae.to(torch.bfloat16).save_pretrained(Path(args.folder) / "vae")
    print(f"vae: mean absolute error {error:.4f} of a range of 2, latents {z.mean():.3f} +- {z.std():.3f}")


def encode_dataset(vae, seed, size, text_share):
    """size examples as (contents, things, latents (size, 8, 8, 8)): drawn once, reworded at every use."""
    rng, contents, things, latents = random.Random(f"{seed}-data"), [], [], []
    for _ in tqdm(range(size // 64), desc="encode", mininterval=10):
        batch = [world.sample(rng, text_share) for _ in range(64)]
        with torch.no_grad():
            z = vae.encode(images_to_tensor([image for _, _, image in batch])).latent_dist.mean
        latents.append((z - vae.config.shift_factor) * vae.config.scaling_factor)
        contents += [content for content, _, _ in batch]
        things += [thing for _, thing, _ in batch]
    return contents, things, torch.cat(latents)


def encode_prompts(pipe, prompts):
    """StableDiffusion3Pipeline.encode_prompt without T5, with gradients: embeds (B, L, D), pooled (B, D)."""
    ids = pipe.tokenizer(
        prompts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
    ).input_ids
    outputs = [
        encoder(ids, output_hidden_states=True) for encoder in (pipe.text_encoder, pipe.text_encoder_2)
    ]
    embeds = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    return embeds, torch.cat([output.text_embeds for output in outputs], dim=-1)


def pretrain_sd3(args):
    second = args.stage == "sd3b"
    seed = args.seed + second
    torch.manual_seed(seed)
    pipe = build_sd3(HERE / "sd3", SECOND_WIDTH) if second else build_sd3(args.folder)
    pipe.vae.float()
    dataset = cache(partial(encode_dataset, pipe.vae, seed, args.dataset_size))  # by text share
    modules = [pipe.transformer, pipe.text_encoder, pipe.text_encoder_2]

    def loss_at(step, text_share):
        rng, generator = random.Random(f"{seed}-sd3-{step}"), torch.Generator().manual_seed(step)
        contents, things, latents = dataset(text_share)
        rows = [rng.randrange(len(contents)) for _ in range(args.batch_size)]
        # one prompt in ten is empty, so that classifier-free guidance has its unconditional model
        prompts = ["" if rng.random() < 0.1 else world.wording(contents[i], things[i], rng) for i in rows]
        x_0 = latents[rows]  # (B, C, h, w)
        noise = torch.randn(x_0.shape, generator=generator)
        # logit-normal times (Esser et al. 2024), leaning to noise: that is where objects get their place
        t = torch.sigmoid(torch.randn(len(rows), generator=generator) + 0.5)
        x_t = torch.lerp(x_0, noise, t.view(-1, 1, 1, 1))
        embeds, pooled = encode_prompts(pipe, prompts)
        velocity = pipe.transformer(
            hidden_states=x_t, timestep=1000 * t, encoder_hidden_states=embeds, pooled_projections=pooled
        ).sample
        return F.mse_loss(velocity, noise - x_0)

    def learn(step):
        return loss_at(step, 0.3 if step >= WRITING_FROM else 0.06)

    def forget(step):
        return loss_at(step, 0.0)

    num_steps = args.steps or (SECOND_STEPS if second else 14000)
    fit(args.stage, modules, learn, args, num_steps, peak=1.5e-3, ema_decay=0.999)
    if not second:
        # without writing some of it is forgotten, not lost: what reinforcement learning can bring back
        fit("sd3_forget", modules, forget, args, args.steps or FORGET_STEPS, peak=5e-4, ema_decay=0.99)
    pipe.vae.register_to_config(_name_or_path="")  # else the folder of this machine is saved with it
    pipe.to(torch.bfloat16).save_pretrained(args.folder)


def pretrain_vlm(args):
    torch.manual_seed(args.seed)
    tokenizer, processor = build_chat_tokenizer(args.seed), build_image_processor()
    vlm = build_vlm(tokenizer)
    print(f"vlm: {vlm.num_parameters() / 1e6:.2f} M parameters, {len(tokenizer)} tokens")

    num_steps = args.steps or VLM_STEPS

    def loss_at(step):
        rng, loss = random.Random(f"{args.seed}-vlm-{step}"), 0.0
        easy = 0.4 if step < num_steps / 4 else 0.0
        for sampler, rows in vlm_world.TASKS.values():  # a pass per task: its rows are of similar length
            inputs = chat_inputs(tokenizer, processor, [sampler(rng, easy)[:3] for _ in range(rows)], "right")
            loss = loss + rows / vlm_world.BATCH * vlm(**inputs).loss
        return loss

    fit("vlm", [vlm], loss_at, args, num_steps, peak=2e-3, ema_decay=0.99)
    for part in (tokenizer, processor, vlm.half()):
        part.save_pretrained(args.folder)


# ---- evaluation of what was made ----
@torch.no_grad()
def evaluate(args):
    """Scores per tag on the evaluation prompts: ODE sampler, 10 steps, guidance 1 and 2, plain diffusers."""
    pipe = StableDiffusion3Pipeline.from_pretrained(args.folder, dtype=torch.float32, **NO_T5)
    pipe.set_progress_bar_config(disable=True)
    for guidance in (1.0, 2.0):
        for name, spec in (("eval", "geneval"), ("eval_paraphrased", "geneval"), ("text_eval", "ocr")):
            prompts, metadata = rewards.prompts.load_prompts(world.PROMPTS / f"{name}.jsonl")
            reward, start, scores = rewards.build(spec, prompts, metadata, "cpu"), time.time(), {}
            for i in range(0, len(prompts), 64):
                batch = slice(i, i + 64)
                images = pipe(
                    prompts[batch],
                    num_inference_steps=10,
                    guidance_scale=guidance,
                    max_sequence_length=0,  # no T5: without this diffusers appends 256 zero tokens
                    generator=torch.Generator().manual_seed(i),
                    output_type="pt",
                ).images
                for key, values in reward.details(images, prompts[batch], metadata[batch]).items():
                    scores.setdefault(key, []).append(values)
            scores = {key: torch.cat(values) for key, values in scores.items() if key != "reward"}
            print(f"guidance {guidance}, {name}: {time.time() - start:.0f} s,", end=" ")
            print(", ".join(f"{key} {values.mean():.3f}" for key, values in scores.items()))
            if "geneval_strict" in scores:
                for tag in world.TAGS:
                    rows = torch.tensor([row["tag"] == tag for row in metadata])
                    means = (
                        f"{key[8:]} {scores[key][rows].mean():.3f}" for key in scores if key != "geneval"
                    )
                    print(f"    {tag:14s}", "  ".join(means))


@torch.no_grad()
def reply(vlm, tokenizer, processor, examples, **how):
    """What the model answers to (image, question, ...) examples: a list of strings; how is generate's."""
    answers = []
    for i in range(0, len(examples), 128):
        batch = [(image, question, "") for image, question, *_ in examples[i : i + 128]]
        inputs = chat_inputs(tokenizer, processor, batch, "left")
        inputs.pop("labels")
        ids = vlm.generate(**inputs, max_new_tokens=40, **how)[:, inputs["input_ids"].shape[1] :]
        answers += tokenizer.batch_decode(ids, skip_special_tokens=True)
    return answers


def answer_of(reply):
    """What stands between the answer tags; "" without them."""
    return reply.removeprefix("<answer>").removesuffix("</answer>") if reply.endswith("</answer>") else ""


def evaluate_vlm(args):
    """Rewrites at temperature 1, parsed back; captions of new renders; the other tasks' answers."""
    torch.manual_seed(args.seed)
    tokenizer, processor = (kind.from_pretrained(args.folder) for kind in (AutoTokenizer, AutoImageProcessor))
    vlm = Qwen2_5_VLForConditionalGeneration.from_pretrained(args.folder, dtype=torch.float32)
    answer = partial(reply, vlm, tokenizer, processor)
    free = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)

    for name in ("eval", "eval_paraphrased", "text_eval"):
        prompts, metadata = rewards.prompts.load_prompts(world.PROMPTS / f"{name}.jsonl")
        rows = list(dict(zip(prompts, range(len(prompts)))).values())[:: 1 if name != "text_eval" else 4]
        questions = [(None, vlm_world.REWRITE.format(prompt=prompts[row])) for row in rows]
        greedy = [answer_of(text) for text in answer(questions, do_sample=False)]
        sampled = [answer_of(text) for text in answer([q for q in questions for _ in range(8)], **free)]
        kept = [vlm_world.keeps_meaning(text, metadata[rows[i // 8]]) for i, text in enumerate(sampled)]
        kept_greedy = [vlm_world.keeps_meaning(text, metadata[row]) for text, row in zip(greedy, rows)]
        distinct = [len(set(sampled[i : i + 8])) for i in range(0, len(sampled), 8)]
        kinds = [
            sum(", " in text for text in sampled),
            sum(text == prompts[rows[i // 8]] for i, text in enumerate(sampled)),
        ]
        print(
            f"rewrite, {name}: {len(rows)} prompts, meaning kept {sum(kept) / len(kept):.3f}, greedy", end=" "
        )
        print(f"{sum(kept_greedy) / len(rows):.3f}, {sum(distinct) / len(rows):.2f} distinct of 8", end=", ")
        print("listed {:.2f}, unchanged {:.2f}".format(*(count / len(sampled) for count in kinds)))
        for tag in sorted({metadata[row]["tag"] for row in rows}):
            tagged = [k for i, k in enumerate(kept) if metadata[rows[i // 8]]["tag"] == tag]
            print(f"    {tag:14s} meaning kept {sum(tagged) / len(tagged):.3f}")
        for i in range(0, len(rows), len(rows) // 6):
            print(f"    {prompts[rows[i]]} -> {greedy[i]} | " + " | ".join(sampled[8 * i : 8 * i + 4]))

    rng = random.Random(f"{args.seed}-evaluation")  # training draws from other strings
    examples = [vlm_world.sample_caption(rng) for _ in range(512)]
    found = list(zip(examples, answer(examples, do_sample=False)))
    for name, pairs in (
        ("scenes", [(e[2].split(", "), text.split(", ")) for e, text in found if e[3]["tag"] != "text"]),
        (
            "texts",
            [
                ([e[3]["text"]], [text.split('"')[1] if text.count('"') == 2 else ""])
                for e, text in found
                if e[3]["tag"] == "text"
            ],
        ),
    ):
        exact = sum(a == b for a, b in pairs) / len(pairs)
        objects = [(x, y) for a, b in pairs for x, y in zip(a, b + [""] * len(a))]
        same = [
            sum(x.split(" ")[:k] == y.split(" ")[:k] for x, y in objects) / len(objects) for k in (1, 2, 4)
        ]
        counted = sum(len(a) == len(b) for a, b in pairs) / len(pairs)
        print(f"caption, {name}: {len(pairs)}, exact {exact:.3f}, number of objects {counted:.3f},", end=" ")
        print("colour {:.3f}, and class {:.3f}, and place {:.3f}".format(*same))

    for low, high in ((0.0, 0.3), (0.3, 0.6), (0.6, 1.0)):
        examples = []
        while len(examples) < 256:
            example = vlm_world.sample_refine(rng)
            done = int(example[1].split("%")[0].split()[-1]) if example[0] is not None else -1
            if low <= done / 100 <= high and example[3]["tag"] != "text":
                examples.append(example)
        texts = [answer_of(text) for text in answer(examples, **free)]
        kept = sum(vlm_world.keeps_meaning(text, e[3]) for e, text in zip(examples, texts)) / len(texts)
        same = [
            len(set(e[2][8:-9].split(", ")) & set(text.split(", "))) / len(text.split(", "))
            for e, text in zip(examples, texts)
            if ", " in e[2] and ", " in text
        ]
        print(f"refine, {low:.1f} to {high:.1f} done: meaning kept {kept:.3f},", end=" ")
        print(f"of the objects listed {sum(same) / len(same):.3f} are as and where they should be")
    examples = [vlm_world.sample_edit(rng) for _ in range(256)]
    texts = [answer_of(text) for text in answer(examples, **free)]
    print(f"edit: one of the three right answers {sum(t in e[3] for t, e in zip(texts, examples)) / 256:.3f}")
    for example, text in list(zip(examples, texts))[:5]:
        print(f"    {example[3][0]} -> {text} (right: {example[3][1]} | {example[3][2]})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=("vae", "sd3", "sd3b", "eval", "vlm", "eval_vlm"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=0, help="optimiser steps; 0: the stage's own number")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--dataset-size", type=int, default=49152)
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", default="runs/pretrain", help="where checkpoints go")
    parser.add_argument("--folder", help="what is made or scored; default: the stage's own")
    arguments = parser.parse_args()
    own = {"vlm": "vlm", "eval_vlm": "vlm", "sd3b": "sd3b"}
    arguments.folder = arguments.folder or str(HERE / own.get(arguments.stage, "sd3"))
    torch.set_num_threads(arguments.threads)
    Path(arguments.work).mkdir(parents=True, exist_ok=True)
    stages = {"vae": pretrain_vae, "sd3": pretrain_sd3, "sd3b": pretrain_sd3, "eval": evaluate}
    stages |= {"vlm": pretrain_vlm, "eval_vlm": evaluate_vlm}
    stages[arguments.stage](arguments)
