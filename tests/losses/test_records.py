"""PyTorch's own records of its losses, run on ours; see records.py."""

from __future__ import annotations

import inspect
import itertools
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from typing import Any

import pytest
import sequences
import torch
from records import (
    DTYPES,
    LOSSES,
    MANY,
    SINGULAR,
    module,
    module_dtypes,
    module_errors,
    module_samples,
    nn_samples,
    op_dtypes,
    op_errors,
    op_samples,
    operator,
    own_samples,
)
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close
from torch.testing._internal.common_modules import ModuleErrorEnum
from torch.testing._internal.opinfo.core import SampleInput

import fusedloss
from fusedloss.engines.chunks.products import multiplies_bfloat16
from fusedloss.front.definition import REGISTRY

pytestmark = pytest.mark.filterwarnings("ignore")

# The gradient by a target of 0 with `full` (docs/compatibility.md).
DEFINED_WHERE_TORCH_IS_NAN = {"poisson_nll_loss"}

WITHOUT_DERIVATIVE = {"hinge_embedding_loss": (1,), "cosine_embedding_loss": (2,)}

each_loss = pytest.mark.parametrize("loss", LOSSES)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def per_dtype(dtypes: Callable[[str], Sequence[torch.dtype]]) -> pytest.MarkDecorator:
    pairs = [(loss, dtype) for loss in LOSSES for dtype in dtypes(loss)]
    return pytest.mark.parametrize(
        ("loss", "dtype"), pairs, ids=[f"{loss}-{name_of(dtype)}" for loss, dtype in pairs]
    )


# The tensors of a call, wherever they stand in it.


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def rebuilt(value: Any, tensors: Iterator[Tensor]) -> Any:
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, (tuple, list)):
        return type(value)(rebuilt(item, tensors) for item in value)
    if isinstance(value, dict):
        return {key: rebuilt(item, tensors) for key, item in value.items()}
    return value


class Invocation:
    """The arguments of one call, as a list of tensors and a way to call a function with others."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs
        self.tensors = list(tensors_in((args, kwargs)))
        self.wanted = [k for k, t in enumerate(self.tensors) if t.requires_grad]

    def __call__(self, function: Callable[..., Tensor], tensors: Sequence[Tensor]) -> Tensor:
        args, kwargs = rebuilt((self.args, self.kwargs), iter(tensors))
        return function(*args, **kwargs)

    def leaves(self, wanted: Sequence[int], change: Callable[[Tensor], Tensor]) -> list[Tensor]:
        new = (change(t.detach()) for t in self.tensors)
        return [t.requires_grad_(k in wanted) for k, t in enumerate(new)]

    def outcome(
        self,
        function: Callable[..., Tensor],
        wanted: Sequence[int],
        change: Callable[[Tensor], Tensor] = torch.clone,
    ) -> list[Tensor]:
        """The value and then the gradients of the tensors at `wanted`."""
        tensors = self.leaves(wanted, change)
        value = self(function, tensors)
        if not wanted:
            assert not value.requires_grad
            return [value]
        torch.manual_seed(1)
        # Few bits, so that it is the same in every type, and never 0.
        sizes, signs = torch.randint(1, 9, value.shape) / 8, torch.randint(2, value.shape) * 2 - 1
        incoming = (sizes * signs).to(value.dtype)
        grads = torch.autograd.grad(value, [tensors[k] for k in wanted], incoming)
        return [value.detach(), *grads]


def spaced(tensor: Tensor) -> Tensor:
    """The same values with gaps between them."""
    return torch.testing._internal.common_utils.noncontiguous_like(tensor)


def subsets(wanted: Sequence[int]) -> Iterator[tuple[int, ...]]:
    for size in range(len(wanted) + 1):
        yield from itertools.combinations(wanted, size)


def check_against_torch(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], call: Invocation
) -> None:
    """Value, gradients of every subset, types and shapes; contiguous or not."""
    for wanted in subsets(call.wanted):
        expected = call.outcome(theirs, wanted)
        for change in (torch.clone, spaced):
            assert_close(call.outcome(ours, wanted, change), expected, equal_nan=True)


def widened(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def check_against_float64(
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    call: Invocation,
    dtype: torch.dtype,
    theirs_in_float64: Callable[..., Tensor] | None = None,
) -> None:
    """Within a few roundings of PyTorch's result in float64, and of the type that it gives."""
    narrow = call.outcome(theirs, call.wanted)
    exact = call.outcome(theirs_in_float64 or theirs, call.wanted, widened)
    found = call.outcome(ours, call.wanted)
    broadcast = len({t.shape for t in (call.tensors[k] for k in call.wanted)}) > 1
    sizes = (t.abs().nan_to_num().max().item() for t in call.tensors if t.numel())
    largest = max(sizes, default=1.0)
    for ours_, theirs_, exact_ in zip(found, narrow, exact, strict=True):
        assert (ours_.dtype, ours_.shape) == (theirs_.dtype, theirs_.shape)
        if not exact_.numel():
            continue
        scale = max(largest, exact_.abs().nan_to_num().max().item())
        info = torch.finfo(dtype)
        # A gradient is stored, multiplied by the one that arrives, and summed where it broadcast.
        roundings = 0 if dtype is torch.float32 else 1 if ours_ is found[0] else 2
        cancels = broadcast
        if roundings and "linear" in getattr(ours, "__name__", type(ours).__name__).lower():
            roundings += 1  # large logits, rounded in float32, move their softmax
            # The gradients by logits are rounded before they are multiplied.
            cancels |= dtype is torch.bfloat16 and multiplies_bfloat16()
        allowed = 8 * torch.finfo(torch.float32).eps * scale + info.smallest_normal * info.eps
        allowed = allowed + roundings * info.eps / 2 * (scale if cancels else exact_.abs())
        error = (ours_.double() - exact_).abs()
        same = (ours_.double() == exact_) | (ours_.isnan() & exact_.isnan())
        if getattr(ours, "__name__", "") in DEFINED_WHERE_TORCH_IS_NAN:
            same |= exact_.isnan() & ours_.isfinite()
        bad = ~((error <= allowed) | same | (exact_.abs() > info.max))
        worst = (error / allowed).masked_fill(~bad, 0).max()
        assert not bad.any(), f"off by {worst:.3g} times what is allowed"


