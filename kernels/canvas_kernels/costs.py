"""What the torch executor's work costs on a processor: counts of work times measured seconds of each.

The rates are data, ``rates.json`` beside this file: an entry per device, written by ``python -m benchmarks.rates``. The
same numbers choose how cells are grouped and predict how long that takes. Plain arithmetic: counts may be numpy arrays,
X is batch · heads and D is head_dim.
"""

from __future__ import annotations

import functools
import json
import platform
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

RATES = Path(__file__).with_name("rates.json")
CPUINFO = Path("/proc/cpuinfo")
COUNTS = {
    "call": "calls of the operation",
    "element": "elements of one canvas tensor, n · X · D, that are cleared, written and read whatever is attended over",
    "order": "calls that put positions into packed order and back",
    "moved": "elements that such calls move",
    "cleared": "elements of canvas tensors that they clear for it",
    "converted": "elements of inputs that are cast or copied first",
    "fresh": "bytes of tensors so large that their memory comes from the system, page by page",
    "slab": "slabs computed by products",
    "lane": "lanes of such slabs after the first",
    "piece": "ranges of rows or keys after a slab's first",
    "matrix": "matrices of batched products",
    "product": "pairs · D of batched products",
    "pair": "probabilities of batched products",
    "short": "those in softmaxes over short rows",
    "spilled": "those of lanes beyond what stays in cache from one pass to the next",
    "bias": "those with an addend of their own",
    "row": "elements of slabs' queries and keys",
    "added": "elements that slabs add to what others wrote, instead of writing first",
    "uneven": "elements of queries in slabs whose rows have coefficients of their own",
    "copied": "elements of slabs that are copied side by side first",
    "flash_slab": "slabs computed by the flash kernel",
    "flash_matrix": "their (cell, head)s",
    "flash_product": "their pairs · D",
    "flash_pair": "their probabilities",
    "frame": "(frame, head)s of tables that are nothing but frames",
    "frame_row": "elements of their queries",
    "frame_product": "their pairs · D",
    "frame_pair": "their probabilities",
    "stage": "stages",
    "batch": "batches",
    "gathered": "elements of rows gathered for batches",
    "ragged": "rows of products, slabs or frames whose keys do not fill their last vector",
}
"""What is counted, by name, each for a forward and for a backward pass."""
LARGE_BYTES = 32 << 20
"""Tensors above this many bytes are mapped and unmapped by malloc every time."""
# Softmax over fewer keys than this runs along the middle dimension, keys first, wherever rows are at least as many:
# over the last one torch does not use its vector units for short rows. ns per element (rows × keys): 256 × 8 27 / 1.3,
# 16 × 4 37 / 2.0, 180 × 30 3.6 / 1.8, 64 × 64 1.3 / 1.4.
KEYS_FIRST = 64
# Probabilities of one product that stay in a cache of 2 MB, with as many of their gradients.
CACHED_PAIRS = 1 << 18
IDENTITY = {
    "vendor_id": "",
    "cpu family": "family",
    "model": "model",
    "stepping": "stepping",
    "CPU implementer": "implementer",
    "CPU part": "part",
    "CPU variant": "variant",
    "CPU revision": "revision",
}
"""What /proc/cpuinfo calls the parts of a processor's identity, on x86 and on ARM, and what its key calls them."""
TYPICAL = {"heads": 4, "head_dim": 64}
"""What groupings are chosen for: one serves all numbers of heads."""


def slab_counts(
    cells, rows, keys, *, heads: int, head_dim: int, thin, flash=False, bias=False, row_pieces=1, key_pieces=1
) -> dict:
    """Counts of a slab of ``cells`` cells, ``rows`` × ``keys`` each; ``thin`` as a Slab says."""
    pairs, own = heads * cells * rows * keys, heads * cells * (rows + keys) * head_dim
    joined = heads * cells * head_dim * ((row_pieces > 1) * rows + (key_pieces > 1) * keys)
    counts = {"row": own, "piece": row_pieces + key_pieces - 2, "bias": pairs * bias}
    if flash:
        counts |= {"flash_slab": 1, "flash_matrix": heads * cells, "flash_product": pairs * head_dim}
        return counts | {"flash_pair": pairs, "ragged": heads * cells * rows * ragged(keys), "copied": joined}
    several = (cells > 1) * (heads > 1)
    # the fewer of cells and heads are walked one by one
    lanes = several * (1 - thin) * (np.minimum(cells, heads) - 1)
    counts |= {"slab": 1, "lane": lanes, "copied": joined + several * thin * own}
    return counts | _products(pairs, head_dim, heads * cells, rows, keys, pairs / (lanes + 1))


def batch_counts(
    units, rows, segments, keys, *, heads: int, head_dim: int, bias=False, again=False
) -> dict:
    """Counts of ``units`` units of a batch: ``rows`` × ``segments`` · ``keys`` each; the batch itself is one more.
    ``again``: backward computes the probabilities once more, which is one product after four."""
    pairs = heads * units * rows * segments * keys
    counts = {"gathered": heads * units * (rows + segments * keys) * head_dim, "bias": pairs * bias}
    computed = 1.25 * pairs if again else pairs
    return counts | _products(computed, head_dim, heads * units, rows, keys, pairs)


