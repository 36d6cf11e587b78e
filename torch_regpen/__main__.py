"""`python -m torch_regpen report FILE`: the zeros in a saved state dict."""

import argparse
import os
import sys

from .report import printable, report


def main() -> int:
    """Print the report of a file, or one line on stderr if it cannot be read or written."""
    parser = argparse.ArgumentParser(prog="python -m torch_regpen")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("report", help="a row for each tensor of a saved state dict: shape, zeros, norm")
    command.add_argument("file", help="written by torch.save or by safetensors")
    file = parser.parse_args().file
    try:
        text = report(file)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes the rest to it at exit
        if isinstance(error, BrokenPipeError):  # the reader has closed the pipe, as `head` does
            return 0
        print(printable(f"{file}: its report cannot be written ({error})"), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
