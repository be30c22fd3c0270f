"""The 32B plan: what it refuses, and its formulas against measurements on small models."""

import json
import re
import subprocess
import sys
import tempfile

import pytest
import torch
from conftest import ROOT, ZERO_3, environment
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DynamicCache, Gemma3Config, GPT2Config, Qwen2Config, Qwen2ForCausalLM

import fipo

sys.path.insert(0, str(ROOT / "scripts"))

import plan  # noqa: E402

# ----------------------------------------------------------------------------------------------- what is refused


def dry_run(*words: str, **env: str) -> subprocess.CompletedProcess:
    pytest.importorskip("deepspeed")
    return subprocess.run(["bash", str(ROOT / "train_32b.sh"), *words], env=environment(**{"DRY_RUN": "1"} | env),
                          capture_output=True, text=True)  # fmt: skip


def test_dry_run_prints_the_plan_for_32b_without_gpu_or_weights():
    done = dry_run(NNODES="8")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "32.76 billion parameters" in done.stdout
    rows = {int(line.split()[0]): line for line in done.stdout.splitlines() if re.match(r" +\d+ +\d.*\|", line)}
    assert list(rows) == [8, 16, 32, 64, 128]
    assert rows[8].split()[-2:] == ["no", "yes"] and rows[64].split()[-2:] == ["yes", "yes"]


@pytest.mark.parametrize("words, env, said", [
    (["--lr", "-1"], {}, "--lr is -1.0"),
    (["--no_such_setting", "1"], {}, "unrecognized arguments: --no_such_setting"),
    ([], {"TP": "3"}, "TP=3 does not divide the 8 GPUs"),
    ([], {"TP": "16", "NNODES": "2", "GPUS_PER_NODE": "16"}, "TP=16 does not divide the 40 attention heads"),
    ([], {"TP": "0"}, "TP is 0: it must be a whole number above 0"),
    ([], {"NNODES": "two"}, "NNODES is two: it must be a whole number above 0"),
    ([], {"OFFLOAD": "yes"}, "OFFLOAD is yes: it must be 0 or 1"),
    ([], {"DRY_RUN": "true"}, "DRY_RUN is true: it must be 0 or 1"),
    ([], {"HOSTFILE": "/dev/null"}, "/dev/null names no GPUs"),
    ([], {"DATA": "missing.jsonl"}, "reading problems from missing.jsonl failed"),
    (["--max_response", "200000"], {}, "the model reads 131072"),
])  # fmt: skip
def test_dry_run_refuses_what_cannot_run(words, env, said):
    done = dry_run(*words, **env)
    assert done.returncode != 0 and said in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_help_is_printed_once_and_starts_nothing():
    done = dry_run("--help", DRY_RUN="0")
    assert done.returncode == 0 and done.stdout.count("--wandb WANDB") == 1, done.stderr


@pytest.mark.parametrize("words, env, said", [
    ([], {},
     "on 8 GPUs of 79 GiB, of which 75 can be used: training needs 99.0 GiB per GPU, and sampling needs 124.0 GiB per "
     "GPU; use OFFLOAD=1 with 549 GiB of host memory per node, or 4 nodes of 8 GPUs."),
    ([], {"NNODES": "2"},
     "on 16 GPUs of 79 GiB, of which 75 can be used: sampling needs 89.6 GiB per GPU; use OFFLOAD=1 with 275 GiB of "
     "host memory per node, or 4 nodes of 8 GPUs, or --vllm_memory 0.5."),
    ([], {"GPU_GIB": "139"},
     "on 8 GPUs of 139 GiB, of which 135 can be used: sampling needs 166.0 GiB per GPU; use OFFLOAD=1 with 549 GiB of "
     "host memory per node, or 2 nodes of 8 GPUs, or --vllm_memory 0.45."),
    (["--vllm_memory", "0.2"], {"OFFLOAD": "1"},
     "the KV cache of an engine holds 0 tokens but a response may need 22528; use --vllm_memory 0.9."),
    (["--tokens_per_micro_batch", "100000"], {},
     "it would not fit with OFFLOAD=1, with more nodes or with another --vllm_memory either, so lower "
     "--tokens_per_micro_batch or --max_response, or raise --tensor_parallel (TP)."),
])  # fmt: skip
def test_a_run_that_does_not_fit_is_refused_after_its_plan(words, env, said):
    done = dry_run(*words, **env)
    assert done.returncode == 1
    assert "A step on" in done.stdout, "the whole plan is printed first"
    assert done.stderr.startswith("fipo: Qwen/Qwen2.5-32B does not fit ") and done.stderr.count("\n") == 1
    assert said in done.stderr


