"""The loop: dynamic sampling, one denominator, exact resume, and nothing lost."""

import copy
import dataclasses
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from array import array
from pathlib import Path

import pytest
import torch
from conftest import ROOT, flags, read_jsonl, shared_data, timeless, wait_for_step, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

import fipo
from fipo import HFSampler, Policy, Rollout

LOGGED = """step reward/mean accuracy response_length/mean response_length/max loss entropy influence/mean
influence/frac_low influence/frac_high future_kl/mean clip_frac dual_clip_frac policy_kl grad_norm skipped_updates
gen_rounds lr time/rollout time/score time/update tokens_per_second sampler_mismatch""".split()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def prepared(cfg: fipo.Config) -> tuple[fipo.Config, Policy, list[list[Rollout]]]:
    """Settings, policy and one scored batch of rollouts, just before the first update."""
    cfg = fipo.resolve(cfg)
    policy = Policy(cfg.model, cfg)
    problems = fipo.encode_problems(cfg.data, policy, cfg)
    sampler = HFSampler(policy)
    groups, _, _ = fipo.collect_rollouts(sampler, problems, cfg, 1, 0)
    fipo.assign_rewards([r for g in groups for r in g], cfg)
    fipo.assign_advantages(groups)
    fipo.score_old_logp(policy, groups)
    return cfg, policy, groups


# -------------------------------------------------------------------------------------------------------- one step


def test_dynamic_sampling_keeps_only_groups_that_teach(small):
    cfg, policy, groups = prepared(small)
    assert len(groups) == cfg.prompts_per_batch
    assert all(0 < fipo.group_accuracy(g) < 1 for g in groups)
    problems = fipo.encode_problems(cfg.data, policy, cfg)
    sampler = HFSampler(policy)
    hard = [dataclasses.replace(p, answer="none") for p in problems]
    again, seen, cursor = fipo.collect_rollouts(sampler, problems, dataclasses.replace(cfg, rollout_rows=8), 1, 0)
    assert fipo.draw_problems(problems, 0, cursor, cfg.seed)[-1] == groups[-1][0].problem, "the next step starts here"
    assert [[r.response_ids for r in g] for g in again] == [[r.response_ids for r in g] for g in groups]
    assert seen["gen_rounds"] == math.ceil(cursor / cfg.prompts_per_round)
    with pytest.raises(fipo.NoSignal, match=r"after 3 rounds only 0 of 12 groups.*accuracy seen: 0.0%.*easier"):
        fipo.collect_rollouts(sampler, hard, dataclasses.replace(cfg, max_gen_rounds=3), 1, 0)


def test_variance_from_the_length_penalty_alone_does_not_save_a_group(small):
    """Groups that are all wrong at different lengths have rewards that differ, and are still sampled again."""
    cfg, policy, _ = prepared(small)
    hard = [dataclasses.replace(p, answer="none") for p in fipo.encode_problems(cfg.data, policy, cfg)]
    everything = dataclasses.replace(cfg, dynamic_sampling=False)
    groups, _, _ = fipo.collect_rollouts(HFSampler(policy), hard, everything, 1, 0)
    fipo.assign_rewards([r for g in groups for r in g], cfg)
    assert any(len({r.reward for r in g}) > 1 for g in groups)
    with pytest.raises(fipo.NoSignal):
        fipo.collect_rollouts(HFSampler(policy), hard, dataclasses.replace(cfg, max_gen_rounds=1), 1, 0)


@pytest.mark.parametrize("algorithm", ["fipo", "grpo"])
@pytest.mark.parametrize("drop", [False, True])
def test_micro_batches_change_nothing(small, algorithm, drop):
    """Loss, gradient norm, metrics and weights after three updates; also when a response is dropped on the way."""
    cfg, policy, groups = prepared(dataclasses.replace(small, algorithm=algorithm, dual_clip=10.0))
    rollouts = [r for g in groups for r in g]
    if drop:  # as if the policy had moved far: A < 0 and r > c on every token of one response
        victim = next(r for r in rollouts if r.advantage < 0)
        victim.old_logp = victim.old_logp - 3.0
    results = []
    for tokens in (1, 200, 100_000):
        p = copy.deepcopy(policy)
        p.optimizer = torch.optim.AdamW(p.model.parameters(), weight_decay=0.1)
        split = dataclasses.replace(cfg, tokens_per_micro_batch=tokens)
        passes = len(fipo.micro_batches(rollouts, tokens))
        metrics = [fipo.update_mini_batch(p, rollouts, split, 1e-4, first=False) for _ in range(3)]
        results.append((passes, metrics, p.model.state_dict()))
    assert [r[0] > 1 for r in results] == [True, True, False]
    if drop:
        assert results[0][1][0]["dropped_sequences"] == 1
    for _, metrics, state in results[1:]:
        for mine, theirs in zip(metrics, results[0][1]):
            assert mine == pytest.approx(theirs, rel=1e-4, abs=2e-5)
        for name, value in state.items():
            torch.testing.assert_close(value, results[0][2][name], atol=2e-6, rtol=1e-4)


