"""How fast does an algorithm file run on a GPU, and how much memory does it need?

    python -m benchmark.gpu run flow_grpo.py --size sd3.5-medium -- --lora-rank 32 --micro-batch-size 8
    python -m benchmark.gpu parts --size flux.1-dev --micro-batch-sizes 4 8 16 32
    python -m benchmark.gpu table      # writes the tables of docs/gpu.md from benchmark/results/gpu/

Both make a pipeline of the real size with random weights, so nothing is downloaded; random weights cost the
same time and memory as trained ones. `run` trains with the file as it is, in a process of its own, and reads
its metrics.jsonl: images per second, the share of the GPU's peak that is used (MFU) while sampling and while
training, and peak memory. `parts` times a forward pass, and a forward and backward pass, of the transformer
alone: plain, with gradient checkpointing, and with its blocks compiled. On a CPU, use `--size tiny` or
`--size tiny-flux`. With `--output`, both append their records to a .jsonl.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
)

from benchmark.markdown import table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmark" / "results" / "gpu"
LORA_LAYERS = "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split()

# The configurations of the published models: those of their config.json files.
SD35_MEDIUM = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
SD35_LARGE = SD35_MEDIUM | {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "dual_attention_layers": (),
}
TINY = SD35_MEDIUM | {
    "sample_size": 8,
    "num_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 64,
    "caption_projection_dim": 64,
    "pooled_projection_dim": 64,
    "pos_embed_max_size": 16,
    "dual_attention_layers": (0,),
}
FLUX_DEV = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}
TINY_FLUX = FLUX_DEV | {
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 64,
    "axes_dims_rope": (8, 12, 12),
}
TRANSFORMERS = {
    "sd3.5-medium": SD35_MEDIUM,
    "sd3.5-large": SD35_LARGE,
    "flux.1-dev": FLUX_DEV,
    "tiny": TINY,
    "tiny-flux": TINY_FLUX,
}
T5_TOKENS = {"sd3": 128, "flux": 512}  # length of a prompt
QWEN_3B = {
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}


def is_flux(size):
    """Whether a model of TRANSFORMERS is of the FLUX.1 family, and not of SD3's."""
    return "guidance_embeds" in TRANSFORMERS[size]


def is_tiny(size):
    return size.startswith("tiny")


def num_text_tokens(size):
    """Text tokens that the transformer sees: those of T5, and with SD3 the 77 of CLIP before them."""
    return T5_TOKENS["flux"] if is_flux(size) else 77 + T5_TOKENS["sd3"]


