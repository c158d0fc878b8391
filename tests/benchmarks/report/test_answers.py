"""The page's first sentences follow from the figures, and say what no figure backs."""

from __future__ import annotations

import pytest
from support.results import around, contestant, latency, quality

from offcut.benchmarks.latency.record import Contestant
from offcut.benchmarks.quality.record import Quality
from offcut.benchmarks.report.answers import Answer, answers
from offcut.benchmarks.swap import Swap, SwapRow

CACHED = "offcut openvino fp32, interval 5"


def row(name: str, seconds: list[float], **own: object) -> Contestant:
    return contestant(name, 1.0, loops=seconds, **own)


def first(*rows: Contestant) -> Answer:
    return answers([latency(contestants=list(rows))], [])[0]


@pytest.mark.parametrize(
    ("seconds", "verdict", "says"),
    [
        ([7.0, 7.4, 7.0], "Yes", "30 % less time (1.43× as fast; 1.35× to 1.43× over the rounds)"),  # noqa: RUF001
        ([7.0, 7.0, 8.0], "At the median only", "30 % less time"),
        ([8.0, 8.0, 7.0], "No", "20 % less time"),
        ([12.5, 12.5, 12.5], "No", "25 % more time"),
    ],
)
def test_a_quarter_less_time_in_every_round_is_a_yes(seconds: list[float], verdict: str, says: str) -> None:
    answer = first(row(CACHED, seconds, caching="uniform:5"), row("diffusers eager fp32", [10.0, 10.0, 10.0]))
    assert answer.verdict == verdict
    assert says in answer.sentences[0]
    assert "Against the fastest caching peer: not measured." in answer.sentences


def test_the_same_engine_and_the_peers_are_named() -> None:
    answer = first(
        row(CACHED, [2.0, 2.0], caching="uniform:5"),
        row("openvino fp32, full graph only", [6.0, 6.0], family="openvino", engine="openvino"),
        row("diffusers eager fp32", [10.0, 10.0]),
        row("DeepCache eager fp32", [4.0, 4.0], caching="uniform:5"),
    )
    said = "\n".join(answer.sentences)
    assert (
        "Against the same engine and precision without caching, openvino fp32, full graph only, it takes 67 %" in said
    )
    assert "openvino fp32, full graph only is also the fastest peer without caching." in said
    assert "Against the fastest caching peer, DeepCache eager fp32, it takes 50 % less time" in said


def test_what_was_not_measured_is_said_to_be_not_measured() -> None:
    speed, cost, top = answers([], [])
    assert [speed.verdict, cost.verdict, top.verdict] == ["Not measured"] * 3
    assert answers([latency()], [])[1].verdict == "Not measured"
    assert "LoRA on top was not measured: no row of these results has one." in answers([latency()], [])[2].sentences
    alone = first(row(CACHED, [1.0], caching="uniform:5"))
    assert alone.verdict == "Not measured"


def test_a_lora_that_was_measured_is_named() -> None:
    with_lora = row("offcut openvino fp32 swapped", [2.0], caching="uniform:5", settings={"LoRA": "fused"})
    top = answers([latency(contestants=[with_lora, row("diffusers eager fp32", [4.0])])], [])[2]
    assert "With a LoRA: offcut openvino fp32 swapped; see their rows below." in top.sentences


@pytest.mark.parametrize("restored", [True, False])
def test_a_lora_on_open_engines(restored: bool) -> None:
    exchanged = SwapRow(
        engine="openvino",
        precision="fp32",
        opened=3.0,
        loaded=[5.0, 4.0, 6.0],
        rescaled=[4.0],
        unloaded=[4.0],
        first_calls=[2.0],
        later_calls=[1.1, 0.9, 1.01],
        calls=1.0,
        restored=restored,
        rebuilt=60.0,
        rebuilt_opened=2.0,
    )
    swap = Swap(model="sd15", lora="random", layers=128, cut="deepcache:0", sizes={}, rounds=3, rows=[exchanged])
    top = answers([latency()], [], [swap])[2]
    assert top.verdict == "Measured"
    (said,) = [sentence for sentence in top.sentences if "128 layers" in sentence]
    assert "in 5.00 s, a rebuild with it takes 62.0 s; calls then take 1.01" in said
    assert ("answers come back bit for bit" in said) is restored
    assert ("did NOT come back" in said) is not restored
    assert answers([], [], [swap])[2].verdict == "Measured"


def test_caching_on_top_of_each_engine() -> None:
    top = answers([latency()], [])[2]
    assert top.verdict == "Partly measured"
    assert "on onnxruntime fp32" in top.sentences[0]
    assert "on openvino bf16" in top.sentences[0]


def changed(**fields: object) -> Quality:
    """DDIM's rows; ``fields`` are given to the one at interval 2, which is the closest."""
    rows = [each for each in quality().rows if each.sampler == "ddim"]
    rows = [each.model_copy(update=fields) if each.interval == 2 else each for each in rows]
    return quality(rows=rows)


def test_quality_is_that_of_the_closest_setting_which_saves_enough_beside_fewer_steps() -> None:
    answer = answers([], [changed()])[1]
    assert answer.verdict.replace("\N{NO-BREAK SPACE}", " ") == "PSNR 47 dB"
    (said,) = answer.sentences
    assert "ddim 50, uniform:2:warmup=2, deepcache:0 is closest" in said
    assert "PSNR 46.9 [46.0, 47.8] dB, 38.9 dB for the worst image" in said
    assert "which is within noise" in said
    assert said.endswith(
        "Fewer steps instead, ddim 28, are 1.79\N{MULTIPLICATION SIGN} as fast, "
        "with 39.9 [38.8, 41.0] dB: caching is closer."
    )


@pytest.mark.parametrize(
    ("psnr", "says"), [(around(37.0, 0.5), "fewer steps are closer"), (around(39.0, 0.5), "do not tell")]
)
def test_fewer_steps_may_win(psnr: object, says: str) -> None:
    only = changed(psnr=psnr)
    only.rows = [each for each in only.rows if each.kind != "cached" or each.interval == 2]
    assert says in answers([], [only])[1].sentences[0]


def test_another_model_and_a_setting_that_was_timed_are_told() -> None:
    timed = contestant(CACHED, 1.0, 0.1, caching="uniform:5:warmup=2, deepcache:0")
    case = latency(contestants=[timed, contestant("diffusers eager fp32", 2.0)])
    said = answers([case], [changed(schedule="uniform:5")])[1].sentences
    assert "Quality was measured on another model than the latency" in said[0]
    assert len(said) == 3  # nor is uniform:5 taken for uniform:5:warmup=2
    assert said[-1].startswith("The setting that was timed above, ddim 50, uniform:5:warmup=2, deepcache:0: PSNR 35.1")


def test_a_change_beyond_its_interval_is_not_called_noise() -> None:
    assert "within noise" not in answers([], [changed(accuracy_change=around(-0.1, 0.02))])[1].sentences[0]


def test_too_little_saved_is_said() -> None:
    slow = changed()
    slow.rows = [each for each in slow.rows if each.kind == "uncached"]
    assert answers([], [slow])[1].sentences == ("ddim, 50 steps: no cached row with a PSNR saves 25 %.",)