def frame_counts(queries, rows, head_dim: int, *, masked: bool = False) -> dict:
    """Counts of (head, position)s in frames of ``rows`` rows that read themselves; ``masked``: under addends."""
    pairs = queries * rows
    counts = {"frame": queries // rows, "frame_row": queries * head_dim, "frame_product": pairs * head_dim}
    return counts | {"frame_pair": pairs, "ragged": queries * ragged(rows), "bias": pairs * masked}


def _products(pairs, head_dim, matrices, rows, keys, at_once) -> dict:
    """Of ``pairs`` in ``matrices`` of rows × keys, so many of them ``at_once``."""
    short = (keys < KEYS_FIRST) & (keys > rows)
    counts = {"matrix": matrices, "product": pairs * head_dim, "pair": pairs, "short": pairs * short}
    counts["spilled"] = pairs * np.maximum(1 - CACHED_PAIRS / at_once, 0)
    # elsewhere keys come first, and vectors run along the rows
    return counts | {"ragged": pairs / keys * ragged(keys) * (short | (keys >= KEYS_FIRST))}


def ragged(keys):
    """Whether so many keys do not end with a vector of sixteen, which costs a row 0.1 µs in softmaxes and in torch's
    flash kernel alike: a quarter of the forward of frames of 42."""
    return keys % 16 > 0


def total(parts: Iterable[dict]) -> dict:
    """Counts added up."""
    found: dict = {}
    for part in parts:
        for name, count in part.items():
            found[name] = found.get(name, 0) + count
    return found


def seconds(counts: dict, rates: dict):
    """What counts take at ``rates``, the seconds of each."""
    return sum(rates[name] * count for name, count in counts.items())


@functools.cache
def all_rates() -> dict[str, dict]:
    """The entries of ``rates.json`` by device. A processor's that lacks a count, for it was measured before that was
    counted, is left out with a warning."""
    found = json.loads(RATES.read_text())
    for name in [name for name, entry in found.items() if "backward" in entry]:
        missing = [count for count in COUNTS if any(count not in found[name][part] for part in ("forward", "backward"))]
        if missing:
            del found[name]
            what = f"{RATES}: {name} has no rate for {', '.join(missing)}, and is left out"
            warnings.warn(f"{what}; `python -m benchmarks.rates` measures it anew", stacklevel=2)
    return found


@functools.cache
def cpuinfo() -> dict[str, str]:
    """What Linux says of the first processor; nothing elsewhere."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    found: dict[str, str] = {}
    for name, value in (line.split(":", 1) for line in lines if ":" in line):
        found.setdefault(name.strip(), value.strip())
    return found


def processor() -> str:
    """The name of this machine's processor, which others may share: :func:`processor_key` tells them apart."""
    return cpuinfo().get("model name") or platform.processor() or platform.machine()


def processor_key(threads: int) -> str:
    """The name under which this machine's rates stand, which says what machine it is: many call themselves Xeon."""
    found = (f"{label} {cpuinfo()[name]}".strip() for name, label in IDENTITY.items() if name in cpuinfo())
    return f"{processor()} ({', '.join(found) or platform.machine()}), {threads} thread{'s' * (threads != 1)}"


@functools.cache
def choosing() -> dict[str, float]:
    """Seconds of each count, forward and backward together, by which cells are grouped: one thread's of this
    processor, or of the first one measured. What was measured before a count came up groups without it, as it did."""
    rates = json.loads(RATES.read_text())
    entry = rates.get(processor_key(1)) or next(entry for entry in rates.values() if "backward" in entry)
    return both_passes(entry)


def both_passes(entry: dict) -> dict[str, float]:
    """Seconds of each count, forward and backward together, of a processor's entry."""
    return {name: entry["forward"].get(name, 0.0) + entry["backward"].get(name, 0.0) for name in COUNTS}


# -- GPUs --------------------------------------------------------------------------------------------------------------


class Block(NamedTuple):
    """A block of a kernel's walk: ``seconds`` in one program, of which ``resident`` share a multiprocessor."""

    seconds: float
    resident: int

    @property
    def cost(self) -> float:
        """Seconds of a multiprocessor."""
        return self.seconds / self.resident


def block_key(stage: str, form: str, block_d: int, itemsize: int, config) -> str:
    """The name of a configuration's block in a GPU's entry."""
    return f"{stage} {form} {block_d} {8 * itemsize} {config.block_m} {config.block_n}"


def blocks(rates: dict, stage: str, form: str, block_d: int, itemsize: int, configs) -> list[Block] | None:
    """Measured blocks of the configurations of a pass, in a GPU's entry; None where one of them was not measured."""
    found = [rates["blocks"].get(block_key(stage, form, block_d, itemsize, config)) for config in configs]
    return None if None in found else [Block(*block) for block in found]


def gpu_seconds(rates: dict) -> dict[str, float]:
    """Seconds of each block, of a byte that is moved and of a launch, of a GPU's entry."""
    each = {key: block[0] for key, block in rates["blocks"].items()}
    return each | {"byte": 1 / rates["bandwidth"], "launch": rates["launch"]}