@pytest.mark.parametrize("env", [{"OFFLOAD": "1"}, {"NNODES": "4"}])
def test_a_run_that_fits_is_not_refused(env):
    done = dry_run(**env)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_the_hostfile_tells_the_gpus_and_how_many_share_a_host(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("node1 slots=4\n# node2 slots=8\nnode3 slots=4\n")
    done = dry_run(HOSTFILE=str(hosts), OFFLOAD="1")
    assert done.returncode == 0 and "A step on 8 GPUs" in done.stdout, done.stderr
    assert "275 GiB per node of 4 GPUs" in done.stdout


@pytest.mark.parametrize("change, said", [
    (dict(stage=2), "zero_optimization.stage is 2, it must be 3"),
    (dict(stage=9), "zero_optimization.stage must be 2 or 3"),
    (dict(stage3_max_live_parameters=None), "stage3_max_live_parameters Input should be a valid integer"),
    (dict(offload_param={"device": "cpu"}), "remove zero_optimization.offload_param, which the command line decides"),
    (dict(typo=1), "typo Extra inputs are not permitted"),
])  # fmt: skip
def test_plan_refuses_a_deepspeed_file_that_cannot_hold_32b(zero, change, said):
    pytest.importorskip("deepspeed")
    with pytest.raises(fipo.FipoError, match=said):
        plan.check_deepspeed(zero(**change))
    assert plan.check_deepspeed(ZERO_3)["stage"] == 3


BY_HAND = (
    "--model {base} --data {sums} --out o --deepspeed {zero} --max_prompt 16 --max_response 32 --overlong_buffer 8"
)


@pytest.mark.parametrize("words, env, said", [
    ("", {"GPUS": "many"}, "reading GPUS from the environment failed"),
    ("", {"GPUS": "0"}, "GPUS is 0: it must be more than 0"),
    ("", {"GPUS": "1.5"}, "GPUS is 1.5: it must be a whole number"),
    ("", {"GPU_GIB": "80GB"}, "reading GPU_GIB from the environment failed"),
    ("", {"KEPT": "0"}, "KEPT is 0: it must be more than 0"),
    ("--tensor_parallel 3", {}, "--tensor_parallel 3 does not divide the 8 GPUs"),
    ("--gradient_checkpointing false", {}, "without --gradient_checkpointing nothing of this size fits"),
    ("--max_response 999", {}, "make 1015 tokens, the model reads 256"),
    ("--deepspeed=", {"GPUS": "8"}, "--deepspeed is missing: give ds_config.json"),
    ("--deepspeed no.json", {}, "reading no.json failed"),
])  # fmt: skip
def test_plan_by_hand_refuses_what_cannot_run(base, sums, monkeypatch, words, env, said):
    pytest.importorskip("deepspeed")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    by_hand = BY_HAND.format(base=base, sums=sums, zero=ZERO_3).split() + ["--gradient_checkpointing", "true"]
    with pytest.raises(fipo.FipoError, match=said):
        plan.plan([*by_hand, *words.split()])


def test_plan_by_hand_from_any_folder(base, sums, tmp_path):
    """For 8 GPUs where GPUS does not say another number; --help names GPUS and the assumptions."""
    pytest.importorskip("deepspeed")
    script = [sys.executable, str(ROOT / "scripts" / "plan.py")]
    by_hand = BY_HAND.format(base=base, sums=sums, zero=ZERO_3).split() + ["--gradient_checkpointing", "true"]
    for gpus, env in ((8, {}), (24, {"GPUS": "24"})):
        done = subprocess.run([*script, *by_hand], cwd=tmp_path, env=environment(**env), capture_output=True, text=True)
        assert done.returncode == 0 and f"A step on {gpus} GPUs" in done.stdout, done.stderr
        assert ("\n    24 " in done.stdout) == (gpus == 24)
    told = subprocess.run([*script, "--help"], cwd=tmp_path, env=environment(), capture_output=True, text=True).stdout
    names = ("GPUS", "GPUS_PER_NODE", "GPU_GIB", "MFU", "DECODE", "LENGTH", "KEPT")
    assert all(f"\n  {name} " in told for name in names)
    assert "--group_size" in told and "(default: 16)" in told


def test_plan_reads_the_text_part_of_a_model_that_sees_too(tmp_path):
    small = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    text = small | dict(num_key_value_heads=2, head_dim=16, vocab_size=512, max_position_embeddings=4096)
    Gemma3Config(text_config=text, vision_config=small | dict(image_size=28, patch_size=14)).save_pretrained(tmp_path)
    config, parameters = plan.shape_of(str(tmp_path))
    assert (config.hidden_size, config.vocab_size, config.max_position_embeddings) == (64, 512, 4096)
    assert parameters > 512 * 64 and plan.kv_per_token(config) == 2 * 2 * 2 * 2 * 16


def test_plan_names_what_a_config_lacks(tmp_path):
    GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=64).save_pretrained(tmp_path)
    with pytest.raises(fipo.FipoError, match="has no intermediate_size, which the plan's formulas need"):
        plan.shape_of(str(tmp_path))


