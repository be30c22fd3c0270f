"""scripts/bench_gpu.py at tiny size on the CPU: the same code as on a GPU, all of it."""

from pathlib import Path

import pytest
import torch
from conftest import ROOT

import bench_gpu
import plan

pytestmark = pytest.mark.slow

TOO_LONG = 10**15  # tokens whose ids alone take 8 PB
MODELS = [f"model-{name}" for name in bench_gpu.SHAPES]
Results = dict[tuple[str, str], dict[str, str]]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # for the processes that measure


def read(path: Path) -> Results:
    """The values of each part and case."""
    results: Results = {}
    for row in bench_gpu.read_results(path):
        values = results.setdefault((row["part"], row["case"]), {})
        values[row["what"]] = row["value"]
    return results


def as_numbers(values: dict[str, str]) -> dict[str, float]:
    return {what: float(value) for what, value in values.items()}


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """The file that `bench_gpu.py --tiny` writes. One of its two lengths fits in no memory."""
    path = tmp_path_factory.mktemp("gpu") / "new folder" / "gpu.csv"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        bench_gpu.main(["--tiny", "--csv", str(path), "--tokens", str(TOO_LONG), "64"])
    return path


@pytest.fixture(scope="module")
def results(path) -> Results:
    return read(path)


def test_every_part_is_measured(path, results):
    assert {part for part, _ in results} == set(bench_gpu.PARTS)
    for part in bench_gpu.PARTS:
        assert float(results[part, ""][bench_gpu.WHOLE]) > 0
    for row in bench_gpu.read_results(path):
        assert row["device"] == "CPU"
        assert row["torch"] == torch.__version__


@pytest.mark.parametrize("part", MODELS)
def test_model_parts_have_plausible_values(results, part):
    for what in ("scoring", "update"):
        for way in ("chunks", "full logits"):
            values = dict(results[part, f"{what}, 64 tokens, {way}"])
            assert values.pop("peak GiB") == "", "the peak is measured on a GPU only"
            numbers = as_numbers(values)
            assert 0 < numbers["MFU"] < 1
            assert numbers["tokens/s"] > 0
            assert numbers["tokens/s"] * numbers["seconds"] == pytest.approx(64)
    planned = results[part, "update, 64 tokens, chunks"]["peak GiB by the plan"]
    assert 0 < float(planned) < 0.1


@pytest.mark.parametrize("part", MODELS)
def test_a_length_that_does_not_fit_is_skipped(results, part):
    """The memory really is exhausted. The shorter length and the other parts come after it."""
    skipped = 0
    for (name, case), values in results.items():
        if name == part and str(TOO_LONG) in case:
            assert values == {"does not fit": ""}
            skipped += 1
    assert skipped == 4


def test_future_kl_part_has_plausible_values(results):
    values = as_numbers(results["future_kl", "4 × 300"])
    assert values["error"] < 1e-6
    assert 0 < values["share of the copy"] < 1


@pytest.mark.parametrize(
    "rows, how",
    [
        (16, "without cuDNN's attention"),
        (32, "without cuDNN's attention"),
        (16, "with cuDNN's attention"),
        (16, "under autocast"),
        (32, "under autocast"),
    ],
)
def test_sampler_part_measures_each_way_to_sample(results, rows, how):
    values = results["sampler", f"{rows} rows, 128 + 8 tokens, {how}"]
    assert float(values["tokens/s"]) > 0


@pytest.mark.parametrize("step", [1, 2])
def test_ratio_and_f_are_1_at_the_first_update_of_a_step(results, step):
    values = as_numbers(results["step", f"step {step}"])
    assert values["ratio at the first update"] == pytest.approx(1, abs=1e-6)
    assert values["f at the first update"] == values["ratio at the first update"]
    assert values["tolerance"] == 1e-3
    assert values["|Δ| at the first update"] < values["tolerance"]
    assert 0 < values["mismatch"] < values["tolerance"]
    for name in ("tokens/s", "rollout seconds", "score seconds", "update seconds"):
        assert values[name] > 0


def test_a_killed_run_gives_the_same_numbers_after_resuming(results):
    assert int(results["resume", "killed and resumed"]["from step"]) >= 2
    for case in ("killed and resumed", "uninterrupted, twice"):
        for what in ("metrics", "weights"):
            assert float(results["resume", case][f"largest difference in {what}"]) == 0


