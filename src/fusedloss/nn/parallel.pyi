# Printed by tests/stubs.py.

from torch.nn.parallel import *
