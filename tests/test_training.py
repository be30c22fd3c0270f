"""The loop: dynamic sampling, one denominator, exact resume, and nothing lost."""

import contextlib
import copy
import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from array import array
from pathlib import Path

import pytest
import torch
from conftest import ROOT, flags, read_jsonl, shared_data, timeless, wait_for_step, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

import fipo
from fipo import HFSampler, Policy, Rollout

LOGGED = """step reward/mean accuracy response_length/mean response_length/max loss entropy influence_mean
influence_first influence_last influence_frac_low influence_frac_high future_kl_mean clip_frac dual_clip_frac ppo_kl
ppo_kl_first grad_norm skipped_updates dropped_sequences dropped_tokens gen_rounds lr time/rollout time/score
time/update tokens_per_second sampler_mismatch""".split()


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in theirs)


def checkpoint(cfg: fipo.Config, step: int) -> Path:
    return Path(cfg.out) / "checkpoints" / f"step_{step:06d}"


def prepared(cfg: fipo.Config) -> tuple[fipo.Config, Policy, list[list[Rollout]]]:
    """Settings, policy and one scored batch of rollouts, just before the first update."""
    cfg = fipo.resolve(cfg)
    policy = Policy(cfg.model, cfg)
    problems = fipo.encode_problems(cfg.data, policy, cfg)
    groups, _, _ = fipo.collect_rollouts(HFSampler(policy), problems, cfg, 1, 0)
    fipo.assign_rewards(groups, cfg)
    fipo.assign_advantages(groups)
    fipo.score_old_logp(policy, groups)
    return cfg, policy, groups


# -------------------------------------------------------------------------------------------------------- one step


def test_dynamic_sampling_keeps_only_groups_that_teach(small):
    cfg, policy, groups = prepared(small)
    assert len(groups) == cfg.prompts_per_batch
    assert all(0 < sum(r.correct for r in g) < len(g) for g in groups)
    problems = fipo.encode_problems(cfg.data, policy, cfg)
    sampler = HFSampler(policy)
    hard = [dataclasses.replace(p, answer="none") for p in problems]
    again, seen, cursor = fipo.collect_rollouts(
        sampler, problems, dataclasses.replace(cfg, rollout_rows=8), 1, 0
    )
    assert fipo.draw_problems(problems, 0, cursor, cfg.seed)[-1] == groups[-1][0].problem, (
        "the next step starts here"
    )
    assert [[r.response_ids for r in g] for g in again] == [
        [r.response_ids for r in g] for g in groups
    ]
    assert seen["gen_rounds"] == math.ceil(cursor / cfg.prompts_per_round)
    with pytest.raises(
        fipo.NoSignal,
        match=r"in 3 rounds, 0 of 12 groups carry a signal.*accuracy is 0.0%: give easier",
    ):
        fipo.collect_rollouts(sampler, hard, dataclasses.replace(cfg, max_gen_rounds=3), 1, 0)


def test_variance_from_the_length_penalty_alone_does_not_save_a_group(small):
    """Groups that are all wrong at different lengths have rewards that differ, and are still sampled again."""
    cfg, policy, _ = prepared(small)
    hard = [
        dataclasses.replace(p, answer="none") for p in fipo.encode_problems(cfg.data, policy, cfg)
    ]
    everything = dataclasses.replace(cfg, dynamic_sampling=False)
    groups, _, _ = fipo.collect_rollouts(HFSampler(policy), hard, everything, 1, 0)
    fipo.assign_rewards(groups, cfg)
    assert any(len({r.reward for r in g}) > 1 for g in groups)
    with pytest.raises(fipo.NoSignal):
        fipo.collect_rollouts(
            HFSampler(policy), hard, dataclasses.replace(cfg, max_gen_rounds=1), 1, 0
        )


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
        # with the usual eps of 1e-8, rounding of a gradient near 0 may turn into a step of its own size
        p.optimizer = torch.optim.AdamW(p.model.parameters(), weight_decay=0.1, eps=1e-6)
        split = dataclasses.replace(cfg, tokens_per_micro_batch=tokens)
        passes = len(fipo.micro_batches(rollouts, tokens))
        metrics = [
            fipo.add_gradients(p, rollouts, split) | {"grad_norm": p.step(1e-4)} for _ in range(3)
        ]
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
    fipo.train(
        dataclasses.replace(small, weight_range=[0.8, 1.2], lr=3e-4, warmup_steps=1, steps=1)
    )
    metrics = read_jsonl(Path(small.out) / "metrics.jsonl")[1]
    assert metrics["influence_first"] == pytest.approx(1, abs=1e-5)
    assert metrics["ppo_kl_first"] == pytest.approx(0, abs=1e-5)
    assert abs(metrics["influence_last"] - 1) > 1e-3 and abs(metrics["ppo_kl"]) > 1e-5


def test_the_first_warm_up_step_already_learns(small):
    fipo.train(dataclasses.replace(small, steps=3, save_every=1))
    lines = read_jsonl(Path(small.out) / "metrics.jsonl")
    assert [line["lr"] for line in lines[1:]] == [
        small.lr / 2,
        small.lr,
        small.lr,
    ]  # warmup_steps is 2
    fipo.train(dataclasses.replace(small, out=small.out + "1", steps=1))
    assert not same(
        weights(checkpoint(dataclasses.replace(small, out=small.out + "1"), 1)),
        weights(small.model),
    )


