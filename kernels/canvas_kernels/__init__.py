"""Segmented block-sparse attention over tables of rectangles: it knows tensors and tables, nothing of canvases.

Importing it needs no triton.
"""

from .block_table import BlockTable
from .ops import block_attention

__all__ = ["BlockTable", "block_attention"]
