"""The version of the package, which files that it writes name."""

__version__ = "0.6.0"
WRITTEN_BY = f"canvas-engineering {__version__}"
