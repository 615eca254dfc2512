"""How far is an iteration of flow_grpo.py from its floor? Ratio of its wall time to the sum of its bare
parts.

    python -m benchmark.overhead [FLAGS OF flow_grpo.py]

The bare parts are timed after every iteration, in the same process and at the same shapes, so that both see
the same machine: the transformer's forward passes without gradient, its forward and backward passes, the
decoder and the reward. Writes benchmark/results/overhead.json and prints the medians.
"""

import json
import os
import statistics
import sys
import tempfile
import time

import torch
import tyro

import flow_grpo
from benchmark.run import RESULTS, processor
from rewards.report import Report

ITERATIONS = 12  # the first two warm up and are left out


def bare_parts(args, pipe, transformer, reward, prompts, metadata):
    """Seconds of each part of an iteration, called directly on random inputs of the run's shapes."""
    B, M = args.num_prompts_per_iteration * args.num_images_per_prompt, args.micro_batch_size
    rows = [i % len(prompts) for i in range(M)]
    texts, data = [prompts[i] for i in rows], [metadata[i] for i in rows]
    prompt_embeds, pooled = flow_grpo.encode_prompts(pipe, texts, args.max_sequence_length, {})
    x = torch.randn(M, transformer.config.in_channels, *2 * [transformer.config.sample_size])
    timestep = torch.full((M,), 500.0)
    window = args.sde_window or args.num_inference_steps - 1
    seconds = {}

    def forward():
        return transformer(x, prompt_embeds, pooled, timestep).sample

    def timed(name, count, function):
        start = time.perf_counter()
        for _ in range(count):
            function()
        seconds[name] = time.perf_counter() - start

    with torch.no_grad():
        timed("forward", B // M * args.num_inference_steps, forward)
        images = flow_grpo.decode(pipe, x)
        timed("decode", B // M, lambda: pipe.vae.decode(x))
        timed("reward", B // M, lambda: reward.details(images, texts, data))
    timed("forward and backward", B // M * window, lambda: forward().square().mean().backward())
    for p in transformer.parameters():
        p.grad = None
    return seconds


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        args = tyro.cli(flow_grpo.Args, args=[*sys.argv[1:], "--output-dir", folder])
        args.num_iterations, args.eval_every, args.save_every = ITERATIONS, 1000, 1000
        files = flow_grpo.rewards.prompts.load_prompt_files(args.prompts, args.eval_prompts)
        prompts, metadata = files["train"]
        reward = flow_grpo.rewards.build(args.rewards, prompts, metadata, "cpu")
        pipe, transformer, _ = flow_grpo.load_model(args, torch.device("cpu"), torch.float32)
        rows, write = [], Report.write

        def write_and_measure(self, row, evaluations):
            write(self, row, evaluations)
            phases = {name[13:]: value for name, value in row.items() if name.startswith("perf/seconds_")}
            if not evaluations:
                rows.append((phases, bare_parts(args, pipe, transformer, reward, prompts, metadata)))

        Report.write = write_and_measure
        flow_grpo.train(args)

    rows = rows[2:]
    median = {
        "ratio": statistics.median(sum(phases.values()) / sum(parts.values()) for phases, parts in rows),
        "phases": {name: statistics.median(phases[name] for phases, _ in rows) for name in rows[0][0]},
        "parts": {name: statistics.median(parts[name] for _, parts in rows) for name in rows[0][1]},
    }
    machine = f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    record = {
        "command": " ".join(["python -m benchmark.overhead", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
    }
    record |= {"machine": machine, "iterations": len(rows)} | median
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "overhead.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
