"""LoadGen's verdicts on the page are escaped and are not presented as a submission."""

from pathlib import Path

from support.results import machine

from offcut.benchmarks.record import Result, now
from offcut.benchmarks.report.page import write_report
from offcut.benchmarks.schema.mlperf import MlPerf, ScenarioRun


def run(**changed: object) -> ScenarioRun:
    fields = {
        "scenario": "Server",
        "caching": "uniform:5:warmup=2, deepcache:0",
        "valid": True,
        "metric": "Completed samples per second",
        "value": 1.25,
        "images": 64,
        "accuracy": 0.5,
        "accuracy_images": 32,
        "settings": {"minimum duration": "10 s (MLPerf: 600 s)"},
    }
    return ScenarioRun.model_validate(fields | changed)


def test_the_page_shows_loadgens_verdicts(tmp_path: Path) -> None:
    late = run(
        scenario="SingleStream",
        caching=None,
        valid=False,
        reasons=["<b>too few</b> queries"],
        metric="90.0th percentile latency",
        value=0.5,
        accuracy=None,
    )
    measured = MlPerf(
        model="shapes",
        engine="openvino",
        steps=20,
        guidance=3.0,
        scheduler="DDIMScheduler",
        batch=8,
        loadgen="6.0",
        runs=[run(), late],
    )
    result = Result(
        title="load", command="offcut bench mlperf", started=now(), seconds=9, environment=machine(), mlperf=measured
    )
    assert not result.latency
    text = write_report([result], tmp_path).read_text(encoding="utf-8")
    for text_part in (
        "VALID",
        "1.25 images/s",
        "50% of 32",
        "minimum duration: 10 s (MLPerf: 600 s)",
        "this is no submission",
    ):
        assert text_part in text
    assert "INVALID: &lt;b&gt;too few&lt;/b&gt; queries" in text
    assert not list(tmp_path.glob("*.csv"))
