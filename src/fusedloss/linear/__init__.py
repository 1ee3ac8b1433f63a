"""Losses of a linear head: `call.py` is the formula, `chunks.py` the loop without logits, `products.py` its
matrix products, `steps.py` and `cpu/linear.py` what happens to a chunk of logits, `run.py` the choice.
"""
