"""The command line: help, errors of one sentence, and train_small.py as a user runs it."""

import dataclasses
import importlib.util
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, flags, read_jsonl, write_jsonl
from matplotlib.figure import Figure

import fipo
import tokens
import train_small


def assert_refused(argv: list[str], pattern: str, capsys) -> None:
    """The command must fail, and its error must be one sentence that matches the pattern."""
    with pytest.raises(SystemExit) as stop:
        fipo.main(argv)
    error = stop.value.code
    if error == 2:  # argparse has printed a line of usage before its error
        _, error = capsys.readouterr().err.splitlines()
    assert re.search(pattern, error), error
    assert len(error.splitlines()) == 1


def assert_train_refuses(cfg: fipo.Config, pattern: str, capsys, **change) -> None:
    assert_refused(["train", *flags(dataclasses.replace(cfg, **change))], pattern, capsys)


# -------------------------------------------------------------------------------- mistakes of users

MISTAKES = [
    ({"model": ""}, "--model is missing"),
    ({"model": "no/such/folder"}, "loading the model 'no/such/folder' .* failed"),
    ({"data": ""}, "--data is missing"),
    ({"out": ""}, "--out is missing"),
    ({"data": "tests"}, "tests is .*not a .jsonl, .json or .parquet file"),
    ({"data": "no.jsonl"}, "reading problems from no.jsonl failed: .*No such file"),
    ({"eval_data": "no.jsonl"}, "reading problems from no.jsonl failed"),
    ({"group_size": 1}, "--group_size is 1: it must be at least 2"),
    ({"prompts_per_mini_batch": 8}, r"\(8\) must divide .*\(4\)"),
    ({"prompts_per_mini_batch": 3}, r"\(3\) must divide .*\(4\)"),
    ({"overlong_buffer": 32}, "must exceed --overlong_buffer"),
    ({"overlong_buffer": -5}, "--overlong_buffer is -5"),
    ({"max_response": 250}, "exceeds the model's context of 256"),
    ({"max_prompt": 3}, "every prompt is longer than --max_prompt 3"),
    ({"weight_range": [1.2, 1.0]}, "0 ≤ lo ≤ hi"),
    ({"weight_range": [1.0]}, "give lo hi"),
    ({"weight_range": [1.0, 1.2, 5.0]}, "give lo hi"),
    ({"weight_range": [1.0, math.nan]}, "--weight_range is .*nan"),
    ({"eval_temperature": 0.0}, "--eval_temperature is 0.0"),
    ({"eval_top_p": 0.0}, "--eval_top_p is 0.0"),
    ({"eval_k": 9}, "--eval_k is 9, above --eval_samples 2"),
    ({"clip_low": -1.0}, "--clip_low is -1.0"),
    ({"clip_high": -0.9}, "--clip_high is -0.9"),
    ({"clip_high": math.inf}, "--clip_high is inf: it must be .*finite"),
    ({"dual_clip": 0.5}, "--dual_clip is 0.5"),
    ({"dual_clip": math.nan}, "--dual_clip is nan: it must be"),
    ({"temperature": 0.0}, "--temperature is 0.0: it must be at least 0.001"),
    ({"temperature": math.inf}, "--temperature is inf: it must be .*finite"),
    ({"lr": math.inf}, "--lr is inf: it must be .*finite"),
    ({"lr": math.nan}, "--lr is nan: it must be"),
    ({"tau": math.nan}, "--tau is nan: it must be"),
    ({"steps": 0}, "--steps is 0: it must be at least 1"),
    ({"algorithm": "grpo", "prompts_per_round": 8}, "needs --dynamic_sampling"),
    ({"deepspeed": "ds.json"}, "--deepspeed and a launcher such as torchrun need each other"),
    ({"offload": True}, "--offload needs --deepspeed"),
    ({"wandb": "project"}, r"pip install wandb\) failed: No module named 'wandb'"),
]


@pytest.mark.parametrize("change, pattern", MISTAKES, ids=str)
def test_train_refuses_wrong_settings_in_one_sentence(small, capsys, change, pattern):
    assert_train_refuses(small, pattern, capsys, **change)


