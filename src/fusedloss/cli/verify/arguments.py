"""The arguments of `fusedloss verify`."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path as File

import torch

from ...engines.cpu.load import FLOATS

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measure the errors of every loss, type and path against 50 digits, PyTorch's beside them. "
        "Exits with 1 where one is beyond the bound that docs/accuracy.md states."
    )
    add = parser.add_argument
    add(
        "--quick",
        action="store_true",
        help="a minute or two: fewer probes, two types, one capability",
    )
    add("--only", nargs="+", metavar="LOSS", help="these losses alone")
    add("--dtype", nargs="+", metavar="DTYPE", help=f"these of {', '.join(DTYPES)}")
    add("--json", type=File, metavar="FILE", help="write every figure there")
    add("--markdown", type=File, metavar="FILE", help="write the table into docs/accuracy.md")
    add("--picture", type=File, metavar="FILE", help="draw the errors against the logit, and stop")


def interprets(quick: bool) -> bool:
    """Whether the GPU kernels are measured by Triton's interpreter, which needs NumPy."""
    return not quick and not torch.cuda.is_available() and find_spec("triton") is not None


def needs(args: argparse.Namespace) -> tuple[str, ...]:
    if args.picture:
        return "rich", "mpmath", "matplotlib"
    return ("rich", "mpmath", *(("numpy",) if interprets(args.quick) else ()))
