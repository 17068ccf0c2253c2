"""Examples, run from the project's root: ``python -m examples.cartpole``. Never imported by the library."""
