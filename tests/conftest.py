"""What the tests of several algorithm files share."""

from pathlib import Path

import pytest

from rewards import report as runs


@pytest.fixture
def interrupted_run(monkeypatch):
    """interrupted_run(train, args): folder of a run cut off in iteration 2, after its row in metrics.jsonl
    and before its checkpoint."""

    def run(train, args):
        write = runs.Report.write

        def interrupted(self, row, evaluations):
            write(self, row, evaluations)
            if row["iteration"] == 2:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(runs.Report, "write", interrupted)
            with pytest.raises(KeyboardInterrupt):
                train(args)
        (run_dir,) = Path(args.output_dir).iterdir()
        return run_dir

    return run
