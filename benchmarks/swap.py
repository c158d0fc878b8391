"""How long a LoRA takes to go onto an open bundle, and off again, beside a rebuild of the bundle with it fused."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from ..errors import UserError

if TYPE_CHECKING:
    import torch

    from ..engines.base import EnginePair
    from ..engines.bundle.bundle import Bundle
    from ..engines.bundle.manifest import EngineEntry

Progress = Callable[[str], None]

_ATTENTION = (".to_q.weight", ".to_k.weight", ".to_v.weight", ".to_out.0.weight")


class SwapRow(BaseModel):
    """One engine; seconds, a figure a round where there are several."""

    model_config = ConfigDict(extra="forbid")

    engine: str
    precision: str = Field(description="as it computes")
    opened: float = Field(description="from a closed bundle to an open UNet, its files' digests checked")
    loaded: list[float] = Field(description="unet.load_lora: the file read, the weights exchanged in all graphs")
    rescaled: list[float] = Field(description="unet.set_loras with another scale")
    unloaded: list[float] = Field(description="unet.unload_lora")
    first_calls: list[float] = Field(description="a full and a shallow call right after a load, buffers made anew")
    later_calls: list[float] = Field(default_factory=list, description="the same calls once more, the LoRA still on")
    calls: float = Field(description="the same two calls before any LoRA was loaded, the median of as many rounds")
    restored: bool = Field(description="A, off, A again: the built answers and A's came back bit for bit")
    rebuilt: float | None = Field(default=None, description="offcut build of the model with the LoRA fused, verified")
    rebuilt_opened: float | None = Field(default=None, description="that bundle opened")

    @property
    def swap(self) -> float:
        """The median of loading."""
        return statistics.median(self.loaded)


class Swap(BaseModel):
    """The rows on one model."""

    model_config = ConfigDict(extra="forbid")

    model: str
    lora: str = Field(description="the file, or what random one was made")
    layers: int = Field(description="of the UNet that it changes")
    cut: str
    sizes: dict[str, int] = Field(description="of the calls; height and width are the latent's")
    rounds: int
    rows: list[SwapRow]


def random_lora(bundle: Bundle, entry: EngineEntry, rank: int, path: Path) -> Path:
    """A LoRA with small random weights for every attention layer of a bundle's UNet, as PEFT names them."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in bundle.weights(entry).shapes.items():
        if not name.endswith(_ATTENTION):
            continue
        stem = f"unet.{name.removesuffix('.weight')}"
        tensors[f"{stem}.lora_A.weight"] = 0.01 * torch.randn(rank, shape[1], generator=generator)
        tensors[f"{stem}.lora_B.weight"] = 0.01 * torch.randn(shape[0], rank, generator=generator)
    if not tensors:
        raise UserError(f"{bundle.path} has a UNet without attention: give a LoRA for it with --lora")
    save_file(tensors, path)
    return path


def measure(
    bundle: Bundle,
    *,
    engines: Sequence[str] = (),
    model: Path | None = None,
    lora: Path | None = None,
    rank: int = 16,
    size: int | None = None,
    rounds: int = 3,
    threads: int | None = None,
    device: str = "cpu",
    progress: Progress = lambda step: None,
) -> Swap:
    """Exchange the weights of each engine's build and time it.

    Args:
        engines: of the bundle; all by default.
        model: what the bundle was built from, to time rebuilding it; None leaves that out.
        lora: the file; by default a random one of this rank for all attention layers.
        size: side of the square image that the calls are for, in pixels; by default what the model was trained on.
        rounds: how often each exchange is made.

    Raises:
        UserError: an engine or its weights are not there, or the LoRA is for another model.
    """
    from ..exporter.lora import read
    from .latency.loop import call_dims

    names = list(engines) or bundle.engines
    entries = [bundle.find(name, device=device) for name in names]
    dims = call_dims(bundle, size)
    with tempfile.TemporaryDirectory() as folder:
        file = lora or random_lora(bundle, entries[0], rank, Path(folder) / "random.safetensors")
        said = lora.name if lora else f"random, rank {rank}, every attention layer"
        rows = []
        for entry in entries:
            progress(f"exchange the weights of {entry.key}")
            row = _exchange(bundle, entry, file, dims, rounds, threads, device)
            if model is not None:
                progress(f"rebuild {entry.key} with the LoRA fused")
                row = _rebuild(row, bundle, entry, model, file, Path(folder) / entry.engine, device)
            rows.append(row)
        return Swap(
            model=bundle.manifest.source.model,
            lora=said,
            layers=len(read(file, bundle.unet_config).layers),
            cut=entries[0].cuts[0],
            sizes=dims,
            rounds=rounds,
            rows=rows,
        )


