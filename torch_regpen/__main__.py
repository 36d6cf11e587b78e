"""`python -m torch_regpen report FILE`: what is zero in a saved state dict."""

import argparse
import sys

from .report import report


def main() -> int:
    """Print the report of a file, or one line on stderr that says why there is none."""
    parser = argparse.ArgumentParser(prog="python -m torch_regpen")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("report", help="a row for each tensor of a saved state dict: shape, zeros, norm")
    command.add_argument("file", help="written by torch.save or by safetensors")
    try:
        print(report(parser.parse_args().file))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
