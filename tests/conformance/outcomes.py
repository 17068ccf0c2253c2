"""What each cell of the matrix has to come to: right numbers, or a refusal that is named here."""

from __future__ import annotations

import dataclasses
import itertools

from tests.conformance import processes  # noqa: F401 - it has modes of its own
from tests.conformance.modes import MODES
from tests.conformance.subjects import SUBJECTS


@dataclasses.dataclass(frozen=True)
class Refusal:
    """What a mode cannot do.

    Args:
        message: regular expression that the error's text matches; it names the way out.
        note: the same in a few words, for the table.
    """

    message: str
    note: str


# torch.func itself does not know the hooks with which torch.utils.checkpoint recomputes
RECOMPUTED = Refusal(
    "don't yet support saved tensor hooks",
    "torch.func knows no recomputation: call eval(), or set use_gradient_checkpointing=False on the looped blocks",
)
# nor what a function writes into a tensor that it was not given
AVERAGES = Refusal(
    "attempted to call in-place operation|vmap: inplace arithmetic",
    "residual averages are updated in place: transform a step of a dispatcher without residual_accumulator",
)
TRANSFORMS = ("torch.compile of func.grad", "func.grad", "func.vjp", "func.vmap, and of func.grad", "func.jvp")

# nor what they refuse to wrap
NOTHING = Refusal(
    "not needed when a module doesn't have any parameter that requires a gradient|model state_dict is empty",
    "torch refuses to wrap a model without parameters, as these alone are: wrap the model that holds them",
)
SCALAR = Refusal(
    "fully_shard doesn't support scalar parameters. Change temperature",
    "FSDP2 shards no parameter of shape (), which `temperature` is: name it in `fully_shard`'s `ignored_params`",
)
DDP, FSDP2 = "DistributedDataParallel, 2 processes", "FSDP2, 2 processes, from meta"

REFUSALS: dict[tuple[str, str], Refusal] = {
    **{("a graft (recomputed loops)", mode): RECOMPUTED for mode in (*TRANSFORMS, "dual numbers")},
    **{("a program", mode): AVERAGES for mode in TRANSFORMS},
    **dict.fromkeys(itertools.product(("copy", "none", "canvas_attention (joint)"), (DDP, FSDP2)), NOTHING),
    ("cosine_attention", FSDP2): SCALAR,
}

CELLS = list(itertools.product(SUBJECTS, MODES))


def outcome(subject: str, mode: str) -> Refusal | None:
    """The refusal of a cell, or None where its numbers are right."""
    return REFUSALS.get((subject, mode))
