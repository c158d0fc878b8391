"""Runs of MLPerf's LoadGen with the shapes model, uncached and cached, in each scenario.

LoadGen (``mlcommons-loadgen``) chooses the queries, times them and judges the run. Its logs stay next to the result.
"""

from __future__ import annotations

import json
import queue
import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ...errors import MissingExtraError, UserError
from ..schema.mlperf import MlPerf, Scenario, ScenarioRun
from ..shapes import prompts
from ..shapes.judge_net.reader import JudgeNet, obeyed

if TYPE_CHECKING:
    from ...runtime.generation.schedule import Schedule

Pixels = npt.NDArray[np.uint8]
Generate = Callable[[Sequence[int]], Sequence[Pixels]]
"""Function that generates one image, uint8 [H, W, 3], for each index into the sample library."""

Complete = Callable[[Sequence[tuple[int, Pixels | None]]], None]
"""Function that returns (query id, image) pairs to LoadGen, with None in place of an image that failed."""

# Results of single-stream, offline and server, as LoadGen prints them.
_METRIC = re.compile(r"[\d.]+th percentile latency \(ns\)|Samples per second|Completed samples per second")
_LATENCY = re.compile(r"^\s*([\d.]+ percentile|Mean|Min|Max) latency \(ns\)\s*:\s*(\d+)", re.M)


@dataclass(frozen=True)
class ShortenedRules:
    """LoadGen's settings where MLPerf's text-to-image rules require more.

    Attributes:
        seconds: minimum duration; MLPerf requires 600.
        queries: minimum number of queries; MLPerf requires 1024 in SingleStream and 5000 samples in Offline.
        percentile: percentile of the latency in SingleStream and Server; MLPerf has 90 and 99.
        latency: latency limit of Server in seconds; MLPerf has 20.
        rate: images a second that are expected in Offline and offered in Server.
    """

    seconds: float = 10.0
    queries: int = 64
    percentile: float = 90.0
    latency: float = 20.0
    rate: float = 1.0

    def describe(self, scenario: Scenario) -> dict[str, str]:
        """Return the settings of a scenario, with MLPerf's own in brackets."""
        duration = {"minimum duration": f"{self.seconds:g} s (MLPerf: 600 s)"}
        if scenario == "Offline":
            return {"samples": f"{self.queries} or more (MLPerf: 5000)", **duration}
        if scenario == "SingleStream":
            reported = {"latency reported": f"{self.percentile:g} % (MLPerf: 90 %)"}
            return {"minimum queries": f"{self.queries} (MLPerf: 1024)", **duration, **reported}
        return {
            "minimum queries": f"{self.queries} (MLPerf: as many as its early stopping needs)",
            **duration,
            "latency limit": f"{self.latency:g} s at {self.percentile:g} % (MLPerf: 20 s at 99 %)",
            "offered load": f"{self.rate:.3g} images/s, Poisson arrivals",
        }


@dataclass(frozen=True)
class LoadGenSummary:
    """LoadGen's summary of a performance run; ``schema.mlperf.ScenarioRun`` describes the fields."""

    valid: bool
    reasons: list[str]
    metric: str
    value: float
    latencies: dict[str, float]


class SystemUnderTest:
    """A system under test, which takes samples from any thread and generates images in one thread.

    Samples that wait when the thread is free are generated together, the oldest first, up to ``batch`` of them. In
    SingleStream that is one sample, in Offline a full batch.

    After a failure every sample is completed without an image, so that LoadGen can end. ``close`` then raises the
    failure, and the test has no figures.
    """

    def __init__(self, generate: Generate, complete: Complete, batch: int) -> None:
        self._generate, self._complete, self._batch = generate, complete, batch
        self._waiting: queue.SimpleQueue[tuple[int, int] | None] = queue.SimpleQueue()
        self._failure: Exception | None = None
        self.batches: list[int] = []
        """Sizes of the batches so far."""
        self._thread = threading.Thread(target=self._work, name="offcut-mlperf", daemon=True)
        self._thread.start()

    def issue(self, samples: Iterable[Any]) -> None:
        """Queue LoadGen's samples: objects with the ``id`` of the query and the ``index`` into the library."""
        for sample in samples:
            self._waiting.put((sample.id, sample.index))

    def close(self) -> None:
        """Finish the waiting samples, end the thread, and raise its failure if there was one."""
        self._waiting.put(None)
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        while (first := self._waiting.get()) is not None:
            samples, last = self._next_batch(first)
            images: Sequence[Pixels | None] = [None] * len(samples)
            if self._failure is None:
                try:
                    images = self._generate([index for _, index in samples])
                    self.batches.append(len(samples))
                except Exception as error:  # raised by `close`, in the caller's thread
                    self._failure = error
            self._complete([(name, image) for (name, _), image in zip(samples, images, strict=True)])
            if last:
                return

    def _next_batch(self, first: tuple[int, int]) -> tuple[list[tuple[int, int]], bool]:
        """Return the batch that begins with this sample, and whether it is the last."""
        samples = [first]
        while len(samples) < self._batch:
            try:
                sample = self._waiting.get_nowait()
            except queue.Empty:
                break
            if sample is None:
                return samples, True
            samples.append(sample)
        return samples, False


