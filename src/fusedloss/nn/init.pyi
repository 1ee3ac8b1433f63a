# Printed by tests/stubs.py.

from torch.nn.init import *
