# Printed by tests/stubs.py.

from torch.nn.modules import *
