"""`fusedloss verify`: `command.py` is the command, `probes.py` its inputs, `exact.py` the losses with
50 digits, `measured.py` the paths and their errors, `picture.py` the picture of docs/accuracy.md.
"""

import argparse

from .arguments import add_arguments, needs

__all__ = ["add_arguments", "needs", "run"]


def run(args: argparse.Namespace) -> int:
    from .command import run as of_command

    return of_command(args)