@dataclass(frozen=True)
class SampleLibrary:
    """The prompts that LoadGen chooses from; the index of a prompt is the seed of its image.

    Attributes:
        pipe: pipeline of the shapes model.
        steps, guidance: number of steps and guidance scale of every image.
    """

    pipe: Any
    prompts: Sequence[str]
    steps: int
    guidance: float

    def generate(self, indices: Sequence[int]) -> list[Pixels]:
        """Generate one image for each index, uint8 [H, W, 3]; the images share their UNet calls."""
        import torch

        images = self.pipe(
            [self.prompts[index] for index in indices],
            num_inference_steps=self.steps,
            guidance_scale=self.guidance,
            generator=[torch.Generator("cpu").manual_seed(index) for index in indices],
            output_type="np",
        ).images
        return [np.ascontiguousarray(np.rint(image * 255).astype(np.uint8)) for image in images]

    def rate(self, batch: int) -> float:
        """Return the images a second in full batches, after one batch that is not measured."""
        indices = [index % len(self.prompts) for index in range(batch)]
        self.generate(indices)
        began = time.perf_counter()
        self.generate(indices)
        return batch / (time.perf_counter() - began)


def mixed_prompts(count: int) -> list[str]:
    """Return captions of one object and of two, alternating; the same for the same count."""
    one, two = (prompts.prompts(kind, (count + 1) // 2, seed=2000) for kind in ("one object", "two objects"))
    return [prompt for pair in zip(one, two, strict=True) for prompt in pair][:count]


def version() -> str:
    """Return LoadGen's version.

    Raises:
        MissingExtraError: LoadGen is not installed.
    """
    import importlib.metadata

    try:
        return importlib.metadata.version("mlcommons-loadgen")
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingExtraError("MLPerf's LoadGen", "mlcommons-loadgen", "bench") from error


def run(
    pipe: Any,
    output: Path,
    *,
    scenarios: Sequence[Scenario],
    schedules: Sequence[Schedule | None],
    cut: str | None = None,
    samples: int = 32,
    steps: int = 20,
    guidance: float = 3.0,
    batch: int = 8,
    rules: ShortenedRules | None = None,
    load: float = 0.7,
    accuracy: bool = True,
    stage: Callable[[str], None] = lambda text: None,
) -> MlPerf:
    """Run every scenario with every schedule; LoadGen's logs go into folders under ``output``.

    Args:
        pipe: result of ``offcut.load`` for the shapes model.
        samples: number of prompts in the sample library.
        rules: rules of the runs; ``rate`` is replaced by the measured one.
        load: rate offered in Server, as a share of the images a second in full batches.
        accuracy: whether to generate and judge every sample once for each schedule.

    Raises:
        UserError: LoadGen is missing, the logs cannot be written, or an image could not be generated.
    """
    loadgen_version = version()
    rules = rules or ShortenedRules()
    pipe.set_progress_bar_config(disable=True)
    library = SampleLibrary(pipe, mixed_prompts(samples), steps, guidance)
    runs: list[ScenarioRun] = []
    for schedule in schedules:
        pipe.unet.set_schedule(schedule, cut=cut if schedule else None)
        caching = None if schedule is None else f"{schedule}, {pipe.unet.cut}"
        stage(f"{caching or 'uncached'}: images per second")
        rate = library.rate(batch)
        right: float | None = None
        if accuracy:
            stage(f"{caching or 'uncached'}: accuracy of {samples} images")
            right = _share_right(library, rules, batch, _folder(output, schedule, "accuracy"))
        for scenario in scenarios:
            stage(f"{caching or 'uncached'}: {scenario}")
            # In Offline, LoadGen makes one query of 1.1 times the expected rate times the duration.
            scenario_rules = replace(rules, rate=rate * load if scenario == "Server" else rate * 1.2)
            folder = _folder(output, schedule, scenario)
            summary, batches = performance(scenario, library.generate, samples, scenario_rules, batch, folder)
            runs.append(
                ScenarioRun(
                    scenario=scenario,
                    caching=caching,
                    images=sum(batches),
                    accuracy=right,
                    accuracy_images=samples if accuracy else 0,
                    settings=scenario_rules.describe(scenario),
                    **vars(summary),
                )
            )
    return MlPerf(
        model="shapes",
        engine=pipe.unet.engine,
        steps=steps,
        guidance=guidance,
        scheduler=type(pipe.scheduler).__name__,
        batch=batch,
        loadgen=loadgen_version,
        runs=runs,
    )


def performance(
    scenario: Scenario, generate: Generate, samples: int, rules: ShortenedRules, batch: int, logs: Path
) -> tuple[LoadGenSummary, list[int]]:
    """Make one performance run.

    Args:
        samples: number of samples in the library.
        batch: maximum number of samples generated together.
        logs: existing folder for LoadGen's logs.

    Returns:
        LoadGen's summary, and the sizes of the batches.
    """
    batches = _run(scenario, "PerformanceOnly", generate, samples, rules, batch, logs)
    return summarize(_read(logs / "mlperf_log_summary.txt")), batches


def accuracy(
    scenario: Scenario,
    generate: Generate,
    samples: int,
    rules: ShortenedRules,
    batch: int,
    logs: Path,
    shape: tuple[int, ...],
) -> dict[int, Pixels]:
    """Make one accuracy run, which generates every sample of the library once.

    Args:
        shape: shape of an image.

    Returns:
        The images by index, as LoadGen logged them.
    """
    _run(scenario, "AccuracyOnly", generate, samples, rules, batch, logs)
    rows = json.loads(_read(logs / "mlperf_log_accuracy.json"))
    return {row["qsl_idx"]: np.frombuffer(bytes.fromhex(row["data"]), np.uint8).reshape(shape) for row in rows}


def summarize(text: str) -> LoadGenSummary:
    """Parse ``mlperf_log_summary.txt``.

    Raises:
        UserError: the text has no verdict.
    """
    fields = {name.strip(): value.strip() for name, value in re.findall(r"^\s*([^:\n]+?)\s*:\s*(.*)$", text, re.M)}
    metric = next((name for name in fields if _METRIC.fullmatch(name)), None)
    if "Result is" not in fields or metric is None:
        raise UserError("LoadGen left no verdict: see mlperf_log_detail.txt next to its summary")
    valid = fields["Result is"] == "VALID"
    return LoadGenSummary(
        valid=valid,
        reasons=[] if valid else re.findall(r"^\s*\* (.+)$", text.partition("Recommendations:")[2], re.M),
        metric=metric.removesuffix(" (ns)"),
        value=float(fields[metric]) * (1e-9 if metric.endswith("(ns)") else 1.0),
        latencies={name: float(value) * 1e-9 for name, value in _LATENCY.findall(text)},
    )


def _share_right(library: SampleLibrary, rules: ShortenedRules, batch: int, logs: Path) -> float:
    """Return the share of the logged images that obey their caption, by the judge network."""
    shape = library.generate([0])[0].shape
    images = accuracy("Offline", library.generate, len(library.prompts), rules, batch, logs, shape)
    texts = [library.prompts[index] for index in images]
    return float(obeyed(JudgeNet.load(), np.stack(list(images.values())), texts).mean())


def _folder(output: Path, schedule: Schedule | None, name: str) -> Path:
    caching = "uncached" if schedule is None else str(schedule).replace(":", "-").replace("=", "-")
    folder = output / "loadgen" / f"{caching}-{name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; give another directory with -o") from error
    return folder


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"LoadGen left no {path.name} in {path.parent}: {error.strerror}") from error


