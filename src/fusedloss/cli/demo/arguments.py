"""The arguments of `fusedloss demo`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..arguments import plain_name
from .tasks import TASKS

QUICK = 5


def loss_name(text: str) -> str:
    """The loss that a word of `--only` names; `mse` and `MSELoss` are the same."""
    for task in TASKS:
        if plain_name(task.loss) == plain_name(text):
            return task.loss
    names = ", ".join(task.loss for task in TASKS)
    raise argparse.ArgumentTypeError(f"must be among {names}, got {text!r}")


def seed_value(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"must be an integer from 0 to 2**32 - 1, got {text!r}")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", type=Path, default=Path(), metavar="DIR", help="where to write (default: here)"
    )
    parser.add_argument("--seed", type=seed_value, default=0, help="default: 0")
    parser.add_argument(
        "--only", type=loss_name, nargs="+", metavar="LOSS", help="run these losses' tasks alone"
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--lm", action="store_true", help="a language model, its head and loss four ways"
    )
    instead.add_argument(
        "--distributed", action="store_true", help="that model on two processes, beside one"
    )
    parser.add_argument("--quick", action="store_true", help=f"train 1/{QUICK} of the epochs")
    parser.add_argument("--no-plot", action="store_true", help="do not draw fusedloss-demo.png")


def needs(args: argparse.Namespace) -> tuple[str, ...]:
    drawn = () if args.no_plot else ("matplotlib",)
    return ("rich", "tokenizers" if args.lm or args.distributed else "sklearn", *drawn)
