"""How far is an iteration of flow_grpo.py from its floor? Its wall time over the sum of its bare parts.

    python -m benchmark.measure_iteration_overhead [--output FILE.json] [FLAGS OF flow_grpo.py]

The bare parts are timed after every iteration, in the same process and at the same shapes, so that both see
the same machine: the transformer's forward passes without gradient, its forward and backward passes, the
decoder and the reward. Prints the medians and writes them to a file, by default under runs/. With --output
benchmark/results/first_edition/speed/iteration_overhead.json they are those of docs/first_edition.md.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import tyro
from diffusers import StableDiffusion3Pipeline

import flow_grpo
import rewards
from benchmark.records import RUNS, processor, shown
from rewards.prompts import load_prompt_files
from rewards.report import Log

ITERATIONS = 12
WARM_UP = 2  # of them are left out


class BareParts:
    """The parts of an iteration, called directly on random inputs of the run's shapes."""

    def __init__(self, args):
        num_images = args.num_prompts_per_iteration * args.num_images_per_prompt
        batch_size = min(args.micro_batch_size, num_images)
        self.num_batches = math.ceil(num_images / batch_size)
        self.num_steps = args.num_inference_steps
        self.num_trained_steps = args.sde_window or args.num_inference_steps - 1
        file = load_prompt_files(args.prompts, args.eval_prompts)["train"]
        rows = [row % len(file.prompts) for row in range(batch_size)]
        self.prompts = [file.prompts[row] for row in rows]
        self.metadata = [file.metadata[row] for row in rows]
        self.reward = rewards.build(args.rewards, file.prompts, file.metadata, "cpu")
        self.pipe = StableDiffusion3Pipeline.from_pretrained(
            args.model, dtype=torch.float32, text_encoder_3=None, tokenizer_3=None
        )
        self.embeds, _, self.pooled, _ = self.pipe.encode_prompt(
            self.prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=0
        )
        config = self.pipe.transformer.config
        self.x_t = torch.randn(batch_size, config.in_channels, config.sample_size, config.sample_size)
        self.timestep = torch.full((batch_size,), 500.0)

    def forward(self):
        return self.pipe.transformer(
            self.x_t, self.embeds.detach(), self.pooled.detach(), self.timestep
        ).sample

    def forward_and_backward(self):
        self.forward().square().mean().backward()

    def decode(self):
        return self.pipe.vae.decode(self.x_t).sample

    def seconds(self):
        """{part: seconds} of all its calls in an iteration."""
        seconds = {}
        with torch.no_grad():
            seconds["forward"] = seconds_of(self.forward, self.num_batches * self.num_steps)
            seconds["decode"] = seconds_of(self.decode, self.num_batches)
            images = (self.decode() / 2 + 0.5).clamp(0, 1)
            images = (images * 255).round() / 255
            score = lambda: self.reward.details(images, self.prompts, self.metadata)  # noqa: E731
            seconds["reward"] = seconds_of(score, self.num_batches)
        num_passes = self.num_batches * self.num_trained_steps
        seconds["forward and backward"] = seconds_of(self.forward_and_backward, num_passes)
        self.pipe.transformer.zero_grad()
        return seconds


def seconds_of(function, count):
    """Seconds of a number of calls."""
    start = time.perf_counter()
    for _ in range(count):
        function()
    return time.perf_counter() - start


def measure(args):
    """[(seconds of each phase, seconds of each bare part)] of the iterations of a run."""
    bare_parts = BareParts(args)
    measured = []
    write = Log.write

    def write_and_measure(self, metrics, evaluations):
        write(self, metrics, evaluations)
        if metrics["iteration"] == 0 or evaluations:
            return
        phases = {}
        for name, value in metrics.items():
            if name.startswith("perf/seconds_"):
                phases[name.removeprefix("perf/seconds_")] = value
        measured.append((phases, bare_parts.seconds()))

    Log.write = write_and_measure
    try:
        flow_grpo.train(args)
    finally:
        Log.write = write
    return measured[WARM_UP:]


def summarise(measured):
    """The medians over iterations, and of each iteration's ratio."""
    ratios = [sum(phases.values()) / sum(parts.values()) for phases, parts in measured]
    record = {"iterations": len(measured), "ratio": statistics.median(ratios), "phases": {}, "parts": {}}
    for name in measured[0][0]:
        record["phases"][name] = statistics.median(phases[name] for phases, _ in measured)
    for name in measured[0][1]:
        record["parts"][name] = statistics.median(parts[name] for _, parts in measured)
    return record


def main(words):
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=RUNS / "iteration_overhead.json")
    own, flags = parser.parse_known_args(words)
    args = tyro.cli(flow_grpo.Args, args=flags)
    args.num_iterations = ITERATIONS
    args.eval_every = args.save_every = 1000
    machine = f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    with tempfile.TemporaryDirectory() as folder:
        args.output_dir = folder
        record = {
            "command": " ".join(["python -m benchmark.measure_iteration_overhead"] + flags),
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine,
        } | summarise(measure(args))
    own.output.parent.mkdir(parents=True, exist_ok=True)
    own.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
    print(f"wrote {shown(own.output)}")


if __name__ == "__main__":
    main(sys.argv[1:])
