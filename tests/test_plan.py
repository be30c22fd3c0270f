"""scripts/plan.py: what it refuses, and its formulas against measurements on small models."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, ZERO_3, environment
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma3Config,
    GPT2Config,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import fipo

sys.path.insert(0, str(ROOT / "scripts"))

import plan  # noqa: E402

TRAIN_32B = ["bash", str(ROOT / "train_32b.sh")]
NUMBERS = ("GPUS", "GPUS_PER_NODE", "GPU_GIB", "MFU", "DECODE", "LENGTH", "KEPT")

# ------------------------------------------------------------------------ train_32b.sh and its plan

# Stands in for `python`: records the last call and what the environment says about GPUs.
FAKE_PYTHON = """#!/bin/bash
printf '%s\\0' "$GPUS" "$GPUS_PER_NODE" "$@" >'CALL'
"""


def call(command: Callable[[list[str]], None], words: list[str], capsys) -> tuple[int, str, str]:
    """Run a command in this process. Returns what a process would: status, stdout and stderr."""
    status = 0
    message = ""
    capsys.readouterr()
    try:
        command(words)
    except SystemExit as end:
        status = end.code
    if isinstance(status, str):
        message = status + "\n"
        status = 1
    captured = capsys.readouterr()
    return status, captured.out, captured.err + message


@pytest.fixture
def dry_run(tmp_path, monkeypatch, capsys):
    """Runs train_32b.sh with DRY_RUN=1 and a fake python, and in this process the plan it calls."""
    pytest.importorskip("deepspeed")
    last_call = tmp_path / "call"
    fake = tmp_path / "bin" / "python"
    fake.parent.mkdir()
    fake.write_text(FAKE_PYTHON.replace("CALL", str(last_call)))
    fake.chmod(0o755)

    def run(*words: str, **env: str) -> tuple[int, str, str]:
        path = f"{fake.parent}:{environment()['PATH']}"
        everything = environment(**{"PATH": path, "DRY_RUN": "1"} | env)
        done = subprocess.run([*TRAIN_32B, *words], env=everything, capture_output=True, text=True)
        if done.returncode != 0:
            assert not last_call.exists()
            return done.returncode, done.stdout, done.stderr
        gpus, gpus_per_node, script, *argv = last_call.read_text().split("\0")[:-1]
        assert script == str(ROOT / "scripts" / "plan.py"), "nothing is started after the plan"
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("GPUS", gpus)
        monkeypatch.setenv("GPUS_PER_NODE", gpus_per_node)
        return call(plan.main, argv, capsys)

    return run


@pytest.mark.slow
def test_dry_run_prints_the_plan_for_32b_from_any_folder(tmp_path):
    pytest.importorskip("deepspeed")
    env = environment(DRY_RUN="1", NNODES="8")
    done = subprocess.run(TRAIN_32B, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "32.76 billion parameters" in done.stdout
    rows = {}
    for line in done.stdout.splitlines():
        if re.match(r" +\d+ +\d.*\|", line):
            rows[int(line.split()[0])] = line.split()
    assert list(rows) == [8, 16, 32, 64, 128]
    assert rows[8][-2:] == ["no", "yes"]
    assert rows[64][-2:] == ["yes", "yes"]


@pytest.mark.slow
def test_dry_run_stops_after_the_plan_of_a_run_that_does_not_fit():
    pytest.importorskip("deepspeed")
    env = environment(DRY_RUN="1")
    done = subprocess.run(TRAIN_32B, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert "A step on" in done.stdout, "the whole plan is printed first"
    assert done.stderr.startswith("fipo: Qwen/Qwen2.5-32B does not fit ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "words, env, message",
    [
        (["--lr", "-1"], {}, "--lr is -1.0"),
        (["--no_such_setting", "1"], {}, "unrecognized arguments: --no_such_setting"),
        ([], {"TP": "3"}, "TP=3 does not divide the 8 GPUs"),
        (
            [],
            {"TP": "16", "NNODES": "2", "GPUS_PER_NODE": "16"},
            "TP=16 does not divide the 40 attention heads",
        ),
        ([], {"TP": "0"}, "TP is 0: it must be a whole number above 0"),
        ([], {"NNODES": "two"}, "NNODES is two: it must be a whole number above 0"),
        ([], {"OFFLOAD": "yes"}, "OFFLOAD is yes: it must be 0 or 1"),
        ([], {"DRY_RUN": "true"}, "DRY_RUN is true: it must be 0 or 1"),
        ([], {"HOSTFILE": "/dev/null"}, "/dev/null names no GPUs"),
        ([], {"DATA": "missing.jsonl"}, "reading problems from missing.jsonl failed"),
        (["--max_response", "200000"], {}, "the model reads 131072"),
    ],
)
def test_dry_run_refuses_wrong_settings(dry_run, words, env, message):
    status, _, stderr = dry_run(*words, **env)
    assert status != 0
    assert message in stderr


def test_train_32b_help_is_that_of_the_plan(dry_run):
    status, stdout, stderr = dry_run("--help", DRY_RUN="0")
    assert status == 0 and stdout.count("--wandb WANDB") == 1, stderr
    for name in NUMBERS:
        assert f"\n  {name} " in stdout
    assert "--group_size" in stdout and "(default: 16)" in stdout


@pytest.mark.parametrize(
    "words, env, message",
    [
        (
            [],
            {},
            "on 8 GPUs of 79 GiB, of which 75 can be used: training needs 99.0 GiB per GPU, "
            "and sampling needs 124.0 GiB per GPU; "
            "use OFFLOAD=1 with 549 GiB of host memory per node, or 4 nodes of 8 GPUs.",
        ),
        (
            [],
            {"NNODES": "2"},
            "on 16 GPUs of 79 GiB, of which 75 can be used: sampling needs 89.6 GiB per GPU; "
            "use OFFLOAD=1 with 275 GiB of host memory per node, or 4 nodes of 8 GPUs, "
            "or --vllm_memory 0.5.",
        ),
        (
            [],
            {"GPU_GIB": "139"},
            "on 8 GPUs of 139 GiB, of which 135 can be used: sampling needs 166.0 GiB per GPU; "
            "use OFFLOAD=1 with 549 GiB of host memory per node, or 2 nodes of 8 GPUs, "
            "or --vllm_memory 0.45.",
        ),
        (
            ["--vllm_memory", "0.2"],
            {"OFFLOAD": "1"},
            "the KV cache of an engine holds 0 tokens but a response may need 22528; "
            "use --vllm_memory 0.9.",
        ),
        (
            ["--tokens_per_micro_batch", "100000"],
            {},
            "it would not fit with OFFLOAD=1, with more nodes or with another --vllm_memory "
            "either, so lower --tokens_per_micro_batch or --max_response, "
            "or raise --tensor_parallel (TP).",
        ),
    ],
)
def test_plan_names_each_change_that_would_make_a_run_fit(dry_run, words, env, message):
    status, stdout, stderr = dry_run(*words, **env)
    assert status == 1
    assert "A step on" in stdout, "the whole plan is printed first"
    assert stderr.startswith("fipo: Qwen/Qwen2.5-32B does not fit ") and stderr.count("\n") == 1
    assert message in stderr


@pytest.mark.parametrize("env", [{"OFFLOAD": "1"}, {"NNODES": "4"}])
def test_plan_accepts_a_run_that_fits(dry_run, env):
    status, _, stderr = dry_run(**env)
    assert status == 0 and not stderr


def test_plan_reads_gpus_and_gpus_per_node_from_the_hostfile(dry_run, tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("node1 slots=4\n# node2 slots=8\nnode3 slots=4\n")
    status, stdout, stderr = dry_run(HOSTFILE=str(hosts), OFFLOAD="1")
    assert status == 0, stderr
    assert "A step on 8 GPUs" in stdout
    assert "275 GiB per node of 4 GPUs" in stdout


# --------------------------------------------------------------------------- plan.py called by hand


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(stage=2), "zero_optimization.stage is 2, it must be 3"),
        (dict(stage=9), "zero_optimization.stage must be 2 or 3"),
        (
            dict(stage3_max_live_parameters=None),
            "stage3_max_live_parameters Input should be a valid integer",
        ),
        (
            dict(offload_param={"device": "cpu"}),
            "remove zero_optimization.offload_param, which the command line decides",
        ),
        (dict(typo=1), "typo Extra inputs are not permitted"),
    ],
)
def test_plan_refuses_a_deepspeed_file_unsuited_to_32b(zero, change, message):
    pytest.importorskip("deepspeed")
    with pytest.raises(fipo.FipoError, match=message):
        plan.check_deepspeed(zero(**change))
    assert plan.check_deepspeed(ZERO_3)["stage"] == 3


@pytest.fixture
def one_device(base, sums) -> list[str]:
    """Settings of a small run with plain torch."""
    words = f"--model {base} --data {sums} --out o --max_prompt 16 --max_response 32"
    return [*words.split(), "--overlong_buffer", "8"]


@pytest.fixture
def by_hand(one_device) -> list[str]:
    """Settings of the same run with DeepSpeed."""
    pytest.importorskip("deepspeed")
    return [*one_device, "--deepspeed", ZERO_3, "--gradient_checkpointing", "true"]


@pytest.mark.parametrize(
    "words, env, message",
    [
        ("", {"GPUS": "many"}, "reading GPUS from the environment failed"),
        ("", {"GPUS": "0"}, "GPUS is 0: it must be more than 0"),
        ("", {"GPUS": "1.5"}, "GPUS is 1.5: it must be a whole number"),
        ("", {"GPU_GIB": "80GB"}, "reading GPU_GIB from the environment failed"),
        ("", {"KEPT": "0"}, "KEPT is 0: it must be more than 0"),
        ("--tensor_parallel 3", {}, "--tensor_parallel 3 does not divide the 8 GPUs"),
        (
            "--gradient_checkpointing false",
            {},
            "without --gradient_checkpointing nothing of this size fits",
        ),
        ("--max_response 999", {}, "make 1015 tokens, the model reads 256"),
        ("--deepspeed=", {"GPUS": "8"}, "--deepspeed is missing: give ds_config.json"),
        ("--deepspeed no.json", {}, "reading no.json failed"),
    ],
)
def test_plan_by_hand_refuses_wrong_settings(by_hand, monkeypatch, words, env, message):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(fipo.FipoError, match=message):
        plan.plan([*by_hand, *words.split()])


@pytest.mark.parametrize("env, gpus", [({}, 8), ({"GPUS": "24"}, 24)])
def test_plan_by_hand_is_for_8_gpus_by_default(by_hand, monkeypatch, capsys, env, gpus):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    status, stdout, stderr = call(plan.main, by_hand, capsys)
    assert status == 0, stderr
    assert f"A step on {gpus} GPUs" in stdout
    assert ("\n    24 " in stdout) == (gpus == 24)


def test_plan_without_deepspeed_is_for_one_device(one_device, capsys):
    plan.plan(one_device)
    stdout = capsys.readouterr().out
    assert "on one device with plain torch, in bfloat16" in stdout
    assert "an update" in stdout
    assert "GPUs N" not in stdout


def test_plan_reads_the_text_part_of_an_image_and_text_model(tmp_path):
    small = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    text = dict(num_key_value_heads=2, head_dim=16, vocab_size=512, max_position_embeddings=4096)
    images = dict(image_size=28, patch_size=14)
    model = Gemma3Config(text_config=small | text, vision_config=small | images)
    model.save_pretrained(tmp_path)
    config, parameters = plan.shape_of(str(tmp_path))
    assert config.hidden_size == 64
    assert config.vocab_size == 512
    assert config.max_position_embeddings == 4096
    assert parameters > 512 * 64
    assert plan.kv_bytes_per_token(config) == 2 * 2 * 2 * 2 * 16


def test_plan_names_a_value_that_the_config_lacks(tmp_path):
    GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=64).save_pretrained(tmp_path)
    message = "has no intermediate_size, which the plan's formulas need"
    with pytest.raises(fipo.FipoError, match=message):
        plan.shape_of(str(tmp_path))


# ----------------------------------------------------------------- formulas against measurements


def count_parameters(model: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


def test_plan_counts_the_parameters_of_a_real_model(base):
    _, parameters = plan.shape_of(base)
    assert parameters == count_parameters(AutoModelForCausalLM.from_pretrained(base))


def peak_bytes(run: Callable[[], None], path: Path) -> int:
    """The most bytes allocated at one time while `run` runs on the CPU, by torch's profiler."""
    activities = [ProfilerActivity.CPU]
    with profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
        run()
    profiler.export_chrome_trace(str(path))
    events = []
    for event in json.loads(path.read_text())["traceEvents"]:
        if event.get("name") == "[memory]":
            events.append((event["ts"], event["args"]))
    events.sort(key=lambda event: event[0])
    _, first = events[0]
    before = first["Total Allocated"] - first["Bytes"]
    peak = max(args["Total Allocated"] for _, args in events)
    return peak - before


