"""The command that measures a GPU, at tiny size without one: all of it runs, so that it will where a GPU is at hand."""

import pytest
import torch
from conftest import ROOT

import bench_gpu
import plan

Rows = dict[tuple[str, str], dict[str, str]]


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # of the processes that measure


def rows(path) -> Rows:
    """What was measured, by part and case."""
    found: Rows = {}
    for row in bench_gpu.read(path):
        found.setdefault((row["part"], row["case"]), {})[row["what"]] = row["value"]
    return found


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """The file after `bench_gpu.py --tiny`, with a length that fits nowhere: its token ids alone are 8 PB."""
    path = tmp_path_factory.mktemp("gpu") / "deep" / "gpu.csv"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        bench_gpu.main(["--tiny", "--csv", str(path), "--tokens", str(10**15), "64"])
    return path


def test_every_part_is_measured_with_plausible_values(everything):
    found = rows(everything)
    assert {part for part, _ in found} == set(bench_gpu.PARTS)
    assert all(float(found[part, ""][bench_gpu.WHOLE]) > 0 for part in bench_gpu.PARTS)
    every = {(row["device"], row["torch"]) for row in bench_gpu.read(everything)}
    assert every == {("CPU", torch.__version__)}
    for name in bench_gpu.SHAPES:
        for what in ("scoring", "update"):
            for way in ("chunks", "full logits"):
                values = found[f"model-{name}", f"{what}, 64 tokens, {way}"]
                assert 0 < float(values["MFU"]) < 1 and float(values["tokens/s"]) > 0
                assert float(values["tokens/s"]) * float(values["seconds"]) == pytest.approx(64)
                assert values["peak GiB"] == ""  # told on a GPU only
        assert 0 < float(found[f"model-{name}", "update, 64 tokens, chunks"]["peak GiB by the plan"]) < 0.1
    assert float(found["future_kl", "4 × 300"]["error"]) < 1e-6
    assert 0 < float(found["future_kl", "4 × 300"]["share of the copy"]) < 1
    without, cudnn, autocast = "without cuDNN's attention", "with cuDNN's attention", "under autocast"
    for n, how in ((16, without), (32, without), (16, cudnn), (16, autocast), (32, autocast)):
        case = f"{n} rows, 128 + 8 tokens, {how}"
        assert float(found["sampler", case]["tokens/s"]) > 0


def test_a_step_begins_with_ratio_1_and_the_sampler_agrees(everything):
    for step in (1, 2):
        values = {what: float(value) for what, value in rows(everything)["step", f"step {step}"].items()}
        assert values["ratio at the first update"] == values["f at the first update"] == pytest.approx(1, abs=1e-6)
        assert values["|Δ| at the first update"] < values["tolerance"] == 1e-3 > values["mismatch"] > 0
        assert values["tokens/s"] > 0 and all(values[f"{w} seconds"] > 0 for w in ("rollout", "score", "update"))


def test_a_killed_run_goes_on_as_if_nothing_had_been(everything):
    found = rows(everything)
    assert int(found["resume", "killed and resumed"]["from step"]) >= 2
    for case in ("killed and resumed", "uninterrupted, twice"):
        assert all(float(found["resume", case][f"largest difference in {w}"]) == 0 for w in ("metrics", "weights"))


def test_the_embedded_run_tells_accuracy_before_and_after(everything):
    found = rows(everything)
    assert all(0 <= float(found["embedded", f"step {n}"]["accuracy"]) <= 1 for n in (0, 2))
    assert float(found["embedded", ""]["run seconds"]) > 0


@pytest.mark.parametrize("part", [f"model-{name}" for name in bench_gpu.SHAPES])
def test_what_does_not_fit_is_said_and_passed_over(everything, part):
    """For real, in the process that measures; the length after it was measured, and so were the other parts."""
    found = rows(everything)
    cases = [case for where, case in found if where == part and str(10**15) in case]
    assert len(cases) == 4 and all(found[part, case] == {"does not fit": ""} for case in cases)


def test_one_part_by_name_leaves_the_rows_of_the_others(everything, tmp_path, capfd):
    path = tmp_path / "gpu.csv"
    path.write_text(everything.read_text() + "future_kl,of old,ms,1,,,\n")
    bench_gpu.main(["future_kl", "--tiny", "--csv", str(path)])
    before, after = ([row for row in bench_gpu.read(p) if row["part"] != "future_kl"] for p in (everything, path))
    assert before == after
    assert rows(path).keys() == rows(everything).keys()
    assert "future_kl  4 × 300  ms " in capfd.readouterr().out


def test_a_part_that_takes_too_long_is_stopped_and_said(tmp_path):
    path = tmp_path / "gpu.csv"
    with pytest.raises(SystemExit, match="^fipo: not measured to the end: sampler, step.$"):
        bench_gpu.main(["step", "sampler", "--tiny", "--csv", str(path), "--minutes", "0.02"])
    stopped = {(part, ""): {"stopped after 1 s": ""} for part in ("sampler", "step")}
    assert rows(path) == stopped
    with pytest.raises(SystemExit, match="^fipo: not measured to the end: step.$"):
        bench_gpu.main(["step", "--tiny", "--csv", str(path), "--minutes", "0.001"])  # not begun: its rows stay
    assert rows(path) == stopped


def test_a_part_that_fails_is_said_and_the_next_one_runs(tmp_path, monkeypatch):
    def fails(*given) -> None:
        raise RuntimeError("a bug")

    path = tmp_path / "gpu.csv"
    bench_gpu.forget(path, [])
    monkeypatch.setitem(bench_gpu.PARTS, "step", (fails, 1))
    monkeypatch.setitem(bench_gpu.PARTS, "resume", (lambda say, size, work: say("", {"1 + 1": 2}), 1))
    bench_gpu.measure(["step", "resume"], bench_gpu.TINY, path, tmp_path)
    assert "failed: RuntimeError('a bug')" in rows(path)["step", ""] and rows(path)["resume", ""]["1 + 1"] == "2"


@pytest.mark.parametrize("words, said", [
    (["speed", "--tiny"], "there is no part speed: choose from model-0.5B, "),
    ([], "there is no GPU here: --tiny tries everything without one"),
])  # fmt: skip
def test_mistakes_are_told_in_one_sentence(words, said, monkeypatch):
    monkeypatch.setattr(bench_gpu, "GPU", False)
    with pytest.raises(SystemExit, match=f"^fipo: {said}") as stop:
        bench_gpu.main(words)
    assert len(str(stop.value.code).splitlines()) == 1


def test_tiny_rows_do_not_land_among_the_results(monkeypatch):
    asked = []
    monkeypatch.setattr(bench_gpu, "supervise", lambda parts, path, *rest: asked.append(path))
    bench_gpu.main(["--tiny"])
    assert asked and ROOT not in asked[0].parents


@pytest.mark.parametrize("name, billion", [("0.5B", 0.494), ("1.5B", 1.544), ("7B", 7.616)])
def test_shapes_are_qwen_s(name, billion, tmp_path):
    """And the plan finds room for an update of 20k tokens with 8 bytes a parameter on a card of 79 GiB."""
    bench_gpu.qwen(name, bench_gpu.Size()).save_pretrained(tmp_path)
    config, parameters = plan.shape_of(str(tmp_path))
    assert parameters / 1e9 == pytest.approx(billion, abs=1e-3)
    saved, layer = plan.activations(config, 20480)
    assert (8 * parameters + saved + max(layer, plan.logits(config))) / plan.GIB < plan.GPU_GIB - plan.CUDA_GIB
