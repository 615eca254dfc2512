"""Uses the policies of PromptLoop's runs elsewhere: other numbers of refinements, other image models.

    python -m benchmark.loop [--seeds 1 2 3]

Takes each seed's newest run of benchmark.run under runs/benchmark/ and evaluates it as USES says, and the
untrained policy with it, on the held-out prompts without their paraphrases. Writes
benchmark/results/loop-SEED.json: scores, and seconds of sampling, without and with refinements, measured in
turn in the same process.
"""

import argparse
import functools
import json
import shutil
import statistics
import tempfile
import time

import torch

import promptloop
from benchmark.run import RESULTS, ROOT, circumstances
from benchmark.swap import newest

USES = {  # title -> flags beside the run's policy
    **{f"refinements_{count}": {"num_refinements": count} for count in (1, 2, 3, 5)},
    "second_model": {"model": "tiny/sd3b"},
    "flow_grpo": {"flow_lora": "promptloop_flow_grpo"},  # a LoRA of the runs of this name
}


@functools.cache  # the untrained policy's do not depend on the seed
def evaluate(policy, **flags):
    """(eval/ scores, median seconds to sample a batch, plain and in the loop) of a run's policy.

    policy: the run's folder, "" for the untrained one. flags: of promptloop.py.
    """
    seconds, sample = {"plain": [], "loop": []}, promptloop.sample

    def timed(pipe, texts, noise, schedules, write, *rest):
        seen = []

        def watched(rows, step, current, look):
            return write(rows, step, current, look and (lambda: seen.append(step) or look()))

        start = time.perf_counter()
        images = sample(pipe, texts, noise, schedules, watched, *rest)
        # the first refinement is written without a preview
        later = any(step > 0 for steps in schedules for step in steps)
        kind = "plain" if not any(schedules) else "loop" if seen or not later else "blind"
        seconds.setdefault(kind, []).append(time.perf_counter() - start)
        return images

    promptloop.sample = timed
    try:
        with tempfile.TemporaryDirectory() as folder:
            prompts = shutil.copy(ROOT / "tiny" / "prompts" / "eval.jsonl", folder)  # paraphrases stay behind
            flags |= {"num_iterations": 0, "eval_prompts": prompts, "output_dir": folder}
            args = promptloop.Args(evaluate=str(policy), **flags)
            (row,) = (promptloop.train(args) / "metrics.jsonl").read_text().splitlines()
    finally:
        promptloop.sample = sample
    scores = {
        name: value for name, value in json.loads(row).items() if name.startswith("eval/geneval_strict")
    }
    return scores, {kind: statistics.median(values) for kind, values in seconds.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    seeds = parser.parse_args().seeds
    for seed in seeds:
        if (RESULTS / f"loop-{seed}.json").exists():
            continue
        record = {"command": f"python -m benchmark.loop --seeds {' '.join(map(str, seeds))}", "seed": seed}
        record |= circumstances(f"{torch.get_num_threads()} threads") | {"uses": {}}
        for title, flags in USES.items():
            flags = dict(flags)
            if "flow_lora" in flags:
                flags["flow_lora"] = str(newest(flags["flow_lora"], seed) / "lora")
            for who, policy in (("trained", newest("promptloop", seed)), ("untrained", "")):
                scores, seconds = evaluate(policy, **flags)
                record["uses"][f"{title}_{who}"] = {"scores": scores, "seconds": seconds}
        (RESULTS / f"loop-{seed}.json").write_text(json.dumps(record, indent=0) + "\n")
