"""The command `fusedloss`.

A subcommand is a module or a package here with `add_arguments(parser)`, `needs(args)` and `run(args) -> int`,
and one line in `COMMANDS`. Only the module of the subcommand that runs is imported, and beside torch nothing
before `run`: what is missing is said at once.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec

from .. import __version__

COMMANDS = {
    "demo": "train fourteen models with torch.nn and with fusedloss.nn, and compare",
    "bench": "time the losses beside PyTorch and what the machine can do",
    "verify": "measure every loss's errors against 50 digits, beside PyTorch's",
    "info": "what is installed, which kernels are loaded, and why not if they are not",
}
PACKAGES = {"sklearn": "scikit-learn"}  # by what is imported, where its name is another


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand that `argv` names and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal or a pipe that cannot print µ gets a question mark, not a traceback.
            stream.reconfigure(errors="replace")
    argv = sys.argv[1:] if argv is None else list(argv)
    name = next((word for word in argv if not word.startswith("-")), None)
    parser = argparse.ArgumentParser(
        prog="fusedloss", description="The losses of torch.nn with fused kernels."
    )
    parser.add_argument("--version", action="version", version=f"fusedloss {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for each, help in COMMANDS.items():
        subparser = subparsers.add_parser(
            each, help=help, description=f"{help[0].upper()}{help[1:]}."
        )
        if each == name:
            module = import_module(f"{__name__}.{name}")
            module.add_arguments(subparser)
    args = parser.parse_args(argv)
    missing = [PACKAGES.get(n, n) for n in module.needs(args) if find_spec(n) is None]
    if missing:
        listed, are = " and ".join(missing), "is" if len(missing) == 1 else "are"
        print(
            f"fusedloss {name}: needs {listed}, which {are} not installed: run "
            f"pip install {' '.join(missing)}",
            file=sys.stderr,
        )
        return 2
    try:
        return int(module.run(args))
    except KeyboardInterrupt:
        print(f"fusedloss {name}: interrupted", file=sys.stderr)
        return 130
