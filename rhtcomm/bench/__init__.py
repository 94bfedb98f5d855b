"""Exchanges of gradients and training steps, measured on the user's own ranks.

`python -m rhtcomm bench` (`command.py`) measures `contestants.py` in turns (`rounds.py`) after
their `checks.py`, within a `budget.py`, and ends with a table and `advice.py`. `benchmarks/` uses
the same parts.
"""
