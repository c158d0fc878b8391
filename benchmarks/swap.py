"""Seconds to load a LoRA into open engines and to unload it, compared with a rebuild of the bundle."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from ..errors import UserError

if TYPE_CHECKING:
    import torch

    from ..engines.base import EnginePair
    from ..engines.bundle.bundle import Bundle
    from ..engines.bundle.manifest import EngineEntry

_ATTENTION = (".to_q.weight", ".to_k.weight", ".to_v.weight", ".to_out.0.weight")


class SwapRow(BaseModel):
    """The times of one engine in seconds; lists have one entry for each round."""

    model_config = ConfigDict(extra="forbid")

    engine: str
    precision: str = Field(description="precision of the computation")
    opened: float = Field(description="seconds to open the UNet, with the check of its files' digests")
    loaded: list[float] = Field(description="unet.load_lora: reads the file and exchanges the weights in all graphs")
    rescaled: list[float] = Field(description="unet.set_loras with another scale")
    unloaded: list[float] = Field(description="unet.unload_lora")
    first_calls: list[float] = Field(description="a full and a shallow call right after a load, with new buffers")
    later_calls: list[float] = Field(default_factory=list, description="the same calls once more, with the LoRA")
    calls: float = Field(description="the same two calls before any LoRA was loaded, median over the rounds")
    restored: bool = Field(
        description="whether outputs with and without the LoRA were the same bit for bit after each load and unload"
    )
    rebuilt: float | None = Field(
        default=None, description="offcut build of the model with the LoRA fused, with verification"
    )
    rebuilt_opened: float | None = Field(default=None, description="seconds to open that bundle")

    @property
    def swap(self) -> float:
        """Median seconds of a load."""
        return statistics.median(self.loaded)


class Swap(BaseModel):
    """The measurements of one bundle's engines."""

    model_config = ConfigDict(extra="forbid")

    model: str
    lora: str = Field(description="name of the file, or description of the random LoRA")
    layers: int = Field(description="number of the UNet's layers that the LoRA changes")
    cut: str
    sizes: dict[str, int] = Field(description="dimensions of the calls; height and width are those of the latent")
    rounds: int
    rows: list[SwapRow]


@dataclass(frozen=True)
class SwapRequest:
    """The exchanges that a run measures.

    Attributes:
        engines: names of the bundle's engines; all by default.
        model: the model that the bundle was built from, to time a rebuild; None omits the rebuild.
        lora: a LoRA file; None creates a random LoRA for all attention layers.
        rank: rank of the random LoRA.
        size: side in pixels of the square image that the calls are for; a tiny one by default.
        rounds: number of exchanges.
    """

    engines: tuple[str, ...] = ()
    model: Path | None = None
    lora: Path | None = None
    rank: int = 16
    size: int | None = None
    rounds: int = 3
    threads: int | None = None
    device: str = "cpu"


def random_lora(bundle: Bundle, entry: EngineEntry, rank: int, path: Path) -> Path:
    """Write a LoRA with small random weights for every attention layer of a bundle's UNet, with PEFT's names."""
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
        raise UserError(f"{bundle.path} has a UNet without attention layers: give a LoRA with --lora")
    save_file(tensors, path)
    return path


def measure(bundle: Bundle, request: SwapRequest, progress: Callable[[str], None] = lambda step: None) -> Swap:
    """Load a LoRA into each engine, unload it, and measure both.

    Raises:
        UserError: an engine or its weights are missing, or the LoRA is for another model.
    """
    from ..exporter.lora import read
    from .latency.loop import call_dims

    entries = [bundle.find(name, device=request.device) for name in list(request.engines) or bundle.engines]
    dims, lora = call_dims(bundle, request.size), request.lora
    with tempfile.TemporaryDirectory() as folder:
        file = lora or random_lora(bundle, entries[0], request.rank, Path(folder) / "random.safetensors")
        rows = []
        for entry in entries:
            progress(f"exchange the weights of {entry.key}")
            row = _exchange(bundle, entry, file, dims, request)
            if request.model is not None:
                progress(f"rebuild {entry.key} with the LoRA fused")
                row = _rebuild(row, bundle, entry, request, file, Path(folder) / entry.engine)
            rows.append(row)
        return Swap(
            model=bundle.manifest.source.model,
            lora=lora.name if lora else f"random, rank {request.rank}, every attention layer",
            layers=len(read(file, bundle.unet_config).layers),
            cut=entries[0].cuts[0],
            sizes=dims,
            rounds=request.rounds,
            rows=rows,
        )


def _exchange(bundle: Bundle, entry: EngineEntry, file: Path, dims: Mapping[str, int], request: SwapRequest) -> SwapRow:
    from ..runtime.unet import UNet

    began = time.perf_counter()
    pair = bundle.pair(entry, device=request.device, threads=request.threads)
    unet = UNet(pair, bundle.unet_config, stored=lambda: bundle.weights(entry))
    opened = time.perf_counter() - began
    _calls(pair, entry.cuts[0], dims)
    without_lora, outputs_before = zip(*(_calls(pair, entry.cuts[0], dims) for _ in range(request.rounds)), strict=True)
    loaded, rescaled, unloaded, first, later = [], [], [], [], []
    with_lora: list[list[torch.Tensor]] = []
    try:
        for _ in range(request.rounds):
            loaded.append(_timed(lambda: unet.load_lora(file, 0.8, name="a")))
            seconds, outputs = _calls(pair, entry.cuts[0], dims)
            first.append(seconds)
            with_lora.append(outputs)
            later.append(_calls(pair, entry.cuts[0], dims)[0])
            rescaled.append(_timed(lambda: unet.set_loras({"a": 0.5})))
            unloaded.append(_timed(unet.unload_lora))
        after = _calls(pair, entry.cuts[0], dims)[1]
    finally:
        unet.close()
    unchanged = [_equal(after, outputs_before[0]), *(_equal(outputs, with_lora[0]) for outputs in with_lora)]
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
        calls=statistics.median(without_lora),
        restored=all(unchanged) and not _equal(with_lora[0], outputs_before[0]),
    )


def _rebuild(row: SwapRow, bundle: Bundle, entry: EngineEntry, request: SwapRequest, file: Path, out: Path) -> SwapRow:
    from ..engines.builder.build import build

    assert request.model is not None
    variant = bundle.manifest.variants[entry.variant]
    began = time.perf_counter()
    rebuilt = build(
        request.model,
        out,
        cuts=entry.cuts,
        engine=entry.engine,
        precision=variant.precision,
        inference_precision=entry.inference_precision,
        opset=variant.opset,
        dims=variant.fixed,
        device=request.device,
        loras={file: 0.8},
    )
    built = time.perf_counter()
    rebuilt.open_pair(entry.engine, device=request.device).close()
    opened = time.perf_counter() - built
    return row.model_copy(update={"rebuilt": built - began, "rebuilt_opened": opened})


def _calls(pair: EnginePair, cut: str, dims: Mapping[str, int]) -> tuple[float, list[torch.Tensor]]:
    """Return the seconds of a full and a shallow call in new buffers, and the outputs of both."""
    from .gpu.exercise import run, write

    began = time.perf_counter()
    bound = pair.prepare({name: spec.resolve(dims) for name, spec in pair.inputs.items()})
    write(pair, bound, seed=0)
    outputs = [run(bound).cpu(), run(bound, cut).cpu()]
    seconds = time.perf_counter() - began
    bound.close()
    return seconds, outputs


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _equal(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> bool:
    import torch

    return all(map(torch.equal, one, other))
