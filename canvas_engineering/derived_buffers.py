"""Base class of modules with trainable parameters, tables derived from a declaration, and state of one process."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import nn

_P = ParamSpec("_P")
_R = TypeVar("_R")


def outside_inference(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorates a function that leaves ``torch.inference_mode`` while it runs: tensors made there can be trained.

    >>> with torch.inference_mode():
    ...     outside_inference(torch.zeros)(1).is_inference()
    False
    """

    # a frame of this package, for warnings that look for the user's line
    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False):
            return function(*args, **kwargs)

    return call


def refuse_inference_tensors(module: nn.Module, what: str) -> None:
    """Checks that somebody else's module can be trained.

    Args:
        module: the module.
        what: what it is, for the message.

    Raises:
        ValueError: parameters or buffers that are inference tensors, by name.
    """
    names = [name for name, t in chain(module.named_parameters(), module.named_buffers()) if t.is_inference()]
    if names:
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise ValueError(
            f"{what}, a {type(module).__name__}, was made or moved under torch.inference_mode, and inference tensors "
            f"cannot be trained: {shown}. Make it outside of that mode, or give a copy.deepcopy made outside of it"
        )


class CanvasModule(nn.Module):
    """Base class of the package's modules.

    Constructors, those of subclasses too, leave ``torch.inference_mode``, so that their parameters can be trained.

    Tables are buffers that follow from the declaration. They are in no state dict, keep their dtype when a model
    changes its own, and are made again from the host whenever the module moves: on the ``meta`` device, then
    ``to_empty``, or ``load_state_dict(assign=True)``, they hold what was declared.

    State is a tensor that each process keeps for itself, such as running averages. It is in the state dict under its
    name, and moves, copies, pickles and loads as a buffer does; but parents do not list it among their buffers, so
    that ``DistributedDataParallel`` does not replace it by that of rank 0 in each forward. It keeps its dtype too.

    >>> class Frames(CanvasModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.register_table("index", np.array([2, 0]))
    >>> with torch.device("meta"):
    ...     frames = Frames()
    >>> frames.to_empty(device="cpu").half().index
    tensor([2, 0])
    """

    _declared_tables: dict[str, np.ndarray] = {}
    _own_states: tuple[str, ...] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # on modules without tables too: those of their children lie where their own parameters do
        self.register_load_state_dict_post_hook(_fill_tables)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            cls.__init__ = outside_inference(cls.__init__)

    @outside_inference
    def register_table(self, name: str, array: np.ndarray) -> None:
        """Makes ``array`` the buffer ``name`` on the default device. It must not be written to afterwards.

        Raises:
            TypeError: no numpy array.
        """
        if not isinstance(array, np.ndarray):
            raise TypeError(f"table {name!r} must be a numpy array, from which tensors are made again; got {array!r}")
        self.register_buffer(name, torch.tensor(array), persistent=False)
        self._declared_tables = {**self._declared_tables, name: array}

    def register_state(self, name: str, tensor: torch.Tensor) -> None:
        """Makes ``tensor`` the attribute ``name``, state of this process."""
        self.__dict__[name] = tensor
        self._own_states = (*self._own_states, name)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Buffers, and the module's own state, which is moved where its buffers are (FSDP2 does so)."""
        yield from super().named_buffers(prefix, recurse, remove_duplicate)
        for name in self._own_states:
            yield f"{prefix}.{name}" if prefix else name, self.__dict__[name]

    @contextlib.contextmanager
    def _states_as_buffers(self) -> Iterator[None]:
        """A module whose buffers are state, under torch's own rules."""
        for name in self._own_states:
            self._buffers[name] = self.__dict__.pop(name)
        try:
            yield
        finally:
            for name in self._own_states:
                self.__dict__[name] = self._buffers.pop(name)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        with self._states_as_buffers():
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        with self._states_as_buffers():
            super()._load_from_state_dict(state_dict, prefix, *args)

    @outside_inference
    def _apply(self, fn, recurse=True):
        before = {name: self.__dict__[name] for name in self._own_states}
        with self._states_as_buffers():
            super()._apply(fn, recurse)
        for name, tensor in before.items():
            if self.__dict__[name].dtype != tensor.dtype:
                self.__dict__[name] = tensor.to(self.__dict__[name].device)
        for name in self._declared_tables:
            self._fill(name)
        return self

    def _fill(self, name: str, home: torch.device | None = None) -> None:
        """Makes a table again where it lies, unless that is ``meta``; with ``home``, there and only then."""
        table = self._buffers[name]
        # a fake or a distributed tensor is as its maker left it
        if type(table) is torch.Tensor and table.is_meta == (home is not None):
            device = table.device if home is None else home
            self._buffers[name] = torch.tensor(self._declared_tables[name], device=device)


@outside_inference
def _fill_tables(module: CanvasModule, incompatible_keys: Any) -> None:
    """After loading over tensors on ``meta``: rebuilds tables on the same device."""
    devices = (tensor.device for tensor in chain(module.parameters(), module.buffers()))
    home = next((device for device in devices if device.type != "meta"), None)
    for child in () if home is None else module.modules():
        if isinstance(child, CanvasModule):
            for name in child._declared_tables:
                child._fill(name, home)
