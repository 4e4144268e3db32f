"""Plain programs under flatout and under its peers, and how far each is from the machine's limit.

``python -m benchmarks.suite`` measures, ``benchmarks/RESULTS.md`` is what came out.
"""
