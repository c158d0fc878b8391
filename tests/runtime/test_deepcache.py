"""``DeepCacheSDHelper``, the interface for code written for DeepCache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import offcut
from offcut.errors import CutError, ScheduleError, UserError
from offcut.runtime.generation.schedule import Uniform


def test_the_helper_sets_the_schedule(pipe: Any) -> None:
    helper = offcut.DeepCacheSDHelper(pipe)
    helper.set_params(cache_interval=3, cache_branch_id=1)
    assert pipe.unet.schedule is None
    helper.enable()
    assert (pipe.unet.schedule, pipe.unet.cut) == (Uniform(3), "deepcache:1")
    helper.set_params(cache_interval=5)
    assert (pipe.unet.schedule, pipe.unet.cut) == (Uniform(5), "deepcache:0")
    helper.disable()
    assert pipe.unet.schedule is None
    helper.set_params(cache_interval=2)
    assert pipe.unet.schedule is None


def test_the_pipeline_can_be_given_to_enable(pipe: Any) -> None:
    helper = offcut.DeepCacheSDHelper()
    helper.enable(pipe)
    assert pipe.unet.schedule == Uniform(1)
    helper.disable()


def test_the_helper_refuses_unsupported_parameters(pipe: Any, eager: Any, tiny_bundle: Path) -> None:
    with pytest.raises(UserError, match=r"offcut\.attach\(pipe, bundle\) first"):
        offcut.DeepCacheSDHelper(eager)
    helper = offcut.DeepCacheSDHelper(pipe)
    with pytest.raises(ScheduleError, match=r"set_schedule\(offcut\.Quad"):
        helper.set_params(skip_mode="quad")
    with pytest.raises(ScheduleError, match="interval is 0"):
        helper.set_params(cache_interval=0)
    helper.set_params(cache_branch_id=11)
    with pytest.raises(CutError, match="'deepcache:11'; it has deepcache:0"):
        helper.enable()