def make_vae(size):
    """The autoencoder: 16 channels and factor 8 in both families."""
    widths = [8, 16, 16, 16] if is_tiny(size) else [128, 256, 512, 512]
    return AutoencoderKL(
        latent_channels=16,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=widths,
        layers_per_block=2,
        norm_num_groups=8 if is_tiny(size) else 32,
        sample_size=64 if is_tiny(size) else 1024,
        scaling_factor=0.3611 if is_flux(size) else 1.5305,
        shift_factor=0.1159 if is_flux(size) else 0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def clip_config(width, tokenizer):
    """A CLIP text encoder of the right width. Two layers are enough: it runs once per prompt."""
    return CLIPTextConfig(
        hidden_size=width,
        projection_dim=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=len(tokenizer),
        max_position_embeddings=77,
        eos_token_id=tokenizer.eos_token_id,
    )


def make_t5(width, tokenizer):
    """A T5 encoder of the right width, with one small layer."""
    return T5EncoderModel(
        T5Config(d_model=width, d_ff=64, d_kv=16, num_heads=4, num_layers=1, vocab_size=len(tokenizer))
    )


def make_transformer(size):
    """The transformer with random weights, in bfloat16 on the current default device."""
    family = FluxTransformer2DModel if is_flux(size) else SD3Transformer2DModel
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # else FLUX.1 takes 48 GB while it is made
    try:
        transformer = family(**TRANSFORMERS[size])
    finally:
        torch.set_default_dtype(default_dtype)
    for parameter in transformer.parameters():
        if parameter.ndim > 1:  # the published models' gates are not zero, unlike those of a new model
            parameter.data.normal_(0, 0.02)
    return transformer


def make_pipeline(size, folder, device):
    """Writes a StableDiffusion3Pipeline or a FluxPipeline of that size with random weights, in bfloat16."""
    torch.manual_seed(0)
    with torch.device(device):
        pipe = make_flux(size) if is_flux(size) else make_sd3(size)
    pipe.to(torch.bfloat16).save_pretrained(folder)


def make_sd3(size):
    config = TRANSFORMERS[size]
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny/sd3/tokenizer", model_max_length=77)
    first_clip = 32 if is_tiny(size) else 768
    second_clip = config["pooled_projection_dim"] - first_clip
    return StableDiffusion3Pipeline(
        transformer=make_transformer(size),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=make_vae(size),
        text_encoder=CLIPTextModelWithProjection(clip_config(first_clip, tokenizer)),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(clip_config(second_clip, tokenizer)),
        tokenizer_2=tokenizer,
        text_encoder_3=make_t5(config["joint_attention_dim"], tokenizer),
        tokenizer_3=tokenizer,
    )


def make_flux(size):
    config = TRANSFORMERS[size]
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny/sd3/tokenizer", model_max_length=77)
    return FluxPipeline(
        transformer=make_transformer(size),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=make_vae(size),
        text_encoder=CLIPTextModel(clip_config(config["pooled_projection_dim"], tokenizer)),
        tokenizer=tokenizer,
        text_encoder_2=make_t5(config["joint_attention_dim"], tokenizer),
        tokenizer_2=tokenizer,
    )


def make_language_model(folder, device):
    """Writes a Qwen2.5-VL whose language model has 3B's size; vision tower and tokenizer are tiny/vlm's."""
    shutil.copytree(ROOT / "tiny/vlm", folder, dirs_exist_ok=True)
    config = Qwen2_5_VLConfig.from_pretrained(folder)
    for name, value in QWEN_3B.items():
        setattr(config.text_config, name, value)
    config.text_config.layer_types = ["full_attention"] * QWEN_3B["num_hidden_layers"]
    config.text_config.rope_parameters["mrope_section"] = [16, 24, 24]
    config.vision_config.out_hidden_size = QWEN_3B["hidden_size"]
    (Path(folder) / "model.safetensors").unlink()
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration(config).to(torch.bfloat16)
    model.save_pretrained(folder)


def add_lora(transformer):
    """Freezes the transformer, and adds a trained LoRA of rank 32 to its attention layers."""
    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(target_modules=["attn." + name for name in LORA_LAYERS], r=32))


def count_flops(size, resolution, tokens):
    """FLOPs of a transformer with a LoRA on one image, forward and backward, counted on meta tensors."""
    with torch.device("meta"):
        transformer = make_transformer(size).float()
        add_lora(transformer)
        inputs = make_inputs(size, 1, resolution, tokens, torch.float32)
    with FlopCounterMode(display=False) as counter:
        output = transformer(**inputs).sample
        forward = counter.get_total_flops()
        output.square().mean().backward()
    return forward, counter.get_total_flops() - forward


