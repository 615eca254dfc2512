"""Weights & Biases, imported only where --track asks for it."""

from rewards import BadInput

ADVICE = "Run `wandb login`, or set WANDB_MODE=offline"


def check_tracking():
    """Raises BadInput unless W&B takes a run here: it runs offline, or a key is known and valid."""
    import wandb

    if wandb.setup().settings.mode not in ("online", "shared"):
        return
    try:
        logged_in = wandb.login(prompt=False)
    except wandb.Error as error:
        raise BadInput(f"--track: {error}. {ADVICE}") from None
    if not logged_in:
        raise BadInput(f"--track: not logged in to Weights & Biases. {ADVICE}")


def start_tracking(run_dir, args):
    """The W&B run that mirrors this one."""
    import wandb

    try:
        return wandb.init(
            project=args.wandb_project_name,
            entity=args.wandb_entity,
            dir=run_dir,
            name=run_dir.name,
            id=run_dir.name,
            resume="allow",
            config=vars(args),
        )
    except wandb.Error as error:
        raise BadInput(f"--track: {error}. {ADVICE}") from None


def track(run, metrics, sheets):
    """Mirrors a row of metrics, and pictures, given as paths."""
    import wandb

    pictures = {f"samples/{path.stem}": wandb.Image(str(path)) for path in sheets}
    run.log(metrics | pictures, step=metrics["iteration"])
