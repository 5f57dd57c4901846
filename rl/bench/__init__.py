"""Rollouts, hand-over and a GRPO step timed against what they replace: `nox -s bench`."""
