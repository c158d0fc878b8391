"""What offcut is measured against: eager PyTorch, DeepCache's helper, two compiled modules; all denoise alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ...runtime.generation.schedule import Schedule

if TYPE_CHECKING:
    from ...runtime.unet import UNet

Conditioning = Mapping[str, Any]
"""What a UNet's ``forward`` takes beside sample and timestep, by name."""


class Denoiser(Protocol):
    """Anything that predicts noise, call after call of one generation."""

    name: str

    def generation(self, timesteps: torch.Tensor) -> AbstractContextManager[object]:
        """The calls inside make one generation; one call for each of these timesteps, which are on the device."""
        ...

    def predict(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """The noise in ``sample`` [batch, channels, height, width] at ``timestep`` [], in memory of its own."""
        ...


class CachedUNet:
    """DeepCache's branch 0 by hand: a UNet's forward in two halves, the second of which reads a cached feature.

    It shares no code with the graph surgery.

    Args:
        unet: diffusers' ``UNet2DConditionModel``, without ControlNet or IP-Adapter.
    """

    def __init__(self, unet: Any) -> None:
        self.unet = unet

    def full(
        self, sample: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The whole UNet: its noise prediction, and ``hidden`` where it enters the outermost decoder layer.

        Args:
            sample: [batch, channels, height, width].
            timestep: [] or [batch].
        """
        text = conditioning["encoder_hidden_states"]
        embedding = self._embed(sample, timestep, conditioning)
        hidden = self.unet.conv_in(sample)
        skips = [hidden]
        for block in self.unet.down_blocks:
            hidden, made = block(hidden_states=hidden, temb=embedding, **_text(block, text))
            skips += made
        hidden = self.unet.mid_block(hidden, embedding, **_text(self.unet.mid_block, text))
        *inner, last = self.unet.up_blocks
        for block in inner:
            count = len(block.resnets)
            hidden = block(
                hidden_states=hidden,
                temb=embedding,
                res_hidden_states_tuple=tuple(skips[-count:]),
                **_text(block, text),
            )
            del skips[-count:]
        for layer in range(len(last.resnets) - 1):
            hidden = self._layer(last, layer, hidden, skips.pop(), embedding, text)
        feature = hidden
        return self._outermost(feature, skips.pop(), embedding, text), feature

    def shallow(
        self, sample: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning, feature: torch.Tensor
    ) -> torch.Tensor:
        """The first convolution and the outermost decoder layer around a cached feature."""
        embedding = self._embed(sample, timestep, conditioning)
        skip = self.unet.conv_in(sample)
        return self._outermost(feature, skip, embedding, conditioning["encoder_hidden_states"])

    def shallow_parameters(self) -> Iterator[torch.nn.Parameter]:
        """The weights that ``shallow`` reads."""
        last = self.unet.up_blocks[-1]
        modules = [self.unet.conv_in, self.unet.time_embedding, self.unet.conv_norm_out, self.unet.conv_out]
        modules += [last.resnets[-1], *list(getattr(last, "attentions", []))[-1:]]
        if (added := getattr(self.unet, "add_embedding", None)) is not None:
            modules.append(added)
        for module in modules:
            yield from module.parameters()

    def _embed(self, sample: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        unet = self.unet
        embedding: torch.Tensor = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timestep))
        added = unet.get_aug_embed(
            emb=embedding,
            encoder_hidden_states=conditioning["encoder_hidden_states"],
            added_cond_kwargs=conditioning.get("added_cond_kwargs"),
        )
        return embedding if added is None else embedding + added

    def _layer(self, block: Any, layer: int, hidden: Any, skip: Any, embedding: Any, text: Any) -> torch.Tensor:
        hidden = block.resnets[layer](torch.cat([hidden, skip], dim=1), embedding)
        if getattr(block, "has_cross_attention", False):
            hidden = block.attentions[layer](hidden, encoder_hidden_states=text, return_dict=False)[0]
        assert isinstance(hidden, torch.Tensor)
        return hidden

    def _outermost(self, hidden: Any, skip: Any, embedding: Any, text: Any) -> torch.Tensor:
        unet, last = self.unet, self.unet.up_blocks[-1]
        hidden = self._layer(last, len(last.resnets) - 1, hidden, skip, embedding, text)
        noise_pred = unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))
        assert isinstance(noise_pred, torch.Tensor)
        return noise_pred


def _text(block: Any, text: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}


class EngineDenoiser:
    """offcut: a pair of engines behind the stand-in."""

    def __init__(self, unet: UNet, conditioning: Conditioning, schedule: Schedule | None, cut: str | None) -> None:
        self.name = f"{unet.engine} {'uncached' if schedule is None else schedule}"
        self.unet = unet
        self._conditioning = conditioning
        self._schedule, self._cut = schedule, cut

    def generation(self, timesteps: torch.Tensor) -> AbstractContextManager[object]:
        self.unet.set_schedule(self._schedule, cut=self._cut if self._schedule is not None else None)
        return self.unet.generation(calls=len(timesteps))

    def predict(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        noise_pred = self.unet(sample, timestep, return_dict=False, **self._conditioning)[0]
        assert isinstance(noise_pred, torch.Tensor)
        return noise_pred


class CachedDenoiser:
    """A ``CachedUNet`` that follows a schedule, eagerly or with both halves compiled.

    Args:
        schedule: None makes every call full.
        compile: what is made of each half; nothing by default.
    """

    def __init__(
        self,
        unet: CachedUNet,
        conditioning: Conditioning,
        schedule: Schedule | None,
        compile: Callable[[Any], Any] | None = None,
    ) -> None:
        self.name = "eager PyTorch" if compile is None else "torch.compile, two modules"
        self._full: Any = compile(unet.full) if compile else unet.full
        self._shallow: Any = compile(unet.shallow) if compile else unet.shallow
        self._replays = compile is not None
        self._conditioning = conditioning
        self._schedule = schedule
        self._calls: int | None = None
        self._call = 0
        self._feature: torch.Tensor | None = None

    @contextmanager
    def generation(self, timesteps: torch.Tensor) -> Iterator[None]:
        self._calls, self._call, self._feature = len(timesteps), 0, None
        yield

    def predict(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        full = self._schedule is None or self._schedule.is_full(self._call, self._calls)
        self._call += 1
        if self._replays:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        if full:
            noise_pred, self._feature = self._full(sample, timestep, self._conditioning)
        else:
            noise_pred = self._shallow(sample, timestep, self._conditioning, self._feature)
        assert isinstance(noise_pred, torch.Tensor)
        assert self._feature is not None
        if self._replays:  # its next replay overwrites what it gave
            noise_pred = noise_pred.clone()
            self._feature = self._feature.clone() if full else self._feature
        return noise_pred


def compiled(unet: CachedUNet, conditioning: Conditioning, schedule: Schedule | None) -> CachedDenoiser:
    """Two hand-written modules, each through ``torch.compile(mode="max-autotune")`` for the one shape that comes."""

    def compile(half: Any) -> Any:
        return torch.compile(half, mode="max-autotune", fullgraph=True, dynamic=False)

    return CachedDenoiser(unet, conditioning, schedule, compile)


class HelperDenoiser:
    """DeepCache's own helper (PyPI ``DeepCache``) around an eager UNet, with branch 0."""

    name = "DeepCache's helper, eager"

    def __init__(self, unet: Any, conditioning: Conditioning, interval: int) -> None:
        from DeepCache import DeepCacheSDHelper

        self._pipe = SimpleNamespace(unet=unet, scheduler=SimpleNamespace(timesteps=None))
        self._helper = DeepCacheSDHelper(pipe=self._pipe)
        self._helper.set_params(cache_interval=interval, cache_branch_id=0)
        self._conditioning = conditioning

    @contextmanager
    def generation(self, timesteps: torch.Tensor) -> Iterator[None]:
        self._pipe.scheduler.timesteps = timesteps
        self._helper.enable()
        try:
            yield
        finally:
            self._helper.disable()

    def predict(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        noise_pred = self._pipe.unet(sample, timestep, return_dict=False, **self._conditioning)[0]
        assert isinstance(noise_pred, torch.Tensor)
        return noise_pred
