"""The place of the GPU kernels: the same formulas through Triton. There are none yet.

Until then tensors on a GPU take the formula, and `fusedloss info` says so.
"""
