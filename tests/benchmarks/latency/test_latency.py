"""Runs on a small pipeline: engines, eager PyTorch and DeepCache's helper in turns."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from rich.console import Console
from typer.testing import CliRunner

from offcut.benchmarks import record
from offcut.benchmarks.latency.case import Entrant, LatencyRequest
from offcut.benchmarks.latency.contestants import OPTIMUM_MISSING, PEERS
from offcut.benchmarks.latency.resolve import resolve
from offcut.benchmarks.latency.rounds import RoundOptions, measure
from offcut.benchmarks.report.blocks import for_terminal
from offcut.benchmarks.report.findings import Rivals, gain, uncached_twin
from offcut.benchmarks.report.latency import section
from offcut.benchmarks.schema.latency import Contestant, Latency
from offcut.cli import app
from offcut.cli.bench import _COMMANDS
from offcut.engines.bundle.bundle import Bundle
from offcut.errors import CutError, EngineError, UserError

STEPS, INTERVAL, ROUNDS = 6, 3, 2
OURS, UNCACHED = "offcut onnxruntime fp32", "onnxruntime fp32 full only"
EAGER, HELPER = "diffusers eager fp32", "DeepCache eager fp32"
Once = Callable[[str, Callable[[Path], object]], Path]


def offcut(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


@pytest.fixture(scope="module")
def done(tiny_bundle: Path, tiny_pipeline_dir: Path, once: Once) -> Path:
    """Run the command and return its output directory."""

    def run(folder: Path) -> None:
        result = offcut(
            "latency", tiny_bundle, "--model", tiny_pipeline_dir, "--engine", "onnxruntime",
            "--peer", "diffusers", "--peer", "deepcache", "--peer", "engine", "--peer", "optimum",
            "--steps", str(STEPS), "--interval", str(INTERVAL), "--iterations", str(ROUNDS), "--threads", "1",
            "-o", folder, "--json",
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout) == json.loads((folder / "result.json").read_text(encoding="utf-8"))
        assert f"round 2: {OURS}" in result.stderr, result.stderr

    return once("bench-latency", run)


@pytest.fixture(scope="module")
def latency(done: Path) -> Latency:
    measured = record.read(done).latency
    assert measured is not None
    return measured


@pytest.fixture(scope="module")
def rows(latency: Latency) -> dict[str, Contestant]:
    return {row.name: row for row in latency.contestants}


@pytest.mark.slow
def test_every_contestant_is_measured_or_has_a_reason(rows: dict[str, Contestant]) -> None:
    assert list(rows) == [
        EAGER, HELPER, "diffusers eager bf16", "DeepCache eager bf16", "optimum onnxruntime fp32", OURS, UNCACHED,
    ]  # fmt: skip
    for row in rows.values():
        if row.name.startswith("optimum"):
            assert row.not_run in (None, OPTIMUM_MISSING)
            continue
        assert row.not_run is None, row.not_run
        cached = row.caching is not None
        assert len(row.loops) == ROUNDS
        assert (row.full_calls, row.shallow_calls) == ((2, 4) if cached else (6, 0))
        assert (len(row.full), len(row.shallow)) == (ROUNDS * row.full_calls, ROUNDS * row.shallow_calls)
        assert len(row.full_alone) == 5
        assert len(row.shallow_alone) == (5 if cached else 0)
        assert len(row.forecast_alone) == (5 if row.name == OURS else 0)
        assert sum(row.full) + sum(row.shallow) < sum(row.loops)
        assert row.wall_over_ideal is not None
        assert row.load_seconds is not None
        assert row.warm_up_seconds is not None
        assert row.settings["threads"] == "1"
        assert (row.host_peak_bytes or 0) > 2**26
        assert (row.size_bytes or 0) > 2**15
    shared = f"shared with {UNCACHED}, like load time and peak memory"
    assert rows[OURS].settings["process"] == shared


@pytest.mark.slow
def test_all_contestants_compute_the_same_loop(rows: dict[str, Contestant], latency: Latency) -> None:
    """Cached runs differ much from uncached runs and little from each other; differences in bf16 lie in between."""
    differences = {name: row.difference for name, row in rows.items() if row.not_run is None}
    assert latency.reference == EAGER
    assert differences[EAGER] == 0
    assert 0 < (differences[UNCACHED] or 0) < 1e-4
    assert (differences[OURS] or 0) > 1e-3
    assert differences[OURS] == pytest.approx(differences[HELPER], rel=1e-3)
    assert 1e-4 < (differences["diffusers eager bf16"] or 0) < (differences["DeepCache eager bf16"] or 0) < 1


@pytest.mark.slow
def test_the_limit_is_measured_with_the_calls(rows: dict[str, Contestant], latency: Latency) -> None:
    assert latency.work["full"] > latency.work["shallow"] > 0
    assert set(latency.products) == {"fp32", "bf16"}
    assert min(latency.products.values()) > 1e9
    seconds = statistics.median(rows[OURS].full)
    assert latency.rate(rows[OURS]) == pytest.approx(latency.work["full"] / seconds)
    for row in rows.values():
        if row.loops:
            assert 0 < (latency.of_product(row) or 0) < 1.05  # more would mean that operations were skipped


@pytest.mark.slow
def test_the_ratios_follow_from_the_loops(rows: dict[str, Contestant], latency: Latency) -> None:
    ours, rivals = rows[OURS], Rivals.of(latency, "fp32")
    pairs = zip(rows[EAGER].loops, ours.loops, strict=True)
    assert gain(ours, rows[EAGER]) == pytest.approx(statistics.median(theirs / our for theirs, our in pairs))
    assert rivals.base == rows[EAGER]
    assert rivals.caching_peer == rows[HELPER]
    assert rivals.peer is not None
    assert rivals.peer.name in (EAGER, UNCACHED, "optimum onnxruntime fp32")
    assert uncached_twin(latency, ours) == rows[UNCACHED]


@pytest.mark.slow
def test_the_tables_show_every_row_without_truncation(latency: Latency) -> None:
    console = Console(width=160, record=True, file=Path("/dev/null").open("w", encoding="utf-8"))  # noqa: SIM115
    for block in for_terminal(section(latency, (50, 90, 99))):
        console.print(block)
    text = console.export_text()
    assert "…" not in text
    for row in latency.contestants:
        assert row.name in text
    words = " ".join(text.split())
    assert f"Difference: between the final latents and those of {EAGER}" in words
    assert "monotonic" in words
    assert "A forecast would add up to" in words


@pytest.mark.slow
def test_an_interrupt_keeps_the_rounds_that_are_complete(unet_bundle: Path, tmp_path: Path) -> None:
    request = LatencyRequest(steps=STEPS, schedule="uniform:3", engines=("onnxruntime",), peers=("engine",), threads=1)
    case, entrants = resolve(Bundle.open(unet_bundle), request, tmp_path)

    def interrupt(at: str) -> Latency:
        def progress(sentence: str) -> None:
            if sentence == at:
                raise KeyboardInterrupt

        return measure(case, entrants, RoundOptions(tmp_path / "log", rounds=3, progress=progress), "a model")

    with pytest.raises(KeyboardInterrupt):  # no round is complete yet
        interrupt(f"round 1: {UNCACHED}")
    latency = interrupt(f"round 2: {UNCACHED}")
    assert (latency.rounds, latency.interrupted) == (1, True)
    assert "Interrupted: 1 round" in str(section(latency))
    for row in latency.contestants:
        assert len(row.loops) == 1
        assert (len(row.full), len(row.shallow)) == (row.full_calls, row.shallow_calls)
        assert len(row.full_alone) == 5


def planned(bundle: Path, folder: Path, **request: object) -> list[Entrant]:
    return resolve(Bundle.open(bundle), LatencyRequest(steps=STEPS, schedule="uniform:3", **request), folder)[1]  # type: ignore[arg-type]


def test_without_the_model_the_engines_run_and_the_peers_do_not(
    unet_bundle: Path, tmp_path: Path, copied: Callable[[Path], Path]
) -> None:
    bundle = copied(unet_bundle)
    manifest = json.loads((bundle / "offcut.json").read_text(encoding="utf-8"))
    manifest["source"]["model"] = "some/hub-id"
    (bundle / "offcut.json").write_text(json.dumps(manifest), encoding="utf-8")
    reasons = {entrant.name: entrant.not_run for entrant in planned(bundle, tmp_path)}
    missing = "the peers need the PyTorch weights of some/hub-id: give their directory with --model"
    assert reasons[EAGER] == reasons[HELPER] == reasons["torch.compile bf16"] == missing
    assert reasons[OURS] is reasons[UNCACHED] is None


def test_the_helpers_reason_names_a_schedule_it_cannot_follow(
    tiny_bundle: Path, tiny_pipeline_dir: Path, tmp_path: Path
) -> None:
    request = LatencyRequest(tiny_pipeline_dir, steps=STEPS, schedule="quad:3:center=2", cut="mlperf")
    reasons = {entrant.name: entrant.not_run for entrant in resolve(Bundle.open(tiny_bundle), request, tmp_path)[1]}
    assert reasons[HELPER] is not None
    assert reasons[HELPER].startswith("DeepCache's helper supports only uniform intervals without warm-up, not quad:3")
    assert reasons[EAGER] is reasons[OURS] is None


def test_contestants_of_a_process_share_engine_precision_and_interpreter(
    tiny_bundle: Path, tiny_pipeline_dir: Path, tmp_path: Path
) -> None:
    processes: dict[str, list[Entrant]] = {}
    for entrant in planned(tiny_bundle, tmp_path, model=tiny_pipeline_dir):
        processes.setdefault(entrant.process, []).append(entrant)
    for members in processes.values():
        assert len({(member.engine, member.precision, member.python) for member in members}) == 1
    assert {member.name for member in processes["eager bf16"]} == {"diffusers eager bf16", "DeepCache eager bf16"}
    assert {member.kind for members in processes.values() for member in members} >= {"compiled", "deepcache-regional"}


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"engines": ("inductor",)}, UserError, "not inductor: add it with offcut build"),
        ({"engines": ("abacus",)}, EngineError, "no engine 'abacus'"),
        ({"peers": ("diffuser",)}, UserError, "there is no peer 'diffuser': give all, none"),
        ({"pythons": {"optimum": "/no/python"}}, UserError, "/no/python is not an executable program"),
        ({"pythons": {"diffusers": sys.executable}}, UserError, "needs no environment of its own"),
        ({"cut": "deepcache:7"}, CutError, "was not built with the cut deepcache:7"),
        ({"frames": 3}, UserError, "generates images, which have no frames: omit --frames"),
        ({"height": 65}, UserError, "an image side of 65 pixels does not fit"),
        ({"scheduler": "NoScheduler"}, UserError, "diffusers has no scheduler NoScheduler"),
        ({"model": Path("/no/model")}, UserError, "/no/model is not a directory"),
    ],
)
def test_invalid_requests_are_refused_in_one_sentence(
    unet_bundle: Path, tmp_path: Path, changes: dict[str, object], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        planned(unet_bundle, tmp_path, **changes)


def test_another_models_weights_are_refused(unet_bundle: Path, tiny_unet_dir: Path, tmp_path: Path) -> None:
    import torch
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(tiny_unet_dir)
    with torch.no_grad():
        unet.conv_out.bias.add_(1)
    unet.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="holds other weights than those that"):
        planned(unet_bundle, tmp_path, model=tmp_path / "other")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--interval", "3", "--schedule", "quad:3"], "exclude one another"),
        (["--percentile", "50,101"], "not a list such as 50,90,99"),
        (["--peer-python", "optimum"], "is not NAME=PATH"),
        (["--steps", "3", "--schedule", "steps:0,1,2"], "give more --steps"),
    ],
)
def test_bad_options_end_the_command_before_anything_runs(
    unet_bundle: Path, tmp_path: Path, arguments: list[str], says: str
) -> None:
    result = offcut("latency", unet_bundle, "-o", tmp_path / "out", *arguments)
    assert isinstance(result.exception, UserError | SystemExit)
    assert result.exit_code != 0
    assert says in " ".join(f"{result.stderr} {result.exception}".replace("│", " ").split())
    assert not (tmp_path / "out" / "result.json").exists()


def test_help_has_examples_and_every_peer() -> None:
    text = offcut("latency", "--help").stdout
    assert "Example:" in text
    assert all(peer in text for peer in PEERS)
    assert "latency" in {command.__name__ for command in _COMMANDS}