def test_grpo_is_the_mean_of_the_responses_own_means(small):
    cfg, policy, groups = prepared(dataclasses.replace(small, algorithm="grpo"))
    rollouts = [r for g in groups for r in g]
    assert len({len(r.response_ids) for r in rollouts}) > 2, (
        "lengths must differ for this to say anything"
    )
    means, terms = [], []
    for r in rollouts:
        r.old_logp = r.old_logp + 0.4 * torch.randn(
            len(r.response_ids), generator=torch.Generator().manual_seed(0)
        )
        ids, mask, old_logp, _ = fipo.collate([r], policy.device)
        with torch.no_grad():
            ratio = (policy.logprobs(ids, mask)[0] - old_logp)[mask].exp()
        token_losses = -torch.minimum(r.advantage * ratio, r.advantage * ratio.clamp(0.8, 1.2))
        means.append(token_losses.mean().item())
        terms += token_losses.tolist()
    by_response, by_token = sum(means) / len(means), sum(terms) / len(terms)
    assert abs(by_response - by_token) > 1e-3, "the two means must differ for this to say anything"
    assert fipo.add_gradients(policy, rollouts, cfg)["loss"] == pytest.approx(by_response, abs=1e-5)
    dapo = dataclasses.replace(cfg, loss_mean="token")
    assert fipo.add_gradients(policy, rollouts, dapo)["loss"] == pytest.approx(by_token, abs=1e-5)


def test_no_gradient_clipping_is_no_clipping(small):
    """Not a norm of 0: the step is that of a bound which is never reached. SGD, since AdamW forgets the scale."""
    cfg, policy, groups = prepared(small)
    moved = {}
    for bound in (0.0, 1e9, 1e-3):
        p = copy.deepcopy(policy)
        p.cfg, p.optimizer = (
            dataclasses.replace(cfg, grad_clip=bound),
            torch.optim.SGD(p.model.parameters()),
        )
        fipo.add_gradients(p, groups[0], cfg)
        norm = p.step(1e-2)
        assert norm > 1e-2
        moved[bound] = torch.cat(
            [(a - b).flatten() for a, b in zip(p.model.parameters(), policy.model.parameters())]
        )
    assert torch.equal(moved[0.0], moved[1e9]) and moved[0.0].norm().item() == pytest.approx(
        1e-2 * norm, rel=1e-2
    )
    assert moved[1e-3].norm().item() == pytest.approx(1e-2 * 1e-3, rel=5e-2)
    runs = [
        dataclasses.replace(small, grad_clip=bound, out=f"{small.out}-{bound}", steps=1)
        for bound in (0.0, 1e9)
    ]
    for run in runs:
        fipo.train(run)
    ours, unreached = (weights(checkpoint(run, 1)) for run in runs)
    assert same(ours, unreached) and not same(ours, weights(small.model))


def poisoned(monkeypatch, groups_hit: int) -> None:
    """From here on, the first response of so many groups has an advantage that is not a number."""
    assign = fipo.assign_advantages

    def poison(groups):
        assign(groups)
        for group in groups[:groups_hit]:
            group[0].advantage = math.nan

    monkeypatch.setattr(fipo, "assign_advantages", poison)


def test_a_gradient_that_is_not_finite_moves_nothing_and_is_counted(small, monkeypatch, capsys):
    cfg, policy, groups = prepared(small)
    before = {k: v.clone() for k, v in policy.model.state_dict().items()}
    groups[0][0].advantage = math.nan
    fipo.add_gradients(policy, groups[0] + groups[1], cfg)
    assert not math.isfinite(policy.step(1e-4))
    assert same(policy.model.state_dict(), before)
    assert not policy.optimizer.state and all(p.grad is None for p in policy.model.parameters()), (
        "nothing is left of it"
    )
    poisoned(monkeypatch, 1)
    fipo.train(dataclasses.replace(small, steps=1))
    line = read_jsonl(Path(small.out) / "metrics.jsonl")[1]
    assert line["skipped_updates"] == 1 and not same(
        weights(checkpoint(small, 1)), weights(small.model)
    )
    assert "every gradient" not in capsys.readouterr().out


def test_a_step_that_learned_nothing_says_so(small, monkeypatch, capsys):
    poisoned(monkeypatch, 4)
    fipo.train(dataclasses.replace(small, steps=1))
    said = capsys.readouterr().out
    assert "warning: every gradient of this step was NaN or infinite" in said
    text = (Path(small.out) / "metrics.jsonl").read_text()
    assert json.loads(text.splitlines()[1])["skipped_updates"] == 2 and "NaN" not in text, (
        "NaN is not JSON"
    )
    assert same(weights(checkpoint(small, 1)), weights(small.model))


def test_a_ratio_that_is_not_one_at_the_first_update_stops_the_run(small, monkeypatch):
    score = fipo.score_old_logp

    def shifted(policy, mini_batches):  # as dropout, or another model, would make it
        metrics = score(policy, mini_batches)
        for r in (r for mini in mini_batches for r in mini):
            r.old_logp = r.old_logp + 0.5
        return metrics

    monkeypatch.setattr(fipo, "score_old_logp", shifted)
    with pytest.raises(
        fipo.FipoError,
        match=r"the ratio must be 1 before the first update, but mean .Δlog p. is 0.5",
    ):
        fipo.train(small)
    assert not fipo.newest_checkpoint(Path(small.out))