def check_gradients(
    function: Callable[..., Tensor],
    call: Invocation,
    *,
    forward: bool = True,
    batched_forward: bool = True,
    second: bool = True,
    forward_over_backward: bool = True,
    fast: bool = False,
) -> None:
    """Finite differences of the first and second order, in every mode."""

    def of_wanted(*wanted: Tensor) -> Tensor:
        tensors = dict(zip(call.wanted, wanted, strict=True))
        return call(function, [tensors.get(k, t) for k, t in enumerate(call.tensors)])

    inputs = tuple(call.tensors[k].detach().clone().requires_grad_() for k in call.wanted)
    gradcheck(
        of_wanted,
        inputs,
        check_batched_grad=True,
        check_forward_ad=forward,
        check_batched_forward_grad=forward and batched_forward,
        fast_mode=fast,
    )
    if second:
        gradgradcheck(
            of_wanted,
            inputs,
            check_batched_grad=True,
            check_fwd_over_rev=forward_over_backward,
            check_rev_over_rev=True,
            gen_non_contig_grad_outputs=True,
            fast_mode=True,
        )


def check_sample(loss: str, sample: SampleInput, dtype: torch.dtype, **flags: Any) -> None:
    ours, theirs = (sequences.function_of(f, loss) for f in (fusedloss, torch.nn.functional))
    if dtype.itemsize == 2 and loss in REGISTRY:  # which PyTorch lacks of some
        theirs = REGISTRY[loss].written_out or theirs
    call = Invocation((sample.input, *sample.args), sample.kwargs)
    # Of a target that has no derivative, PyTorch's records ask for one.
    call.wanted = [k for k in call.wanted if k not in WITHOUT_DERIVATIVE.get(loss, ())]
    if dtype is torch.uint8:
        # PyTorch's differences of such integers wrap around.
        found = call.outcome(ours, ())
        assert_close(found, call.outcome(theirs, (), torch.Tensor.long))
    elif dtype is not torch.float64 and has_own_distance(sample):
        # It rounds at each step, the same in both; what follows it may not.
        eps = torch.finfo(dtype).eps
        expected = call.outcome(theirs, call.wanted)
        assert_close(call.outcome(ours, call.wanted), expected, rtol=4 * eps, atol=16 * eps)
    elif dtype in (torch.float32, torch.bfloat16, torch.float16):
        check_against_float64(ours, theirs, call, dtype)
        check_layouts(ours, call)
    else:
        check_against_torch(ours, theirs, call)
    finite = all(t.isfinite().all() for t in call.tensors)  # else there are no differences
    if dtype is torch.float64 and sample.name != SINGULAR and finite:
        check_gradients(ours, call, fast=sum(t.numel() for t in call.tensors) > 20, **flags)