def test_the_first_update_is_dapo_and_later_ones_are_not(small):
    cfg, policy, groups = prepared(dataclasses.replace(small, weight_range=[0.8, 1.2], lr=3e-4, warmup_steps=1))
    metrics = fipo.update(policy, fipo.mini_batches(groups, cfg, 1), cfg, step=1)
    assert metrics["influence/first"] == pytest.approx(1, abs=1e-5)
    assert abs(metrics["influence/last"] - 1) > 1e-3


def test_the_first_warm_up_step_already_learns(small):
    cfg, policy, groups = prepared(small)
    before = {k: v.clone() for k, v in policy.model.state_dict().items()}
    metrics = fipo.update(policy, fipo.mini_batches(groups, cfg, 1), cfg, step=1)
    assert metrics["lr"] == cfg.lr / 2  # warmup_steps is 2
    assert any(not torch.equal(before[k], v) for k, v in policy.model.state_dict().items())
    cfg, policy, groups = prepared(small)
    assert fipo.update(policy, fipo.mini_batches(groups, cfg, 5), cfg, step=5)["lr"] == cfg.lr


def test_a_gradient_that_is_not_finite_moves_nothing_and_is_counted(small):
    cfg, policy, groups = prepared(small)
    before = {k: v.clone() for k, v in policy.model.state_dict().items()}
    groups[0][0].advantage = math.nan
    metrics = fipo.update(policy, [groups[0] + groups[1]], cfg, step=1)
    assert metrics["skipped_updates"] == 1
    assert all(torch.equal(before[k], v) for k, v in policy.model.state_dict().items())


def test_a_ratio_that_is_not_one_at_the_first_update_stops_the_run(small):
    cfg, policy, groups = prepared(small)
    for r in (r for g in groups for r in g):
        r.old_logp = r.old_logp + 0.5  # as dropout, or another model, would make it
    before = {k: v.clone() for k, v in policy.model.state_dict().items()}
    with pytest.raises(fipo.FipoError, match="the ratio is not 1"):
        fipo.update(policy, fipo.mini_batches(groups, cfg, 1), cfg, step=1)
    assert all(torch.equal(before[k], v) for k, v in policy.model.state_dict().items())


def test_a_sampler_that_is_not_the_trainer_s_policy_stops_the_run(small):
    _, policy, groups = prepared(small)
    groups[0][0].sampler_logp = array("f", [lp - 1.0 for lp in groups[0][0].sampler_logp])
    with pytest.raises(fipo.FipoError, match="other weights than the trainer"):
        fipo.score_old_logp(policy, groups[:1])


def test_presets_are_a_ladder_and_explicit_settings_win():
    given = dict(model="m", data="d", out="o")
    grpo, dapo, ours = (fipo.resolve(fipo.Config(**given, algorithm=a)) for a in ("grpo", "dapo", "fipo"))
    assert dataclasses.replace(ours, weight_range=[1.0, 1.0], algorithm="dapo") == dapo
    assert (grpo.clip_high, grpo.loss_mean, grpo.dynamic_sampling, grpo.overlong_buffer) == (0.2, "response", False, 0)
    assert ours.weight_range == [1.0, 1.2] and ours.clip_high == 0.28 and ours.dual_clip == 10
    assert fipo.resolve(fipo.Config(**given, algorithm="grpo", clip_high=0.3)).clip_high == 0.3


def test_one_update_per_rollout_is_warned_about(small, capsys):
    with pytest.raises(fipo.FipoError):  # the warning comes before anything is read
        fipo.train(dataclasses.replace(small, data="missing.jsonl", prompts_per_mini_batch=4))
    assert "FIPO is just DAPO" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------- the whole loop


