"""What torch's Inductor is told of our operators; with torch_state the room of torch's private names."""

from __future__ import annotations

import operator
import sys
from typing import Any

import torch

from .torch_state import is_large

LEAST = 1 << 16  # elements: to multiply fewer takes less time than to call an operator of Python


def gives_away(scale: Any, multiplies: bool = False) -> None:
    """Inductor, once it is loaded, lets `scale(tensor, number, given, ...)` give the tensor itself away.

    Only what it may write to: what the graph made, or what was saved for this backward alone ("donated"), and
    nothing else of the graph reads. It hands that memory to no other tensor then, as it would once it was read
    for the last time. All else it multiplies itself, and fuses, if `scale` does no more.
    """
    module = sys.modules.get("torch._inductor.lowering")
    known = getattr(module, "lowerings", None)
    if module is None or known is None or scale in known:
        return
    try:
        from torch._inductor.ir import DonatedBuffer
        from torch._inductor.virtualized import V

        multiply = known[torch.ops.aten.mul.Tensor]
        give = module.fallback_handler(scale, add_to_fallback_set=False)
        register = module.register_lowering(scale, type_promotion_kind=None)
    except (ImportError, AttributeError, KeyError, TypeError):  # of another torch
        return

    @register
    def lower(tensor: Any, number: Any, given: bool, *others: Any) -> Any:
        kept = getattr(V.graph, "never_reuse_buffers", None)
        inputs = getattr(V.graph, "graph_inputs_original", {})
        node: Any = V.graph.current_node
        source = node.args[0]
        own = source.target is operator.getitem or (
            source.op == "placeholder" and isinstance(inputs.get(source.target), DonatedBuffer)
        )
        if kept is None or not own or not _pays(node, source):
            return multiply(tensor, number) if multiplies else give(tensor, number, False, *others)
        kept.add(tensor.get_name())
        return give(tensor, number, True, *others)


def _pays(node: Any, source: Any) -> bool:
    """Whether a large tensor that nothing else reads is multiplied for what Inductor does not fuse."""
    return (
        len(source.users) == 1
        and not all(torch.Tag.pointwise in getattr(user.target, "tags", ()) for user in node.users)
        and is_large(source.meta["val"].numel(), LEAST)
    )