def _run(
    scenario: Scenario, mode: str, generate: Generate, samples: int, rules: ShortenedRules, batch: int, logs: Path
) -> list[int]:
    """Run LoadGen in this process; return the sizes of the batches."""
    version()
    import mlperf_loadgen

    system = SystemUnderTest(generate, partial(_complete, mlperf_loadgen), batch)
    under_test = mlperf_loadgen.ConstructSUT(system.issue, _nothing)
    library = mlperf_loadgen.ConstructQSL(samples, samples, _nothing, _nothing)
    output = mlperf_loadgen.LogOutputSettings()
    output.outdir = str(logs)
    output.copy_summary_to_stdout = False
    log = mlperf_loadgen.LogSettings()
    log.log_output = output
    log.enable_trace = False
    settings = mlperf_loadgen.TestSettings()
    settings.scenario = getattr(mlperf_loadgen.TestScenario, scenario)
    settings.mode = getattr(mlperf_loadgen.TestMode, mode)
    settings.min_duration_ms = round(rules.seconds * 1000)
    settings.min_query_count = rules.queries
    settings.single_stream_expected_latency_ns = round(1e9 / rules.rate)
    settings.single_stream_target_latency_percentile = rules.percentile / 100
    settings.offline_expected_qps = rules.rate
    settings.server_target_qps = rules.rate
    settings.server_target_latency_ns = round(rules.latency * 1e9)
    settings.server_target_latency_percentile = rules.percentile / 100
    try:
        mlperf_loadgen.StartTestWithLogSettings(under_test, library, settings, log)
    finally:
        try:
            system.close()
        finally:
            mlperf_loadgen.DestroyQSL(library)
            mlperf_loadgen.DestroySUT(under_test)
    return system.batches


def _complete(loadgen: Any, images: Sequence[tuple[int, Pixels | None]]) -> None:
    # The arrays must live until LoadGen has copied them.
    arrays = [(name, np.zeros(0, np.uint8) if i is None else np.ascontiguousarray(i)) for name, i in images]
    responses = [loadgen.QuerySampleResponse(name, array.ctypes.data, array.nbytes) for name, array in arrays]
    loadgen.QuerySamplesComplete(responses)


def _nothing(*_: Any) -> None:
    """Do nothing, as LoadGen's other callbacks: the library is in memory, and no query waits for a flush."""
