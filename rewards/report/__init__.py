"""What a run leaves behind: its folder, metrics, pictures, evaluations and checkpoints. Knows no algorithm.

Only the first process of a run makes a Log and writes files; evaluating is shared among all processes.
Every logged name is explained in docs/.
"""

from rewards.report.checkpoint import (
    is_first_process,
    put_together,
    read_checkpoint,
    restore_optimizer,
    restore_parameters,
    write_checkpoint,
)
from rewards.report.evaluation import (
    Evaluation,
    Samples,
    evaluate,
    files_to_evaluate,
    gather,
    gather_scores,
)
from rewards.report.files import replace_folder
from rewards.report.folder import open_run, read_args
from rewards.report.log import Log, announce, print_folder
from rewards.report.metrics import Clock, check_finite, mean, reward_metrics, summarise

__all__ = [
    "Clock",
    "Evaluation",
    "Log",
    "Samples",
    "announce",
    "check_finite",
    "evaluate",
    "files_to_evaluate",
    "gather",
    "gather_scores",
    "is_first_process",
    "mean",
    "open_run",
    "print_folder",
    "put_together",
    "read_args",
    "read_checkpoint",
    "replace_folder",
    "restore_optimizer",
    "restore_parameters",
    "reward_metrics",
    "summarise",
    "write_checkpoint",
]