def make_inputs(size, batch_size, resolution, tokens, dtype):
    """Random inputs of a transformer, on the current default device."""
    config = TRANSFORMERS[size]
    side = resolution // 8
    inputs = {
        "encoder_hidden_states": torch.randn(batch_size, tokens, config["joint_attention_dim"], dtype=dtype),
        "pooled_projections": torch.randn(batch_size, config["pooled_projection_dim"], dtype=dtype),
    }
    if not is_flux(size):
        latents = torch.randn(batch_size, config["in_channels"], side, side, dtype=dtype)
        return inputs | {"hidden_states": latents, "timestep": torch.full((batch_size,), 500.0)}
    num_patches = (side // 2) ** 2
    return inputs | {
        "hidden_states": torch.randn(batch_size, num_patches, config["in_channels"], dtype=dtype),
        "timestep": torch.full((batch_size,), 0.5),
        "guidance": torch.full((batch_size,), 3.5),
        "img_ids": torch.zeros(num_patches, 3),
        "txt_ids": torch.zeros(tokens, 3),
    }


def describe_machine(commit):
    """The card or processor, torch's version, and the commit: the checkout's own, unless it is given."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    if not commit:
        words = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {"card": card, "torch": torch.__version__, "commit": commit, "date": time.strftime("%Y-%m-%d")}


def show(record):
    """Prints a record on one line."""
    words = []
    for name, value in record.items():
        words.append(f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}")
    print("  ".join(words), flush=True)


# --- run: a whole algorithm file ---
REWARD = "jpeg_incompressibility:0.001"  # needs no weights, and lies in [0, 1] for superflow.py


def run_file(args, folder, flags):
    """Trains with an algorithm file for a few iterations, and returns a record of the last one."""
    family = "flux" if is_flux(args.size) else "sd3"
    resolution = 64 if is_tiny(args.size) else args.resolution
    lines = (ROOT / "tiny/prompts/fold_0/train.jsonl").read_text().splitlines()
    for name, count in (("train", 16), ("eval", 4)):
        prompts = [json.loads(line)["prompt"] for line in lines[:count]]
        (folder / f"{name}.txt").write_text("\n".join(prompts))
    words = [
        *("--model", folder / "pipeline"),
        *("--prompts", folder / "train.txt"),
        *("--rewards", REWARD),
        *("--output-dir", folder / "runs"),
        *("--resolution", resolution),
        *("--max-sequence-length", T5_TOKENS[family]),
        *("--num-iterations", args.num_iterations),
        *("--eval-every", 1000),
        *("--save-every", 1000),
        *flags,
    ]
    began = time.time()
    subprocess.run([sys.executable, ROOT / args.script, *map(str, words)], check=True)
    (run_dir,) = (folder / "runs").iterdir()
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    saved = json.loads((run_dir / "args.json").read_text())
    record = describe_machine(args.commit) | {
        "script": args.script,
        "size": args.size,
        "flags": " ".join(flags),
    }
    last = rows[-1]
    for name, value in last.items():
        if name.startswith("perf/") or name.endswith("ratio_first"):
            record[name.split("/")[1]] = value
    record["seconds_in_all"] = time.time() - began
    num_images = last["charts/num_images"] - rows[-2]["charts/num_images"]
    return record | utilisation(args, saved, num_images, last)


def utilisation(args, saved, num_images, last):
    """MFU while sampling and while training: FLOPs that the algorithm needs, over what the card could do.

    Only the image model's passes are counted. Decoding, the reward, a language model and activations that
    are recomputed are overhead.
    """
    if "learning_rate" not in saved:
        return {}  # promptloop.py: the image model is not trained
    resolution = 64 if is_tiny(args.size) else args.resolution
    forward, backward = count_flops(args.size, resolution, num_text_tokens(args.size))
    has_two_passes = saved["guidance_scale"] > 1 and not is_flux(args.size)  # FLUX.1 has it as an input
    passes = 2 if has_two_passes else 1
    steps = saved["num_inference_steps"]
    is_fdfo = "churn" in saved  # trains every step
    trained_steps = steps if is_fdfo else saved["sde_window"] or steps - 1
    per_trained_step = forward + backward
    if saved["kl_coef"] > 0:
        per_trained_step += forward  # the base model's
    peak = args.peak_tflops * 1e12
    sampling = num_images * steps * passes * forward
    training = num_images * trained_steps * passes * per_trained_step
    return {
        "mfu_sample": sampling / last["perf/seconds_sample"] / peak,
        "mfu_train": training / last["perf/seconds_train"] / peak,
    }


# --- parts: the transformer alone ---


def median_seconds(function, repeats=5):
    """Median duration of a call, after two calls to warm up."""
    seconds = []
    for _ in range(2 + repeats):
        synchronise()
        began = time.perf_counter()
        function()
        synchronise()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[2:])


def synchronise():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_parts(args, device):
    """Yields a record for each way to run the transformer and each micro-batch size."""
    resolution = 64 if is_tiny(args.size) else args.resolution
    tokens = num_text_tokens(args.size)
    forward_flops, backward_flops = count_flops(args.size, resolution, tokens)
    peak = args.peak_tflops * 1e12
    for way in args.ways:
        torch.manual_seed(0)
        with torch.device(device):
            transformer = make_transformer(args.size)
            add_lora(transformer)
        for parameter in transformer.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        if way == "checkpointing":
            transformer.train().enable_gradient_checkpointing()
        if way == "compiled":
            for module in transformer.modules():
                if type(module).__name__ in transformer._no_split_modules:
                    module.compile()
        for batch_size in args.micro_batch_sizes:
            record = {"way": way, "size": args.size, "micro_batch_size": batch_size}
            try:
                with torch.device(device):
                    inputs = make_inputs(args.size, batch_size, resolution, tokens, torch.bfloat16)
                record |= time_passes(transformer, inputs, device)
            except torch.OutOfMemoryError:
                record["failed"] = "out of memory"
            else:
                record["mfu_forward"] = batch_size * forward_flops / record["forward_s"] / peak
                flops = batch_size * (forward_flops + backward_flops)
                record["mfu_both"] = flops / record["forward_and_backward_s"] / peak
            yield describe_machine(args.commit) | record
        del transformer
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def time_passes(transformer, inputs, device):
    """Seconds of a forward pass, and of a forward and backward pass, under autocast as in training."""

    def forward():
        with torch.autocast(device.type, torch.bfloat16):
            return transformer(**inputs).sample.float()

    def forward_without_graph():
        with torch.no_grad():
            forward()

    def forward_and_backward():
        forward().square().mean().backward()

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    record = {"forward_s": median_seconds(forward_without_graph)}
    record["forward_and_backward_s"] = median_seconds(forward_and_backward)
    if device.type == "cuda":
        record["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return record


# --- table: docs/gpu.md ---


def read_results(name):
    """The records of a .jsonl in benchmark/results/gpu/."""
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


def number(record, name, form):
    """A number of a record as a cell of a table."""
    return format(record[name], form) if name in record else "-"


def table_of_files():
    """A row for each run of an algorithm file."""
    head = ["file", "model", "flags", "card", "images/s", "MFU sampling", "MFU training", "peak GB"]
    head.append("first ratio - 1")
    rows = []
    for record in read_results("files.jsonl"):
        ratios = [number(record, name, ".0e") for name in ("ratio_first", "lm_ratio_first") if name in record]
        rows.append(
            [
                f"`{record['script']}`",
                record["size"],
                f"`{record['flags']}`" if record["flags"] else "",
                short_name(record["card"]),
                number(record, "images_per_second", ".1f"),
                number(record, "mfu_sample", ".0%"),
                number(record, "mfu_train", ".0%"),
                number(record, "peak_memory_gb", ".1f"),
                ", ".join("0" if ratio == "0e+00" else ratio for ratio in ratios),
            ]
        )
    return table(head, rows)


def short_name(card):
    """A card's name as it fits a table: "NVIDIA H100 80GB HBM3" is "H100"."""
    return card.removeprefix("NVIDIA ").split(" ")[0]


def table_of_transformer():
    """A row for each way to run a transformer. Times per image are relative to the model's first row."""
    head = ["model", "card", "way", "batch", "forward", "forward and backward", "per image, relative"]
    head += ["MFU of both", "peak GB"]
    first_times = {}
    rows = []
    for record in read_results("transformer.jsonl"):
        cells = [record["size"], short_name(record["card"]), record["way"], str(record["micro_batch_size"])]
        if "failed" in record:
            rows.append(cells + [record["failed"], "-", "-", "-", "-"])
            continue
        per_image = record["forward_and_backward_s"] / record["micro_batch_size"]
        first = first_times.setdefault(record["size"], per_image)
        rows.append(
            cells
            + [
                f"{1000 * record['forward_s']:.0f} ms",
                f"{1000 * record['forward_and_backward_s']:.0f} ms",
                f"{per_image / first:.2f}",
                number(record, "mfu_both", ".0%"),
                number(record, "peak_memory_gb", ".1f"),
            ]
        )
    return table(head, rows)


def machines():
    """What the records were made on, in a line."""
    found = []
    for record in read_results("files.jsonl") + read_results("transformer.jsonl"):
        line = f"{record['card']}, torch {record['torch']}, {record['date']}, commit {record['commit']}"
        if line not in found:
            found.append(line)
    return "; ".join(found)


def write_tables(page):
    """The text of docs/gpu.md with its tables, between their markers, made anew."""
    parts = {
        "files": "\n".join(table_of_files()),
        "transformer": "\n".join(table_of_transformer()),
        "machines": machines(),
    }
    for name, text in parts.items():
        begin, end = f"<!-- {name} -->", "<!-- end -->"
        before, rest = page.split(begin)
        _, after = rest.split(end, 1)
        page = f"{before}{begin}\n{text}\n{end}{after}"
    return page


def parse_args(words):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["run", "parts", "table"])
    parser.add_argument("script", nargs="?", default="flow_grpo.py", help="algorithm file, for `run`")
    parser.add_argument(
        "--size", choices=list(TRANSFORMERS), default="sd3.5-medium", help="of the image model"
    )
    parser.add_argument("--resolution", type=int, default=512, help="side of the images in pixels")
    parser.add_argument("--num-iterations", type=int, default=3, help="for `run`; the last one is measured")
    parser.add_argument("--language-model", action="store_true", help="a Qwen2.5-VL-3B as --lm, not tiny/vlm")
    parser.add_argument(
        "--micro-batch-sizes", type=int, nargs="+", default=[4, 8, 16, 32], help="for `parts`"
    )
    parser.add_argument(
        "--ways",
        nargs="+",
        default=["plain", "checkpointing", "compiled"],
        help="ways to run the transformer, for `parts`",
    )
    parser.add_argument(
        "--peak-tflops", type=float, default=989.0, help="dense bfloat16 peak; H100, H200: 989"
    )
    parser.add_argument("--folder", type=Path, help="keep the random models here, for the next call")
    parser.add_argument("--commit", default="", help="of these files, on a machine that has no repository")
    parser.add_argument("--output", type=Path, help="a .jsonl to append the records to")
    return parser.parse_args(words)


def keep(args, records):
    """Prints records as they come, and appends them to --output."""
    for record in records:
        show(record)
        if args.output:
            with open(args.output, "a") as file:
                file.write(json.dumps(record) + "\n")


def main(words):
    flags = []
    if "--" in words:
        flags = words[words.index("--") + 1 :]
        words = words[: words.index("--")]
    args = parse_args(words)
    if args.what == "table":
        page = ROOT / "docs" / "gpu.md"
        page.write_text(write_tables(page.read_text()))
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        if args.what == "parts":
            keep(args, time_parts(args, device))
            return
        if not (folder / "pipeline/model_index.json").exists():
            make_pipeline(args.size, folder / "pipeline", device)
        if args.language_model:
            if not (folder / "lm/model.safetensors.index.json").exists():
                make_language_model(folder / "lm", device)
            flags += ["--lm", str(folder / "lm")]
        shutil.rmtree(folder / "runs", ignore_errors=True)
        keep(args, [run_file(args, folder, flags)])


if __name__ == "__main__":
    main(sys.argv[1:])
