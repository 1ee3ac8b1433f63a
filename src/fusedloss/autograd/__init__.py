"""The autograd functions over the kernels, and the kernels as operators of torch."""
