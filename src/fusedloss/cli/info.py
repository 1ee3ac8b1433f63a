"""`fusedloss info`: what is installed, which kernels loaded, and why others did not."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform

import torch

from .. import __version__
from ..engines import cpu, gpu
from ..engines.cpu import load


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Print versions, the CPU library in use, threads, GPU and Triton."


def needs(_: argparse.Namespace) -> tuple[str, ...]:
    return ()


def run(args: argparse.Namespace) -> int:
    for name, value in facts().items():
        print(f"{name:<16}{value}")
    return 0


def facts() -> dict[str, str]:
    problem, one_thread = cpu.problem(), cpu.one_thread()
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} CPUs, torch's own pool"
    return {
        "fusedloss": __version__,
        "torch": torch.__version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "CPU capability": torch.backends.cpu.get_cpu_capability(),
        "CPU kernels": f"off: {problem}" if problem else str(load.path()),
        "threads": f"1: {one_thread}" if one_thread else threads,
        "GPU": devices(),
        "Triton": triton(),
        "GPU kernels": gpu_kernels(),
    }


def devices() -> str:
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        return "none found" if built else "none: this torch is built for the CPU"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def gpu_kernels() -> str:
    if problem := gpu.problem():
        return f"off: {problem}"
    return "on, through Triton" if torch.cuda.is_available() else "off: there is no GPU"


def triton() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
