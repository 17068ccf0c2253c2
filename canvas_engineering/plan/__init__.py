"""Declarations become tables, on the host, once: :func:`compile_attention` gives an :class:`AttentionPlan`."""

from .compile import NORMALIZE, compile_attention
from .plan import AttentionPlan

__all__ = ["NORMALIZE", "AttentionPlan", "compile_attention"]