def _exchange(
    bundle: Bundle,
    entry: EngineEntry,
    file: Path,
    dims: Mapping[str, int],
    rounds: int,
    threads: int | None,
    device: str,
) -> SwapRow:

    from ..runtime.unet import UNet

    began = time.perf_counter()
    pair = bundle.pair(entry, device=device, threads=threads)
    unet = UNet(pair, bundle.unet_config, stored=lambda: bundle.weights(entry))
    opened = time.perf_counter() - began
    _calls(pair, entry.cuts[0], dims)
    usual, built = zip(*(_calls(pair, entry.cuts[0], dims) for _ in range(rounds)), strict=True)
    loaded, rescaled, unloaded, first, later = [], [], [], [], []
    worn: list[list[torch.Tensor]] = []
    try:
        for _ in range(rounds):
            loaded.append(_timed(lambda: unet.load_lora(file, 0.8, name="a")))
            seconds, answers = _calls(pair, entry.cuts[0], dims)
            first.append(seconds)
            worn.append(answers)
            later.append(_calls(pair, entry.cuts[0], dims)[0])
            rescaled.append(_timed(lambda: unet.set_loras({"a": 0.5})))
            unloaded.append(_timed(unet.unload_lora))
        after = _calls(pair, entry.cuts[0], dims)[1]
    finally:
        unet.close()
    returned = [_same(after, built[0]), *(_same(each, worn[0]) for each in worn)]
    variant = bundle.manifest.variants[entry.variant]
    return SwapRow(
        engine=entry.engine,
        precision=entry.inference_precision or variant.precision,
        opened=opened,
        loaded=loaded,
        rescaled=rescaled,
        unloaded=unloaded,
        first_calls=first,
        later_calls=later,
        calls=statistics.median(usual),
        restored=all(returned) and not _same(worn[0], built[0]),
    )


def _rebuild(
    row: SwapRow, bundle: Bundle, entry: EngineEntry, model: Path, file: Path, out: Path, device: str
) -> SwapRow:
    from ..engines.builder.build import build

    variant = bundle.manifest.variants[entry.variant]
    began = time.perf_counter()
    rebuilt = build(
        model,
        out,
        cuts=entry.cuts,
        engine=entry.engine,
        precision=variant.precision,
        inference_precision=entry.inference_precision,
        opset=variant.opset,
        dims=variant.fixed,
        device=device,
        loras={file: 0.8},
    )
    built = time.perf_counter()
    rebuilt.open_pair(entry.engine, device=device).close()
    opened = time.perf_counter() - built
    return row.model_copy(update={"rebuilt": built - began, "rebuilt_opened": opened})


def _calls(pair: EnginePair, cut: str, dims: Mapping[str, int]) -> tuple[float, list[torch.Tensor]]:
    """Seconds of a full and a shallow call in fresh buffers, and their answers."""
    from ..exporter.families import example_inputs

    given = example_inputs(tuple(pair.inputs.values()), dims)
    began = time.perf_counter()
    bound = pair.prepare({name: tuple(value.shape) for name, value in given.items()})
    for name, value in given.items():
        bound.buffers[name].copy_(value)
    bound.full()
    answers = [bound.buffers["noise_pred"].cpu().clone()]
    bound.shallow(cut)
    answers.append(bound.buffers["noise_pred"].cpu().clone())
    seconds = time.perf_counter() - began
    bound.close()
    return seconds, answers


def _timed(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def _same(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> bool:
    import torch

    return all(map(torch.equal, one, other))
