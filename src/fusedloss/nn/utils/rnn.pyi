# Printed by tests/stubs.py.

from torch.nn.utils.rnn import *
