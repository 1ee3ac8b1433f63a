"""The command `fusedloss`.

A subcommand is a module or a package here with `add_arguments(parser)` and `run(args) -> int`,
and one line in `COMMANDS`. Only the module of the subcommand that runs is imported.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple


class Command(NamedTuple):
    help: str
    extra: str | None = None


COMMANDS = {
    "demo": Command(
        "train fourteen models with torch.nn and with fusedloss.nn, and compare", "demo"
    ),
    "bench": Command("time the losses beside PyTorch and what the machine can do", "cli"),
    "verify": Command("measure every loss's errors against 50 digits, beside PyTorch's", "verify"),
    "info": Command("what is installed, which kernels are loaded, and why not if they are not"),
}


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
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    try:
        for each, command in COMMANDS.items():
            subparser = subparsers.add_parser(
                each, help=command.help, description=f"{command.help[0].upper()}{command.help[1:]}."
            )
            if each == name:
                module = import_module(f"{__name__}.{name}")
                module.add_arguments(subparser)
        args = parser.parse_args(argv)
        return int(module.run(args))
    except ModuleNotFoundError as error:
        extra = COMMANDS[name].extra if name in COMMANDS else None
        missing = (error.name or "").partition(".")[0]
        if extra is None or missing in ("", "fusedloss", "torch"):
            raise
        print(
            f"fusedloss {name}: needs {missing}, which is not installed: "
            f"run pip install 'fusedloss[{extra}]'",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print(f"fusedloss {name}: interrupted", file=sys.stderr)
        return 130
