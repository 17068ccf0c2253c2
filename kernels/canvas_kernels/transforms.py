"""Autograd functions that the transforms of torch.func see through, at no cost to calls without them."""

from __future__ import annotations

import torch


def transformed() -> bool:
    """Whether a transform of torch.func is at work. It sees autograd functions, but none inside of an operator."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


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
        """``apply`` of the form that fits."""
        return (cls if torch.compiler.is_compiling() or transformed() else cls.twin).apply(*inputs)
