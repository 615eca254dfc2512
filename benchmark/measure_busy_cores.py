"""What does a busy core cost? Seconds of the same training work, with one thread and with two.

    python -m benchmark.measure_busy_cores [--repeats 5] [--rounds 3] [--output FILE.json]

The work is a forward and a backward pass of the transformer of tiny/sd3. It is timed with one and with two
threads, with and without OMP_WAIT_POLICY=PASSIVE, on idle cores and beside one busy process. Threads that
wait spin by default, so they take the core of the thread that they wait for. Each round times all cases in
processes of their own, one after the other, so that they see the same machine. Prints the medians over the
rounds of each case's ratio to one thread on idle cores, and writes them to a file, by default under runs/.
With --output benchmark/results/speed/busy_cores.json they are those of docs/flow_grpo.md. The machine must
be idle otherwise, and its cores should be two: with more, the busy process has a core of its own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel

from benchmark.records import RUNS, commit, processor, shown

ROOT = Path(__file__).parent.parent
REFERENCE = "1 thread, beside an idle core"
THREADS = {
    "1 thread": {"OMP_NUM_THREADS": "1"},
    "2 threads that spin": {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "ACTIVE"},
    "2 threads, as by default": {"OMP_NUM_THREADS": "2"},
    "2 threads that sleep": {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"},
}


def time_work(repeats):
    """Seconds of a forward and a backward pass on 32 latents: the median of `repeats`, after a warm-up."""
    transformer = SD3Transformer2DModel.from_pretrained(ROOT / "tiny/sd3", subfolder="transformer")
    config = transformer.config
    latents = torch.randn(32, config.in_channels, config.sample_size, config.sample_size)
    timestep = torch.full((32,), 500.0)
    text = torch.randn(32, 32, config.joint_attention_dim)
    pooled = torch.randn(32, config.pooled_projection_dim)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        velocity = transformer(latents, text, pooled, timestep, return_dict=False)[0]
        velocity.square().mean().backward()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def time_in_a_process(settings, repeats):
    """The same in a new process with these environment variables: OpenMP reads them when it is loaded."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    words = [sys.executable, "-m", "benchmark.measure_busy_cores", "--work", str(repeats)]
    finished = subprocess.run(words, cwd=ROOT, env=environment | settings, capture_output=True, text=True)
    if finished.returncode != 0:
        raise RuntimeError(finished.stderr)
    return float(finished.stdout)


def measure(repeats, rounds):
    """{case: [seconds, for each round]}."""
    seconds = {}
    for _ in range(rounds):
        for threads, settings in THREADS.items():
            idle = time_in_a_process(settings, repeats)
            busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            try:
                beside_busy = time_in_a_process(settings, repeats)
            finally:
                busy.kill()
                busy.wait()
            seconds.setdefault(f"{threads}, beside an idle core", []).append(idle)
            seconds.setdefault(f"{threads}, beside a busy core", []).append(beside_busy)
    return seconds


def summarise(seconds):
    """{case: median over rounds of its ratio to one thread on idle cores in the same round}."""
    ratios = {}
    for case, values in seconds.items():
        ratios[case] = statistics.median(value / floor for value, floor in zip(values, seconds[REFERENCE]))
    return ratios


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RUNS / "busy_cores.json")
    parser.add_argument("--work", type=int, help="time the work in this process, with this many repeats")
    args = parser.parse_args()
    if args.work is not None:
        print(time_work(args.work))
        sys.exit()
    seconds = measure(args.repeats, args.rounds)
    record = {
        "command": " ".join(["python -m benchmark.measure_busy_cores"] + sys.argv[1:]),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "seconds": {case: statistics.median(values) for case, values in seconds.items()},
        "ratio_to_one_thread": summarise(seconds),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["ratio_to_one_thread"], indent=1))
    print(f"wrote {shown(args.output)}")
