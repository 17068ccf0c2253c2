"""What operators share: autograd functions that transforms of torch.func see through, and autocast."""

from __future__ import annotations

import torch


def transformed() -> bool:
    """Whether a transform of torch.func is at work. It sees autograd functions, but none inside of an operator."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which autocast lets ``x`` take part: float64 and integers stay as they are."""
    dtype = x.dtype
    # a device makes its type's name anew each time: 20 µs with cold caches, of the 1500 that a small forward takes
    kind = "cpu" if x.is_cpu else x.device.type
    if dtype.is_floating_point and dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return dtype


def autocast(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Tensors as autocast lets them take part."""
    return tuple(None if x is None else x.to(autocast_dtype(x)) for x in tensors)


class Function(torch.autograd.Function):
    """An autograd function with ``setup_context``, to be called by :meth:`call`.

    torch binds the arguments of such a function anew at each ``apply``, 40 µs, three times what a small one takes.
    Outside of transforms and compilers a twin of the older form runs the same code.
    """

    generate_vmap_rule = True

    def __init_subclass__(cls) -> None:
        def forward(ctx, *inputs):
            output = cls.forward(*inputs)
            cls.setup_context(ctx, inputs, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(cls.backward)}
        cls.twin = type(cls.__name__, (torch.autograd.Function,), methods)

    @classmethod
    def call(cls, *inputs):
        """``apply`` of the form that fits; nothing is recorded where no gradient is wanted."""
        if torch.compiler.is_compiling() or transformed():
            return cls.apply(*inputs)
        return cls.twin.apply(*inputs) if torch.is_grad_enabled() else cls.forward(*inputs)
