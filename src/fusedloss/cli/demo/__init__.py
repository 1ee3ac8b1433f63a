"""`fusedloss demo`."""

import argparse

from .arguments import add_arguments, needs

__all__ = ["add_arguments", "needs", "run"]


def run(args: argparse.Namespace) -> int:
    from .command import run as of_command

    return of_command(args)
