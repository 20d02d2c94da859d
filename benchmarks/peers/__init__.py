"""What others use for the same computation, restated for the comparisons.

Each module imports a package of the extra ``benchmarks``; its users ask first whether
that package is there.
"""