@pytest.mark.parametrize(
    "size, is_reported", [(0.0, False), (1e-7, False), (0.0003, True), (0.004, True)]
)
def test_a_drift_of_one_sign_before_the_first_update_is_reported(size, is_reported, capsys):
    """F sums 47 times a drift of one sign, so a mean |Δlog p| of 0.004 already moves f to its bound."""
    noise = torch.randn(8, 400, generator=torch.Generator().manual_seed(0))
    delta = size * noise.abs()
    _, m = fipo.fipo_loss(delta, torch.zeros(8, 400), torch.ones(8), torch.ones(8, 400))
    metrics = {"drift": delta.abs().mean().item(), "influence_mean": m["influence_mean"]}
    fipo.check_first_update(metrics, tolerance=0.1)
    assert (
        capsys.readouterr().out.startswith("warning: f must be 1 before the first update")
        == is_reported
    )
    with pytest.raises(fipo.FipoError, match="the ratio must be 1 before the first update"):
        fipo.check_first_update(metrics | {"drift": 0.2}, tolerance=0.1)


def test_a_sampler_that_is_not_the_trainer_s_policy_stops_the_run(small):
    _, policy, groups = prepared(small)
    groups[0][0].sampler_logp = array("f", [lp - 1.0 for lp in groups[0][0].sampler_logp])
    with pytest.raises(fipo.FipoError, match="other weights than the trainer"):
        fipo.score_old_logp(policy, groups[:1])


def test_presets_are_a_ladder_and_explicit_settings_win():
    given = dict(model="m", data="d", out="o")
    grpo, dapo, ours = (
        fipo.resolve(fipo.Config(**given, algorithm=a)) for a in ("grpo", "dapo", "fipo")
    )
    assert dataclasses.replace(ours, weight_range=[1.0, 1.0], algorithm="dapo") == dapo
    assert (grpo.clip_high, grpo.loss_mean, grpo.dynamic_sampling, grpo.overlong_buffer) == (
        0.2,
        "response",
        False,
        0,
    )
    assert ours.weight_range == [1.0, 1.2] and ours.clip_high == 0.28 and ours.dual_clip == 10
    assert fipo.resolve(fipo.Config(**given, algorithm="grpo", clip_high=0.3)).clip_high == 0.3


def test_the_sampler_sleeps_while_the_trainer_works_and_at_the_end(small, sums, monkeypatch):
    """A vLLM that is awake holds the memory that updates, or whatever follows the run, need."""
    calls = []

    class Watched(HFSampler):
        def sleep(self):
            calls.append("sleep")

        def sync(self):
            calls.append("sync")

        def generate(self, *args):
            calls.append("generate")
            return super().generate(*args)

    step = Policy.step
    monkeypatch.setattr(fipo, "HFSampler", Watched)
    monkeypatch.setattr(Policy, "step", lambda policy, lr: calls.append("step") or step(policy, lr))
    fipo.train(dataclasses.replace(small, eval_data=sums))
    calls = " ".join(
        call for i, call in enumerate(calls) if call != "generate" or calls[i - 1] != call
    )
    assert calls == "generate sleep step step sync generate sleep step step sync generate sleep"


def test_one_update_per_rollout_is_warned_about(small, capsys):
    with pytest.raises(fipo.FipoError):  # the warning comes before anything is read
        fipo.train(dataclasses.replace(small, data="missing.jsonl", prompts_per_mini_batch=4))
    assert "one update per rollout batch makes FIPO DAPO" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------- the whole loop


