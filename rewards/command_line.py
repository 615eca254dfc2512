"""The command line: what every script does with its flags, and with a mistake in them."""

import sys

from rewards import BadInput


def main(train, args):
    """Runs train(args) from the command line: a mistake in the input ends in one line and exit code 2."""
    try:
        train(args)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (FloatingPointError, KeyboardInterrupt) as error:
        print(
            f"stopped: {str(error) or 'Ctrl-C'}. Go on from the last checkpoint with --resume RUN",
            file=sys.stderr,
        )
        sys.exit(1)