# ------------------------------------------------------------------------------- the formulas against measurements


def test_plan_counts_the_parameters_of_a_real_model(base):
    _, parameters = plan.shape_of(base)
    assert parameters == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(base).parameters())


def peak(run) -> int:
    """The most bytes allocated at one time while `run` runs on the CPU, by torch's own profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        run()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        seen.export_chrome_trace(file.name)
        events = [e for e in json.load(open(file.name))["traceEvents"] if e.get("name") == "[memory]"]
    events.sort(key=lambda e: e["ts"])
    before = events[0]["args"]["Total Allocated"] - events[0]["args"]["Bytes"]
    return max(e["args"]["Total Allocated"] for e in events) - before


@pytest.mark.parametrize("shape", [
    dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=4, vocab_size=512),
    dict(hidden_size=128, intermediate_size=512, num_hidden_layers=12, vocab_size=512),
    dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, vocab_size=30_000),
])  # fmt: skip
def test_plan_s_bytes_of_activations_and_logits_are_the_measured_peak(shape):
    """One pass of 1024 tokens, forward and backward, in bfloat16, activations recomputed; beside the gradients."""
    config = Qwen2Config(**shape, num_attention_heads=4, num_key_value_heads=1, tie_word_embeddings=False)
    model, tokens, chunk = Qwen2ForCausalLM(config).to(torch.bfloat16).train(), 1024, 256
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    ids, mask = torch.randint(0, config.vocab_size, (1, tokens)), torch.ones(1, tokens)
    saved, layer = plan.activations(config, tokens)
    planned = saved + max(layer, plan.logits(config, chunk))
    measured = peak(lambda: fipo.token_logprobs(model, ids, mask, 1.0, chunk)[0].sum().backward())
    assert planned == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("shape", [
    dict(hidden_size=128, intermediate_size=512, num_hidden_layers=8, vocab_size=512),
    dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, vocab_size=30_000),
])  # fmt: skip
def test_plan_s_bytes_of_a_pass_with_plain_torch_are_the_measured_peak(shape, recomputed, bf16):
    """Float32 weights, with and without autocast, activations kept or recomputed; beside the gradients."""
    config = Qwen2Config(**shape, num_attention_heads=4, num_key_value_heads=1, tie_word_embeddings=True)
    model, tokens, chunk = Qwen2ForCausalLM(config).train(), 1024, 256
    if recomputed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for p in model.parameters():
        p.grad = torch.zeros_like(p)

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logp, _ = fipo.token_logprobs(model, torch.zeros(1, tokens).long(), torch.ones(1, tokens), 1.0, chunk)
        logp.sum().backward()

    parameters = sum(p.numel() for p in model.parameters())
    assert plan.passes(config, parameters, tokens, chunk, bf16, recomputed) == pytest.approx(peak(run), rel=0.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plan_counts_the_bytes_of_the_sampler_s_cache(base, dtype):
    """HFSampler samples in bfloat16 without autocast, which would hold keys and values in float32."""
    policy = fipo.Policy(base, fipo.Config(model=base, dtype=str(dtype).removeprefix("torch.")))
    model, config = fipo.HFSampler(policy).model, policy.config
    cache, rows = DynamicCache(config=config), 3
    with torch.no_grad():
        model(input_ids=torch.zeros(rows, 5).long(), past_key_values=cache)
        model(input_ids=torch.zeros(rows, 1).long(), past_key_values=cache)
    held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    assert sum(tensor.nbytes for tensor in held) == rows * 6 * plan.kv_per_token(config, dtype.itemsize)


def test_plan_of_one_device(base, sums, capsys):
    """Without --deepspeed it tells what plain torch takes, whatever the machine it is asked on."""
    plan.plan(f"--model {base} --data {sums} --out o --max_prompt 16 --max_response 32 --overlong_buffer 8".split())
    told = capsys.readouterr().out
    assert "on one device with plain torch, in bfloat16" in told and "an update" in told and "GPUs N" not in told


@pytest.mark.parametrize("tied", [False, True])
def test_plan_s_flops_are_those_torch_counts(tied):
    config = Qwen2Config(hidden_size=128, intermediate_size=256, num_hidden_layers=2, vocab_size=512,
                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied)  # fmt: skip
    config._attn_implementation = "eager"  # of which torch counts all products, masked or not
    model, tokens = Qwen2ForCausalLM(config), 512
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        fipo.token_logprobs(model, torch.zeros(1, tokens, dtype=torch.long), torch.ones(1, tokens))
    parameters = sum(p.numel() for p in model.parameters())
    attention = 2 * config.num_hidden_layers * config.hidden_size * tokens  # causal: half of what is counted
    planned = plan.forward_flops(config, parameters, tokens)
    assert planned + attention == pytest.approx(counter.get_total_flops() / tokens, rel=0.01)
