"""Uses the policies of PromptLoop's runs elsewhere: other numbers of refinements, other image models.

    python -m benchmark.use_promptloop_elsewhere [--seeds 1 2 3] [--results FOLDER]

Takes the newest run of each seed that run_seeds.py made on this machine, and evaluates its policy, and the
untrained one, as USES says, on the held-out prompts without their paraphrases. Writes
benchmark/results/promptloop_elsewhere/seed-SEED.json: scores, and the seconds of sampling a batch with and
without refinements, measured in turn in the same process.
"""

import argparse
import functools
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

import promptloop
from benchmark.records import (
    RESULTS,
    ROOT,
    circumstances,
    missing_seeds,
    newest_run,
    record_path,
    write_record,
)
from rewards import report

SETTING = "promptloop_elsewhere"
FLOW_LORA = "promptloop/flow_grpo_lora"  # setting of the runs that trained a LoRA of the image model
USES = {  # title -> flags of promptloop.py, beside the run's policy
    "refinements_1": {"num_refinements": 1},
    "refinements_2": {"num_refinements": 2},
    "refinements_3": {"num_refinements": 3},
    "refinements_5": {"num_refinements": 5},
    "second_model": {"model": "tiny/sd3b"},
    "flow_grpo": {"flow_lora": FLOW_LORA},
}
WAYS = {  # name of an evaluation of promptloop.py -> how its images were sampled
    "eval": "plain",
    "eval_loop": "loop",
    "eval_apriori": "apriori",
}


class Stopwatch:
    """Times the sampling of each batch while it is in place of `report.evaluate`."""

    def __init__(self):
        self.seconds = {way: [] for way in WAYS.values()}
        self.evaluate = report.evaluate

    def __call__(self, name, sample, *rest, **options):
        def timed(*batch):
            start = time.perf_counter()
            samples = sample(*batch)
            self.seconds[WAYS[name]].append(time.perf_counter() - start)
            return samples

        return self.evaluate(name, timed, *rest, **options)

    def __enter__(self):
        report.evaluate = self
        return self

    def __exit__(self, *error):
        report.evaluate = self.evaluate

    def medians(self):
        """{way: median seconds of a batch}."""
        return {way: statistics.median(values) for way, values in self.seconds.items() if values}


@functools.cache  # the scores of the untrained policy do not depend on the seed
def evaluate(policy, **flags):
    """(strict scores, {way: median seconds of a batch}) of a run's policy.

    policy: the run's folder, "" for the untrained one. flags: of promptloop.py.
    """
    with tempfile.TemporaryDirectory() as folder, Stopwatch() as stopwatch:
        prompts = shutil.copy(
            ROOT / "tiny" / "prompts" / "fold_0" / "test.jsonl", folder
        )  # paraphrases stay behind
        options = {"num_iterations": 0, "eval_prompts": prompts, "output_dir": folder}
        run_dir = promptloop.train(promptloop.Args(evaluate=str(policy), **options, **flags))
        (line,) = (run_dir / "metrics.jsonl").read_text().splitlines()
    metrics = json.loads(line)
    scores = {name: value for name, value in metrics.items() if name.startswith("eval/geneval_strict")}
    return scores, stopwatch.medians()


def use_elsewhere(seeds, results):
    """Evaluates all uses for the seeds that have no record."""
    command = f"python -m benchmark.use_promptloop_elsewhere --seeds {' '.join(map(str, seeds))}"
    for seed in missing_seeds(SETTING, seeds, results):
        policies = {"trained": newest_run("promptloop/default", seed), "untrained": ""}
        flow_lora = newest_run(FLOW_LORA, seed) / "lora"
        record = {"command": command, "seed": seed}
        record |= circumstances(torch.get_num_threads())
        record["uses"] = {}
        for title, flags in USES.items():
            if "flow_lora" in flags:
                flags = flags | {"flow_lora": str(flow_lora)}
            for who, policy in policies.items():
                scores, seconds = evaluate(policy, **flags)
                record["uses"][f"{title}_{who}"] = {"scores": scores, "seconds": seconds}
        write_record(record_path(SETTING, seed, results), record)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of all records")
    args = parser.parse_args()
    use_elsewhere(args.seeds, args.results)
