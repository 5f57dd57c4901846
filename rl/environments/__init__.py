"""Environments: worlds of several turns whose methods a policy calls as tools."""

from rl.environments.guess_number import GuessNumber

__all__ = ["GuessNumber"]
