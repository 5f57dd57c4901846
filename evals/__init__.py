"""Measure finished runs with lm-eval and build tables from its result files: `python -m evals --help`."""
