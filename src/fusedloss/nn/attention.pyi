# Printed by tests/stubs.py.

from torch.nn.attention import *
