"""Segmented block-sparse attention over tables of rectangles: it knows tensors and tables, nothing of canvases.

Importing it needs no triton.
"""

from .ops import block_attention
from .table import BlockTable

__all__ = ["BlockTable", "block_attention"]
