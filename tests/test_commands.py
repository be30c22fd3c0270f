"""The command line: help, one clear sentence for each mistake, and train_small.py as a user runs it."""

import dataclasses
import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, flags, read_jsonl, write_jsonl

import fipo
import tokens
import train_small


def fails(argv: list[str], capsys, said: str) -> None:
    """The command ends with a non-zero status and one sentence that holds `said`."""
    with pytest.raises(SystemExit) as stop:
        fipo.main(argv)
    sentence = capsys.readouterr().err if stop.value.code == 2 else str(stop.value.code)
    assert stop.value.code not in (0, None) and re.search(said, sentence), sentence
    assert len(sentence.splitlines()) == (
        2 if stop.value.code == 2 else 1
    )  # argparse adds a line of usage


MISTAKES = {
    "no model": (dict(model=""), "--model is missing"),
    "missing model folder": (
        dict(model="no/such/folder"),
        "loading the model 'no/such/folder' .* failed",
    ),
    "no data": (dict(data=""), "--data is missing"),
    "no out": (dict(out=""), "--out is missing"),
    "a folder as data": (dict(data="tests"), "tests is .*not a .jsonl, .json or .parquet file"),
    "missing file": (
        dict(data="missing.jsonl"),
        "reading problems from missing.jsonl failed: .*No such file",
    ),
    "missing evaluation file": (
        dict(eval_data="missing.jsonl"),
        "reading problems from missing.jsonl failed",
    ),
    "one response a group": (dict(group_size=1), "--group_size is 1: it must be at least 2"),
    "mini-batch larger than the batch": (
        dict(prompts_per_mini_batch=8),
        r"\(8\) must divide .*\(4\)",
    ),
    "mini-batch does not divide the batch": (
        dict(prompts_per_mini_batch=3),
        r"\(3\) must divide .*\(4\)",
    ),
    "limit inside the overlong buffer": (dict(overlong_buffer=32), "must exceed --overlong_buffer"),
    "prompt and response exceed the context": (
        dict(max_response=250),
        "exceeds the model's context of 256",
    ),
    "every prompt too long": (dict(max_prompt=3), "every prompt is longer than --max_prompt 3"),
    "weight range upside down": (dict(weight_range=[1.2, 1.0]), "0 ≤ lo ≤ hi"),
    "weight range of one number": (dict(weight_range=[1.0]), "give lo hi"),
    "weight range of three numbers": (dict(weight_range=[1.0, 1.2, 5.0]), "give lo hi"),
    "greedy evaluation": (dict(eval_temperature=0.0), "--eval_temperature is 0.0"),
    "empty nucleus": (dict(eval_top_p=0.0), "--eval_top_p is 0.0"),
    "pass@k of more than there are": (dict(eval_k=9), "--eval_k is 9, above --eval_samples 2"),
    "negative clip": (dict(clip_low=-1.0), "--clip_low is -1.0"),
    "negative upper clip": (dict(clip_high=-0.9), "--clip_high is -0.9"),
    "dual clip below one": (dict(dual_clip=0.5), "--dual_clip is 0.5"),
    "negative overlong buffer": (dict(overlong_buffer=-5), "--overlong_buffer is -5"),
    "no temperature": (dict(temperature=0.0), "--temperature is 0.0: it must be at least 0.001"),
    "no steps": (dict(steps=0), "--steps is 0: it must be at least 1"),
    "rounds without dynamic sampling": (
        dict(algorithm="grpo", prompts_per_round=8),
        "needs --dynamic_sampling",
    ),
    "DeepSpeed without a launcher": (
        dict(deepspeed="ds_config.json"),
        "--deepspeed and a launcher such as torchrun need each other",
    ),
    "offload without DeepSpeed": (dict(offload=True), "--offload needs --deepspeed"),
    "endless learning rate": (dict(lr=math.inf), "--lr is inf: it must be .*finite"),
    "learning rate that is not a number": (dict(lr=math.nan), "--lr is nan: it must be"),
    "endless temperature": (
        dict(temperature=math.inf),
        "--temperature is inf: it must be .*finite",
    ),
    "half-life that is not a number": (dict(tau=math.nan), "--tau is nan: it must be"),
    "endless clip": (dict(clip_high=math.inf), "--clip_high is inf: it must be .*finite"),
    "dual clip that is not a number": (dict(dual_clip=math.nan), "--dual_clip is nan: it must be"),
    "bounds that are not numbers": (dict(weight_range=[1.0, math.nan]), "--weight_range is .*nan"),
    "wandb not installed": (
        dict(wandb="project"),
        r"pip install wandb\) failed: No module named 'wandb'",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_in_one_sentence(small, capsys, mistake):
    change, said = MISTAKES[mistake]
    fails(["train", *flags(dataclasses.replace(small, **change))], capsys, said)


def test_an_out_that_cannot_be_a_folder_is_told(small, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "sub"):
        fails(
            ["train", *flags(dataclasses.replace(small, out=str(out)))],
            capsys,
            "making the folder .* failed",
        )


@pytest.mark.parametrize("rows, said", [
    ([], "is empty"),
    ([{"foo": "1"}], r"has the columns \['foo'\]"),
    ([{"prompt": "1+1="}], "has the columns"),
    ([{"prompt": "1+1=", "answer": None}], "row 1 has no answer"),
    ([{"prompt": 5, "answer": "1"}], "row 1 has a prompt that is neither text nor chat messages"),
    ([{"prompt": ["1+1="], "answer": "2"}], "row 1 has a prompt that is neither text nor chat messages"),
    ([{"prompt": [{"content": "1+1="}], "answer": "2"}], "row 1 has a prompt that is neither text nor chat messages"),
])  # fmt: skip
def test_bad_data_is_told_in_one_sentence(small, tmp_path, capsys, rows, said):
    write_jsonl(tmp_path / "bad.jsonl", rows)
    fails(
        ["train", *flags(dataclasses.replace(small, data=str(tmp_path / "bad.jsonl")))],
        capsys,
        said,
    )


def test_a_mistake_leaves_the_folder_free(small):
    """A run that could not start must not be in the way of the corrected one."""
    for change in (dict(wandb="project"), dict(data="missing.jsonl"), dict(max_response=250)):
        with pytest.raises(fipo.FipoError):
            fipo.train(dataclasses.replace(small, **change))
    fipo.train(dataclasses.replace(small, steps=1))


def test_groups_without_signal_are_told_in_one_sentence(small, tmp_path, capsys):
    write_jsonl(tmp_path / "hard.jsonl", [{"prompt": "1+1=?\n", "answer": "none"}])
    fails(
        ["train", *flags(dataclasses.replace(small, data=str(tmp_path / "hard.jsonl")))],
        capsys,
        "accuracy seen: 0.0%",
    )


def test_a_folder_that_holds_another_run_is_refused(small, capsys):
    Path(small.out).mkdir()
    write_jsonl(Path(small.out) / "metrics.jsonl", [{"step": 0}])
    fails(["train", *flags(small)], capsys, "holds another run: go on with it by --resume")


def test_a_model_folder_without_a_model_is_told(small, tmp_path, capsys):
    fails(
        ["train", *flags(dataclasses.replace(small, model=str(tmp_path)))],
        capsys,
        "loading the model .* failed",
    )


def test_a_model_that_was_not_read_to_its_end_is_told(small, base, tmp_path, capsys):
    """As an interrupted copy or download leaves it."""
    shutil.copytree(base, tmp_path / "half")
    os.truncate(tmp_path / "half" / "model.safetensors", 100_000)
    half = dataclasses.replace(small, model=str(tmp_path / "half"))
    fails(["train", *flags(half)], capsys, "loading the model .*half' .* failed")


def test_an_evaluation_is_not_written_over(small, tmp_path, capsys):
    (tmp_path / "eval.json").write_text("{}")
    fails(
        ["eval", "--model", small.model, "--data", small.data, "--out", str(tmp_path)],
        capsys,
        "holds an evaluation",
    )


def test_a_gpu_without_bfloat16_is_refused_it(base, monkeypatch):
    """No such GPU is here: what torch would say of one is set by hand."""
    says = {"is_available": True, "current_device": 0, "is_bf16_supported": False}
    for name, answer in says.items():
        monkeypatch.setattr(f"torch.cuda.{name}", lambda answer=answer, **how: answer)
    with pytest.raises(fipo.FipoError, match="this GPU has no bfloat16: --dtype float32"):
        fipo.Policy(base, fipo.EvalConfig(model=base, data="d", dtype="bfloat16"))


def test_unknown_flag_and_unknown_command(small, capsys):
    fails(
        ["train", *flags(small), "--learning_rate", "1"],
        capsys,
        "unrecognized arguments: --learning_rate",
    )
    fails(["train", *flags(small), "--ste", "1"], capsys, "unrecognized arguments: --ste")
    fails(["trian"], capsys, "first word is train or eval")
    fails(
        ["eval", "--model", small.model, "--data", small.data, "--eval_k", "99"],
        capsys,
        "--eval_k is 99",
    )


@pytest.mark.parametrize("error", [
    MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
])  # fmt: skip
def test_out_of_memory_names_the_knobs(error):
    with pytest.raises(
        SystemExit, match="--tokens_per_micro_batch.*--rollout_rows.*--gradient_checkpointing"
    ):
        with fipo.report_errors():
            raise error


def test_out_of_memory_for_real():
    import torch

    with pytest.raises(SystemExit, match="out of memory"), fipo.report_errors():
        torch.empty(1 << 60)


def test_other_errors_are_not_hidden():
    with pytest.raises(RuntimeError, match="a bug"), fipo.report_errors():
        raise RuntimeError("a bug")


def test_an_evaluation_under_a_launcher_is_refused(small, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    words = ["eval", "--model", small.model, "--data", small.data]
    fails(words, capsys, "--deepspeed and a launcher.* need each other")


def test_a_mistake_of_another_rank_alone_is_reported_after_rank_0_had_its_time(monkeypatch):
    """The launcher ends the other ranks as soon as rank 0 has ended, so usually only rank 0 reports."""
    waited = []
    monkeypatch.setattr(fipo.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "3")
    with (
        pytest.raises(SystemExit, match="^fipo: rank 3: the disk of this node is full$"),
        fipo.report_errors(),
    ):
        raise fipo.FipoError("the disk of this node is full")
    assert waited == [10]


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"], ["eval", "--help"]])
def test_help(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        fipo.main(argv)
        sys.exit(0)
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "Future-KL" in text if argv == ["--help"] else "--max_response" in text


def test_every_setting_has_a_line_of_help():
    assert all(f.metadata.get("help") for f in dataclasses.fields(fipo.Config))


def test_a_mistake_ends_the_process_without_a_traceback():
    done = subprocess.run(
        [sys.executable, str(ROOT / "fipo.py"), "train", "--model", "m"],
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 1
        and "Traceback" not in done.stderr
        and "fipo: --data is missing" in done.stderr
    )


# -------------------------------------------------------------------------------------------------- train_small.py


def small_run(out: Path, cache: Path, *extra: str) -> subprocess.CompletedProcess:
    quick = ["--pretrain_steps", "60", "--group_size", "8", "--prompts_per_batch", "4", "--prompts_per_mini_batch", "2",
             "--max_response", "32", "--eval_every", "2", "--save_every", "1"]  # fmt: skip
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, str(ROOT / "train_small.py"), "--out", str(out), *quick, *extra],
                          capture_output=True, text=True, env=environment)  # fmt: skip


def test_train_small_as_a_user_runs_it(tmp_path):
    out, cache = tmp_path / "run", tmp_path / "cache"
    first = small_run(out, cache, "--steps", "2", "--study_seeds", "0")
    assert first.returncode == 0, first.stdout + first.stderr
    assert first.stdout.startswith("embedded run") and "pretraining for 60 steps" in first.stdout
    assert re.search(r"accuracy +[\d.]+% +[\d.]+%", first.stdout) and "mean length" in first.stdout
    assert first.stdout.count("before ") >= 3 and "Traceback" not in first.stderr
    assert (out / "curves.png").stat().st_size > 10_000
    assert {p.name for p in out.iterdir()} == {"checkpoints", "config.json", "curves.png", "metrics.jsonl", "problems",
                                               "samples.jsonl"}  # fmt: skip
    refused = small_run(out, cache, "--steps", "3")
    assert refused.returncode == 1 and "holds another run" in refused.stderr
    more = small_run(out, cache, "--steps", "3", "--resume", "--study_seeds", "1")
    assert (
        more.returncode == 0 and "cached" in more.stdout and "resuming after step 2" in more.stdout
    )
    assert [line["step"] for line in read_jsonl(out / "metrics.jsonl")] == [0, 1, 2, 3]
    assert "which tokens did RL change?" in more.stdout and "tokens to replace" in more.stdout
    assert {p.name for p in (out / "tokens").iterdir()} == {
        "metrics.json", "histograms.png", "replacement.png", "token_map.html", "token_map.png"}  # fmt: skip
    shutil.rmtree(out)


def test_the_token_study_of_a_run_is_in_float32(tmp_path, monkeypatch):
    """Whatever the run computed in: bfloat16's rounding would look like a change."""
    asked = []
    monkeypatch.setattr(
        tokens, "run_tokens", lambda cfg: asked.append(cfg) or fipo.require(False, "seen")
    )
    cfg = fipo.Config(model="m", data="d", eval_data="e", out=str(tmp_path), dtype="bfloat16", max_response=77,
                      problems=9)  # fmt: skip
    with pytest.raises(fipo.FipoError, match="seen"):
        train_small.study_tokens(cfg, 2, embedded=False)
    with pytest.raises(fipo.FipoError, match="seen"):
        train_small.study_tokens(cfg, 2, embedded=True)
    how, tiny = asked
    assert (how.dtype, how.data, how.max_response, how.seeds, how.replacement) == (
        "float32",
        "e",
        77,
        2,
        False,
    )
    assert (how.problems, tiny.problems, tiny.replacement) == (32, 128, True), (
        "not the number that the run took"
    )


def test_grpo_in_the_embedded_run_is_grpo():
    given = ["--model", "m", "--data", "d", "--out", "o"]
    cfg = train_small.configure([*given, "--algorithm", "grpo"], train_small.EMBEDDED)
    assert fipo.resolve(cfg).overlong_buffer == 0
    cfg = train_small.configure([*given, "--algorithm", "dapo"], train_small.EMBEDDED)
    assert fipo.resolve(cfg).overlong_buffer == train_small.EMBEDDED["overlong_buffer"]


def test_each_section_holds_what_the_docstring_says_of_it():
    """And the README names no lines: they move with every edit."""
    sections, number = {}, 0
    for line in (ROOT / "fipo.py").read_text().splitlines():
        number = int(found[1]) if (found := re.match(r"# -{9,} (\d+)\. ", line)) else number
        if found := re.match(r"(?:def|class) (\w+)", line):
            sections[found[1]] = number
    table = next(part for part in fipo.__doc__.split("\n\n") if part.startswith("  1. "))
    named, number = {}, 0
    for line in table.splitlines():
        number = int(found[1]) if (found := re.match(r" +(\d+)\. ", line)) else number
        if found := re.search(r"  ([a-zA-Z_]+(?:, [a-zA-Z_]+)*)$", line):
            named |= dict.fromkeys(found[1].split(", "), number)
    assert set(named.values()) == set(range(1, 11)), named
    assert named == {name: sections.get(name) for name in named}
    assert not re.findall(r"fipo\.py#L\d+", (ROOT / "README.md").read_text())


def test_a_mistake_in_train_small_leaves_nothing_behind(tmp_path):
    with pytest.raises(SystemExit, match="--clip_low is -1.0"):
        train_small.main(["--clip_low", "-1", "--out", str(tmp_path / "run")])
    assert not list(tmp_path.iterdir())


def test_train_small_tells_a_mistyped_setting_in_two_lines(capsys):
    with pytest.raises(SystemExit):
        train_small.main(["--algorithm", "ppo"])
    usage, sentence = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: python train_small.py") and "invalid choice: 'ppo'" in sentence


def test_train_small_help(capsys):
    with pytest.raises(SystemExit) as stop:
        train_small.main(["--help"])
    text = capsys.readouterr().out
    assert (
        stop.value.code == 0
        and len(text.splitlines()) <= 24
        and max(map(len, text.splitlines())) <= 90
    )
    named = re.findall(r"^  --(\w+)", text, re.M)
    assert len(named) == 8 and set(named) <= set(vars(train_small.parser().parse_args([])))


def test_held_out_problems_are_neither_in_the_corpus_nor_trained_on():
    parts = [{tuple(d) for d in train_small.all_problems()[s]} for s in
             (train_small.HELD_OUT, train_small.FOR_RL, train_small.FOR_CORPUS)]  # fmt: skip
    assert (
        len(set.union(*parts)) == sum(map(len, parts)) == train_small.LARGEST**train_small.OPERANDS
    )


def test_the_corpus_says_what_the_readme_says():
    """Longer answers are rarer and more often right."""
    import random

    rng, share, right, length = random.Random(0), {}, {}, {}
    for style, weight, slip, _ in train_small.STYLES:
        texts = [
            (d, train_small.answer(d, style, slip, rng)) for d in train_small.all_problems()[:1000]
        ]
        share[style] = weight
        right[style] = sum(fipo.verify(text, str(sum(d))) for d, text in texts) / 1000
        length[style] = sum(len(text) for _, text in texts) / 1000
    assert share["short"] > share["worked"] > share["checked"]
    assert right["short"] < 0.3 < 0.9 < right["worked"] < right["checked"] == 1
    assert length["short"] < length["worked"] / 2.5 < length["checked"] / 4


def test_vllm_that_is_not_installed_is_told(small, capsys):
    if importlib.util.find_spec("vllm"):
        pytest.skip("vLLM is installed here")
    fails(
        ["train", *flags(dataclasses.replace(small, sampler="vllm"))],
        capsys,
        "pip install vllm==.* No module named",
    )


def test_a_terminal_that_knows_no_greek_is_no_obstacle():
    code = "import fipo, train_small; fipo.main(['--help']); train_small.main(['--help'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"PYTHONIOENCODING": "ascii"})  # fmt: skip
    assert done.returncode == 0 and "Future-KL" in done.stdout and "--study_seeds" in done.stdout, (
        done.stderr
    )


def test_without_a_terminal_a_line_a_minute_says_where_a_long_run_stands(capsys):
    clock = 0
    with (
        fipo.progress(total=3, desc="steps") as outer,
        fipo.progress(total=300, desc="tokens") as bar,
    ):
        start = bar.start_t
        bar._time = lambda: start + clock  # tqdm's own
        while clock < 199:
            clock += 1
            bar.update()
        fipo.say("step 1")
        outer.update()
    told = capsys.readouterr()
    assert re.findall(r"tokens (\d+)/300, (\S+) gone, (\S+) left\n", told.err) == [
        ("60", "01:00", "04:00"), ("120", "02:00", "03:00"), ("180", "03:00", "02:00")
    ]  # fmt: skip
    assert (
        told.out == "step 1\n" and told.err.count("\n") == 3 and not set("\r\x1b") & set(told.err)
    )


def test_the_bar_that_vllm_is_given_has_a_duration_and_prints_lines(capsys):
    """vLLM makes the bar itself, with these arguments, and divides by the time since its start."""
    bar = fipo.progress(
        total=2,
        desc="Processed prompts",
        dynamic_ncols=True,
        postfix="est. speed input: 0.00 toks/s",
    )
    assert bar.format_dict["elapsed"] > 0
    bar.postfix = "est. speed input: 1.00 toks/s"
    bar.update(2)
    bar.refresh()
    bar.close()
    assert capsys.readouterr().err.startswith("Processed prompts 2/2, 00:00 gone")


def test_a_log_is_written_line_by_line(tmp_path):
    """A step takes minutes: what it says must not wait in a buffer until there are 8 kB of it."""
    code = "import os, fipo\nwith fipo.report_errors():\n fipo.say('step 1')\n os._exit(0)"
    with open(tmp_path / "log", "w") as log:
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=log, check=True)
    assert (tmp_path / "log").read_text() == "step 1\n"