DEEP = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=12, vocab_size=512)
LARGE_VOCABULARY = dict(
    hidden_size=128, intermediate_size=256, num_hidden_layers=2, vocab_size=30_000
)


def model_with_gradients(shape: dict, tied: bool, recomputed: bool) -> Qwen2ForCausalLM:
    """A Qwen2 model whose gradients exist, so that a pass does not allocate them."""
    heads = dict(num_attention_heads=4, num_key_value_heads=1)
    model = Qwen2ForCausalLM(Qwen2Config(**shape, **heads, tie_word_embeddings=tied))
    model.train()
    if recomputed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    return model


@pytest.mark.parametrize(
    "shape",
    [
        dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=4, vocab_size=512),
        DEEP,
        LARGE_VOCABULARY,
    ],
)
def test_plan_bytes_of_activations_and_logits_match_the_measured_peak(shape, tmp_path):
    """One forward and backward pass in bfloat16 with gradient checkpointing."""
    tokens = 1024
    chunk = 256
    model = model_with_gradients(shape, tied=False, recomputed=True).to(torch.bfloat16)
    ids = torch.randint(shape["vocab_size"], (1, tokens))
    mask = torch.ones(1, tokens)

    def run() -> None:
        logp, _ = fipo.token_logprobs(model, ids, mask, 1.0, chunk)
        logp.sum().backward()

    measured = peak_bytes(run, tmp_path / "trace.json")
    assert plan.pass_bytes(model.config, tokens, chunk) == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("shape", [DEEP | dict(num_hidden_layers=8), LARGE_VOCABULARY])
