"""The 32B code path, tiny and for real: vLLM and DeepSpeed ZeRO-3 in two processes. Needs an environment with vLLM."""

import dataclasses
import json
import os
import re
import signal
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    alike,
    environment,
    finished,
    flags,
    launch,
    read_jsonl,
    second_rank,
    shared_data,
    wait_for_step,
)
from transformers import AutoModelForCausalLM

import fipo

if os.environ.get("FIPO_ENGINES"):  # where the engines must be there, nothing is skipped
    import vllm
else:
    vllm = pytest.importorskip("vllm")


@pytest.fixture(scope="module")
def policy(base, sums) -> fipo.Policy:
    cfg = fipo.Config(
        model=base, data=sums, max_response=32, dtype="float32", sampler="vllm", lr=1e-3
    )
    return fipo.Policy(
        base, fipo.resolve(dataclasses.replace(cfg, out="unused", overlong_buffer=8))
    )


@pytest.fixture(scope="module")
def sampler(policy) -> fipo.VLLMSampler:
    assert policy.vllm
    return fipo.VLLMSampler(policy)


@pytest.fixture(scope="module")
def problems(policy) -> list[fipo.Problem]:
    return fipo.encode_problems(policy.cfg.data, policy, policy.cfg)[:12]


def draw(sampler, problems, n=4, **change) -> list[list[fipo.Rollout]]:
    cfg = dataclasses.replace(sampler.policy.cfg, **change)
    return list(fipo.sample(sampler, problems, (1,), cfg, n, cfg.temperature, 1.0))


# ------------------------------------------------------------------------------------------------------ the sampler


def test_vllm_and_trainer_are_one_policy(sampler, policy, problems):
    groups = draw(sampler, problems)
    assert fipo.score_old_logp(policy, groups)["sampler_mismatch"] < 1e-5
    for r in (r for g in groups for r in g):
        assert len(r.sampler_logp) == len(r.response_ids) > 0
        ends = [i for i, t in enumerate(r.response_ids) if t in policy.eos]
        assert ends == [len(r.response_ids) - 1] or (not ends and len(r.response_ids) == 32), (
            "through the first EOS"
        )


def test_temperature_is_that_of_the_trainer(base, sums, policy, sampler, problems):
    policy.cfg.temperature = 0.7
    assert fipo.score_old_logp(policy, draw(sampler, problems))["sampler_mismatch"] < 1e-5
    policy.cfg.temperature = 1.0


def test_a_response_depends_on_its_problem_s_seed_not_on_who_is_sampled_beside_it(
    sampler, problems
):
    ids = [
        [[list(r.response_ids) for r in g] for g in draw(sampler, problems, rollout_rows=n)]
        for n in (4, 12, 512)
    ]
    assert ids[0] == ids[1] == ids[2]
    assert len({str(r) for g in ids[0] for r in g}) > 10


def test_sync_sends_every_weight_also_a_tied_head_and_without_it_the_run_stops(
    sampler, policy, problems
):
    assert policy.model.config.tie_word_embeddings
    groups = draw(sampler, problems)
    fipo.score_old_logp(policy, groups)
    for group in groups:
        for i, r in enumerate(group):
            r.advantage = (-1.0) ** i
    for _ in range(3):
        fipo.add_gradients(policy, [r for g in groups for r in g], policy.cfg)
        policy.step(lr=3e-3)
    with pytest.raises(fipo.FipoError, match="the sampler holds other weights than the trainer"):
        fipo.score_old_logp(policy, draw(sampler, problems))  # the sync was left out
    sampler.sync()
    assert fipo.score_old_logp(policy, draw(sampler, problems))["sampler_mismatch"] < 1e-5


def test_a_whole_run_without_sync_stops_at_its_second_step(small, sums, monkeypatch):
    monkeypatch.setattr(fipo.VLLMSampler, "sync", lambda self: None)
    with pytest.raises(fipo.FipoError, match="the sampler holds other weights than the trainer"):
        fipo.train(dataclasses.replace(small, lr=3e-3, warmup_steps=1, dtype="float32"))
    assert [line["step"] for line in read_jsonl(Path(small.out) / "metrics.jsonl")] == [0, 1]


