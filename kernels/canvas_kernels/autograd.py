"""All autograd functions of the project, for eager, compiled and exported code and transforms of torch.func.

Two are linear (rows moved by an index map) and are their own derivatives. All others are an :class:`Operation`: a
forward operator, a backward operator for first derivatives, and the same function composed of plain torch, for tangents
and derivatives of any higher order. Operators have no autograd of their own, and compilers put the functions at the end
of this file into their graphs unchanged (``torch.compiler.allow_in_graph``): on torch 2.10 to 2.13 only that is correct
under ``torch.compile`` together with ``torch.func``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

# Dispatch keys that the operators are registered for.
DEVICES = ("CPU", "CUDA", "MPS", "XPU", "PrivateUse1")
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


class Function(torch.autograd.Function):
    """An autograd function with ``setup_context``, to be called by :meth:`call`.

    torch binds the arguments of such a function at each ``apply``, 20 µs, twice the time of a small operator. Outside
    of transforms a legacy (ctx-first) copy of the function runs the same code.
    """

    def __init_subclass__(cls) -> None:
        def forward(ctx, *inputs):
            output = cls.forward(*inputs)
            cls.setup_context(ctx, inputs, output)
            return output

        methods = {"forward": forward, "backward": cls.backward, "jvp": cls.jvp}
        methods = {name: staticmethod(method) for name, method in methods.items()}
        cls.legacy = type(cls.__name__, (torch.autograd.Function,), methods)

    @classmethod
    def call(cls, *inputs):
        """Applies the function, or its legacy copy outside of transforms."""
        return (cls if torch._C._are_functorch_transforms_active() else cls.legacy).apply(*inputs)


MAPS: dict[str, Callable[[str], object]] = {}
"""Lookup of index maps by key, set by :mod:`.packing`: graphs keep theirs alive until backward."""


# -- rows --------------------------------------------------------------------------------------------------------------


class _ApplyMap(Function):
    """Computes y = A x along ``dim``, or Aᵀ x if ``transposed``."""

    @staticmethod
    def forward(x, key, transposed, dim):
        return torch.ops.canvas_kernels.apply_map.default(x, key, transposed, dim)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.map, ctx.owner = inputs[1:], MAPS["lookup"](inputs[1])

    @staticmethod
    def backward(ctx, grad):
        key, transposed, dim = ctx.map
        return _ApplyMap.call(grad, key, not transposed, dim), None, None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        return _ApplyMap.call(tangent, *ctx.map)

    @staticmethod
    def vmap(info, in_dims, x, key, transposed, dim):
        return _ApplyMap.call(x.movedim(in_dims[0], -1), key, transposed, dim), -1


class _ReplaceRows(Function):
    """Replaces the rows of a distinct gather in x by y, or by zeros for None."""

    @staticmethod
    def forward(x, y, key, dim):
        return torch.ops.canvas_kernels.replace_rows.default(x, y, key, dim)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.map, ctx.owner = inputs[2:], MAPS["lookup"](inputs[2])

    @staticmethod
    def backward(ctx, grad):
        key, dim = ctx.map
        d_x = _ReplaceRows.call(grad, None, key, dim) if ctx.needs_input_grad[0] else None
        d_y = _ApplyMap.call(grad, key, False, dim) if ctx.needs_input_grad[1] else None
        return d_x, d_y, None, None

    @staticmethod
    def jvp(ctx, d_x, d_y, *_):
        key, dim = ctx.map
        if d_x is None:
            return _ApplyMap.call(d_y, key, True, dim)
        return _ReplaceRows.call(d_x, d_y, key, dim)

    @staticmethod
    def vmap(info, in_dims, x, y, key, dim):
        moved = [
            each if each is None else each.movedim(at, -1) if at is not None else each[..., None]
            for each, at in zip((x, y), in_dims)
        ]
        moved = [each if each is None else each.expand(*each.shape[:-1], info.batch_size) for each in moved]
        return _ReplaceRows.call(*moved, key, dim), -1


# -- operations --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operation:
    """One differentiable operation; a call's ``args`` are ``n_tensors`` tensors or None, then constants.

    Attributes:
        forward: (keep, *args) → (result, *saved), tensors; ``saved`` is for backward, if ``keep``, and has no gradient.
        backward: (gradient, needs, saved, *args) → a gradient for each tensor i with bit i of ``needs`` set, None for
            others. ``saved`` starts with the result, or None unless ``keeps_result(*args)``.
        composition: (*args) → result, by plain differentiable torch.
        differentiable: which of the tensors have gradients, the others are constants.
        keeps_result: (*args) → bool.
        owners: (*args) → objects that ``args`` name by key, saved alive until backward.
    """

    forward: Callable
    backward: Callable
    composition: Callable
    n_tensors: int
    differentiable: tuple[int, ...]
    keeps_result: Callable[..., bool] = lambda *args: False
    owners: Callable[..., object] = lambda *args: None

    def of_tensors(self, args: tuple) -> tuple[list[torch.Tensor], Callable, list[int]]:
        """Returns the tensors of ``args`` with gradients, the composition as a function of these, and their numbers."""
        numbers = [i for i in self.differentiable if args[i] is not None]

        def function(*tensors):
            filled = list(args)
            for i, x in zip(numbers, tensors):
                filled[i] = x
            # no autocast inside: 16-bit inputs are computed in float32
            with torch._C._DisableAutocast():
                return self.composition(*filled)

        return [args[i] for i in numbers], function, numbers


OPERATIONS: dict[str, Operation] = {}
"""Operations by name; modules register theirs."""


def _tangent(function: Callable, primals: list[torch.Tensor], tangents: list[torch.Tensor | None]):
    """Returns the derivative of ``function`` along ``tangents`` by two reverse passes."""
    result, pull = torch.func.vjp(function, *primals)[:2]
    cotangent = torch.zeros_like(result) if isinstance(result, torch.Tensor) else tuple(map(torch.zeros_like, result))
    push = torch.func.vjp(pull, cotangent)[1]
    filled = (torch.zeros_like(x) if t is None else t for x, t in zip(primals, tangents))
    return push(tuple(filled))[0]


def _slices(function: type[Function], info, in_dims, args):
    """Implements vmap by one call for each slice."""
    results = []
    for i in range(info.batch_size):
        inputs = (x if at is None else x.select(at, i) for x, at in zip(args, in_dims))
        results.append(function.call(*inputs))
    stacked = tuple(None if part[0] is None else torch.stack(part) for part in zip(*results))
    return stacked, tuple(None if part is None else 0 for part in stacked)


class _Operate(Function):
    @staticmethod
    def forward(name, keep, *args):
        return OPERATIONS[name].forward(keep, *args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        name, _, *args = inputs
        operation, (result, *saved) = OPERATIONS[name], output
        ctx.name, ctx.constants = name, args[operation.n_tensors :]
        ctx.n_tensors, ctx.n_saved, ctx.owners = operation.n_tensors, len(saved), operation.owners(*args)
        tensors = args[: operation.n_tensors]
        result = result if operation.keeps_result(*args) else None
        ctx.save_for_backward(*tensors, result, *saved)
        ctx.save_for_forward(*tensors)
        ctx.mark_non_differentiable(*saved)
        # or autograd would allocate zeros the size of saved tensors
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad, *_):
        n = ctx.n_tensors
        nothing = (None,) * (2 + n + len(ctx.constants))
        if grad is None:
            return nothing
        # read once: activation checkpointing unpacks them each time
        saved = ctx.saved_tensors
        tensors, saved = saved[:n], saved[n:]
        needs = sum(1 << i for i in OPERATIONS[ctx.name].differentiable if ctx.needs_input_grad[2 + i])
        if not needs:
            return nothing
        grads = _Differentiate.call(ctx.name, needs, len(saved), grad, *saved, *tensors, *ctx.constants)
        by_index = dict(zip((i for i in range(n) if needs >> i & 1), grads))
        return None, None, *(by_index.get(i) for i in range(n)), *(None,) * len(ctx.constants)

    @staticmethod
    def jvp(ctx, _name, _keep, *tangents):
        operation, tensors = OPERATIONS[ctx.name], ctx.saved_tensors[: ctx.n_tensors]
        primals, function, numbers = operation.of_tensors((*tensors, *ctx.constants))
        if any(tangents[i] is not None for i in set(range(ctx.n_tensors)) - set(operation.differentiable)):
            raise NotImplementedError(
                f"{ctx.name} has constants (activity, row scales, rates): a tangent of one of them would be dropped; "
                "detach it"
            )
        tangent = _tangent(function, primals, [tangents[i] for i in numbers])
        return tangent, *(None,) * ctx.n_saved

    @staticmethod
    def vmap(info, in_dims, *args):
        return _slices(_Operate, info, in_dims, args)


class _Differentiate(Function):
    """Computes the gradients of an operation for the tensors in ``needs``; differentiated by its composition."""

    @staticmethod
    def forward(name, needs, n_saved, grad, *rest):
        saved, args = rest[:n_saved], rest[n_saved:]
        grads = OPERATIONS[name].backward(grad, needs, saved, *args)
        return tuple(each for i, each in enumerate(grads) if needs >> i & 1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.name, ctx.needs, ctx.n_saved, grad, *rest = inputs
        n = OPERATIONS[ctx.name].n_tensors
        args = rest[ctx.n_saved :]
        ctx.constants = args[n:]
        ctx.save_for_backward(grad, *args[:n])
        ctx.save_for_forward(grad, *args[:n])
        ctx.set_materialize_grads(False)

    @staticmethod
    def _function(ctx):
        """Returns (primals, their indices among the inputs, gradients as a function of them, number of tensors)."""
        grad, *tensors = ctx.saved_tensors
        primals, function, numbers = OPERATIONS[ctx.name].of_tensors((*tensors, *ctx.constants))
        needed = [index for index, i in enumerate(numbers) if ctx.needs >> i & 1]

        def gradients(grad, *primals):
            grads = torch.func.vjp(function, *primals)[1](grad)
            return tuple(grads[index] for index in needed)

        first = 4 + ctx.n_saved
        return [grad, *primals], [3, *(first + i for i in numbers)], gradients, len(tensors)

    @staticmethod
    def backward(ctx, *grads):
        primals, indices, gradients, n_tensors = _Differentiate._function(ctx)
        results, pull = torch.func.vjp(gradients, *primals)[:2]
        by_index = pull(tuple(torch.zeros_like(r) if g is None else g for r, g in zip(results, grads)))
        count = 4 + ctx.n_saved + n_tensors + len(ctx.constants)
        by_input = dict(zip(indices, by_index))
        return tuple(by_input.get(index) for index in range(count))

    @staticmethod
    def jvp(ctx, *tangents):
        primals, indices, gradients, _ = _Differentiate._function(ctx)
        return _tangent(gradients, primals, [tangents[index] for index in indices])

    @staticmethod
    def vmap(info, in_dims, *args):
        return _slices(_Differentiate, info, in_dims, args)


def under_autograd(operator: Callable, function: Callable) -> Callable:
    """Returns an operator's kernel for torch's Autograd key, which only exported graphs call: ``function(*args)`` if
    gradients are required, else the operator."""

    def call(*args):
        if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in args):
            return function(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    return call


# -- functions that compilers do not trace -----------------------------------------------------------------------------


def apply_map(x: torch.Tensor, key: str, transposed: bool, dim: int) -> torch.Tensor:
    """Applies the index map of this key to the rows of x along ``dim``."""
    return _ApplyMap.call(x, key, transposed, dim)


def replace_rows_by_map(x: torch.Tensor, y: torch.Tensor, key: str, dim: int) -> torch.Tensor:
    """Replaces the rows of x that the index map of this key gathers by those of y."""
    return _ReplaceRows.call(x, y, key, dim)


def operate(name: str, *args) -> tuple[torch.Tensor, ...]:
    """Runs the operation of this name: (result, *saved)."""
    tensors = (x for x in args if isinstance(x, torch.Tensor))
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return _Operate.call(name, keep or torch._C._are_functorch_transforms_active(), *args)


COMPILED_FUNCTIONS: list[Callable] = [apply_map, replace_rows_by_map, operate]
"""Functions that compilers do not trace; modules register theirs."""
CONSTANT_FUNCTIONS: list[Callable] = []
"""Functions of constants that compilers evaluate instead of tracing; modules register theirs."""


_VIEWS = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)


def own_products(kernel: Callable) -> Callable:
    """Decorates the kernel of an operator: no autocast inside, and results that dual numbers accept (no views)."""

    @functools.wraps(kernel)
    def call(*args):
        with torch._C._DisableAutocast(), torch._C._ExcludeDispatchKeyGuard(_VIEWS):
            return kernel(*args)

    return call


@functools.cache
def mark_for_compilers() -> None:
    """Registers these functions with torch.compile. It imports torch._dynamo, so only the first plan calls it."""
    for function in COMPILED_FUNCTIONS:
        torch.compiler.allow_in_graph(function)
    for function in CONSTANT_FUNCTIONS:
        torch.compiler.assume_constant_result(function)
