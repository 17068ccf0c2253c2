"""Programs: what each region is, when it updates, how its connections behave, and how it is lowered for deployment.

`specs` holds a program's declarations, `connections` resolves connections under a program, `document` is the whole
program and its JSON, and `checks` refuses or reports what cannot be meant.
"""

from canvas_engineering.learning import LearningSpec
from canvas_engineering.program.checks import validate_constraints
from canvas_engineering.program.connections import OPERATOR_DEFAULTS, evaluate_trigger, resolve_operator_defaults
from canvas_engineering.program.document import CanvasProgram
from canvas_engineering.program.specs import (
    CARRIERS,
    COMPILE_MODES,
    OPERATORS,
    REGION_FAMILIES,
    WRITE_MODES,
    ClockSpec,
    ConnectionProgram,
    ConstraintSpec,
    RegionProgram,
)

__all__ = [
    "CARRIERS",
    "COMPILE_MODES",
    "OPERATORS",
    "OPERATOR_DEFAULTS",
    "REGION_FAMILIES",
    "WRITE_MODES",
    "CanvasProgram",
    "ClockSpec",
    "ConnectionProgram",
    "ConstraintSpec",
    "LearningSpec",
    "RegionProgram",
    "evaluate_trigger",
    "resolve_operator_defaults",
    "validate_constraints",
]
