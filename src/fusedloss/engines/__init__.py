"""What runs a call on a device: `cpu`, `gpu`, and `chunks` for heads whose logits never exist as a whole."""
