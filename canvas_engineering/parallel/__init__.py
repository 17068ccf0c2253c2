"""One canvas over many ranks: plans cut over a device mesh, and what their ranks exchange."""

from .shards import PlacedPlan, ShardedPlan

__all__ = ["PlacedPlan", "ShardedPlan"]
