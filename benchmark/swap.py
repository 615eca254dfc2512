"""Swaps the parts of trained runs: another language model for the flow model, another flow model for it.

    python -m benchmark.swap [--seeds 1 2 3]

Takes each seed's newest run of benchmark.run under runs/benchmark/ and evaluates `promptrl.py` at iteration 0
with the parts that PAIRS names. Writes benchmark/results/swap-SEED.json.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch

import promptrl
from benchmark.run import RESULTS, ROOT, circumstances

PAIRS = {  # title -> (runs of the flow model, of the language model, its seed's shift); None: untrained
    "flow_only": ("promptrl_flow_only", None, 0),
    "flow": ("promptrl", None, 0),
    "lm": (None, "promptrl", 0),
    "both": ("promptrl", "promptrl", 0),
    "other": ("promptrl", "promptrl", 1),  # the rewriter of the next seed
}


def newest(name, seed):
    """Folder of the newest run of a setting, with its seed."""
    return max(
        (ROOT / "runs" / "benchmark").glob(f"{name}-{seed}-*/*"), key=lambda path: path.stat().st_mtime
    )


def evaluate(flow, lm):
    """The eval/ metrics of a trained flow model with a trained rewriter, folders of runs or None."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        shutil.copytree(ROOT / "tiny" / "sd3", folder / "sd3")
        if flow:
            shutil.copytree(flow / "transformer", folder / "sd3" / "transformer", dirs_exist_ok=True)
        args = promptrl.Args(num_iterations=0, model=str(folder / "sd3"), output_dir=str(folder))
        args.lm = str(lm / "lm") if lm else args.lm
        (row,) = (promptrl.train(args) / "metrics.jsonl").read_text().splitlines()
    return {name: value for name, value in json.loads(row).items() if name.startswith("eval/geneval_strict")}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    seeds = parser.parse_args().seeds
    for k, seed in enumerate(seeds):
        if (RESULTS / f"swap-{seed}.json").exists():
            continue
        record = {"command": f"python -m benchmark.swap --seeds {' '.join(map(str, seeds))}", "seed": seed}
        record |= circumstances(f"{torch.get_num_threads()} threads") | {"swaps": {}}
        for title, (flow, lm, shift) in PAIRS.items():
            other = seeds[(k + shift) % len(seeds)]
            parts = newest(flow, seed) if flow else None, newest(lm, other) if lm else None
            record["swaps"][title] = evaluate(*parts)
        (RESULTS / f"swap-{seed}.json").write_text(json.dumps(record, indent=0) + "\n")
