"""Tools that a policy calls while it answers, and the turns of such an episode; free of torch, trl and mlx."""

from rl.tools.calculator import calculator

__all__ = ["calculator"]
