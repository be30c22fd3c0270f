"""The training loop: dynamic sampling, updates, logs, checkpoints and exact resume."""

import contextlib
import copy
import dataclasses
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from array import array
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    finished,
    flags,
    has_logged_step,
    launch,
    read_jsonl,
    shared_data,
    small_config,
    timeless,
    write_jsonl,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

import fipo
from fipo import FipoError, HFSampler, NoSignal, Policy, Rollout

LOGGED = """step reward/mean accuracy response_length/mean response_length/max loss entropy
influence_mean influence_first influence_last influence_frac_low influence_frac_high future_kl_mean
clip_frac dual_clip_frac ppo_kl ppo_kl_first grad_norm skipped_updates dropped_sequences
dropped_tokens gen_rounds lr time/rollout time/score time/update tokens_per_second
sampler_mismatch""".split()


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def equal_weights(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    if state.keys() != other.keys():
        return False
    return all(torch.equal(state[name], other[name]) for name in other)


def checkpoint(cfg: fipo.Config, step: int) -> Path:
    return Path(cfg.out) / "checkpoints" / f"step_{step:06d}"


def newest_step(cfg: fipo.Config) -> int | None:
    folder = fipo.newest_checkpoint(Path(cfg.out))
    return int(folder.name.removeprefix("step_")) if folder else None


def metrics_of(cfg: fipo.Config) -> list[dict]:
    return read_jsonl(Path(cfg.out) / "metrics.jsonl")


def samples_of(cfg: fipo.Config) -> list[dict]:
    return read_jsonl(Path(cfg.out) / "samples.jsonl")


def steps_of(rows: list[dict]) -> list[int]:
    return [row["step"] for row in rows]


def prepare(cfg: fipo.Config) -> tuple[fipo.Config, Policy, list[list[Rollout]]]:
    """Settings, policy and one scored batch of rollouts, just before the first update."""
    cfg = fipo.resolve(cfg)
    policy = Policy(cfg.model, cfg)
    problems = fipo.encode_problems(cfg.data, policy, cfg)
    groups, _, _ = fipo.collect_rollouts(HFSampler(policy), problems, cfg, 1, 0)
    fipo.assign_rewards(groups, cfg)
    fipo.assign_advantages(groups)
    fipo.score_old_logp(policy, groups)
    return cfg, policy, groups


@pytest.fixture(scope="module")
def finished_run(base, sums, tmp_path_factory) -> fipo.Config:
    """The run `small`, with evaluations and a checkpoint of each step. Tests use a copy of it."""
    cfg = small_config(base, sums, tmp_path_factory.mktemp("finished") / "run")
    cfg = dataclasses.replace(cfg, eval_data=sums, save_every=1)
    fipo.train(cfg)
    return cfg


@pytest.fixture
def finished_copy(finished_run, tmp_path) -> fipo.Config:
    """A copy of finished_run, to be resumed without evaluations."""
    out = tmp_path / "copy"
    shutil.copytree(finished_run.out, out)
    return dataclasses.replace(finished_run, out=str(out), eval_data="", resume=True)


@pytest.fixture(scope="module")
def long_run(base, sums, tmp_path_factory) -> fipo.Config:
    """Eight steps, with evaluations, that nothing interrupts."""
    cfg = small_config(base, sums, tmp_path_factory.mktemp("uninterrupted") / "run")
    cfg = dataclasses.replace(
        cfg,
        eval_data=sums,
        steps=8,
        warmup_steps=4,
        tokens_per_micro_batch=32768,
        eval_samples=1,
        eval_every=3,
        save_every=3,
    )
    fipo.train(cfg)
    return cfg


# ----------------------------------------------------------------------------------------- Sampling


def test_dynamic_sampling_keeps_only_groups_with_a_signal(small):
    cfg, policy, groups = prepare(small)
    assert len(groups) == cfg.prompts_per_batch
    for group in groups:
        assert 0 < sum(r.correct for r in group) < len(group)

    # The same groups come in smaller chunks, and the next step starts after the last of them.
    problems = fipo.encode_problems(cfg.data, policy, cfg)
    sampler = HFSampler(policy)
    in_chunks = dataclasses.replace(cfg, rollout_rows=8)
    again, statistics, cursor = fipo.collect_rollouts(sampler, problems, in_chunks, 1, 0)
    drawn = fipo.draw_problems(problems, 0, cursor, cfg.seed)
    assert drawn[-1] == groups[-1][0].problem
    for group, expected in zip(again, groups, strict=True):
        assert [r.response_ids for r in group] == [r.response_ids for r in expected]
    assert statistics["gen_rounds"] == math.ceil(cursor / cfg.prompts_per_round)

    hard = [dataclasses.replace(problem, answer="none") for problem in problems]
    few_rounds = dataclasses.replace(cfg, max_gen_rounds=3)
    message = r"12 groups in 3 rounds did not give a batch of 4.*accuracy is 0.0%: use easier"
    with pytest.raises(NoSignal, match=message):
        fipo.collect_rollouts(sampler, hard, few_rounds, 1, 0)

    # Groups that are all wrong at different lengths have different rewards, because of the length
    # penalty. They carry no signal either.
    everything = dataclasses.replace(cfg, dynamic_sampling=False)
    groups, _, _ = fipo.collect_rollouts(sampler, hard, everything, 1, 0)
    fipo.assign_rewards(groups, cfg)
    assert any(len({r.reward for r in group}) > 1 for group in groups)


# ------------------------------------------------------------------------------------------ Updates


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["fipo", "grpo"])
@pytest.mark.parametrize("drop", [False, True])
def test_result_does_not_depend_on_micro_batches(small, algorithm, drop):
    """Compare loss, gradient norm, metrics and weights after three updates."""
    small = dataclasses.replace(small, algorithm=algorithm, dual_clip=10.0)
    cfg, policy, groups = prepare(small)
    rollouts = fipo.flatten(groups)
    if drop:
        # As if the policy had moved far: A < 0 and r > c on every token of one response.
        victim = next(r for r in rollouts if r.advantage < 0)
        victim.old_logp = victim.old_logp - 3.0
    num_passes = []
    metrics = []
    states = []
    for tokens in (1, 200, 100_000):
        copied = copy.deepcopy(policy)
        # With the usual eps of 1e-8, rounding of a gradient near 0 may become a step of full size.
        copied.optimizer = torch.optim.AdamW(copied.model.parameters(), weight_decay=0.1, eps=1e-6)
        split = dataclasses.replace(cfg, tokens_per_micro_batch=tokens)
        num_passes.append(len(fipo.micro_batches(rollouts, tokens)))
        updates = []
        for _ in range(3):
            update = fipo.add_gradients(copied, rollouts, split)
            update["grad_norm"] = copied.step(1e-4)
            updates.append(update)
        metrics.append(updates)
        states.append(copied.model.state_dict())
    assert num_passes[0] > 1
    assert num_passes[1] > 1
    assert num_passes[2] == 1
    assert not drop or metrics[0][0]["dropped_sequences"] == 1
    for updates, state in zip(metrics[1:], states[1:]):
        for update, expected in zip(updates, metrics[0]):
            assert update == pytest.approx(expected, rel=1e-4, abs=2e-5)
        for name, value in state.items():
            torch.testing.assert_close(value, states[0][name], atol=2e-6, rtol=1e-4)