def test_a_run_logs_what_it_promises_and_leaves_a_model_that_transformers_loads(small, sums):
    fipo.train(dataclasses.replace(small, eval_data=sums))
    out = Path(small.out)
    lines = read_jsonl(out / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert set(lines[0]) == {"step", "eval/accuracy", "eval/cons", "eval/pass", "eval/response_length"}
    assert all(name in line for line in lines[1:] for name in LOGGED)
    assert "eval/accuracy" not in lines[1] and "eval/accuracy" in lines[2]
    kinds = [(s["step"], s["kind"]) for s in read_jsonl(out / "samples.jsonl")]
    assert set(kinds) == {(0, "eval"), (1, "train"), (2, "train"), (2, "eval")}
    trained, base = weights(out / "checkpoints" / "step_000002"), weights(Path(small.model))
    assert any(not torch.equal(trained[k], base[k]) for k in base)
    assert AutoTokenizer.from_pretrained(out / "checkpoints" / "step_000002")("1+2")["input_ids"] == [2, 11, 3]


@pytest.mark.parametrize("algorithm", ["dapo", "grpo"])
def test_the_other_rungs_of_the_ladder_run(small, algorithm):
    fipo.train(dataclasses.replace(small, algorithm=algorithm))
    lines = read_jsonl(Path(small.out) / "metrics.jsonl")
    assert all(line["influence/mean"] == 1 for line in lines[1:])


def test_gsm8k_runs_through_the_real_loop(reader, tmp_path):
    """A random model that reads bytes learns nothing; data, prompts, verifier, loop and logs are the real ones."""
    data, out = shared_data("gsm8k/train.jsonl"), tmp_path / "run"
    fipo.main(["train", "--model", reader, "--data", data, "--out", str(out), "--steps", "2", "--algorithm", "dapo",
               "--dynamic_sampling", "false", "--group_size", "4", "--prompts_per_batch", "2", "--max_response", "64",
               "--prompts_per_mini_batch", "1", "--max_prompt", "400", "--overlong_buffer", "60"])  # fmt: skip
    lines = read_jsonl(out / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2] and lines[2]["grad_norm"] > 0
    assert "Solve the problem below" in read_jsonl(out / "samples.jsonl")[0]["prompt"][0]["content"]


def test_eval_command_on_aime(base, tmp_path, capsys):
    data, out = shared_data("aime24/aime-2024.parquet"), tmp_path / "eval"
    fipo.main(["eval", "--model", base, "--data", data, "--eval_samples", "2", "--max_response", "8", "--max_prompt",
               "240", "--out", str(out)])  # fmt: skip
    assert "avg@2 0.0%" in capsys.readouterr().out
    assert json.loads((out / "eval.json").read_text())["eval/accuracy"] == 0
    assert read_jsonl(out / "responses.jsonl")


# ----------------------------------------------------------------------------------------------- nothing gets lost


def start(cfg: fipo.Config, *extra: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(ROOT / "fipo.py"), "train", *flags(cfg), *extra],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip


@pytest.fixture(scope="module")
def long_run(base, sums, tmp_path_factory) -> fipo.Config:
    """Eight steps, with evaluations, that nothing interrupts."""
    cfg = fipo.Config(
        model=base, data=sums, eval_data=sums, out=str(tmp_path_factory.mktemp("uninterrupted") / "run"), steps=8,
        group_size=8, prompts_per_batch=4, prompts_per_mini_batch=2, max_prompt=16, max_response=32, overlong_buffer=8,
        lr=1e-4, warmup_steps=4, eval_samples=1, eval_every=3, save_every=3,
    )  # fmt: skip
    process = start(cfg)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return cfg


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_equals_uninterrupted(long_run, tmp_path, how):
    cfg = dataclasses.replace(long_run, out=str(tmp_path / "run"))
    out = Path(cfg.out)
    process = start(cfg)
    wait_for_step(out, 4, process)
    process.send_signal(how)
    output, _ = process.communicate(timeout=60)
    if how != signal.SIGKILL:
        assert process.returncode == 0 and "Traceback" not in output and "--resume goes on from there" in output
    process = start(cfg, "--resume")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "resuming after step" in output, output
    whole = Path(long_run.out)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert timeless(read_jsonl(out / name)) == timeless(read_jsonl(whole / name)), name
    mine, theirs = (weights(folder / "checkpoints" / "step_000008") for folder in (out, whole))
    assert all(torch.equal(mine[k], theirs[k]) for k in theirs)


def test_two_checkpoints_are_kept(long_run):
    names = sorted(p.name for p in (Path(long_run.out) / "checkpoints").iterdir())
    assert names == ["step_000006", "step_000008"]


def test_kill_in_the_middle_of_a_save_leaves_the_checkpoint_before_whole(small):
    small = dataclasses.replace(small, steps=4)
    script = f"""
import os, signal, sys, torch
sys.path.insert(0, {str(ROOT)!r})
import fipo
save, count = torch.save, 0
def dying_save(state, path):
    global count
    count += 1
    if count == 2:  # the second checkpoint: weights are written, the optimiser half
        path.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    save(state, path)
torch.save = dying_save
fipo.main(["train", *{flags(small)!r}])
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
    assert fipo.newest_checkpoint(Path(small.out)).name == "step_000002"
    process = start(small, "--resume")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "resuming after step 2" in output
    assert [line["step"] for line in read_jsonl(Path(small.out) / "metrics.jsonl")] == [0, 1, 2, 3, 4]


def test_a_full_disk_is_told_in_one_sentence(small):
    """Here: files may not grow beyond 2 MB, so that the weights can be written and the optimiser cannot."""
    resource = pytest.importorskip("resource")  # Unix
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (2 << 20, 2 << 20))
    words = [sys.executable, str(ROOT / "fipo.py"), "train", *flags(small)]
    done = subprocess.run(words, preexec_fn=limit, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "fipo: writing the checkpoint" in done.stderr and "is the disk full?" in done.stderr
    assert not fipo.newest_checkpoint(Path(small.out)), "half a checkpoint has no name"
    fipo.train(dataclasses.replace(small, resume=True))
    assert fipo.newest_checkpoint(Path(small.out)).name == "step_000002"


def test_a_checkpoint_cut_short_is_named_and_the_one_before_is_taken(long_run, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(long_run.out, out)
    newest, before = out / "checkpoints" / "step_000008", out / "checkpoints" / "step_000006"
    os.truncate(newest / "optimizer.pt", 100)
    assert fipo.newest_checkpoint(out) == before
    said = capsys.readouterr().out
    assert "step_000008 is damaged (optimizer.pt)" in said and "falling back" in said
    process = start(dataclasses.replace(long_run, out=str(out)), "--resume")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "resuming after step 6" in output
    mine, theirs = weights(newest), weights(Path(long_run.out) / "checkpoints" / "step_000008")
    assert all(torch.equal(mine[k], theirs[k]) for k in theirs)
    for folder in (newest, before):
        (folder / "model.safetensors").unlink()
    for _ in range(2):  # and saying so destroys nothing
        with pytest.raises(fipo.FipoError, match=r"no checkpoint in .* is whole"):
            fipo.newest_checkpoint(out)


def test_an_error_during_rollouts_loses_no_finished_step(small, monkeypatch):
    """Whatever ends the run between two updates, the steps already done are saved, though none was due to be."""
    collect = fipo.collect_rollouts

    def dies_at_step_two(*args):
        if args[3] == 2:
            raise MemoryError
        return collect(*args)

    monkeypatch.setattr(fipo, "collect_rollouts", dies_at_step_two)
    small = dataclasses.replace(small, save_every=100)
    with pytest.raises(MemoryError):
        fipo.train(small)
    assert fipo.newest_checkpoint(Path(small.out)).name == "step_000001"
    monkeypatch.undo()
    fipo.train(dataclasses.replace(small, resume=True))
    assert [line["step"] for line in read_jsonl(Path(small.out) / "metrics.jsonl")] == [0, 1, 2]


def test_a_signal_during_an_update_waits_for_its_end(small, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    step = Policy.step

    def signalled(policy, lr, scale):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(policy, lr, scale)

    monkeypatch.setattr(Policy, "step", signalled)
    with pytest.raises(fipo.Interrupted):
        fipo.train(small)
    checkpoint = fipo.newest_checkpoint(Path(small.out))
    assert json.loads((checkpoint / "state.json").read_text())["step"] == 1  # both updates of step 1 are in
    assert signal.getsignal(signal.SIGTERM) == before


def test_resuming_names_settings_that_changed(small, capsys):
    fipo.train(small)
    fipo.train(dataclasses.replace(small, resume=True, steps=3, lr=2e-4))
    assert "settings that differ from the run so far: steps 2 → 3, lr 0.0001 → 0.0002" in capsys.readouterr().out
    with pytest.raises(fipo.FipoError, match="is at step 3 already"):
        fipo.train(dataclasses.replace(small, resume=True, steps=1))


def test_when_nothing_is_left_to_learn_the_run_saves_and_says_so(small, tmp_path):
    data = tmp_path / "impossible.jsonl"
    write_jsonl(data, [{"prompt": "1+1=?\n", "answer": "none"}] * 2)
    with pytest.raises(fipo.NoSignal):
        fipo.train(dataclasses.replace(small, data=str(data), max_gen_rounds=2))
    assert fipo.newest_checkpoint(Path(small.out)).name == "step_000000"
    with pytest.raises(fipo.NoSignal, match="all rewards are equal"):
        fipo.train(dataclasses.replace(small, data=str(data), algorithm="grpo", overlong_buffer=0, out=small.out + "2"))
