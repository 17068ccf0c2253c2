"""random_fixed: softmax over keys that are keys for each query once, from a seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes

from ..checked import checked_int
from ..derived_buffers import outside_inference
from ..plan import AttentionPlan
from .softmax import FixedPatternAttention

_MASK64 = (1 << 64) - 1


class RandomFixedAttention(FixedPatternAttention):
    """Softmax over min(n_random, m) keys of an attention set, keys once for each query from ``seed``.

    ``seed`` is a saved int64 buffer, keys from torch's generator unless given. The keys are a function of (seed, index
    of the query in its set, m): equal after a reload and on every device. Loading a checkpoint without a seed keeps the
    module's own.

    >>> module = RandomFixedAttention(8, n_heads=2, n_random=2, seed=1)
    >>> [keys.tolist() for keys in module.pairs(3, 9)]
    [[0, 0, 1, 1, 2, 2], [3, 7, 2, 5, 2, 7]]
    """

    seed: torch.Tensor

    def __init__(
        self,
        d_model: int,
        n_heads: int = 4,
        dropout: float = 0.0,
        n_random: int = 8,
        *,
        seed: int | None = None,
    ):
        super().__init__(d_model, n_heads, dropout)
        self.n_random = checked_int(n_random, "n_random", 1)
        self._host_seed = _random_seed() if seed is None else checked_int(seed, "seed", most=2**63 - 1)
        self.register_buffer("seed", torch.tensor(self._host_seed, dtype=torch.int64))
        self._prepared: list[AttentionPlan] = []
        self._seed_version = self._buffer_state()

    def prepare(self, plan: AttentionPlan) -> None:
        """Builds the table of ``plan``; again when another seed is loaded."""
        if not any(plan is known for known in self._prepared):
            self._prepared.append(plan)
        super().prepare(plan)

    def refine(self, plan: AttentionPlan) -> AttentionPlan:
        """Returns the plan with only the keys pairs."""
        return self.with_pattern(plan)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # published checkpoints hold no seed: their keys were keys anew in each call
        if f"{prefix}seed" not in state_dict:
            state_dict = {**state_dict, f"{prefix}seed": self.seed}
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._copy_seed()
        for plan in self._prepared:
            super().prepare(plan)

    @outside_inference
    def _apply(self, fn, recurse=True):
        self.pattern_key()
        super()._apply(fn, recurse)
        if self._is_real():  # to_empty leaves memory uninitialised
            self.seed = torch.tensor(self._host_seed, dtype=torch.int64, device=self.seed.device)
        self._seed_version = self._buffer_state()
        return self

    def _is_real(self) -> bool:
        return type(self.seed) is torch.Tensor and not self.seed.is_meta

    def _copy_seed(self) -> None:
        """Copies the seed to the host, once each time the buffer is moved or written."""
        if self._is_real():
            self._host_seed = int(self.seed)
        self._seed_version = self._buffer_state()

    def _buffer_state(self) -> tuple:
        return (id(self.seed), None if self.seed.is_inference() else self.seed._version)

    def pattern_key(self) -> tuple:
        # compilers cannot trace tensor versions; loading a state dict updates the seed itself
        if not torch.compiler.is_compiling() and self._seed_version != self._buffer_state():
            self._copy_seed()
        return ("random", self.n_random, self._host_seed)

    def draw(self, n: int, m: int) -> np.ndarray:
        """Returns int64 [n, min(n_random, m)]: the keys of each query, ascending."""
        _, _, seed = self.pattern_key()
        return np.sort(draw_keys(seed, n, m, min(self.n_random, m)), axis=1)

    def pairs(self, n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
        keys = self.draw(n, m)
        return np.repeat(np.arange(n), keys.shape[1]), keys.reshape(-1)


def _random_seed() -> int:
    with _disable_current_modes():
        return int(torch.randint(2**63 - 1, (), device="cpu"))


def draw_keys(seed: int, n: int, m: int, count: int) -> np.ndarray:
    """Draws ``count`` distinct numbers below m for each of n queries, by Floyd's method: for each last = m − count …
    m − 1 a number up to ``last``, or ``last`` itself if that was keys before.

    Numbers are splitmix64 hashes of (seed, query, m, last), so that draws are independent of each other. They may never
    change: saved models depend on them.

    Returns:
        int64 [n, count].
    """
    word = _scramble(np.array(seed & _MASK64, np.uint64))
    word = _scramble(_scramble(word ^ np.arange(n, dtype=np.uint64)) ^ np.uint64(m))
    keys = np.empty((n, count), np.int64)
    for column, last in enumerate(range(m - count, m)):
        number = (_scramble(word ^ np.uint64(last)) % np.uint64(last + 1)).astype(np.int64)
        repeated = (keys[:, :column] == number[:, None]).any(1)
        keys[:, column] = np.where(repeated, last, number)
    return keys


def _scramble(word: np.ndarray) -> np.ndarray:
    """Returns the next output of splitmix64 (Steele, Lea, Flood, 2014) for each uint64 state, modulo 2⁶⁴."""
    with np.errstate(over="ignore"):
        word = word + np.uint64(0x9E3779B97F4A7C15)
        word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return word ^ (word >> np.uint64(31))