def test_train_refuses_an_out_that_cannot_be_a_folder(small, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    for out in (file, file / "sub"):
        assert_train_refuses(small, "creating the folder .* failed", capsys, out=str(out))


NOT_A_PROMPT = "row 1 has a prompt that is neither text nor chat messages"
BAD_DATA = [
    ([], "is empty"),
    ([{"foo": "1"}], r"has the columns \['foo'\]"),
    ([{"prompt": "1+1="}], "has the columns"),
    ([{"prompt": "1+1=", "answer": None}], "row 1 has no answer"),
    ([{"prompt": 5, "answer": "1"}], NOT_A_PROMPT),
    ([{"prompt": ["1+1="], "answer": "2"}], NOT_A_PROMPT),
    ([{"prompt": [{"content": "1+1="}], "answer": "2"}], NOT_A_PROMPT),
]


@pytest.mark.parametrize("rows, pattern", BAD_DATA, ids=str)
def test_train_refuses_bad_data_in_one_sentence(small, tmp_path, capsys, rows, pattern):
    data = tmp_path / "bad.jsonl"
    write_jsonl(data, rows)
    assert_train_refuses(small, pattern, capsys, data=str(data))


def test_a_start_that_failed_does_not_block_the_corrected_one(small):
    for change in ({"wandb": "project"}, {"data": "missing.jsonl"}, {"max_response": 250}):
        with pytest.raises(fipo.FipoError):
            fipo.train(dataclasses.replace(small, **change))
    fipo.train(dataclasses.replace(small, steps=1))


def test_train_reports_groups_without_a_signal_in_one_sentence(small, tmp_path, capsys):
    data = tmp_path / "hard.jsonl"
    write_jsonl(data, [{"prompt": "1+1=?\n", "answer": "none"}])
    pattern = "40 groups in .* rounds did not give a batch of 4 .*accuracy is 0.0%"
    assert_train_refuses(small, pattern, capsys, data=str(data))


def test_train_refuses_a_folder_that_holds_another_run(small, capsys):
    Path(small.out).mkdir()
    write_jsonl(Path(small.out) / "metrics.jsonl", [{"step": 0}])
    assert_train_refuses(small, "holds another run: continue it with --resume", capsys)


def test_train_refuses_an_empty_and_an_incomplete_model_folder(small, base, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert_train_refuses(small, "loading the model .*empty' .* failed", capsys, model=str(empty))
    half = tmp_path / "half"  # as an interrupted copy or download leaves it
    shutil.copytree(base, half)
    os.truncate(half / "model.safetensors", 100_000)
    assert_train_refuses(small, "loading the model .*half' .* failed", capsys, model=str(half))


def test_eval_refuses_what_it_cannot_do(small, tmp_path, monkeypatch, capsys):
    (tmp_path / "eval.json").write_text("{}")
    words = ["eval", "--model", small.model, "--data", small.data]
    assert_refused([*words, "--out", str(tmp_path)], "holds an evaluation", capsys)
    assert_refused([*words, "--eval_k", "99"], "--eval_k is 99", capsys)
    monkeypatch.setenv("RANK", "0")
    assert_refused(words, "--deepspeed and a launcher.* need each other", capsys)


def test_bfloat16_is_refused_on_a_gpu_without_it(base, monkeypatch):
    """The tests have no such GPU, so the answers of torch.cuda are replaced."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: False)
    with pytest.raises(fipo.FipoError, match="this GPU has no bfloat16: set --dtype float32"):
        fipo.Policy(base, fipo.EvalConfig(model=base, data="d", dtype="bfloat16"))


def test_unknown_flags_and_commands_are_refused(small, capsys):
    words = ["train", *flags(small)]
    unknown = "unrecognized arguments: "
    assert_refused([*words, "--learning_rate", "1"], unknown + "--learning_rate", capsys)
    assert_refused([*words, "--ste", "1"], unknown + "--ste", capsys)
    assert_refused(["trian"], "first argument must be train or eval", capsys)


def test_a_missing_vllm_is_reported(small, capsys):
    if importlib.util.find_spec("vllm"):
        pytest.skip("vLLM is installed here")
    pattern = r"starting vLLM \(pip install vllm; .*\) failed: No module named 'vllm'"
    assert_train_refuses(small, pattern, capsys, sampler="vllm")


@pytest.mark.parametrize("cause", ["MemoryError", "message of torch", "torch itself"])
def test_out_of_memory_names_the_settings_to_change(cause):
    settings = "--tokens_per_micro_batch.*--rollout_rows.*--gradient_checkpointing"
    with pytest.raises(SystemExit, match="out of memory.*" + settings), fipo.report_errors():
        if cause == "MemoryError":
            raise MemoryError
        if cause == "message of torch":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        torch.empty(1 << 60)


def test_unexpected_errors_are_not_hidden():
    with pytest.raises(RuntimeError, match="a bug"), fipo.report_errors():
        raise RuntimeError("a bug")


def test_other_ranks_wait_for_rank_0_before_they_report_an_error(monkeypatch):
    """A launcher ends the other ranks when rank 0 has ended, so usually only rank 0 reports."""
    waited = []
    monkeypatch.setattr(fipo.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "3")
    message = "^fipo: rank 3: the disk of this node is full$"
    with pytest.raises(SystemExit, match=message), fipo.report_errors():
        raise fipo.FipoError("the disk of this node is full")
    assert waited == [10]


@pytest.mark.slow
def test_a_mistake_ends_the_process_without_a_traceback():
    words = [sys.executable, str(ROOT / "fipo.py"), "train", "--model", "m"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "fipo: --data is missing" in done.stderr


# ---------------------------------------------------------------------------------- help and output


@pytest.mark.parametrize("command", ["", "train", "eval"])
def test_help(command, capsys):
    argv = [command, "--help"] if command else ["--help"]
    with pytest.raises(SystemExit) as stop:
        fipo.main(argv)
        sys.exit(0)
    assert stop.value.code == 0
    assert ("--max_response" if command else "Future-KL") in capsys.readouterr().out


def test_every_setting_has_a_line_of_help():
    for setting in dataclasses.fields(fipo.Config):
        assert setting.metadata.get("help"), setting.name


def test_the_docstring_lists_the_sections_of_the_file():
    """README names no lines of fipo.py, because every edit moves them."""
    # 1) The section in which each function and class is defined.
    defined = {}
    section = 0
    for line in (ROOT / "fipo.py").read_text().splitlines():
        if heading := re.match(r"# -{9,} (\d+)\. ", line):
            section = int(heading[1])
        if definition := re.match(r"(?:def|class) (\w+)", line):
            defined[definition[1]] = section
    # 2) The names at the ends of the lines of the docstring's table.
    listed = {}
    section = 0
    table = fipo.__doc__.split("The sections follow the data:\n")[1].split("\n\n")[0]
    for line in table.splitlines():
        if row := re.match(r" +(\d+)\. ", line):
            section = int(row[1])
        if names := re.search(r"  ([a-zA-Z_]+(?:, [a-zA-Z_]+)*)$", line):
            for name in names[1].split(", "):
                listed[name] = section
    assert set(listed.values()) == set(range(1, 14)), listed
    assert listed == {name: defined.get(name) for name in listed}
    assert not re.findall(r"fipo\.py#L\d+", (ROOT / "README.md").read_text())


@pytest.mark.slow
def test_output_is_written_line_by_line_and_to_ascii_terminals(tmp_path):
    """A step takes minutes, so its line must not wait in a buffer. Help contains Greek letters."""
    code = """
import os, fipo, train_small
fipo.main(["--help"])
try:
    train_small.main(["--help"])
except SystemExit:
    fipo.say("step 1")
    os._exit(0)  # without flushing
"""
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    with open(tmp_path / "log", "w") as log:
        words = [sys.executable, "-c", code]
        subprocess.run(words, cwd=ROOT, stdout=log, check=True, env=ascii_only)
    text = (tmp_path / "log").read_text()
    assert "Future-KL" in text
    assert "--study_seeds" in text
    assert text.endswith("\nstep 1\n")


def test_progress_without_a_terminal_is_shown_once_a_minute(capsys):
    with fipo.progress(total=3, desc="steps"), fipo.progress(total=300, desc="tokens") as bar:
        bar._time = lambda: bar.start_t + bar.n  # tqdm's clock: one second per token
        for _ in range(59):
            bar.update()
        assert capsys.readouterr().err == ""
        for _ in range(140):
            bar.update()
        lines = capsys.readouterr().err
        assert lines.count("\n") == 3
        shown = re.findall(r"tokens (\d+)/300, (\S+) elapsed, (\S+) left\n", lines)
        minutes = [("60", "01:00", "04:00"), ("120", "02:00", "03:00"), ("180", "03:00", "02:00")]
        assert shown == minutes
        fipo.say("step 1")
    assert capsys.readouterr().out == "step 1\n"


def test_vllm_can_use_the_progress_bar(capsys):
    """vLLM creates the bar with these arguments, and divides by the time since its start."""
    speed = "est. speed input: 0.00 toks/s"
    bar = fipo.progress(total=2, desc="Processed prompts", dynamic_ncols=True, postfix=speed)
    assert bar.format_dict["elapsed"] > 0
    bar.postfix = "est. speed input: 1.00 toks/s"
    bar.update(2)
    bar.refresh()
    bar.close()
    shown = capsys.readouterr().err
    assert shown.startswith("\rProcessed prompts 2/2, 00:00 elapsed")


# ----------------------------------------------------------------------------------- train_small.py

PICTURES = {"curves.png", "influence.png"}
FIRST_FILES = {"checkpoints", "config.json", "metrics.jsonl", "problems", *PICTURES}
TOKEN_FILES = {"metrics.json", "replacement.png", "token_map.html"}
QUICK = """--pretrain_steps 30 --problems 32 --group_size 8 --prompts_per_batch 2
--prompts_per_mini_batch 1 --max_response 32 --dynamic_sampling false --eval_every 2
--save_every 1""".split()


def file_names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.slow
def test_train_small_trains_resumes_and_studies_tokens(tmp_path, monkeypatch, capsys):
    """The first start is a process of its own. The later ones run here, without a GPU."""
    out = tmp_path / "run"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = ["--out", str(out), *QUICK]

    # 1) A fresh start makes the base model, trains it, and reports before and after.
    start = [sys.executable, str(ROOT / "train_small.py"), *words, "--steps", "1"]
    no_gpu = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    first = subprocess.run(
        [*start, "--study_seeds", "0"], capture_output=True, text=True, env=no_gpu
    )
    assert first.returncode == 0, first.stdout + first.stderr
    assert first.stdout.startswith("embedded run")
    assert "pretraining for 30 steps" in first.stdout
    assert re.search(r"accuracy +[\d.]+% +[\d.]+%", first.stdout)
    assert "mean length" in first.stdout
    assert first.stdout.count("before ") >= 3
    assert "Traceback" not in first.stderr
    assert (out / "curves.png").stat().st_size > 10_000
    assert file_names(out) == FIRST_FILES | {"samples.jsonl"}

    # 2) A second start in the same folder is refused.
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="holds another run"):
        train_small.main([*words, "--steps", "2"])

    # 3) With --resume it continues, and studies the tokens: of a few short responses, to save time.
    run_tokens = tokens.run_tokens

    def run_short_study(study):
        run_tokens(dataclasses.replace(study, problems=4, max_response=8))

    monkeypatch.setattr(tokens, "run_tokens", run_short_study)
    capsys.readouterr()
    train_small.main([*words, "--steps", "2", "--resume", "--study_seeds", "1"])
    output = capsys.readouterr().out
    assert "cached" in output
    assert "resuming after step 1" in output
    assert [line["step"] for line in read_jsonl(out / "metrics.jsonl")] == [0, 1, 2]
    assert "Which tokens did RL change?" in output
    assert "tokens to replace" in output
    assert file_names(out / "tokens") == TOKEN_FILES | {"token_map.png"}

    # 4) Resumed again, a finished run draws its pictures again, here beside itself.
    (out / "curves.png").unlink()
    words += ["--steps", "2", "--resume", "--study_seeds", "0"]
    train_small.main([*words, "--compare", str(out)])
    assert (out / "curves.png").exists()
    shutil.rmtree(out)


@pytest.fixture
def figures(monkeypatch):
    """The figures that a test draws; none is saved."""
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    return drawn


LINES = [
    {"step": 0, "eval/accuracy": 0.25, "eval/response_length": 16},
    {"step": 1, "accuracy": 0.5, "response_length/mean": 20}
    | {"influence_mean": 1.01, "influence_last": 0.97},
    {"step": 2, "accuracy": 0.75, "response_length/mean": 30}
    | {"influence_mean": 1.002, "influence_last": 1.004}
    | {"eval/accuracy": 1.0, "eval/response_length": 40},
]


def test_curves_are_solid_for_the_run_and_dashed_for_the_other_one(tmp_path, figures):
    for algorithm in ("fipo", "dapo"):
        run = tmp_path / algorithm
        run.mkdir()
        (run / "config.json").write_text(json.dumps({"algorithm": algorithm, "seed": 3}))
        write_jsonl(run / "metrics.jsonl", LINES)
    train_small.plot_curves([tmp_path / "fipo", tmp_path / "dapo"], tmp_path / "curves.png")
    accuracy, length = figures[0].axes
    styles = {line.get_label(): line.get_linestyle() for line in accuracy.lines}
    assert styles == {
        "FIPO, seed 3, rollouts": "-",
        "FIPO, seed 3, held out": "-",
        "DAPO, seed 3, rollouts": "--",
        "DAPO, seed 3, held out": "--",
    }
    rollouts, held_out, *_ = accuracy.lines
    assert rollouts.get_xydata().tolist() == [[1, 50], [2, 75]]
    assert held_out.get_xydata().tolist() == [[0, 25], [2, 100]]
    assert length.lines[1].get_xydata().tolist() == [[0, 16], [2, 40]]


def test_title_says_how_far_f_is_from_1(tmp_path, figures):
    train_small.plot_influence(LINES, tmp_path / "influence.png")
    assert figures[0].axes[0].get_title() == "Mean f differs from 1 by 0.2 to 3.0 %"


def test_a_folder_to_compare_with_must_hold_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="--compare .* has no metrics.jsonl"):
        train_small.main(["--out", str(tmp_path / "run"), "--compare", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_the_token_study_of_a_run_uses_float32(tmp_path, monkeypatch):
    """Even where the run computed in bfloat16, whose rounding would look like a change."""
    studies = []
    monkeypatch.setattr(tokens, "run_tokens", studies.append)
    settings = {"model": "m", "data": "d", "eval_data": "e", "out": str(tmp_path)}
    cfg = fipo.Config(**settings, dtype="bfloat16", max_response=77, problems=9)
    train_small.study_tokens(cfg, 2, is_embedded=False)
    train_small.study_tokens(cfg, 2, is_embedded=True)
    large, embedded = studies
    assert large.dtype == "float32"
    assert large.data == "e"
    assert large.max_response == 77
    assert large.seeds == 2
    assert not large.replacement
    assert embedded.replacement
    # The number of problems is the study's own, and not that of the run.
    assert large.problems == 32
    assert embedded.problems == 128


def test_only_grpo_has_no_length_penalty_in_the_embedded_run():
    expected = {"grpo": 0, "dapo": train_small.EMBEDDED["overlong_buffer"]}
    for algorithm, overlong_buffer in expected.items():
        words = ["--model", "m", "--data", "d", "--out", "o", "--algorithm", algorithm]
        cfg = train_small.configure(words, train_small.EMBEDDED)
        assert fipo.resolve(cfg).overlong_buffer == overlong_buffer


def test_a_mistake_in_the_settings_of_train_small_creates_no_files(tmp_path):
    with pytest.raises(SystemExit, match="--clip_low is -1.0"):
        train_small.main(["--clip_low", "-1", "--out", str(tmp_path / "run")])
    assert not list(tmp_path.iterdir())


def test_train_small_reports_a_wrong_choice_in_two_lines(capsys):
    with pytest.raises(SystemExit):
        train_small.main(["--algorithm", "ppo"])
    usage, sentence = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: python train_small.py")
    assert "invalid choice: 'ppo'" in sentence


def test_the_help_of_train_small_fits_a_screen_and_names_existing_settings(capsys):
    with pytest.raises(SystemExit) as stop:
        train_small.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 90
    names = re.findall(r"^  --(\w+)", text, re.M)
    assert len(names) == 9
    assert set(names) <= set(vars(train_small.parser().parse_args([])))


def test_held_out_problems_are_neither_in_the_corpus_nor_trained_on():
    seen = set()
    num_problems = 0
    for part in (train_small.HELD_OUT, train_small.FOR_RL, train_small.FOR_CORPUS):
        problems = train_small.all_problems()[part]
        seen.update(map(tuple, problems))
        num_problems += len(problems)
    assert len(seen) == num_problems == train_small.LARGEST**train_small.OPERANDS


def test_longer_answers_are_rarer_in_the_corpus_and_more_often_right():
    rng = random.Random(0)
    problems = train_small.all_problems()[:1000]
    share = {}
    accuracy = {}
    length = {}
    for style, share[style], slip, _ in train_small.STYLES:
        texts = [train_small.answer(digits, style, slip, rng) for digits in problems]
        verdicts = [fipo.verify(text, str(sum(digits))) for text, digits in zip(texts, problems)]
        accuracy[style] = sum(verdicts) / 1000
        length[style] = sum(map(len, texts)) / 1000
    assert share["short"] > share["worked"] > share["checked"]
    assert accuracy["short"] < 0.3 < 0.9 < accuracy["worked"] < accuracy["checked"] == 1
    assert length["short"] < length["worked"] / 2.5 < length["checked"] / 4
