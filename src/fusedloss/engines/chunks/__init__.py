"""Losses of a linear head: the loop without logits, its matrix products, and the steps of a chunk."""
