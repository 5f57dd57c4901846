"""mlx-lm's contestant of the bench in a process of its own."""

import pytest

import rl.rollouts  # noqa: F401  binds BLAS before mlx loads
from rl import models
from rl.rollouts import bench as contestants
from rl.rollouts import load


def test_apart_the_same_model_gives_the_same_in_another_process(tiny_base: models.Base) -> None:
    prompts, limits = [[2, 3, 4, 5]] * 2, [9, 4]
    here, apart = (
        contestants.batch_here(load.load_sampler(tiny_base.path)),
        contestants.batch_apart(tiny_base.path, "float32"),
    )
    (done, _), (again, seconds) = (run(prompts, limits, temperature=0.0) for run in (here, apart))
    assert [c.tokens for c in done] == [c.tokens for c in again]
    assert [len(c.tokens) for c in again] == limits
    assert 0 < seconds < 60
    with pytest.raises(TypeError, match="heat"):
        apart(prompts, limits, heat=1.0)
