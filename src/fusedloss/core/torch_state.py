"""torch's private names: the one room that knows them, by names that say what they tell.

Who asks at every call binds the function to a global of its own module.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import _autograd, _dynamo, _functorch, _profiler
from torch._functorch import pyfunctorch
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.nn import _reduction
from torch.nn.modules import adaptive, module
from torch.utils import _python_dispatch

F = TypeVar("F", bound=Callable[..., Any])

__all__ = ["FakeTensor", "FunctionalTensor"]

# What is going on around a call.
transforms_active = torch._C._are_functorch_transforms_active
dispatch_modes = torch._C._len_torch_dispatch_stack  # how many, which see every operation of torch
modes = _python_dispatch._get_current_dispatch_mode_stack
without_modes = _python_dispatch._disable_current_modes
is_tracing = torch._C._is_tracing  # for torch.jit
any_autocast = torch._C._is_any_autocast_enabled
_tracers = tuple(torch._C._TorchDispatchModeKey.__members__.values())

# Of autograd and the profiler.
keeps_graph = _autograd._get_current_graph_task_keep_graph
saved_tensor_hooks = _autograd._top_saved_tensors_default_hooks
profiling = _autograd._profiler_enabled
span = _profiler._RecordFunctionFast
unpacks_saved = hasattr(_autograd.SavedTensor, "unpack")

# Of tensors.
storage = getattr(
    torch._C, "_data_address", Tensor.data_ptr
)  # null for every view of what was freed
is_functional = torch._is_functional_tensor
is_wrapped = _functorch.is_functorch_wrapped_tensor  # by a transform around
unwrapped = _functorch.get_unwrapped
assert_async = torch._assert_async

no_torch_function = torch._C.DisableTorchFunctionSubclass

# Of GPUs; a build of torch for CPUs lacks them.
current_gpu: Any = getattr(torch._C, "_cuda_getDevice", None)
current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)

asm_output = adaptive._ASMoutput
legacy_reduction = _reduction.legacy_get_string


# Memory by shape, strides and type: torch.empty_strided takes twice the time, to tell its arguments apart.
empty_on_cpu: Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]
empty_on_cpu = _dynamo.guards._empty_strided_cpu  # type: ignore[attr-defined]


def alike(*tensors: Tensor) -> Callable[..., bool]:
    """Whether other tensors are like these, asked by one call of C++: what guards a compiled graph.

    In class, type, device, shape, strides, lazy signs and whether they require gradients; and whether
    inference mode, autocast, transforms, tracers and dispatch modes are as now, but not grad mode. No tensor
    that is given twice is like others.
    """
    guards = _dynamo.guards.TensorGuards(
        *tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None
    )
    found: Callable[..., bool] = guards.check
    return found


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooked(called: torch.nn.Module) -> bool:
    """Whether hooks, of this module or of all, run where it is called."""
    return module._has_any_global_hook() or any(getattr(called, hooks) for hooks in _HOOKS)


def forward_mode() -> bool:
    """Whether forward-mode differentiation is active."""
    return forward_ad._current_level >= 0


def mode_traces() -> bool:
    """Whether a dispatch mode that is active traces a graph."""
    return any(torch._C._get_dispatch_mode(key) is not None for key in _tracers)


def functionalizes() -> bool:
    """Whether torch.func.functionalize is active, which takes no autograd function."""
    kind = _functorch.TransformType.Functionalize
    return any(each.key() == kind for each in _functorch.get_interpreter_stack() or ())


def constant(function: F) -> F:
    """Dynamo calls the function and takes its result for a constant.

    As torch.compiler.assume_constant_result, which first imports torch._dynamo: 1.7 seconds.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def untraced(function: F) -> F:
    """Dynamo traces neither the function nor what it calls.

    As torch.compiler.disable, which imports torch._dynamo.
    """
    frames = _dynamo.eval_frame

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        before = frames.set_eval_frame(None)
        try:
            return function(*args, **kwargs)
        finally:
            frames.set_eval_frame(before)

    called._torchdynamo_disable = True  # type: ignore[attr-defined]
    return called  # type: ignore[return-value]


def bare_backward(function: Any, traced: Callable[..., Any]) -> None:
    """An autograd function's backward runs as its own `apply` would run it, and a microsecond sooner.

    But for choosing between `backward` and `vjp`. Compiled autograd looks for `backward`, and traces it.
    """
    function._backward_cls.apply = function.backward
    function.backward = staticmethod(traced)


def _is_compiling() -> bool:
    return torch.compiler.is_compiling() or (
        TracingContext.try_get() is not None and not torch.compiler.is_exporting()
    )


# Whether torch.compile or an exporter traces. Before torch 2.13 its own word is no while AOTAutograd traces
# what Dynamo has traced: a function that Dynamo keeps as it is, such as a patched one, is first entered then.
is_compiling: Callable[[], bool] = (
    torch.compiler.is_compiling
    if hasattr(torch.compiler, "_compile_session_context")
    else _is_compiling
)


@constant
def is_exporting() -> bool:
    # The dynamo of torch 2.11 takes torch's own function for true.
    return torch.compiler.is_exporting()


def is_large(size: int, least: int) -> bool:
    """Whether a number of elements reaches `least`: a symbolic one as it is now, and no guard says so."""
    shapes = torch.fx.experimental.symbolic_shapes
    if hasattr(shapes, "optimization_hint"):  # it came with 2.13
        return shapes.optimization_hint(size, 0) >= least
    return shapes.statically_known_true(size >= least)


def wrapper(
    kind: type[Tensor], shape: torch.Size, stride: Any, dtype: torch.dtype, device: torch.device
) -> Any:
    """A tensor of a subclass, without memory."""
    return torch.Tensor._make_wrapper_subclass(kind, shape, stride, dtype=dtype, device=device)


def local_of(tensor: Any) -> Tensor:
    """What this process has of a DTensor; no operation of autograd."""
    found: Tensor = tensor._local_tensor
    return found


def spec_of(tensor: Any) -> Any:
    """Where a DTensor lies, and its whole shape, strides and type."""
    return tensor._spec


def all_gather(group: Any, found: Tensor, part: Tensor) -> None:
    """As torch.distributed.all_gather_into_tensor, whose own work takes as long as that of the group."""
    group._allgather_base(found, part).wait()


def process_group(name: str) -> Any:
    """The process group of a name."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def freed_after_forward(module: torch.nn.Module) -> bool:
    """Whether FSDP takes a module's parameters away before its caller has the output."""
    states = sys.modules.get("torch.distributed._composable_state")
    for found in list(getattr(states, "_module_state_mapping", {}).values()):
        for group in getattr(found(), "_fsdp_param_groups", ()):
            infos = (parameter._module_info for parameter in group.fsdp_params)
            if any(module is each for i in infos for each in (i.module, *i.shared_modules)):
                return bool(group._reshard_after_forward)
    return False


def of_fsdp(hook: Any) -> bool:
    """Whether a hook of tensors is how FSDP learns that backward comes, whatever the gradient."""
    return type(getattr(hook, "__self__", None)).__module__.startswith("torch.distributed.fsdp")


@contextlib.contextmanager
def as_if_alone(device: str) -> Iterator[None]:
    """With gradients, and without autocast, inference mode and functorch's transforms."""
    cleared: Any = contextlib.nullcontext()
    if transforms_active():
        cleared = pyfunctorch.temporarily_clear_interpreter_stack()
    with (
        cleared,
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device, enabled=False),
    ):
        yield


@contextlib.contextmanager
def differentiating() -> Iterator[None]:
    """Autograd is off within an operator: here it is on."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield
