"""Length of a run and its learning rates."""

import pytest

from coca_scale.errors import UserError
from coca_scale.recipe.schema import ScheduleSection, TrainSection
from coca_scale.recipe.total_steps import total_steps
from coca_scale.training.schedule import learning_rate


def rates(steps, **schedule):
    return [learning_rate(s, steps, 1.0, ScheduleSection(**schedule)) for s in range(steps)]


def test_cosine_warms_up_and_ends_near_zero():
    curve = rates(100, name="cosine", warmup_steps=10)
    assert curve[0] == pytest.approx(0.1)
    assert curve[9] == curve[10] == 1.0
    assert curve[55] == pytest.approx(0.5)
    assert 0 < curve[99] < 1e-3
    assert curve[10:] == sorted(curve[10:], reverse=True)


def test_constant_and_cooldown():
    assert set(rates(10, name="constant")) == {1.0}
    curve = rates(10, name="constant-cooldown", cooldown_steps=4)
    assert curve[:7] == [1.0] * 7
    assert curve[7:] == [0.75, 0.5, 0.25]


def test_warmup_is_cut_to_the_run():
    assert rates(4, warmup_steps=1000) == [0.25, 0.5, 0.75, 1.0]


def test_length_from_steps_samples_and_epochs():
    batch = {"global_batch": 64, "micro_batch": 64}
    assert total_steps(TrainSection(steps=7, **batch), None) == 7
    assert total_steps(TrainSection(samples=65, **batch), None) == 2
    assert total_steps(TrainSection(epochs=1.5, **batch), 640) == 15
    with pytest.raises(UserError, match=r"data\.train_samples"):
        total_steps(TrainSection(epochs=1.0, **batch), None)