def test_embedded_part_measures_accuracy_before_and_after(results):
    for step in (0, 2):
        assert 0 <= float(results["embedded", f"step {step}"]["accuracy"]) <= 1
    assert float(results["embedded", ""]["run seconds"]) > 0


def test_measuring_one_part_keeps_the_rows_of_the_others(path, tmp_path, monkeypatch, capfd):
    def run_in_this_process(words: list[str], limit: float) -> str:
        bench_gpu.main(words)
        return "failed"

    def other_rows(of: Path) -> list[dict[str, str]]:
        return [row for row in bench_gpu.read_results(of) if row["part"] != "future_kl"]

    monkeypatch.setattr(bench_gpu, "run_in_own_process", run_in_this_process)
    copy = tmp_path / "gpu.csv"
    copy.write_text(path.read_text() + "future_kl,of old,ms,1,,,\n")
    bench_gpu.main(["future_kl", "--tiny", "--csv", str(copy)])
    assert other_rows(copy) == other_rows(path)
    assert read(copy).keys() == read(path).keys()
    assert "future_kl  4 × 300  ms " in capfd.readouterr().out


def test_a_part_that_takes_too_long_is_stopped_and_reported(tmp_path):
    path = tmp_path / "gpu.csv"
    words = ["--tiny", "--csv", str(path), "--minutes"]
    with pytest.raises(SystemExit, match="^fipo: not measured to the end: sampler, step.$"):
        bench_gpu.main(["step", "sampler", *words, "0.02"])
    message = {"stopped after 1 s": ""}
    stopped = {("sampler", ""): message, ("step", ""): message}
    assert read(path) == stopped
    # Without any time left, a part is not begun, and its old rows stay.
    with pytest.raises(SystemExit, match="^fipo: not measured to the end: step.$"):
        bench_gpu.main(["step", *words, "0.001"])
    assert read(path) == stopped


def test_a_part_that_fails_is_reported_and_the_next_one_runs(tmp_path, monkeypatch):
    def fail(*args) -> None:
        raise RuntimeError("a bug")

    def succeed(record, size, work) -> None:
        record("", {"1 + 1": 2})

    path = tmp_path / "gpu.csv"
    bench_gpu.remove_results(path, [])
    monkeypatch.setitem(bench_gpu.PARTS, "step", bench_gpu.Part(fail, 1))
    monkeypatch.setitem(bench_gpu.PARTS, "resume", bench_gpu.Part(succeed, 1))
    bench_gpu.measure_parts(["step", "resume"], bench_gpu.TINY, path, tmp_path)
    results = read(path)
    assert "failed: RuntimeError('a bug')" in results["step", ""]
    assert results["resume", ""]["1 + 1"] == "2"


@pytest.mark.parametrize(
    "words, message",
    [
        (["speed", "--tiny"], "there is no part speed: choose from model-0.5B, "),
        ([], "there is no GPU here: --tiny tries everything without one"),
    ],
)
def test_user_errors_are_one_sentence(words, message, monkeypatch):
    monkeypatch.setattr(bench_gpu, "GPU", False)
    with pytest.raises(SystemExit, match=f"^fipo: {message}") as stop:
        bench_gpu.main(words)
    assert len(str(stop.value.code).splitlines()) == 1


def test_tiny_results_are_not_written_to_assets(monkeypatch):
    paths = []

    def supervise(parts, path, *rest) -> None:
        paths.append(path)

    monkeypatch.setattr(bench_gpu, "supervise", supervise)
    bench_gpu.main(["--tiny"])
    (path,) = paths
    assert ROOT not in path.parents


@pytest.mark.parametrize("name, billion", [("0.5B", 0.494), ("1.5B", 1.544), ("7B", 7.616)])
def test_shapes_match_qwen_and_fit_on_a_card_of_79_gib(name, billion, tmp_path):
    """By the plan, an update of 20k tokens fits with 8 bytes per parameter."""
    bench_gpu.qwen(name, bench_gpu.Size()).save_pretrained(tmp_path)
    config, parameters = plan.shape_of(str(tmp_path))
    assert parameters / 1e9 == pytest.approx(billion, abs=1e-3)
    planned = 8 * parameters + plan.pass_bytes(config, 20480)
    assert planned / plan.GIB < plan.GPU_GIB - plan.CUDA_GIB