def test_a_run_logs_what_it_promises_and_leaves_a_model_that_transformers_loads(small, sums):
    fipo.train(dataclasses.replace(small, eval_data=sums))
    out = Path(small.out)
    lines = read_jsonl(out / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert set(lines[0]) == {
        "step",
        "eval/accuracy",
        "eval/cons",
        "eval/pass",
        "eval/response_length",
    }
    assert all(name in line for line in lines[1:] for name in LOGGED)
    assert "eval/accuracy" not in lines[1] and "eval/accuracy" in lines[2]
    kinds = [(s["step"], s["kind"]) for s in read_jsonl(out / "samples.jsonl")]
    assert set(kinds) == {(0, "eval"), (1, "train"), (2, "train"), (2, "eval")}
    assert not same(weights(checkpoint(small, 2)), weights(small.model))
    assert AutoTokenizer.from_pretrained(out / "checkpoints" / "step_000002")("1+2")[
        "input_ids"
    ] == [2, 11, 3]


@pytest.mark.parametrize("algorithm", ["dapo", "grpo"])
def test_the_other_rungs_of_the_ladder_run(small, algorithm):
    fipo.train(dataclasses.replace(small, algorithm=algorithm))
    lines = read_jsonl(Path(small.out) / "metrics.jsonl")
    assert all(line["influence_mean"] == 1 for line in lines[1:])


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
    assert "avg@2 0" in capsys.readouterr().out
    assert json.loads((out / "eval.json").read_text())["eval/accuracy"] == 0
    assert read_jsonl(out / "responses.jsonl")


# ----------------------------------------------------------------------------------------------- nothing gets lost


def start(cfg: fipo.Config) -> subprocess.Popen:
    threads = os.environ | {
        "OMP_NUM_THREADS": str(torch.get_num_threads())
    }  # as here: sums are rounded alike
    return subprocess.Popen([sys.executable, str(ROOT / "fipo.py"), "train", *flags(cfg)], env=threads,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip


@pytest.fixture(scope="module")
def long_run(base, sums, tmp_path_factory) -> fipo.Config:
    """Eight steps, with evaluations, that nothing interrupts."""
    cfg = fipo.Config(
        model=base, data=sums, eval_data=sums, out=str(tmp_path_factory.mktemp("uninterrupted") / "run"), steps=8,
        group_size=8, prompts_per_batch=4, prompts_per_mini_batch=2, max_prompt=16, max_response=32, overlong_buffer=8,
        lr=1e-4, warmup_steps=4, eval_samples=1, eval_every=3, save_every=3,
    )  # fmt: skip
    fipo.train(cfg)
    return cfg


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_equals_uninterrupted(long_run, tmp_path, how, capsys):
    cfg = dataclasses.replace(long_run, out=str(tmp_path / "run"))
    out = Path(cfg.out)
    process = start(cfg)
    wait_for_step(out, 4, process)
    process.send_signal(how)
    output, _ = process.communicate(timeout=60)
    if how != signal.SIGKILL:
        assert (
            process.returncode == 0
            and "Traceback" not in output
            and "--resume continues from there" in output
        )
    fipo.train(dataclasses.replace(cfg, resume=True))
    assert "resuming after step" in capsys.readouterr().out
    whole = Path(long_run.out)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert timeless(read_jsonl(out / name)) == timeless(read_jsonl(whole / name)), name
    assert same(weights(checkpoint(cfg, 8)), weights(checkpoint(long_run, 8)))


def test_two_checkpoints_are_kept(long_run):
    names = sorted(p.name for p in (Path(long_run.out) / "checkpoints").iterdir())
    assert names == ["step_000006", "step_000008"]


def test_kill_in_the_middle_of_a_save_leaves_the_checkpoint_before_whole(small, capsys):
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
    fipo.train(dataclasses.replace(small, resume=True))
    assert "resuming after step 2" in capsys.readouterr().out
    assert [line["step"] for line in read_jsonl(Path(small.out) / "metrics.jsonl")] == [
        0,
        1,
        2,
        3,
        4,
    ]


def test_a_full_disk_is_told_in_one_sentence(small):
    """Here: files may not grow beyond 2 MB, so that the weights can be written and the optimiser cannot."""
    resource = pytest.importorskip("resource")  # Unix
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, hard))
    try:
        with pytest.raises(
            SystemExit, match="^fipo: writing the checkpoint .*is the disk full?.* failed: "
        ) as end:
            fipo.main(["train", *flags(small)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(str(end.value).splitlines()) == 1
    assert not fipo.newest_checkpoint(Path(small.out)), "half a checkpoint has no name"
    fipo.train(dataclasses.replace(small, resume=True))
    assert fipo.newest_checkpoint(Path(small.out)).name == "step_000002"


DAMAGES = {
    "optimiser cut short": lambda folder: os.truncate(folder / "optimizer.pt", 100),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "weights cut short": lambda folder: os.truncate(folder / "model.safetensors", 100_000),
    "state cut short": lambda folder: os.truncate(folder / "state.json", 20),
    "state of another version": lambda folder: (folder / "state.json").write_text(
        '{"step": 8, "last_update": []}'
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_stays(long_run, tmp_path, damage):
    cfg = dataclasses.replace(long_run, out=str(tmp_path / "run"), resume=True, steps=9)
    shutil.copytree(long_run.out, cfg.out)
    DAMAGES[damage](checkpoint(cfg, 8))
    files = sorted(p.name for p in checkpoint(cfg, 8).iterdir())
    logs = (Path(cfg.out) / "metrics.jsonl").read_text()
    with pytest.raises(fipo.FipoError, match="step_000008.* failed: ") as sentence:
        fipo.train(cfg)
    assert len(str(sentence.value).splitlines()) == 1
    assert sorted(p.name for p in checkpoint(cfg, 8).iterdir()) == files, (
        "saying so destroys nothing"
    )
    assert (Path(cfg.out) / "metrics.jsonl").read_text() == logs


def test_when_a_damaged_checkpoint_is_removed_the_one_before_is_taken(long_run, tmp_path, capsys):
    cfg = dataclasses.replace(long_run, out=str(tmp_path / "run"), resume=True)
    shutil.copytree(long_run.out, cfg.out)
    (checkpoint(cfg, 8) / "state.json").unlink()
    assert fipo.newest_checkpoint(Path(cfg.out)) == checkpoint(cfg, 6), (
        "without state.json it is no checkpoint"
    )
    shutil.rmtree(checkpoint(cfg, 8))
    fipo.train(cfg)
    assert "resuming after step 6" in capsys.readouterr().out
    assert same(weights(checkpoint(cfg, 8)), weights(checkpoint(long_run, 8)))


@pytest.mark.parametrize(
    "kept", [0, 1, 40, 300]
)  # bytes of each log, less than the checkpoint knows of
def test_logs_shorter_than_the_checkpoint_are_gone_on_with(small, kept):
    """As a host that lost power, or a copy, leaves them: no padding with NULs, no half lines."""
    fipo.train(small)
    logs = [Path(small.out) / f"{name}.jsonl" for name in ("metrics", "samples")]
    whole = [[row for row in read_jsonl(log) if row["step"] < 2] for log in logs]
    for log in logs:
        os.truncate(log, kept)
    lines = [[json.loads(line) for line in log.read_text().split("\n")[:-1]] for log in logs]
    fipo.train(dataclasses.replace(small, resume=True, steps=3))
    assert all("\0" not in log.read_text() for log in logs)
    metrics, samples = map(read_jsonl, logs)
    assert [row["step"] for row in metrics] == [row["step"] for row in lines[0]] + [2, 3]
    assert metrics[: len(lines[0])] == lines[0] == whole[0][: len(lines[0])]
    assert samples[: len(lines[1])] == lines[1] and {
        row["step"] for row in samples[len(lines[1]) :]
    } == {3}


def test_a_half_written_last_line_is_cut(small):
    fipo.train(small)
    logs = [Path(small.out) / f"{name}.jsonl" for name in ("metrics", "samples")]
    before = [read_jsonl(log) for log in logs]
    for log in logs:
        with open(log, "a") as file:
            file.write('{"step": 2, "kind": "train", "accu')
    fipo.train(dataclasses.replace(small, resume=True, steps=3))
    metrics, samples = map(read_jsonl, logs)
    assert [row["step"] for row in metrics] == [0, 1, 2, 3] and timeless(metrics)[:3] == timeless(
        before[0]
    )
    assert samples[: len(before[1])] == before[1] and {
        row["step"] for row in samples[len(before[1]) :]
    } == {3}


def test_a_run_continues_from_its_last_checkpoint_after_an_error(small, monkeypatch):
    """The step that was finished but not saved is repeated, and the logs hold it once."""
    collect = fipo.collect_rollouts

    def fails_at_step_three(*args):
        if args[3] == 3:
            raise MemoryError
        return collect(*args)

    monkeypatch.setattr(fipo, "collect_rollouts", fails_at_step_three)
    small = dataclasses.replace(small, steps=4, save_every=1)
    with pytest.raises(MemoryError):
        fipo.train(small)
    shutil.rmtree(checkpoint(small, 2))
    assert fipo.newest_checkpoint(Path(small.out)) == checkpoint(small, 1)
    before = timeless(read_jsonl(Path(small.out) / "metrics.jsonl"))
    monkeypatch.undo()
    fipo.train(dataclasses.replace(small, resume=True))
    after = timeless(read_jsonl(Path(small.out) / "metrics.jsonl"))
    assert [line["step"] for line in after] == [0, 1, 2, 3, 4]
    assert after[:3] == before


def signalled_in_updates(monkeypatch, *signals: int) -> None:
    """Send the signals during the first update. A second signal of the same kind would end pytest."""
    step = Policy.step
    left = list(signals)

    def signalled(policy, lr):
        while left:
            os.kill(os.getpid(), left.pop())
        return step(policy, lr)

    monkeypatch.setattr(Policy, "step", signalled)


def test_a_signal_during_an_update_waits_for_the_end_of_the_step(small, monkeypatch):
    signalled_in_updates(monkeypatch, signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        fipo.train(small)
    assert end.value.code == 0
    assert json.loads((checkpoint(small, 1) / "state.json").read_text())["step"] == 1
    adam = torch.load(checkpoint(small, 1) / "optimizer.pt")["state"]
    assert all(of_weight["step"] == 2 for of_weight in adam.values()), (
        "both updates of step 1 are in"
    )


@pytest.mark.parametrize("end", ["done", "signal", "mistake in an update"])
def test_after_a_run_signals_mean_what_they_meant_before(small, monkeypatch, end):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    if end == "signal":
        signalled_in_updates(monkeypatch, signal.SIGTERM)
    if end == "mistake in an update":
        monkeypatch.setattr(Policy, "step", lambda *_: fipo.require(False, "a mistake"))
    with contextlib.nullcontext() if end == "done" else pytest.raises((SystemExit, fipo.FipoError)):
        fipo.train(dataclasses.replace(small, steps=1))
    after = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), before):
        signal.signal(number, handler)
    assert after == before


def test_a_run_that_is_done_names_its_step_when_asked_for_less(small):
    fipo.train(small)
    with pytest.raises(fipo.FipoError, match="is at step 2: raise --steps above it"):
        fipo.train(dataclasses.replace(small, resume=True, steps=1))
    fipo.train(dataclasses.replace(small, resume=True, steps=3))
    assert read_jsonl(Path(small.out) / "metrics.jsonl")[-1]["step"] == 3, (
        "more steps may be asked for"
    )


def test_a_run_without_a_signal_saves_the_last_step_and_says_so(
    small, tmp_path, monkeypatch, capsys
):
    collect = fipo.collect_rollouts

    def collect_nothing_at_step_two(*args):
        if args[3] == 2:
            raise fipo.NoSignal("step 2: no group carries a signal.")
        return collect(*args)

    monkeypatch.setattr(fipo, "collect_rollouts", collect_nothing_at_step_two)
    with pytest.raises(fipo.NoSignal):
        fipo.train(small)
    assert fipo.newest_checkpoint(Path(small.out)) == checkpoint(small, 1)
    assert "saved step 1" in capsys.readouterr().out


def test_a_run_without_a_signal_at_its_first_step_has_nothing_to_save(small, tmp_path, capsys):
    data = tmp_path / "impossible.jsonl"
    write_jsonl(data, [{"prompt": "1+1=?\n", "answer": "none"}] * 2)
    grpo = dict(algorithm="grpo", overlong_buffer=0, out=small.out + "2")
    for change in ({}, grpo):
        cfg = dataclasses.replace(small, data=str(data), max_gen_rounds=2, **change)
        with pytest.raises(fipo.NoSignal, match="carry a signal"):
            fipo.train(cfg)
        assert not fipo.newest_checkpoint(Path(cfg.out))
        assert "there is nothing to save" in capsys.readouterr().out


# --------------------------------------------------------------------------------------- resuming with other settings


def strict_json(path: Path) -> dict:
    """The content of a file that any JSON parser accepts: no NaN, no Infinity."""

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.mark.parametrize("change", [
    dict(lr=2e-4), dict(seed=1), dict(group_size=4, temperature=0.9), dict(algorithm="dapo"), dict(dual_clip=math.inf),
    dict(weight_range=[0.8, 1.2]), dict(model="another/model"), dict(data="another.jsonl"), dict(problems=32),
    dict(verifier="math"), dict(max_response=16), dict(prompts_per_round=8), dict(dtype="bfloat16"),
    dict(sampler="vllm"),
])  # fmt: skip
def test_resuming_with_other_settings_names_them_and_is_refused(long_run, change):
    old = dataclasses.asdict(fipo.resolve(long_run))
    files = {path: path.read_bytes() for path in Path(long_run.out).glob("*.json*")}
    with pytest.raises(fipo.FipoError, match="cannot be resumed with other settings") as end:
        fipo.train(dataclasses.replace(long_run, resume=True, steps=9, **change))
    for name, value in change.items():
        value = "Infinity" if value == math.inf else value
        assert f"--{name} was {old[name]!r} and is now {value!r}" in str(end.value)
    assert "--steps" not in str(end.value) and len(str(end.value).splitlines()) == 1
    assert {path: path.read_bytes() for path in Path(long_run.out).glob("*.json*")} == files


def test_every_setting_that_may_change_exists_and_no_setting_of_the_update_is_among_them():
    names = {field.name for field in dataclasses.fields(fipo.Config)}
    assert set(fipo.MAY_CHANGE) < names
    learned = {
        "tau",
        "safety",
        "clip_low",
        "clip_high",
        "loss_mean",
        "lr",
        "warmup_steps",
        "weight_decay",
        "grad_clip",
    }
    assert not learned & set(fipo.MAY_CHANGE)


def test_resuming_with_settings_that_may_change_continues_and_config_json_states_them(
    long_run, tmp_path, capsys
):
    """The folder of the run was moved, and the data is inside."""
    first, moved = tmp_path / "first", tmp_path / "moved"
    first.mkdir()
    shutil.copy(long_run.data, first / "sums.jsonl")
    cfg = dataclasses.replace(
        long_run, out=str(first), data=str(first / "sums.jsonl"), eval_data="", steps=1
    )
    fipo.train(cfg)
    first.rename(moved)
    cfg = dataclasses.replace(cfg, out=str(moved), data=str(moved / "sums.jsonl"), steps=2, resume=True, eval_every=1,
                              eval_data=long_run.eval_data, save_every=1, log_samples=1, rollout_rows=16,
                              tokens_per_micro_batch=300, max_gen_rounds=5)  # fmt: skip
    fipo.train(cfg)
    assert "resuming after step 1" in capsys.readouterr().out
    assert fipo.Config(**strict_json(moved / "config.json")) == fipo.resolve(cfg)
    assert not list(moved.glob("*.partial"))
    elsewhere = dataclasses.replace(cfg, data=long_run.data)
    with pytest.raises(
        fipo.FipoError, match="--data was '.*moved/sums.jsonl' and is now '.*data0/sums.jsonl'"
    ):
        fipo.train(elsewhere)


def test_config_json_of_grpo_is_json_and_reads_back(small):
    cfg = dataclasses.replace(small, algorithm="grpo", steps=1)
    fipo.train(cfg)
    settings = strict_json(Path(small.out) / "config.json")
    assert float(settings["dual_clip"]) == math.inf and settings["loss_mean"] == "response"
    assert fipo.Config(**settings | {"dual_clip": float(settings["dual_clip"])}) == fipo.resolve(
        cfg
    )
    fipo.train(dataclasses.replace(cfg, steps=2, resume=True))
    with pytest.raises(fipo.FipoError, match="--dual_clip was 'Infinity' and is now 10.0"):
        fipo.train(dataclasses.replace(cfg, steps=3, resume=True, dual_clip=10.0))


def test_resuming_without_config_json_warns_and_with_a_damaged_one_is_refused(small, capsys):
    fipo.train(dataclasses.replace(small, steps=1))
    config, again = Path(small.out) / "config.json", dataclasses.replace(small, resume=True)
    for text in ("", '{"lr": 1e-', "[]", "null", "{}"):
        config.write_text(text)
        with pytest.raises(
            fipo.FipoError, match=r"reading .*config.json \(if it is damaged, remove it.* failed: "
        ):
            fipo.train(again)
    config.unlink()
    fipo.train(again)
    assert f"warning: {config} is missing" in capsys.readouterr().out
    assert strict_json(config)["steps"] == 2


def test_resume_without_a_checkpoint_accepts_any_settings(small):
    """train_32b.sh always passes --resume; its first start may have failed on a setting that was then corrected."""
    with pytest.raises(fipo.FipoError, match="missing.jsonl"):
        fipo.train(dataclasses.replace(small, resume=True, data="missing.jsonl"))
    fipo.train(dataclasses.replace(small, resume=True, steps=1))
    assert strict_json(Path(small.out) / "config.json")["data"] == small.data


def test_nan_and_infinity_are_null_in_the_logs(tmp_path):
    path = tmp_path / "log.jsonl"
    fipo.append_jsonl(
        path, [{"a": math.nan, "b": [1.5, math.inf, -math.inf], "c": {"d": [math.nan]}, "e": "NaN"}]
    )
    assert strict_json(path) == {"a": None, "b": [1.5, None, None], "c": {"d": [None]}, "e": "NaN"}


class RecordedWandb:
    """The two things that fipo uses of wandb, which is not installed here: `init`, and the id of a run."""

    def __init__(self):
        self.runs = []

    def init(self, id=None, **settings):
        run = type(
            "Run", (), {"id": id or f"random-{len(self.runs)}", "log": lambda self, *_, **__: None}
        )()
        self.runs.append(run.id)
        return run


def test_only_a_resumed_run_continues_its_curve(small, monkeypatch):
    wandb = RecordedWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    cfg = dataclasses.replace(small, wandb="project", steps=1)
    fipo.train(cfg)
    fipo.train(dataclasses.replace(cfg, steps=2, resume=True))
    shutil.move(cfg.out, cfg.out + "-moved")
    fipo.train(dataclasses.replace(cfg, out=cfg.out + "-moved", steps=3, resume=True))
    Path(cfg.out).mkdir()
    shutil.copy(cfg.out + "-moved/wandb_id.txt", cfg.out)
    fipo.train(cfg)  # another run in the place of the first, of which the logs were removed
    assert wandb.runs == ["random-0", "random-0", "random-0", "random-3"]


# --------------------------------------------------------------------- signals, threads, and batches without a signal


def test_training_in_a_thread_is_refused_in_one_sentence(small):
    errors = []

    def work():
        try:
            fipo.train(small)
        except fipo.FipoError as error:
            errors.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(errors) == 1 and "must be called from the main thread" in errors[0]
    assert not Path(small.out).exists()


@pytest.mark.parametrize("when", ["evaluation before step 1", "rollouts of step 1"])
def test_a_signal_before_the_first_step_leaves_no_checkpoint(
    small, sums, monkeypatch, capsys, when
):
    generate = HFSampler.generate
    left = [signal.SIGTERM]

    def signalled(sampler, *args):
        if left:
            os.kill(os.getpid(), left.pop())
        return generate(sampler, *args)

    monkeypatch.setattr(
        HFSampler, "check", lambda sampler: None
    )  # it generates before the run begins
    monkeypatch.setattr(HFSampler, "generate", signalled)
    cfg = dataclasses.replace(small, eval_data=sums if when.startswith("evaluation") else "")
    with pytest.raises(SystemExit) as end:
        fipo.train(cfg)
    assert (
        end.value.code == 0
        and "no step was finished, so there is nothing to save" in capsys.readouterr().out
    )
    assert not (Path(small.out) / "checkpoints").exists()
    monkeypatch.undo()
    fipo.train(dataclasses.replace(cfg, resume=True))
    assert [line["step"] for line in read_jsonl(Path(small.out) / "metrics.jsonl")] == [0, 1, 2]


def test_a_signal_during_a_save_ends_the_run_right_after_it(small, sums, monkeypatch, capsys):
    save, saved, sampled = Policy.save, [], []

    def signalled(policy, folder):
        saved.append(folder)
        os.kill(os.getpid(), signal.SIGTERM)
        save(policy, folder)

    class Watched(HFSampler):
        def generate(self, *args):
            sampled.append(len(saved))
            return super().generate(*args)

    monkeypatch.setattr(Policy, "save", signalled)
    monkeypatch.setattr(fipo, "HFSampler", Watched)
    with pytest.raises(SystemExit) as end:
        fipo.train(dataclasses.replace(small, eval_data=sums, eval_every=1, save_every=1))
    assert end.value.code == 0 and len(saved) == 1 and set(sampled) == {0}, (
        "neither saved nor sampled again"
    )
    assert "saved step 1" in capsys.readouterr().out and fipo.newest_checkpoint(
        Path(small.out)
    ) == checkpoint(small, 1)


def test_stale_files_of_a_partial_checkpoint_are_removed(small):
    stale = Path(small.out) / "checkpoints" / "partial" / "deepspeed" / "ranks" / "rank_7.pt"
    stale.parent.mkdir(parents=True)
    stale.write_text("of a run with eight ranks")
    fipo.train(dataclasses.replace(small, resume=True, steps=1))
    assert fipo.newest_checkpoint(Path(small.out)) == checkpoint(small, 1)
    assert not list((Path(small.out) / "checkpoints").rglob(stale.name))


@pytest.fixture
def hopeless_at_first(small, tmp_path) -> fipo.Config:
    """GRPO without a length penalty, where the first batch holds only problems that nothing solves."""
    rows = read_jsonl(Path(small.data))
    problems = [fipo.Problem(row["prompt"], row["answer"]) for row in rows]
    first = {p.prompt for p in fipo.draw_problems(problems, 0, small.prompts_per_batch, small.seed)}
    write_jsonl(
        tmp_path / "data.jsonl",
        [r | {"answer": "none"} if r["prompt"] in first else r for r in rows],
    )
    return dataclasses.replace(
        small, data=str(tmp_path / "data.jsonl"), algorithm="grpo", overlong_buffer=0
    )


def test_a_batch_of_equal_rewards_is_skipped_and_the_run_goes_on(hopeless_at_first, capsys):
    cfg = hopeless_at_first
    fipo.train(dataclasses.replace(cfg, save_every=1))
    said = capsys.readouterr().out
    assert said.count("step 1: skipped a batch, because all rewards of every group are equal") == 1
    lines = read_jsonl(Path(cfg.out) / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2] and [
        line["gen_rounds"] for line in lines[1:]
    ] == [2, 1]
    cursors = [
        json.loads((checkpoint(cfg, step) / "state.json").read_text())["cursor"] for step in (1, 2)
    ]
    assert cursors == [8, 12], "the problems of the skipped batch are used up"
    # Resumed after step 1, the run draws what the uninterrupted one draws; and so does a run that begins again.
    resumed, again = (
        dataclasses.replace(cfg, out=cfg.out + name) for name in ("-resumed", "-again")
    )
    fipo.train(dataclasses.replace(resumed, steps=1))
    fipo.train(dataclasses.replace(resumed, resume=True))
    fipo.train(again)
    for other in (resumed, again):
        assert timeless(read_jsonl(Path(other.out) / "metrics.jsonl")) == timeless(lines)
        assert same(weights(checkpoint(other, 2)), weights(checkpoint(cfg, 2)))


def test_batches_of_equal_rewards_end_the_run_after_max_gen_rounds(hopeless_at_first, capsys):
    with pytest.raises(
        fipo.NoSignal, match="step 1: in 1 rounds, 0 of 4 groups carry a signal, 4 are needed"
    ):
        fipo.train(dataclasses.replace(hopeless_at_first, max_gen_rounds=1))
    write_jsonl(Path(hopeless_at_first.data), [{"prompt": "1+1=?\n", "answer": "none"}])
    with pytest.raises(
        fipo.NoSignal, match="in 3 rounds, .* The accuracy is 0.0%: give easier problems"
    ):
        fipo.train(
            dataclasses.replace(
                hopeless_at_first, max_gen_rounds=3, out=hopeless_at_first.out + "2"
            )
        )
    assert capsys.readouterr().out.count("skipped a batch") == 4


def test_a_damaged_line_of_a_log_does_not_delete_the_others(small):
    fipo.train(dataclasses.replace(small, steps=2, save_every=1))
    path = Path(small.out) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + "x" * (len(lines[1]) - 1) + "\n" + lines[2] + "not JSON\n")
    fipo.train(dataclasses.replace(small, steps=3, resume=True))
    after = path.read_text().splitlines(keepends=True)
    assert after[0] == lines[0] and after[1].startswith("xxx")
    assert [json.loads(line)["step"] for line in after[2:]] == [2, 3]


def test_a_start_that_fails_leaves_settings_and_logs_as_they_are(small, sums):
    fipo.train(dataclasses.replace(small, steps=1, eval_data=sums))
    files = [Path(small.out) / name for name in ("config.json", "metrics.jsonl", "samples.jsonl")]
    before = [file.read_text() for file in files]
    with pytest.raises(fipo.FipoError, match="nowhere.jsonl"):
        fipo.train(dataclasses.replace(small, resume=True, eval_data="nowhere.jsonl"))
    assert [file.read_text() for file in files] == before


def test_a_copy_of_a_checkpoint_is_neither_resumed_nor_removed(small):
    fipo.train(dataclasses.replace(small, steps=2, save_every=1))
    copy = checkpoint(small, 1).with_name("step_best")
    shutil.copytree(checkpoint(small, 1), copy)
    assert fipo.newest_checkpoint(Path(small.out)) == checkpoint(small, 2)
    fipo.train(dataclasses.replace(small, steps=3, save_every=1, resume=True))
    assert copy.exists() and checkpoint(small, 3).exists() and not checkpoint(small, 1).exists()


def test_an_incomplete_checkpoint_is_written_again(small):
    fipo.train(dataclasses.replace(small, save_every=1))
    (checkpoint(small, 2) / "state.json").unlink()
    fipo.train(dataclasses.replace(small, save_every=1, resume=True))
    assert fipo.newest_checkpoint(Path(small.out)) == checkpoint(small, 2)


def test_a_run_resumes_with_another_spelling_of_the_same_path(small, monkeypatch):
    fipo.train(dataclasses.replace(small, steps=1))
    monkeypatch.chdir(Path(small.data).parent)
    fipo.train(
        dataclasses.replace(small, resume=True, data=Path(small.data).name, model=small.model + "/")
    )
