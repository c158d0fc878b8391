"""DeepCache's plug-in interface, for code that was written for DeepCache: three methods over ``UNet.set_schedule``."""

from __future__ import annotations

from typing import Any

from ..errors import ScheduleError, UserError
from .generation.schedule import Uniform
from .unet import UNet


class DeepCacheSDHelper:
    """Replacement for ``DeepCache.DeepCacheSDHelper`` (PyPI ``DeepCache``), for a pipeline with an ``offcut.UNet``.

        helper = offcut.DeepCacheSDHelper(pipe=pipe)
        helper.set_params(cache_interval=3, cache_branch_id=0)
        helper.enable()

    A branch ``k`` is the cut ``deepcache:k``, which the bundle must have been built with. Two faults of
    DeepCache are not copied: calls are counted rather than looked up by their timestep (with Heun, DeepCache refreshes
    its cache only once), and every generation begins with a full call (DeepCache can start an img2img run on another
    image's features).

    Raises:
        UserError: the pipeline's UNet is not an ``offcut.UNet``.
    """

    def __init__(self, pipe: Any = None) -> None:
        self.pipe = pipe
        self._schedule = Uniform(1)
        self._cut = "deepcache:0"
        self._enabled = False
        if pipe is not None:
            _unet_of(pipe)

    def set_params(self, cache_interval: int = 1, cache_branch_id: int = 0, skip_mode: str = "uniform") -> None:
        """Make every ``cache_interval``-th call full, and cache branch ``cache_branch_id``; takes effect once enabled.

        Raises:
            ScheduleError: ``skip_mode`` is not ``"uniform"``, or the interval is below 1.
            CutError: caching is enabled, and the UNet was built without this branch.
        """
        if skip_mode != "uniform":
            raise ScheduleError(
                f"skip_mode is {skip_mode!r}, but DeepCache's helper only has 'uniform': for others use "
                "pipe.unet.set_schedule(offcut.Quad(...))"
            )
        self._schedule = Uniform(cache_interval)
        self._cut = f"deepcache:{cache_branch_id}"
        if self._enabled:
            self.enable()

    def enable(self, pipe: Any = None) -> None:
        """Cache from the next generation on.

        Raises:
            CutError: the UNet was built without this branch.
            UserError: there is no pipeline, or its UNet is not an ``offcut.UNet``.
        """
        self.pipe = pipe if pipe is not None else self.pipe
        _unet_of(self.pipe).set_schedule(self._schedule, cut=self._cut)
        self._enabled = True

    def disable(self) -> None:
        """Make every call full again.

        Raises:
            UserError: as in ``enable``.
        """
        _unet_of(self.pipe).set_schedule(None)
        self._enabled = False


def _unet_of(pipe: Any) -> UNet:
    unet = getattr(pipe, "unet", None)
    if not isinstance(unet, UNet):
        raise UserError(
            "DeepCacheSDHelper needs a pipeline with an offcut.UNet: make it with offcut.load(bundle), or call "
            "offcut.attach(pipe, bundle) first"
        )
    return unet