def test_first_update_is_dapo_and_later_ones_are_not(small):
    cfg = dataclasses.replace(small, weight_range=[0.8, 1.2], lr=3e-4, warmup_steps=1, steps=1)
    fipo.train(cfg)
    metrics = metrics_of(cfg)[1]
    assert metrics["influence_first"] == pytest.approx(1, abs=1e-5)
    assert metrics["ppo_kl_first"] == pytest.approx(0, abs=1e-5)
    assert abs(metrics["influence_last"] - 1) > 1e-3
    assert abs(metrics["ppo_kl"]) > 1e-5


@pytest.mark.slow
def test_warm_up_is_linear_and_its_first_step_learns(long_run, finished_run):
    factors = [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    assert [line["lr"] for line in metrics_of(long_run)[1:]] == [1e-4 * f for f in factors]
    assert [line["lr"] for line in metrics_of(finished_run)[1:]] == [5e-5, 1e-4]
    assert not equal_weights(weights(checkpoint(finished_run, 1)), weights(finished_run.model))


def test_grpo_averages_over_the_means_of_responses(small):
    cfg, policy, groups = prepare(dataclasses.replace(small, algorithm="grpo"))
    rollouts = fipo.flatten(groups)
    assert len({len(r.response_ids) for r in rollouts}) > 2, "lengths must differ"
    means = []
    terms = []
    for r in rollouts:
        noise = torch.randn(len(r.response_ids), generator=torch.Generator().manual_seed(0))
        r.old_logp = r.old_logp + 0.4 * noise
        ids, mask, old_logp, _ = fipo.collate([r], policy.device)
        with torch.no_grad():
            logp, _ = policy.logprobs(ids, mask)
        ratio = (logp - old_logp)[mask].exp()
        objective = torch.minimum(r.advantage * ratio, r.advantage * ratio.clamp(0.8, 1.2))
        means.append(-objective.mean().item())
        terms += (-objective).tolist()
    by_response = sum(means) / len(means)
    by_token = sum(terms) / len(terms)
    assert abs(by_response - by_token) > 1e-3, "the two means must differ"
    loss = fipo.add_gradients(policy, rollouts, cfg)["loss"]
    assert loss == pytest.approx(by_response, abs=1e-5)
    with_token_mean = dataclasses.replace(cfg, loss_mean="token")
    loss = fipo.add_gradients(policy, rollouts, with_token_mean)["loss"]
    assert loss == pytest.approx(by_token, abs=1e-5)


def test_grad_clip_0_does_not_clip(small):
    """The step equals that of a bound that is never reached."""
    cfg, policy, groups = prepare(small)
    moved = {}
    for bound in (0.0, 1e9, 1e-3):
        copied = copy.deepcopy(policy)
        copied.cfg = dataclasses.replace(cfg, grad_clip=bound)
        # Not AdamW, whose step does not depend on the scale of the gradient.
        copied.optimizer = torch.optim.SGD(copied.model.parameters())
        fipo.add_gradients(copied, groups[0], cfg)
        norm = copied.step(1e-2)
        assert norm > 1e-2
        pairs = zip(copied.model.parameters(), policy.model.parameters())
        moved[bound] = torch.cat([(new - old).flatten() for new, old in pairs])
    assert torch.equal(moved[0.0], moved[1e9])
    assert moved[0.0].norm().item() == pytest.approx(1e-2 * norm, rel=1e-2)
    assert moved[1e-3].norm().item() == pytest.approx(1e-2 * 1e-3, rel=5e-2)

    # The same holds for whole runs.
    trained = {}
    for bound in (0.0, 1e9):
        run = dataclasses.replace(small, grad_clip=bound, out=f"{small.out}-{bound}", steps=1)
        fipo.train(run)
        trained[bound] = weights(checkpoint(run, 1))
    assert equal_weights(trained[0.0], trained[1e9])
    assert not equal_weights(trained[0.0], weights(small.model))


def poison_advantages(monkeypatch, num_groups: int) -> None:
    """Give the first response of that many groups an advantage that is NaN."""
    assign = fipo.assign_advantages

    def assign_and_poison(groups):
        assign(groups)
        for group in groups[:num_groups]:
            group[0].advantage = math.nan

    monkeypatch.setattr(fipo, "assign_advantages", assign_and_poison)


def test_gradient_that_is_not_finite_is_skipped_and_counted(small, monkeypatch, capsys):
    cfg, policy, groups = prepare(small)
    before = {name: value.clone() for name, value in policy.model.state_dict().items()}
    groups[0][0].advantage = math.nan
    fipo.add_gradients(policy, groups[0] + groups[1], cfg)
    assert not math.isfinite(policy.step(1e-4))
    assert equal_weights(policy.model.state_dict(), before)
    assert not policy.optimizer.state
    assert all(weight.grad is None for weight in policy.model.parameters())

    poison_advantages(monkeypatch, 1)
    cfg = dataclasses.replace(small, steps=1)
    fipo.train(cfg)
    assert metrics_of(cfg)[1]["skipped_updates"] == 1
    assert not equal_weights(weights(checkpoint(cfg, 1)), weights(cfg.model))
    assert "every gradient" not in capsys.readouterr().out


def test_step_without_a_finite_gradient_is_reported(small, monkeypatch, capsys):
    poison_advantages(monkeypatch, 4)
    cfg = dataclasses.replace(small, steps=1)
    fipo.train(cfg)
    output = capsys.readouterr().out
    assert "warning: every gradient of this step was NaN or infinite" in output
    assert metrics_of(cfg)[1]["skipped_updates"] == 2
    assert "NaN" not in (Path(cfg.out) / "metrics.jsonl").read_text(), "NaN is not JSON"
    assert equal_weights(weights(checkpoint(cfg, 1)), weights(cfg.model))


def test_ratio_that_is_not_1_at_the_first_update_stops_the_run(small, monkeypatch):
    score = fipo.score_old_logp

    def score_and_shift(policy, mini_batches):  # as dropout, or another model, would do it
        metrics = score(policy, mini_batches)
        for r in fipo.flatten(mini_batches):
            r.old_logp = r.old_logp + 0.5
        return metrics

    monkeypatch.setattr(fipo, "score_old_logp", score_and_shift)
    message = r"the ratio must be 1 before the first update, but mean .Δlog p. is 0.5"
    with pytest.raises(FipoError, match=message):
        fipo.train(small)
    assert newest_step(small) is None


@pytest.mark.parametrize(
    "size, is_reported", [(0.0, False), (1e-7, False), (0.0003, True), (0.004, True)]
)
def test_drift_of_one_sign_before_the_first_update_is_reported(size, is_reported, capsys):
    """F sums 47 times a drift of one sign: a mean |Δlog p| of 0.004 moves f to its bound."""
    noise = torch.randn(8, 400, generator=torch.Generator().manual_seed(0))
    delta = size * noise.abs()
    ones = torch.ones(8, 400)
    _, loss_metrics = fipo.fipo_loss(delta, torch.zeros(8, 400), torch.ones(8), ones)
    metrics = {
        "drift": delta.abs().mean().item(),
        "influence_mean": loss_metrics["influence_mean"],
    }
    fipo.check_first_update(metrics, tolerance=0.1)
    output = capsys.readouterr().out
    assert output.startswith("warning: f must be 1 before the first update") == is_reported
    with pytest.raises(FipoError, match="the ratio must be 1 before the first update"):
        fipo.check_first_update(metrics | {"drift": 0.2}, tolerance=0.1)


def test_sampler_with_other_weights_than_the_trainer_stops_the_run(small):
    _, policy, groups = prepare(small)
    r = groups[0][0]
    r.sampler_logp = array("f", [logp - 1.0 for logp in r.sampler_logp])
    with pytest.raises(FipoError, match="other weights than the trainer"):
        fipo.score_old_logp(policy, groups[:1])


def test_presets_differ_as_described_and_explicit_settings_win():
    given = {"model": "m", "data": "d", "out": "o"}
    grpo = fipo.resolve(fipo.Config(**given, algorithm="grpo"))
    dapo = fipo.resolve(fipo.Config(**given, algorithm="dapo"))
    ours = fipo.resolve(fipo.Config(**given, algorithm="fipo"))
    assert dataclasses.replace(ours, weight_range=[1.0, 1.0], algorithm="dapo") == dapo
    assert grpo.clip_high == 0.2
    assert grpo.loss_mean == "response"
    assert grpo.dynamic_sampling is False
    assert grpo.overlong_buffer == 0
    assert ours.weight_range == [1.0, 1.2]
    assert ours.clip_high == 0.28
    assert ours.dual_clip == 10
    changed = fipo.resolve(fipo.Config(**given, algorithm="grpo", clip_high=0.3))
    assert changed.clip_high == 0.3


def test_sampler_sleeps_during_updates_and_at_the_end(small, sums, monkeypatch):
    """A vLLM that is awake holds memory that updates, or what follows the run, need."""
    calls = []

    class WatchedSampler(HFSampler):
        def sleep(self):
            calls.append("sleep")

        def sync(self):
            calls.append("sync")

        def generate(self, *args):
            if calls[-1:] != ["generate"]:
                calls.append("generate")
            return super().generate(*args)

    step = Policy.step

    def watched_step(policy, lr):
        calls.append("step")
        return step(policy, lr)

    monkeypatch.setattr(fipo, "HFSampler", WatchedSampler)
    monkeypatch.setattr(Policy, "step", watched_step)
    fipo.train(dataclasses.replace(small, eval_data=sums))
    one_step = ["generate", "sleep", "step", "step", "sync"]
    assert calls == [*one_step, *one_step, "generate", "sleep"]


def test_one_update_per_rollout_batch_is_warned_about(small, capsys):
    cfg = dataclasses.replace(small, data="missing.jsonl", prompts_per_mini_batch=4)
    with pytest.raises(FipoError):  # the warning comes before anything is read
        fipo.train(cfg)
    assert "with one update per rollout batch, FIPO is the same as DAPO" in capsys.readouterr().out


# --------------------------------------------------------------------------------------- Whole runs


def test_run_writes_logs_and_a_model_that_transformers_loads(finished_run):
    lines = metrics_of(finished_run)
    assert steps_of(lines) == [0, 1, 2]
    evaluated = {"eval/accuracy", "eval/cons", "eval/pass", "eval/response_length"}
    assert set(lines[0]) == {"step"} | evaluated
    for line in lines[1:]:
        assert set(LOGGED) <= set(line)
    assert "eval/accuracy" not in lines[1]
    assert "eval/accuracy" in lines[2]
    kinds = {(row["step"], row["kind"]) for row in samples_of(finished_run)}
    assert kinds == {(0, "eval"), (1, "train"), (2, "train"), (2, "eval")}
    assert not equal_weights(weights(checkpoint(finished_run, 2)), weights(finished_run.model))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint(finished_run, 2))
    assert tokenizer("1+2")["input_ids"] == [2, 11, 3]