def test_auto_takes_vllm_where_the_version_this_file_knows_is_installed(base, monkeypatch, capsys):
    wishes = {
        wish: fipo.Policy(base, fipo.EvalConfig(sampler=wish)).vllm
        for wish in ("auto", "vllm", "hf")
    }
    assert wishes == {"auto": True, "vllm": True, "hf": False}
    monkeypatch.setattr(fipo, "VLLM", "0.11.0")  # as if this file knew another
    assert not fipo.Policy(base, fipo.EvalConfig(sampler="auto")).vllm
    assert "sampling with Hugging Face" in capsys.readouterr().out


def test_the_engine_reads_no_more_than_the_model_does(sampler, policy):
    """A --max_prompt far above the longest prompt does not make vLLM refuse what fits."""
    assert policy.cfg.max_prompt + policy.cfg.max_response > policy.context
    assert sampler.llm.llm_engine.model_config.max_model_len == policy.context == 256


def test_the_engine_runs_all_responses_of_a_chunk_at_once(sampler, policy):
    rows = policy.cfg.rollout_rows
    assert sampler.llm.llm_engine.vllm_config.scheduler_config.max_num_seqs == rows == 512


def test_mistakes_are_told_in_one_sentence(policy, monkeypatch):
    def opens(said, **change):
        monkeypatch.setattr(policy, "cfg", dataclasses.replace(policy.cfg, **change))
        with pytest.raises(fipo.FipoError, match=said):
            fipo.VLLMSampler(policy)

    opens("--tensor_parallel 2 does not divide the 1 ranks", tensor_parallel=2)
    opens(
        "--tensor_parallel 2 does not divide the 1 ranks",
        tensor_parallel=2,
        deepspeed="ds_config.json",
    )
    monkeypatch.setattr(vllm, "__version__", "0.11.0")
    opens("it is 0.11.0, this file knows 0.32.0", tensor_parallel=1, deepspeed="")


# ------------------------------------------------------------------------------------- both engines, two processes


@pytest.fixture(scope="module")
def alone(base, sums, tmp_path_factory) -> fipo.Config:
    """Six steps in one process: plain torch, vLLM."""
    cfg = fipo.Config(
        model=base, data=sums, eval_data=sums, out=str(tmp_path_factory.mktemp("alone") / "run"), steps=6, group_size=8,
        prompts_per_batch=6, prompts_per_mini_batch=2, max_prompt=16, max_response=32, overlong_buffer=8, lr=3e-4,
        warmup_steps=1, eval_samples=2, eval_every=3, dtype="float32", tokens_per_micro_batch=400, sampler="vllm",
    )  # fmt: skip
    finished(launch([str(ROOT / "fipo.py"), "train", *flags(cfg)]))
    return cfg


def test_zero_3_with_an_engine_per_rank_logs_what_one_process_logs(alone, zero, tmp_path):
    sharded = zero(
        stage3_param_persistence_threshold=0
    )  # every weight is gathered when it is needed
    cfg = dataclasses.replace(alone, out=str(tmp_path / "run"), deepspeed=sharded, rollout_rows=16)
    finished(launch([str(ROOT / "fipo.py"), "train", *flags(cfg)], ranks=2))
    alike(Path(cfg.out), Path(alone.out))


