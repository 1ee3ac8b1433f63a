# Printed by tests/stubs.py.

from ..functional import *
