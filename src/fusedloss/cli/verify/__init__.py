"""`fusedloss verify`: `command.py` is the command, `probes.py` its inputs, `exact.py` the losses with
50 digits, `measured.py` the paths and their errors, `picture.py` the picture of docs/accuracy.md.
"""

from .command import add_arguments, run

__all__ = ["add_arguments", "run"]
