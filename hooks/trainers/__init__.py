"""The hook in training frameworks, one module each; see docs/trainers.md.

Each module imports its framework, so import only the one that you use.
"""
