"""Declare regions of latent space and who reads whom; train through the block-sparse attention that follows."""

from canvas_engineering.masks import MaskSpec

__all__ = ["MaskSpec"]
