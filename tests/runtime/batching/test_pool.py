"""Slots are counted by their bytes, and each belongs to one request."""

from __future__ import annotations

import pytest
import torch

from offcut.errors import CapacityError, InternalError
from offcut.runtime.batching.pool import FeatureSpec, Layout, SlotPool

FEATURES = {"hidden": FeatureSpec((2, 4, 8, 8), torch.float16), "skip": FeatureSpec((2, 1, 8, 8), torch.float32)}
LAYOUT, SKIP_ONLY = Layout(FEATURES), Layout({"skip": FEATURES["skip"]})
BYTES = 2 * 4 * 64 * 2 + 2 * 64 * 4


def test_slots_are_given_while_there_is_room() -> None:
    pool = SlotPool(2 * BYTES + 1, torch.device("cpu"))
    first, second = pool.take(LAYOUT), pool.take(LAYOUT)
    assert first is not None
    assert second is not None
    assert (pool.slots, pool.used) == (2, 2 * BYTES)
    (features,) = first.copies
    assert {name: (tuple(t.shape), t.dtype) for name, t in features.items()} == {
        name: (spec.shape, spec.dtype) for name, spec in FEATURES.items()
    }
    assert pool.take(LAYOUT) is None
    pool.give_back(first)
    assert (pool.slots, pool.used) == (1, BYTES)
    assert pool.take(SKIP_ONLY) is not None
    with pytest.raises(InternalError, match="twice"):
        pool.give_back(first)


def test_a_slot_for_two_full_calls_has_two_copies_and_twice_the_bytes() -> None:
    pool = SlotPool(2 * BYTES, torch.device("cpu"))
    slot = pool.take(Layout(FEATURES, copies=2))
    assert slot is not None
    assert pool.used == 2 * BYTES
    pointers = {tensor.data_ptr() for copy in slot.copies for tensor in copy.values()}
    assert len(pointers) == 4


def test_features_above_the_limit_are_refused() -> None:
    with pytest.raises(CapacityError, match=r"keeps 0\.0 MiB.*may keep 0\.0.*larger cache_bytes"):
        SlotPool(BYTES - 1, torch.device("cpu")).take(LAYOUT)