def train_32b(cfg: fipo.Config, *words: str) -> subprocess.Popen:
    """`bash train_32b.sh` with small limits, as a user would type it."""
    small = dataclasses.replace(cfg, model="", data="", eval_data="", out="", sampler="auto")
    env = environment(
        MODEL=cfg.model,
        DATA=cfg.data,
        EVAL_DATA=cfg.eval_data,
        OUT=cfg.out,
        GPUS_PER_NODE="2",
        TP="2",
    )
    words = ["bash", str(ROOT / "train_32b.sh"), *flags(small), "--prompts_per_round", "6", *words]
    return subprocess.Popen(
        words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_train_32b_sh_trains_evaluates_is_stopped_and_goes_on(alone, zero, tmp_path, how):
    """Two processes, ZeRO-3, one vLLM engine over both: the numbers are those of one process, through a stop too.

    SIGTERM goes to the script, as from a scheduler; SIGKILL to one rank.
    """
    sharded = zero(stage3_param_persistence_threshold=0)
    cfg = dataclasses.replace(alone, out=str(tmp_path / "run"), save_every=1, deepspeed=sharded)
    out = Path(cfg.out)
    process = train_32b(cfg)
    wait_for_step(out, 1, process)
    os.kill(process.pid if how == signal.SIGTERM else second_rank(process), how)
    output, _ = process.communicate(timeout=60)
    said = {
        signal.SIGTERM: "--resume goes on from there",
        signal.SIGKILL: "another rank has ended",
    }
    assert process.returncode != 0 and re.search(said[how], output), output
    assert fipo.newest_checkpoint(out)
    assert "resuming after step" in finished(train_32b(cfg))
    alike(out, Path(alone.out))
    for line in read_jsonl(out / "metrics.jsonl")[1:]:
        assert line["sampler_mismatch"] < 1e-5
    exported = AutoModelForCausalLM.from_pretrained(out / "checkpoints" / "step_000006")
    trained = AutoModelForCausalLM.from_pretrained(Path(alone.out) / "checkpoints" / "step_000006")
    for name, weight in trained.state_dict().items():
        torch.testing.assert_close(exported.state_dict()[name], weight, atol=2e-5, rtol=1e-3)


def test_train_32b_sh_on_gsm8k_and_vllm_loads_what_it_leaves(reader, tmp_path, capsys):
    """Random weights learn nothing; data, prompts, verifier, both engines and the checkpoint are the real ones."""
    data, cfg = shared_data("gsm8k/test.jsonl"), fipo.Config(out=str(tmp_path / "run"))
    cfg = dataclasses.replace(cfg, model=reader, data=data, steps=2, dynamic_sampling=False, group_size=4,
                              prompts_per_batch=4, prompts_per_mini_batch=2, max_prompt=400, max_response=64,
                              overlong_buffer=60, tokens_per_micro_batch=2000, dtype="float32")  # fmt: skip
    finished(train_32b(cfg, "--algorithm", "dapo", "--prompts_per_round", "4"))
    lines = read_jsonl(Path(cfg.out) / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2] and lines[2]["grad_norm"] > 0
    (tmp_path / "few.jsonl").write_text("".join(open(data).readlines()[:8]))
    left = str(Path(cfg.out) / "checkpoints" / "step_000002")
    fipo.main(["eval", "--model", left, "--data", str(tmp_path / "few.jsonl"), "--sampler", "vllm", "--eval_samples",
               "2", "--max_prompt", "900", "--max_response", "16", "--out", str(tmp_path / "eval")])  # fmt: skip
    assert "8 problems, avg@2" in capsys.readouterr().out
    assert json.loads((tmp_path / "eval" / "eval.json").read_text())["eval/response_length"] > 1


def test_eval_shares_an_engine_between_processes_and_needs_no_weights_of_its_own(
    base, sums, tmp_path
):
    words = f"--model {base} --data {sums} --sampler vllm --eval_samples 2 --max_prompt 16 --max_response 32".split()
    words += ["--dtype", "float32", "--out"]
    for tp in ("1", "2"):  # on a CPU, vLLM has to be told which core a process of its own may have
        finished(launch([str(ROOT / "fipo.py"), "eval", *words, str(tmp_path / tp), "--tensor_parallel", tp],
                        VLLM_CPU_OMP_THREADS_BIND="0|1" if tp == "2" else "auto"))  # fmt: skip
    one, two = (json.loads((tmp_path / tp / "eval.json").read_text()) for tp in ("1", "2"))
    assert one | {"out": "", "tensor_parallel": 0} == two | {"out": "", "tensor_parallel": 0}


def test_pins_are_those_of_vllm_s_own_metadata():
    """The GPU and the CPU build ask for the same torch and transformers; ours are among them."""
    wanted = [
        r
        for name in ("vllm", "vllm-cpu")
        for r in (metadata.requires(name) if installed(name) else [])
    ]
    pins = (ROOT / "requirements.txt").read_text()
    assert (
        any(r.split(";")[0].strip() == "torch==2.13.0" for r in wanted) and "torch==2.13.0" in pins
    )
    assert any(r.startswith("transformers") and ">=5.16.1" in r and "<5.20" in r for r in wanted)
    assert "transformers>=5.16.1,<5.20" in pins and f"vllm=={fipo.VLLM}" in pins


def installed(name: str) -> bool:
    return any(d.metadata["Name"] == name for d in metadata.distributions())