@pytest.mark.parametrize("algorithm", ["dapo", "grpo"])
def test_other_algorithms_run_with_an_influence_of_1(small, algorithm):
    fipo.train(dataclasses.replace(small, algorithm=algorithm))
    lines = metrics_of(small)[1:]
    assert len(lines) == 2
    assert all(line["influence_mean"] == 1 for line in lines)


@pytest.mark.slow
def test_gsm8k_runs_through_the_loop(reader, tmp_path):
    """A random model that reads bytes learns nothing. Everything else is as in a real run."""
    data = shared_data("gsm8k/train.jsonl")
    cfg = fipo.Config(
        model=reader,
        data=data,
        out=str(tmp_path / "run"),
        steps=2,
        algorithm="dapo",
        dynamic_sampling=False,
        group_size=4,
        prompts_per_batch=2,
        prompts_per_mini_batch=1,
        max_prompt=400,
        max_response=64,
        overlong_buffer=60,
    )
    fipo.main(["train", *flags(cfg)])
    lines = metrics_of(cfg)
    assert steps_of(lines) == [0, 1, 2]
    assert lines[2]["grad_norm"] > 0
    assert "Solve the problem below" in samples_of(cfg)[0]["prompt"][0]["content"]


@pytest.mark.slow
def test_eval_runs_on_aime(base, tmp_path, capsys):
    cfg = fipo.EvalConfig(
        model=base,
        data=shared_data("aime24/aime-2024.parquet"),
        out=str(tmp_path / "eval"),
        eval_samples=2,
        max_response=8,
        max_prompt=240,
    )
    fipo.main(["eval", *flags(cfg)])
    assert "avg@2 0" in capsys.readouterr().out
    scores = json.loads((tmp_path / "eval" / "eval.json").read_text())
    assert scores["eval/accuracy"] == 0
    assert read_jsonl(tmp_path / "eval" / "responses.jsonl")