def has_own_distance(sample: SampleInput) -> bool:
    distance = sample.kwargs.get("distance_function")
    return not (distance is None or isinstance(distance, torch.nn.PairwiseDistance))


def check_layouts(ours: Callable[..., Tensor], call: Invocation) -> None:
    """Values with gaps between them give the same, and so does a subset of the gradients."""
    value, *grads = call.outcome(ours, call.wanted)
    for wanted in subsets(call.wanted):
        found = call.outcome(ours, wanted, spaced)
        expected = [value, *(grads[call.wanted.index(k)] for k in wanted)]
        assert_close(found, expected, equal_nan=True)


@per_dtype(op_dtypes)
def test_op_db(loss: str, dtype: torch.dtype, tally: Any) -> None:
    record = operator(loss)
    count = tally(loss, "op_db")
    for k, sample in enumerate(op_samples(loss, dtype)):
        with count(f"{k}: {sample.summary()}"):
            check_sample(
                loss,
                sample,
                dtype,
                forward=record.supports_forward_ad,
                batched_forward=record.check_batched_forward_grad,
                second=record.supports_gradgrad,
                forward_over_backward=record.supports_fwgrad_bwgrad,
            )
            if dtype is torch.float64 and callable(record.ref):
                bare = sample.numpy()
                expected = record.ref(bare.input, *bare.args, **bare.kwargs)
                result = record.op(sample.input, *sample.args, **sample.kwargs).detach()
                assert_close(result, torch.as_tensor(expected))


@each_loss
def test_op_db_errors(loss: str, tally: Any) -> None:
    count = tally(loss, "op_db errors")
    for k, error in enumerate(op_errors(loss)):
        with count(f"{k}: {error.error_regex}"):
            sample = error.sample_input
            with pytest.raises(error.error_type) as caught:
                operator(loss).op(sample.input, *sample.args, **sample.kwargs)
            assert re.search(error.error_regex, str(caught.value)), str(caught.value)


@pytest.mark.one_in(2)
@per_dtype(module_dtypes)
def test_module_db(loss: str, dtype: torch.dtype, tally: Any) -> None:
    count = tally(loss, "module_db")
    record = module(loss)
    theirs_class = getattr(torch.nn, LOSSES[loss])
    samples = module_samples(loss, dtype)
    for k, sample in enumerate(samples):
        with count(sample.desc):
            built = (sample.constructor_input.args, sample.constructor_input.kwargs)
            ours = record.module_cls(*built[0], **built[1])
            theirs = theirs_class(*built[0], **built[1])
            check_module(ours, theirs)
            for each in (ours, theirs):
                each.requires_grad_(False)  # of a head; tests/heads differentiate it
            itself = ours
            theirs_in_float64 = sequences.projected(loss, deepcopy(theirs).double())
            ours, theirs = sequences.projected(loss, ours), sequences.projected(loss, theirs)
            call = Invocation(sample.forward_input.args, sample.forward_input.kwargs)
            if dtype is torch.float64:
                check_against_torch(ours, theirs, call)
                # PyTorch skips the gradient checks of KLDivLoss, whose record is full of NaN.
                # A mean over nothing is NaN, which has no differences.
                # Where there are very many, or each takes long, op_db has the differences of all kinds.
                few = len(samples) < MANY and loss != "ctc_loss"
                wanted = loss != "kl_div" and (few or k % 8 == 0)
                if wanted and not call(ours, call.tensors).isnan().any():
                    check_gradients(ours, call, fast=True)
            else:
                check_against_float64(ours, theirs, call, dtype, theirs_in_float64)
                check_layouts(ours, call)
            if sample.reference_fn is not None:
                check_reference(itself, sample, call, dtype)


