"""C++17 sources of the `edgeqat` operators and what compiles them; `build.py` runs without the rest of the package."""
