"""Values derived from host tables: computed once, in any mode of torch, in bounded caches.

Tensors are derived inside of operators only, so that traced, exported or fake graphs hold the string key of a table or
index map instead. :func:`derived` is the decorator that caches them.
"""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from threading import RLock
from typing import Any, TypeVar, cast

import torch
from torch.utils._python_dispatch import _disable_current_modes

Maker = TypeVar("Maker", bound=Callable[..., Any])

_lock = RLock()


@contextlib.contextmanager
def real_tensors() -> Iterator[None]:
    """Disables every mode of torch, so that tensors created in the block are plain and may be cached.

    Disabled are inference mode, fake and functional tensors, tracing, transforms of torch.func and default devices.

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
    """Whether Python may use the values of ``x``: it is not traced, fake, transformed or of a subclass."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or type(x) is not torch.Tensor
    )


class Store:
    """Values derived from one host object, by function and arguments. Copies and pickles start empty."""

    def __init__(self) -> None:
        self.values: dict[str, OrderedDict] = {}

    def __deepcopy__(self, memo) -> Store:
        return Store()

    def __reduce__(self):
        return Store, ()


def derived(limit: int = 16) -> Callable[[Maker], Maker]:
    """Returns a decorator that caches a function's results in the ``store`` of its first argument.

    The other arguments (positional, hashable) are the key; at most ``limit`` values per function and object are cached,
    the least recently used is evicted.
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

        return cast(Maker, get)

    return decorate


def to_device(array, device: torch.device | str) -> torch.Tensor:
    """Returns a numpy array as a tensor on ``device`` that shares no memory with it."""
    return torch.from_numpy(array.copy()).to(device)
