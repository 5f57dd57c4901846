"""Verifiable and learned rewards in TRL's calling convention, and the grader of held-out completions.

`[[reward]] name` is one of NAMES, or "module:function" for a function of your own: TRL's batch convention
`f(prompts, completions, **columns) -> list[float | None]`, found from the folder the command runs in.
"""

from rl.rewards.answers import Score, grade
from rl.rewards.functions import NAMES, RewardFunction, Stats, build, grader

__all__ = ["NAMES", "RewardFunction", "Score", "Stats", "build", "grade", "grader"]