# -------------------------------------------------------------------------------- Runs that are cut
DIES_IN_A_SAVE = f"""
import os, signal, sys
import torch
sys.path.insert(0, {str(ROOT)!r})
import fipo
save = torch.save
paths = []
def dying_save(state, path):
    paths.append(path)
    if len(paths) == 2:  # the weights are written, and half of the optimizer
        path.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    save(state, path)
torch.save = dying_save
fipo.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def cut_runs(long_run, tmp_path_factory) -> dict[str, fipo.Config]:
    """Runs like long_run, in processes of their own, each of which was cut in another way.

    Two received a signal after step 4. The third was killed in the save of step 6.
    """
    threads = str(torch.get_num_threads())  # sums must be rounded as in this process
    configs = {}
    processes = {}
    for name in ("SIGINT", "SIGTERM", "killed in a save"):
        out = tmp_path_factory.mktemp("cut") / "run"
        cfg = dataclasses.replace(long_run, out=str(out))
        script = ["-c", DIES_IN_A_SAVE] if name == "killed in a save" else [str(ROOT / "fipo.py")]
        configs[name] = cfg
        processes[name] = launch([*script, "train", *flags(cfg)], OMP_NUM_THREADS=threads)
    waiting = ["SIGINT", "SIGTERM"]
    deadline = time.monotonic() + 120
    while waiting:
        assert time.monotonic() < deadline
        for name in list(waiting):
            assert processes[name].poll() is None, processes[name].stdout.read()
            if has_logged_step(Path(configs[name].out), 4):
                processes[name].send_signal(getattr(signal, name))
                waiting.remove(name)
        time.sleep(0.05)
    for name in ("SIGINT", "SIGTERM"):
        output = finished(processes[name], status=0, seconds=60)
        assert "Traceback" not in output
        assert "--resume continues from there" in output
        assert newest_step(configs[name]) >= 4
    finished(processes["killed in a save"], status=-signal.SIGKILL, seconds=60)
    assert newest_step(configs["killed in a save"]) == 3
    return configs


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "killed in a save"])
def test_resumed_run_equals_an_uninterrupted_one(cut_runs, long_run, name, capsys):
    cfg = cut_runs[name]
    fipo.train(dataclasses.replace(cfg, resume=True))
    assert "resuming after step" in capsys.readouterr().out
    assert timeless(metrics_of(cfg)) == timeless(metrics_of(long_run))
    assert samples_of(cfg) == samples_of(long_run)
    assert equal_weights(weights(checkpoint(cfg, 8)), weights(checkpoint(long_run, 8)))


@pytest.mark.slow
def test_two_checkpoints_are_kept(long_run):
    folders = (Path(long_run.out) / "checkpoints").iterdir()
    assert sorted(folder.name for folder in folders) == ["step_000006", "step_000008"]


def test_full_disk_is_reported_and_leaves_no_checkpoint(small):
    """Files may not grow beyond 2 MB here: the weights can be written, the optimizer cannot."""
    resource = pytest.importorskip("resource")  # Unix
    small = dataclasses.replace(small, steps=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, hard))
    message = "^fipo: writing the checkpoint .*is the disk full?.* failed: "
    try:
        with pytest.raises(SystemExit, match=message) as end:
            fipo.main(["train", *flags(small)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(str(end.value).splitlines()) == 1
    assert newest_step(small) is None
    fipo.train(dataclasses.replace(small, resume=True))
    assert newest_step(small) == 1


def write_old_state(folder: Path) -> None:
    (folder / "state.json").write_text('{"step": 2, "last_update": []}')


DAMAGES = {
    "optimizer cut short": lambda folder: os.truncate(folder / "optimizer.pt", 100),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "weights cut short": lambda folder: os.truncate(folder / "model.safetensors", 100_000),
    "state cut short": lambda folder: os.truncate(folder / "state.json", 20),
    "state of another version": write_old_state,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_named_and_stays(finished_copy, damage):
    cfg = dataclasses.replace(finished_copy, steps=3)
    DAMAGES[damage](checkpoint(cfg, 2))
    files = sorted(checkpoint(cfg, 2).iterdir())
    log = Path(cfg.out) / "metrics.jsonl"
    text = log.read_text()
    with pytest.raises(FipoError, match="step_000002.* failed: ") as error:
        fipo.train(cfg)
    assert len(str(error.value).splitlines()) == 1
    assert sorted(checkpoint(cfg, 2).iterdir()) == files
    assert log.read_text() == text


def test_run_resumes_from_the_checkpoint_before_a_removed_one(finished_copy, finished_run, capsys):
    cfg = finished_copy
    (checkpoint(cfg, 2) / "state.json").unlink()
    assert newest_step(cfg) == 1, "without state.json it is no checkpoint"
    shutil.rmtree(checkpoint(cfg, 2))
    fipo.train(cfg)
    assert "resuming after step 1" in capsys.readouterr().out
    assert equal_weights(weights(checkpoint(cfg, 2)), weights(checkpoint(finished_run, 2)))


def test_incomplete_checkpoint_is_written_again(finished_copy):
    (checkpoint(finished_copy, 2) / "state.json").unlink()
    fipo.train(finished_copy)
    assert newest_step(finished_copy) == 2


def test_copy_of_a_checkpoint_is_neither_resumed_nor_removed(finished_copy):
    best = checkpoint(finished_copy, 1).with_name("step_best")
    shutil.copytree(checkpoint(finished_copy, 1), best)
    assert newest_step(finished_copy) == 2
    fipo.train(dataclasses.replace(finished_copy, steps=3))
    assert best.exists()
    assert checkpoint(finished_copy, 3).exists()
    assert not checkpoint(finished_copy, 1).exists()


def test_stale_files_of_a_partial_checkpoint_are_removed(small):
    checkpoints = Path(small.out) / "checkpoints"
    stale = checkpoints / "partial" / "deepspeed" / "ranks" / "rank_7.pt"
    stale.parent.mkdir(parents=True)
    stale.write_text("of a run with eight ranks")
    fipo.train(dataclasses.replace(small, resume=True, steps=1))
    assert newest_step(small) == 1
    assert not list(checkpoints.rglob(stale.name))


@pytest.mark.parametrize("num_bytes", [0, 1, 40, 300])
def test_logs_shorter_than_the_checkpoint_knows_are_continued(finished_copy, num_bytes):
    """A host that lost power may leave such logs. They get no NUL bytes and no half lines."""
    logs = [Path(finished_copy.out) / f"{name}.jsonl" for name in ("metrics", "samples")]
    kept = {}
    for log in logs:
        os.truncate(log, num_bytes)
        complete_lines = log.read_text().split("\n")[:-1]
        kept[log] = [json.loads(line) for line in complete_lines]
    fipo.train(dataclasses.replace(finished_copy, steps=3))
    for log, new_steps in zip(logs, ({2, 3}, {3})):
        assert "\0" not in log.read_text()
        rows = read_jsonl(log)
        num_kept = len(kept[log])
        assert rows[:num_kept] == kept[log]
        assert set(steps_of(rows[num_kept:])) == new_steps
    metrics = metrics_of(finished_copy)
    assert len(set(steps_of(metrics))) == len(metrics), "no step is logged twice"


def test_half_written_last_line_is_cut(finished_copy):
    metrics = metrics_of(finished_copy)
    samples = [
        row for row in samples_of(finished_copy) if (row["step"], row["kind"]) != (2, "eval")
    ]
    for name in ("metrics", "samples"):
        with open(Path(finished_copy.out) / f"{name}.jsonl", "a") as file:
            file.write('{"step": 2, "kind": "train", "accu')
    fipo.train(dataclasses.replace(finished_copy, steps=3))
    new_metrics = metrics_of(finished_copy)
    assert steps_of(new_metrics) == [0, 1, 2, 3]
    without_eval = {k: v for k, v in metrics[2].items() if not k.startswith("eval/")}
    assert timeless(new_metrics)[:3] == timeless([*metrics[:2], without_eval])
    new_samples = samples_of(finished_copy)
    assert new_samples[: len(samples)] == samples
    assert set(steps_of(new_samples[len(samples) :])) == {3}


def test_damaged_line_of_a_log_does_not_remove_the_others(finished_copy):
    path = Path(finished_copy.out) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    damaged = "x" * (len(lines[1]) - 1) + "\n"
    path.write_text(lines[0] + damaged + lines[2] + "not JSON\n")
    fipo.train(dataclasses.replace(finished_copy, steps=3))
    after = path.read_text().splitlines(keepends=True)
    assert after[:2] == [lines[0], damaged]
    assert [json.loads(line)["step"] for line in after[2:]] == [2, 3]


@pytest.mark.slow
def test_run_continues_from_its_last_checkpoint_after_an_error(small, monkeypatch):
    """The step that was finished but not saved is repeated, and the logs hold it once."""
    collect = fipo.collect_rollouts

    def fails_at_step_3(*args):
        if args[3] == 3:
            raise MemoryError
        return collect(*args)

    monkeypatch.setattr(fipo, "collect_rollouts", fails_at_step_3)
    small = dataclasses.replace(small, steps=4, save_every=1)
    with pytest.raises(MemoryError):
        fipo.train(small)
    shutil.rmtree(checkpoint(small, 2))
    assert newest_step(small) == 1
    before = timeless(metrics_of(small))
    monkeypatch.undo()
    fipo.train(dataclasses.replace(small, resume=True))
    after = timeless(metrics_of(small))
    assert steps_of(after) == [0, 1, 2, 3, 4]
    assert after[:3] == before


def test_finished_run_refuses_fewer_steps_and_accepts_more(finished_copy):
    with pytest.raises(FipoError, match="is at step 2: raise --steps above it"):
        fipo.train(dataclasses.replace(finished_copy, steps=1))
    fipo.train(dataclasses.replace(finished_copy, steps=3))
    assert metrics_of(finished_copy)[-1]["step"] == 3


# ------------------------------------------------------------------------------ Signals and threads


def signal_in_first_update(monkeypatch, number: int) -> None:
    """Send a signal once. A second one of the same kind would end pytest."""
    step = Policy.step
    left = [number]

    def signalled_step(policy, lr):
        if left:
            os.kill(os.getpid(), left.pop())
        return step(policy, lr)

    monkeypatch.setattr(Policy, "step", signalled_step)


def test_signal_in_an_update_stops_the_run_after_the_step(small, monkeypatch):
    signal_in_first_update(monkeypatch, signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        fipo.train(small)
    assert end.value.code == 0
    assert json.loads((checkpoint(small, 1) / "state.json").read_text())["step"] == 1
    adam = torch.load(checkpoint(small, 1) / "optimizer.pt")["state"]
    num_updates = {state["step"].item() for state in adam.values()}
    assert num_updates == {2}, "both updates of step 1 are saved"


@pytest.mark.parametrize("end", ["done", "signal", "mistake in an update"])
def test_signal_handlers_are_restored_after_a_run(small, monkeypatch, end):
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    expected = pytest.raises((SystemExit, FipoError))
    if end == "done":
        expected = contextlib.nullcontext()
    elif end == "signal":
        signal_in_first_update(monkeypatch, signal.SIGTERM)
    else:
        monkeypatch.setattr(Policy, "step", lambda *_: fipo.require(False, "a mistake"))
    with expected:
        fipo.train(dataclasses.replace(small, steps=1))
    after = [signal.getsignal(number) for number in numbers]
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)
    assert after == before


def test_training_in_a_thread_is_refused(small):
    errors = []

    def work():
        try:
            fipo.train(small)
        except FipoError as error:
            errors.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(errors) == 1
    assert "must be called from the main thread" in errors[0]
    assert not Path(small.out).exists()


@pytest.mark.parametrize("when", ["evaluation before step 1", "rollouts of step 1"])
def test_signal_before_the_first_step_leaves_no_checkpoint(small, sums, monkeypatch, capsys, when):
    generate = HFSampler.generate
    left = [signal.SIGTERM]

    def signalled_generate(sampler, *args):
        if left:
            os.kill(os.getpid(), left.pop())
        return generate(sampler, *args)

    # The check of a sampler generates too, before the run begins.
    monkeypatch.setattr(HFSampler, "check", lambda sampler: None)
    monkeypatch.setattr(HFSampler, "generate", signalled_generate)
    cfg = dataclasses.replace(small, eval_data=sums if when.startswith("evaluation") else "")
    with pytest.raises(SystemExit) as end:
        fipo.train(cfg)
    assert end.value.code == 0
    assert "no step was finished, so there is nothing to save" in capsys.readouterr().out
    assert not (Path(cfg.out) / "checkpoints").exists()
    monkeypatch.undo()
    fipo.train(dataclasses.replace(cfg, resume=True))
    assert steps_of(metrics_of(cfg)) == [0, 1, 2]


def test_signal_in_a_save_ends_the_run_right_after_it(small, sums, monkeypatch, capsys):
    save = Policy.save
    saved = []
    saves_before_sampling = set()

    def signalled_save(policy, folder):
        saved.append(folder)
        os.kill(os.getpid(), signal.SIGTERM)
        save(policy, folder)

    class WatchedSampler(HFSampler):
        def generate(self, *args):
            saves_before_sampling.add(len(saved))
            return super().generate(*args)

    monkeypatch.setattr(Policy, "save", signalled_save)
    monkeypatch.setattr(fipo, "HFSampler", WatchedSampler)
    with pytest.raises(SystemExit) as end:
        fipo.train(dataclasses.replace(small, eval_data=sums, eval_every=1, save_every=1))
    assert end.value.code == 0
    assert len(saved) == 1
    assert saves_before_sampling == {0}, "it does not sample again"
    assert "saved step 1" in capsys.readouterr().out
    assert newest_step(small) == 1


# ------------------------------------------------------------------------- Batches without a signal


def test_no_signal_after_a_step_saves_this_step(small, monkeypatch, capsys):
    collect = fipo.collect_rollouts

    def finds_nothing_at_step_2(*args):
        if args[3] == 2:
            raise NoSignal("step 2: no group carries a signal.")
        return collect(*args)

    monkeypatch.setattr(fipo, "collect_rollouts", finds_nothing_at_step_2)
    with pytest.raises(NoSignal):
        fipo.train(small)
    assert newest_step(small) == 1
    assert "saved step 1" in capsys.readouterr().out


@pytest.mark.parametrize("algorithm", ["fipo", "grpo"])
def test_no_signal_at_the_first_step_saves_nothing(small, tmp_path, capsys, algorithm):
    data = tmp_path / "impossible.jsonl"
    write_jsonl(data, [{"prompt": "1+1=?\n", "answer": "none"}] * 2)
    cfg = dataclasses.replace(small, data=str(data), max_gen_rounds=2, algorithm=algorithm)
    if algorithm == "grpo":
        cfg = dataclasses.replace(cfg, overlong_buffer=0)
    with pytest.raises(NoSignal, match="did not give a batch of 4 with a signal"):
        fipo.train(cfg)
    assert newest_step(cfg) is None
    assert "there is nothing to save" in capsys.readouterr().out


@pytest.fixture
def hopeless_at_first(small, tmp_path) -> fipo.Config:
    """GRPO without a length penalty. Nothing solves any problem of the first batch."""
    rows = read_jsonl(Path(small.data))
    problems = [fipo.Problem(row["prompt"], row["answer"]) for row in rows]
    first = fipo.draw_problems(problems, 0, small.prompts_per_batch, small.seed)
    first_prompts = {problem.prompt for problem in first}
    for row in rows:
        if row["prompt"] in first_prompts:
            row["answer"] = "none"
    data = tmp_path / "data.jsonl"
    write_jsonl(data, rows)
    return dataclasses.replace(small, data=str(data), algorithm="grpo", overlong_buffer=0)


@pytest.mark.slow
def test_batch_of_equal_rewards_is_skipped(hopeless_at_first, capsys):
    cfg = dataclasses.replace(hopeless_at_first, save_every=1)
    fipo.train(cfg)
    message = "step 1: skipped a batch, because rewards are equal within every group"
    assert capsys.readouterr().out.count(message) == 1
    lines = metrics_of(cfg)
    assert steps_of(lines) == [0, 1, 2]
    assert [line["gen_rounds"] for line in lines[1:]] == [2, 1]
    cursors = []
    for step in (1, 2):
        state = json.loads((checkpoint(cfg, step) / "state.json").read_text())
        cursors.append(state["cursor"])
    assert cursors == [8, 12], "the problems of the skipped batch are used up"

    # A run that resumes after step 1 draws the same problems. So does a run that begins again.
    resumed = dataclasses.replace(cfg, out=cfg.out + "-resumed", steps=1)
    fipo.train(resumed)
    resumed = dataclasses.replace(resumed, steps=2, resume=True)
    fipo.train(resumed)
    again = dataclasses.replace(cfg, out=cfg.out + "-again")
    fipo.train(again)
    for other in (resumed, again):
        assert timeless(metrics_of(other)) == timeless(lines)
        assert equal_weights(weights(checkpoint(other, 2)), weights(checkpoint(cfg, 2)))


def test_batches_of_equal_rewards_end_the_run_after_max_gen_rounds(hopeless_at_first, capsys):
    cfg = dataclasses.replace(hopeless_at_first, max_gen_rounds=1)
    message = "step 1: 4 groups in 1 rounds did not give a batch of 4 with a signal"
    with pytest.raises(NoSignal, match=message):
        fipo.train(cfg)
    write_jsonl(Path(cfg.data), [{"prompt": "1+1=?\n", "answer": "none"}])
    cfg = dataclasses.replace(cfg, max_gen_rounds=3, out=cfg.out + "2")
    message = "in 3 rounds did not .* accuracy is 0.0%: use easier problems"
    with pytest.raises(NoSignal, match=message):
        fipo.train(cfg)
    assert capsys.readouterr().out.count("skipped a batch") == 4


# ----------------------------------------------------------------------- Resume with other settings


def strict_json(path: Path) -> dict:
    """The content of a file that any JSON parser accepts: without NaN and Infinity."""

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 2e-4},
        {"seed": 1},
        {"group_size": 4, "temperature": 0.9},
        {"algorithm": "dapo"},
        {"dual_clip": math.inf},
        {"weight_range": [0.8, 1.2]},
        {"model": "another/model"},
        {"data": "another.jsonl"},
        {"problems": 32},
        {"verifier": "math"},
        {"max_response": 16},
        {"prompts_per_round": 8},
        {"dtype": "bfloat16"},
        {"sampler": "vllm"},
    ],
)
def test_resuming_with_other_settings_is_refused(finished_run, change):
    old = dataclasses.asdict(fipo.resolve(finished_run))
    paths = list(Path(finished_run.out).glob("*.json*"))
    files = {path: path.read_bytes() for path in paths}
    cfg = dataclasses.replace(finished_run, resume=True, steps=9, **change)
    with pytest.raises(FipoError, match="cannot be resumed with other settings") as error:
        fipo.train(cfg)
    sentence = str(error.value)
    for name, value in change.items():
        value = "Infinity" if value == math.inf else value
        assert f"--{name} was {old[name]!r} and is now {value!r}" in sentence
    assert "--steps" not in sentence
    assert len(sentence.splitlines()) == 1
    assert set(Path(finished_run.out).glob("*.json*")) == set(paths)
    assert {path: path.read_bytes() for path in paths} == files


def test_settings_that_may_change_exist_and_do_not_affect_updates():
    names = {field.name for field in dataclasses.fields(fipo.Config)}
    assert set(fipo.MAY_CHANGE) < names
    learned = """tau safety clip_low clip_high loss_mean lr warmup_steps weight_decay grad_clip"""
    assert not set(learned.split()) & set(fipo.MAY_CHANGE)


def test_resuming_with_settings_that_may_change_writes_them_to_config_json(
    small, sums, tmp_path, capsys
):
    """The folder of the run has moved, and the data is inside."""
    first = tmp_path / "first"
    moved = tmp_path / "moved"
    first.mkdir()
    shutil.copy(sums, first / "sums.jsonl")
    cfg = dataclasses.replace(small, out=str(first), data=str(first / "sums.jsonl"), steps=1)
    fipo.train(cfg)
    first.rename(moved)
    cfg = dataclasses.replace(
        cfg,
        out=str(moved),
        data=str(moved / "sums.jsonl"),
        steps=2,
        resume=True,
        eval_every=1,
        eval_data=sums,
        save_every=1,
        log_samples=1,
        rollout_rows=16,
        tokens_per_micro_batch=300,
        max_gen_rounds=5,
    )
    fipo.train(cfg)
    assert "resuming after step 1" in capsys.readouterr().out
    assert fipo.Config(**strict_json(moved / "config.json")) == fipo.resolve(cfg)
    assert not list(moved.glob("*.partial"))
    elsewhere = dataclasses.replace(cfg, data=sums)
    message = "--data was '.*moved/sums.jsonl' and is now '.*data0/sums.jsonl'"
    with pytest.raises(FipoError, match=message):
        fipo.train(elsewhere)


def test_config_json_of_grpo_is_json_and_can_be_read(small):
    cfg = dataclasses.replace(small, algorithm="grpo", steps=1)
    fipo.train(cfg)
    settings = strict_json(Path(cfg.out) / "config.json")
    assert float(settings["dual_clip"]) == math.inf
    assert settings["loss_mean"] == "response"
    settings["dual_clip"] = float(settings["dual_clip"])
    assert fipo.Config(**settings) == fipo.resolve(cfg)
    fipo.train(dataclasses.replace(cfg, steps=2, resume=True))
    message = "--dual_clip was 'Infinity' and is now 10.0"
    with pytest.raises(FipoError, match=message):
        fipo.train(dataclasses.replace(cfg, steps=3, resume=True, dual_clip=10.0))


def test_resume_needs_a_config_json_that_is_complete_or_none(finished_copy, capsys):
    config = Path(finished_copy.out) / "config.json"
    message = r"reading .*config.json \(if it is damaged, remove it.* failed: "
    for text in ("", '{"lr": 1e-', "[]", "null", "{}"):
        config.write_text(text)
        with pytest.raises(FipoError, match=message):
            fipo.train(finished_copy)
    config.unlink()
    fipo.train(finished_copy)
    assert f"warning: {config} is missing" in capsys.readouterr().out
    assert strict_json(config)["steps"] == 2


def test_resume_without_a_checkpoint_accepts_any_settings(small):
    """train_32b.sh always passes --resume, also after a first start that failed on a setting."""
    with pytest.raises(FipoError, match="missing.jsonl"):
        fipo.train(dataclasses.replace(small, resume=True, data="missing.jsonl"))
    fipo.train(dataclasses.replace(small, resume=True, steps=1))
    assert strict_json(Path(small.out) / "config.json")["data"] == small.data


def test_start_that_fails_leaves_settings_and_logs_as_they_are(finished_copy):
    names = ("config.json", "metrics.jsonl", "samples.jsonl")
    files = [Path(finished_copy.out) / name for name in names]
    before = [file.read_text() for file in files]
    with pytest.raises(FipoError, match="nowhere.jsonl"):
        fipo.train(dataclasses.replace(finished_copy, steps=3, eval_data="nowhere.jsonl"))
    assert [file.read_text() for file in files] == before


def test_resume_accepts_another_spelling_of_the_same_path(finished_copy, monkeypatch):
    data = Path(finished_copy.data)
    monkeypatch.chdir(data.parent)
    model = finished_copy.model + "/"
    fipo.train(dataclasses.replace(finished_copy, data=data.name, model=model))


def test_nan_and_infinity_are_null_in_logs(tmp_path):
    path = tmp_path / "log.jsonl"
    row = {"a": math.nan, "b": [1.5, math.inf, -math.inf], "c": {"d": [math.nan]}, "e": "NaN"}
    fipo.append_jsonl(path, [row])
    assert strict_json(path) == {"a": None, "b": [1.5, None, None], "c": {"d": [None]}, "e": "NaN"}


class RecordedRun:
    def __init__(self, id: str):
        self.id = id

    def log(self, *_, **__):
        pass


class RecordedWandb:
    """What fipo uses of wandb, which is not installed here: `init`, and the id of a run."""

    def __init__(self):
        self.ids = []

    def init(self, id=None, **settings):
        self.ids.append(id or f"random-{len(self.ids)}")
        return RecordedRun(self.ids[-1])


def test_only_a_resumed_run_continues_its_wandb_curve(small, monkeypatch):
    wandb = RecordedWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    cfg = dataclasses.replace(small, wandb="project", steps=1)
    fipo.train(cfg)
    moved = Path(cfg.out + "-moved")
    shutil.copytree(cfg.out, moved)
    fipo.train(dataclasses.replace(cfg, resume=True))
    fipo.train(dataclasses.replace(cfg, out=str(moved), resume=True))
    shutil.rmtree(cfg.out)
    Path(cfg.out).mkdir()
    shutil.copy(moved / "wandb_id.txt", cfg.out)
    fipo.train(cfg)  # another run in the place of the first, whose logs were removed
    assert wandb.ids == ["random-0", "random-0", "random-0", "random-3"]
