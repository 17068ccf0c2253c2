"""Values derived from host tables: made once, whatever mode torch is in, and bounded.

Tensors are derived inside of operators only, so that what is traced, exported or faked never holds one: it holds the
string key of a table or of an index map. :func:`derived` is the one decorator that keeps them.
"""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from threading import RLock
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import _disable_current_modes

Maker = TypeVar("Maker", bound=Callable[..., Any])

_lock = RLock()


@contextlib.contextmanager
def real_tensors() -> Iterator[None]:
    """Runs its body with every mode of torch off, so that tensors made in it are plain and may be kept.

    Off are inference mode, fake and functional tensors, tracing, transforms of torch.func and default devices.

    >>> with torch.inference_mode(), real_tensors():
    ...     torch.zeros(1).is_inference()
    False
    """
    with (
        torch.inference_mode(False),
        torch._C._DisableFuncTorch(),
        torch._C.DisableTorchFunction(),
        _disable_current_modes(),
    ):
        yield


def is_plain(x: torch.Tensor) -> bool:
    """Returns whether the values of ``x`` may be read by Python: not traced, faked, transformed or a subclass."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or type(x) is not torch.Tensor
    )


class Store:
    """What was derived from one host object: values by function and arguments. Copies and pickles start empty."""

    def __init__(self) -> None:
        self.values: dict[str, OrderedDict] = {}

    def __deepcopy__(self, memo) -> Store:
        return Store()

    def __reduce__(self):
        return Store, ()


def derived(limit: int = 16) -> Callable[[Maker], Maker]:
    """Returns a decorator that keeps what a function derives from its first argument, an object with a ``store``.

    The function's other arguments (positional, hashable) are the key; of each function at most ``limit`` values are
    kept per object, the least recently used goes first.
    """

    def decorate(make: Maker) -> Maker:
        name = f"{make.__module__}.{make.__qualname__}"

        @functools.wraps(make)
        def get(owner, *key):
            with _lock:
                values = owner.store.values.setdefault(name, OrderedDict())
                if key in values:
                    values.move_to_end(key)
                    return values[key]
                with real_tensors():
                    value = values[key] = make(owner, *key)
                if len(values) > limit:
                    values.popitem(last=False)
                return value

        return get

    return decorate


def to_device(array, device: torch.device | str) -> torch.Tensor:
    """Returns a numpy array as a tensor on ``device`` that shares no memory with it."""
    return torch.from_numpy(array.copy()).to(device)
