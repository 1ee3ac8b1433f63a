"""What every room stands on: errors, levels of checks, and what a tensor is to us."""
