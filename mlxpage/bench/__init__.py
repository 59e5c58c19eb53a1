"""Measuring: what is served, in which turns, and what is told of it.

Each benchmark is a module that makes arms, a `Kind` in `kinds.py` says how its results are shown
and compared, and `mlxpage.cli.bench` is how people run them.
"""
