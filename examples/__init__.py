"""Examples, each a file that runs from any folder: ``python examples/cartpole.py``. Never imported by the library."""
