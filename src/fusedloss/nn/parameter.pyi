# Printed by tests/stubs.py.

from torch.nn.parameter import *