def check_reference(ours: Any, sample: Any, call: Invocation, dtype: torch.dtype) -> None:
    args, kwargs = deepcopy(detached((call.args, call.kwargs)))
    expected = sample.reference_fn(ours, *args, **kwargs)
    half = dtype is torch.float16  # the reference rounds at every step; its record allows as much
    tolerance = {"rtol": 5e-3, "atol": 3e-2} if half else {}
    assert_close(ours(*args, **kwargs), expected, equal_nan=True, **tolerance)


def detached(value: Any) -> Any:
    return rebuilt(value, (t.detach() for t in tensors_in(value)))


def check_module(ours: Any, theirs: Any) -> None:
    """What surrounds a module is PyTorch's: its words, its state, its copies."""
    assert isinstance(ours, type(theirs))
    assert repr(ours) == repr(theirs)
    assert set(vars(ours)) >= set(vars(theirs))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    for copy in (deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(copy) is type(ours)
        assert repr(copy) == repr(ours)
        assert_close(dict(copy.state_dict()), dict(ours.state_dict()), equal_nan=True)


@per_dtype(module_dtypes)
def test_module_db_errors(loss: str, dtype: torch.dtype, tally: Any) -> None:
    count = tally(loss, "module_db errors")
    for error in module_errors(loss, dtype):
        with count(error.error_regex):
            sample = error.module_error_input
            args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
            make = module(loss).module_cls
            ours = (
                make(*args, **kwargs) if error.error_on is ModuleErrorEnum.FORWARD_ERROR else None
            )
            with pytest.raises(error.error_type) as caught:
                if ours is None:
                    make(*args, **kwargs)
                else:
                    ours(*sample.forward_input.args, **sample.forward_input.kwargs)
            assert re.search(error.error_regex, str(caught.value)), str(caught.value)


@each_loss
def test_common_nn(loss: str, tally: Any) -> None:
    """As test_nn.py runs them: PyTorch's functions, unedited, while ours are in their place."""
    count = tally(loss, "common_nn")
    for record in nn_samples(loss):
        with count(record["fullname"]), fusedloss.patched():
            torch.manual_seed(0)
            before = fusedloss.core.trace.calls().total()
            subject = record["constructor"](*record.get("constructor_args", ()))
            parts = [inputs_of(record, part) for part in ("input", "target")]
            inputs = [
                x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
                for part in parts
                for x in part
            ]
            result = subject(*inputs)
            assert fusedloss.core.trace.calls().total() > before
            if len(inputs) == 1:
                expected = record["reference_fn"](inputs[0], [], subject)
            else:
                groups = inputs[: len(parts[0])], inputs[len(parts[0]) :]
                given = [group[0] if len(group) == 1 else group for group in groups]
                expected = record["reference_fn"](*given, subject)
            # The reference keeps the float32 of its target, as PyTorch's own test does.
            tolerance = record.get("precision", 1e-6)
            assert_close(result, expected.to(result.dtype), rtol=0, atol=tolerance)
            leaf = inputs[0].detach().requires_grad_()
            gradcheck(lambda x, s=subject, i=inputs: s(x, *i[1:]), (leaf,), fast_mode=True)


def inputs_of(record: dict[str, Any], part: str) -> tuple[Any, ...]:
    if f"{part}_size" in record:
        return (torch.randn(record[f"{part}_size"]),)
    found = record[f"{part}_fn"]() if f"{part}_fn" in record else record.get(part, ())
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@each_loss
def test_own(loss: str, dtype: torch.dtype, tally: Any) -> None:
    count = tally(loss, "own")
    for k, sample in enumerate(own_samples(loss, dtype)):
        with count(f"{k}: {sample.summary()}"):
            check_sample(loss, sample, dtype)
            settings = inspect.signature(getattr(torch.nn, LOSSES[loss])).parameters
            if dtype is torch.float64 and set(sample.kwargs) <= set(settings):
                ours = getattr(fusedloss.nn, LOSSES[loss])(**sample.kwargs)
                theirs = getattr(torch.nn, LOSSES[loss])(**sample.kwargs)
                check_module(ours, theirs)
                call = Invocation((sample.input, *sample.args), {})
                ours, theirs = sequences.projected(loss, ours), sequences.projected(loss, theirs)
                if sample.name != SINGULAR:
                    check_against_torch(ours, theirs, call)
