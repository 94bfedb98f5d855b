"""The hook in the trainers that people use, one module for each; see docs/trainers.md.

Each imports its trainer's package, so none is imported before it is asked for.
"""