def test_plan_bytes_of_a_plain_torch_pass_match_the_measured_peak(
    shape, recomputed, bf16, tmp_path
):
    """One forward and backward pass with float32 weights, with and without autocast."""
    tokens = 1024
    chunk = 256
    model = model_with_gradients(shape, tied=True, recomputed=recomputed)
    ids = torch.zeros(1, tokens, dtype=torch.long)
    mask = torch.ones(1, tokens)

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logp, _ = fipo.token_logprobs(model, ids, mask, 1.0, chunk)
        logp.sum().backward()

    parameters = count_parameters(model)
    planned = plan.plain_pass_bytes(model.config, parameters, tokens, chunk, bf16, recomputed)
    assert planned == pytest.approx(peak_bytes(run, tmp_path / "trace.json"), rel=0.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plan_bytes_of_the_cache_match_those_of_the_sampler(base, dtype):
    """HFSampler samples in bfloat16 without autocast, which would keep the cache in float32."""
    name = str(dtype).removeprefix("torch.")
    policy = fipo.Policy(base, fipo.Config(model=base, dtype=name))
    model = fipo.HFSampler(policy).model
    cache = DynamicCache(config=policy.config)
    rows = 3
    with torch.no_grad():
        model(input_ids=torch.zeros(rows, 5).long(), past_key_values=cache)
        model(input_ids=torch.zeros(rows, 1).long(), past_key_values=cache)
    measured = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert measured == rows * 6 * plan.kv_bytes_per_token(policy.config, dtype.itemsize)


@pytest.mark.parametrize("tied", [False, True])
def test_plan_flops_match_those_that_torch_counts(tied):
    tokens = 512
    config = Qwen2Config(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        vocab_size=512,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    config._attn_implementation = "eager"  # torch counts all of its products, masked or not
    model = Qwen2ForCausalLM(config)
    ids = torch.zeros(1, tokens, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        fipo.token_logprobs(model, ids, torch.ones(1, tokens))
    # The plan counts causal attention, which is half of what torch counts.
    masked_half = 2 * config.num_hidden_layers * config.hidden_size * tokens
    planned = plan.forward_flops(config, count_parameters(model), tokens) + masked_half
    assert planned == pytest.approx(counter.get_total_flops() / tokens, rel=0.01)
