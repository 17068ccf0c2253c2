"""Learning recipes of regions, their fate at deployment, and each family's default."""

from __future__ import annotations

from dataclasses import dataclass

from canvas_engineering.checked import checked_string, checked_strings

__all__ = ["FAMILY_DEFAULTS", "LearningSpec", "default_learning"]


@dataclass(frozen=True)
class LearningSpec:
    """The learning recipe of a region.

    Args:
        mode: the paradigm: "supervised", "ssl_prediction", "posterior_match", "retrieval", "calibration", "none", or
            another name that the training loop knows.
        losses: names of loss functions, for the training loop.
        compile_mode: what happens at deploy: "runtime" keeps it live, "freeze" stops its learning, "constant" turns
            its parameters into buffers, "export" writes them out, and both drop the region; "distill", to train a
            student, is recorded and does nothing yet.

    Raises:
        ValueError: a field of the wrong kind.

    >>> default_learning("memory").compile_mode
    'export'
    """

    mode: str = "supervised"
    losses: tuple[str, ...] = ()
    compile_mode: str = "runtime"

    def __post_init__(self) -> None:
        for name in ("mode", "compile_mode"):
            checked_string(getattr(self, name), f"LearningSpec {name}")
        object.__setattr__(self, "losses", checked_strings(self.losses, "LearningSpec losses"))


FAMILY_DEFAULTS: dict[str, LearningSpec] = {
    "observation": LearningSpec("ssl_prediction", ("next_step", "masked_prediction"), "freeze"),
    "state": LearningSpec("posterior_match", ("predictive_consistency", "calibration"), "runtime"),
    "memory": LearningSpec("retrieval", ("retrieval_accuracy", "write_utility"), "export"),
    "residual": LearningSpec("calibration", ("calibration", "sparsity"), "freeze"),
    "action": LearningSpec("supervised", ("task",), "freeze"),
}


def default_learning(family: str) -> LearningSpec:
    """Returns the recipe of a family; a plain LearningSpec for a family that is not among the five.

    >>> default_learning("memory").compile_mode
    'export'
    """
    return FAMILY_DEFAULTS.get(checked_string(family, "family"), LearningSpec())
