"""What the process of `sandbox` runs: it shuts itself in, then runs a program that a model wrote.

The process loads these files alone, not the library, so they import each other and Python's own
modules only.
"""
