"""The arguments of `fusedloss bench`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .cases import CHOICES, DTYPES, SIZES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    flags = {
        "--quick": "fewer cases, sizes and samples: two minutes at most",
        "--linear": "linear cross entropy instead; takes --quick, --threads, --against a folder",
        "--calls": "small calls with every option set, what a call costs before its kernel, and the import; "
        "takes --quick, --only, --threads",
        "--compiled": "ours under torch.compile, beside ours called and PyTorch's compiled, and training "
        "steps; takes --quick, --threads, --only, --sizes",
        "--distributed": "a head whose classes are divided among two processes, beside one and PyTorch's "
        "loss_parallel; takes --quick",
        "--shards": "row losses of DTensors on two processes, beside the kernel on one shard; takes --quick, "
        "--only",
        "--no-sweep": "the cases alone",
        "--targets": "print which targets are met",
    }
    lists = {
        "--only LOSS": "these losses alone",
        "--dtype DTYPE": f"these of {', '.join(DTYPES)}",
        "--sizes SIZE": f"the sweep alone, at these of {', '.join(SIZES)}, or shapes like 1024x32000",
        "--variants NAME": f"these of {', '.join(CHOICES)}, and ours",
    }
    files = {
        "--against PATH": "compare with the JSON of an earlier run, or, call by call, with the fusedloss of "
        "a folder: a checkout, or where it is installed",
        "--picture FILE": "the ratios (with --linear the memory) as an SVG or PNG; needs matplotlib",
    }
    for option, text in flags.items():
        add(option, action="store_true", help=text)
    for words, text in lists.items():
        option, metavar = words.split()
        add(option, nargs="+", metavar=metavar, help=text)
    for words, text in files.items():
        option, metavar = words.split()
        add(option, type=Path, metavar=metavar, help=text)
    for option, kind in (("--output", "json"), ("--html", "html")):
        default = Path(f"fusedloss-bench.{kind}")
        add(option, type=Path, default=default, metavar="FILE", help="default: %(default)s")
    takes = "cuda takes --only, --linear and --output of these options; default: %(default)s"
    add("--device", choices=("cpu", "cuda"), default="cpu", help=takes)
    add("--threads", metavar="N", help="default: what torch takes")


def needs(args: argparse.Namespace) -> tuple[str, ...]:
    return ("rich", *(("matplotlib",) if args.picture else ()))
