"""Segmented block-sparse attention over tables of rectangles. Knows tensors and tables, nothing of canvases; importing it needs no triton."""

from .ops import block_attention, permute_rows
from .table import BlockTable

__all__ = ["BlockTable", "block_attention", "permute_rows"]
