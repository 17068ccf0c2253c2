"""The published path of :mod:`canvas_engineering.models.measure`."""

from ..models.measure import TopologyMeasure, measure_topology

__all__ = ["TopologyMeasure", "measure_topology"]
