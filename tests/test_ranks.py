"""Training on many ranks with DeepSpeed: the result does not depend on how the work is split."""

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import types
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    SCRIPTS,
    ZERO_3,
    assert_runs_equal,
    finished,
    flags,
    free_port,
    launch,
    second_rank,
    small_config,
    wait_for_step,
)
from three_updates import run_jobs
from transformers import AutoModelForCausalLM

import fipo
import train_small

# ------------------------------------------------------------------------------- splitting the work


def rollouts_of_lengths(lengths):
    problem = fipo.Problem("", "", [0] * 3)
    return [fipo.Rollout(problem, fipo.array("i", [1] * length)) for length in lengths]


@pytest.mark.parametrize(
    "lengths", [[5] * 16, [1, 2, 3, 50, 4, 40, 3, 3, 9], [7], [100] + [1] * 30]
)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_micro_batches_give_ranks_equal_numbers_of_passes_and_similar_loads(
    monkeypatch, lengths, ranks
):
    mini_batch = rollouts_of_lengths(lengths)
    passes_of_rank = []
    for rank in range(ranks):
        monkeypatch.setattr(fipo, "world", lambda: ranks)
        monkeypatch.setattr(fipo, "rank", lambda rank=rank: rank)
        passes_of_rank.append(fipo.micro_batches(mini_batch, max_tokens=60))
    assert len({len(passes) for passes in passes_of_rank}) == 1
    shares = [fipo.flatten(passes) for passes in passes_of_rank]
    assigned = fipo.flatten(shares)
    assert sorted(map(id, assigned)) == sorted(map(id, mini_batch)), "each response has one rank"
    loads = [sum(r.total_tokens for r in share) for share in shares]
    assert max(loads) - min(loads) <= max(r.total_tokens for r in mini_batch)


def test_collate_of_no_rollouts_gives_a_dummy_row_that_counts_in_nothing():
    ids, mask, old_logp, advantage = fipo.collate([], fipo.CPU)
    assert ids.shape == (1, 2)
    assert not mask.any()
    assert not old_logp.any()
    assert not advantage.any()


# ------------------------------------------------------------ three updates, however they are split
# The name of each job, and how it differs from plain torch in one process. Under ZeRO-3, every
# parameter is gathered when it is needed and none is kept, as for the large ones of a 32B model.
# The memory is measured first, before another job has left anything.
PLAIN = {
    "plain": {},
    "one pass": {"tokens_per_micro_batch": 100_000},
}
ONE_RANK = {
    "memory, one rank": {"dtype": "bfloat16", "stage": 3},
    "ZeRO-3, one rank": {"stage": 3},
}
TWO_RANKS = {
    "memory, two ranks": {"dtype": "bfloat16", "stage": 3},
    "ZeRO-3, two ranks, activations recomputed": {"stage": 3, "gradient_checkpointing": True},
    "ZeRO-3, two ranks, offload, a pass per response": {
        "stage": 3,
        "offload": True,
        "tokens_per_micro_batch": 1,
    },
    "ZeRO-2, two ranks": {"stage": 2},
    "broken, ZeRO-2": {"dtype": "bfloat16", "stage": 2, "persistence": 100_000, "broken": 1},
    "broken, ZeRO-3": {"dtype": "bfloat16", "stage": 3, "persistence": 100_000, "broken": 1},
}
JOBS_OF_RANKS = {0: PLAIN, 1: ONE_RANK, 2: TWO_RANKS}
SPLITS = [name for jobs in JOBS_OF_RANKS.values() for name in jobs if name != "plain"]
SPLITS = [name for name in SPLITS if not name.startswith(("memory", "broken"))]


@pytest.fixture(scope="module")
def given(base, sums) -> dict:
    """Settings, and scored rollouts for three updates, one of which drops a response."""
    cfg = fipo.Config(
        model=base,
        data=sums,
        out="unused",
        group_size=8,
        prompts_per_batch=6,
        prompts_per_mini_batch=2,
        max_prompt=16,
        max_response=32,
        overlong_buffer=8,
        tokens_per_micro_batch=200,
        dtype="float32",
    )
    cfg = fipo.resolve(cfg)
    policy = fipo.Policy(base, cfg)
    problems = fipo.encode_problems(sums, policy, cfg)
    groups, _, _ = fipo.collect_rollouts(fipo.HFSampler(policy), problems, cfg, 1, 0)
    fipo.assign_rewards(groups, cfg)
    fipo.assign_advantages(groups)
    rows = []
    for group in groups:
        row_group = []
        for r in group:
            row = {
                "prompt_ids": r.problem.prompt_ids,
                "response_ids": list(r.response_ids),
                "sampler_logp": list(r.sampler_logp),
                "advantage": r.advantage,
            }
            row_group.append(row)
        rows.append(row_group)
    bad_rows = [row for row in fipo.flatten(rows) if row["advantage"] < 0]
    return {"cfg": cfg, "groups": rows, "runaway": bad_rows[0]["response_ids"]}


@pytest.fixture(scope="module")
def results_on(given, zero, tmp_path_factory):
    """Runs all jobs on some number of ranks, in one process group, the first time it is called."""
    known = {}

    def run(ranks: int) -> dict:
        jobs = []
        for change in JOBS_OF_RANKS[ranks].values():
            settings = dict(change)
            broken = settings.pop("broken", -1)
            if ranks:
                settings["deepspeed"] = zero(
                    stage=settings.pop("stage"),
                    stage3_param_persistence_threshold=settings.pop("persistence", 0),
                )
            cfg = dataclasses.replace(given["cfg"], **settings)
            jobs.append({"config": dataclasses.asdict(cfg), "broken": broken})
        settings = {"groups": given["groups"], "runaway": given["runaway"], "jobs": jobs}
        if ranks == 0:
            return dict(zip(PLAIN, run_jobs(settings)))
        folder = tmp_path_factory.mktemp("jobs")
        jobs_json = folder / "jobs.json"
        result_pt = folder / "result.pt"
        jobs_json.write_text(json.dumps(settings))
        words = [str(ROOT / "tests" / "three_updates.py"), str(jobs_json), str(result_pt)]
        finished(launch(words, ranks))
        result = torch.load(result_pt)
        named = dict(zip(JOBS_OF_RANKS[ranks], result["jobs"]))
        return named | {"process group": result["process group"]}

    def get(ranks: int) -> dict:
        if ranks not in known:
            known[ranks] = run(ranks)
        return known[ranks]

    return get


def ranks_of(split: str) -> int:
    return next(ranks for ranks, jobs in JOBS_OF_RANKS.items() if split in jobs)


@pytest.mark.parametrize(
    "split",
    [name if name in PLAIN else pytest.param(name, marks=pytest.mark.slow) for name in SPLITS],
)
def test_result_does_not_depend_on_the_split(results_on, split):
    """Compare loss, gradient norm, all metrics, and the weights after three updates in float32."""
    expected = results_on(0)["plain"]
    result = results_on(ranks_of(split))[split]
    assert expected["updates"][0]["dropped_sequences"] == 1
    assert all(update["grad_norm"] > 0 for update in expected["updates"])
    assert all(shares[0] > 0 for shares in result["shares"])
    assert sum(shares[0] for shares in result["shares"]) == 16
    has_shards_only = result["largest"] == 0
    assert has_shards_only == result["sharded"] == ("ZeRO-3" in split)
    for update, expected_update in zip(result["updates"], expected["updates"]):
        assert update == pytest.approx(expected_update, rel=1e-4, abs=2e-5)
    assert result["weights"].keys() == expected["weights"].keys()
    assert "lm_head.weight" in expected["weights"]
    for name, weight in result["weights"].items():
        torch.testing.assert_close(weight, expected["weights"][name], atol=4e-6, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_skips_a_gradient_that_is_not_finite(results_on, stage):
    updates = results_on(2)[f"broken, ZeRO-{stage}"]["updates"]
    assert [update["moved"] for update in updates] == [1.0, 0.0, 1.0]
    assert math.isinf(updates[1]["grad_norm"])


@pytest.mark.slow
def test_deepspeed_adopts_the_process_group_with_its_timeout_and_without_a_device(results_on):
    assert results_on(2)["process group"] == {
        "backend": "gloo",
        "deepspeed has adopted it": True,
        "deepspeed's ranks": 2,
        "sum of ones": 2.0,
        "timeouts in hours": [6.0, 6.0],
        "device": None,
    }


@pytest.mark.slow
@pytest.mark.parametrize("ranks, job", [(1, "memory, one rank"), (2, "memory, two ranks")])
def test_plan_predicts_the_bytes_of_weights_gradients_and_optimizer(results_on, base, ranks, job):
    """Count all floating-point tensors alive after an update under ZeRO-3 in bfloat16."""
    import plan

    held = results_on(ranks)[job]["held"]
    _, parameters = plan.shape_of(base)
    assert held == pytest.approx(sum(plan.states(parameters, ranks)), rel=0.03)


# --------------------------------------------------------------------------------------- whole runs


def train(cfg: fipo.Config, ranks: int = 0, *extra: str, by: str = "torchrun") -> subprocess.Popen:
    return launch([str(ROOT / "fipo.py"), "train", *flags(cfg), *extra], ranks, by)


def rank_variables(rank: int = 0, ranks: int = 1) -> dict[str, str]:
    """The environment that a launcher gives to a rank."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }


def train_as_only_rank(cfg: fipo.Config, *extra: str) -> subprocess.Popen:
    words = [str(ROOT / "fipo.py"), "train", *flags(cfg), *extra]
    return launch(words, **rank_variables())


@pytest.fixture(scope="module")
def sharded(base, sums, zero) -> fipo.Config:
    """A run under ZeRO-2, which the Hugging Face sampler can read."""
    cfg = small_config(base, sums, Path("unused"))
    return dataclasses.replace(
        cfg, deepspeed=zero(stage=2), eval_data=sums, eval_every=4, steps=8, dtype="float32"
    )


@pytest.fixture(scope="module")
def two_ranks(sharded, tmp_path_factory) -> fipo.Config:
    """A run on two ranks that nothing interrupts."""
    cfg = dataclasses.replace(sharded, out=str(tmp_path_factory.mktemp("two") / "run"))
    finished(train(cfg, ranks=2))
    return cfg


@pytest.fixture(scope="module")
def one_process(sharded, tmp_path_factory) -> fipo.Config:
    """The same run without DeepSpeed."""
    out = tmp_path_factory.mktemp("one") / "run"
    cfg = dataclasses.replace(sharded, out=str(out), deepspeed="")
    fipo.train(cfg)
    return cfg


@pytest.mark.slow
def test_two_ranks_log_and_learn_what_one_process_does(two_ranks, one_process):
    assert_runs_equal(Path(two_ranks.out), Path(one_process.out))
    last = Path("checkpoints") / "step_000008"
    model = AutoModelForCausalLM.from_pretrained(Path(two_ranks.out) / last)
    expected = AutoModelForCausalLM.from_pretrained(Path(one_process.out) / last)
    weights = model.state_dict()
    for name, weight in expected.state_dict().items():
        torch.testing.assert_close(weights[name], weight, atol=2e-5, rtol=1e-3)


@pytest.mark.slow
def test_run_whose_rank_was_killed_and_then_stopped_equals_an_uninterrupted_one(
    two_ranks, tmp_path
):
    cfg = dataclasses.replace(two_ranks, out=str(tmp_path / "run"))
    out = Path(cfg.out)
    checkpoints = out / "checkpoints"

    # 1) A rank dies: torchrun ends the other, and the newest checkpoint is complete.
    process = train(cfg, ranks=2)
    wait_for_step(out, 3, process)
    os.kill(second_rank(process), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert fipo.newest_checkpoint(out)

    # 2) A signal to one rank stops all of them after a save. Files of a larger run are removed.
    stale = checkpoints / "partial" / "deepspeed" / "ranks" / "of_a_run_with_more_ranks.pt"
    stale.parent.mkdir(parents=True)
    stale.touch()
    process = train(cfg, 2, "--resume")
    wait_for_step(out, 5, process)
    os.kill(second_rank(process), signal.SIGTERM)
    output = finished(process, status=0, seconds=60)
    assert "resuming after step" in output
    assert "--resume continues from there" in output
    assert not (checkpoints / "step_000008").exists()
    assert not list(checkpoints.rglob(stale.name))

    # 3) The other launcher continues.
    finished(train(cfg, 2, "--resume", by="deepspeed"))
    assert_runs_equal(out, Path(two_ranks.out), tolerance=0)


@pytest.mark.slow
def test_resuming_with_another_engine_or_number_of_ranks_is_refused(two_ranks, one_process):
    refused = [
        train_as_only_rank(two_ranks, "--resume"),
        train_as_only_rank(dataclasses.replace(one_process, deepspeed=ZERO_3), "--resume"),
    ]
    reading = r"reading the optimizer in .*step_0000\d\d \(use the engine and the number of ranks"
    for process in refused:
        output = finished(process, status=1)
        assert re.search(reading, output), output
        assert "Traceback" not in output, output
    without_deepspeed = dataclasses.replace(two_ranks, deepspeed="", resume=True, steps=9)
    with pytest.raises(fipo.FipoError, match=reading):
        fipo.train(without_deepspeed)


# ----------------------------------------------------------------------------------------- mistakes


@pytest.fixture
def as_only_rank(monkeypatch):
    """Runs a command in this process, as a launcher would start the only rank of a run."""
    pytest.importorskip("deepspeed")
    for name, value in rank_variables().items():
        monkeypatch.setenv(name, value)

    def run(main, *words: str) -> str:
        with pytest.raises(SystemExit) as end:
            main(list(words))
        return str(end.value.code)

    return run


@pytest.mark.parametrize(
    "change, zero_change, message",
    [
        ({}, {"overlap_com": True}, "overlap_com Extra inputs are not permitted"),
        ({}, {"stage": 1}, "zero_optimization.stage must be 2 or 3"),
        (
            {"gradient_accumulation_steps": 4},
            {},
            "ds_config.json: gradient_accumulation_steps is 4",
        ),
        (
            {"train_batch_size": 2},
            {},
            "gradient_accumulation_steps is 2 (or follows from train_batch_size)",
        ),
        ({"gradient_clipping": "auto"}, {}, "ds_config.json: ['gradient_clipping'] is \"auto\""),
        ({"fp16": {"enabled": "auto"}}, {}, "ds_config.json: ['enabled'] is \"auto\""),
        ({"optimizer": {"type": "AdamW"}}, {}, "ds_config.json: remove optimizer"),
    ],
)
def test_deepspeed_file_that_cannot_work_is_refused(
    as_only_rank, sharded, tmp_path, change, zero_change, message
):
    config = json.loads(Path(ZERO_3).read_text()) | change
    config["zero_optimization"] |= zero_change
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(config))
    cfg = dataclasses.replace(sharded, out=str(tmp_path / "run"), deepspeed=str(path))
    sentence = as_only_rank(fipo.main, "train", *flags(cfg))
    assert sentence.count(message) == 1
    assert len(sentence.splitlines()) == 1


def test_missing_deepspeed_file_is_refused(as_only_rank, sharded, tmp_path):
    cfg = dataclasses.replace(sharded, out=str(tmp_path / "run"), deepspeed="no.json")
    sentence = as_only_rank(fipo.main, "train", *flags(cfg))
    assert "reading no.json failed" in sentence
    assert len(sentence.splitlines()) == 1


NEED_EACH_OTHER = "--deepspeed and a launcher such as torchrun need each other"


def test_launcher_without_deepspeed_is_refused(as_only_rank, base, sums, sharded, tmp_path):
    cfg = dataclasses.replace(sharded, out=str(tmp_path / "run"), deepspeed="")
    commands = [
        (fipo.main, ["train", *flags(cfg)]),
        (fipo.main, ["eval", "--model", base, "--data", sums, "--max_response", "8"]),
        (train_small.main, ["--out", str(tmp_path / "small")]),
    ]
    for main, words in commands:
        assert NEED_EACH_OTHER in as_only_rank(main, *words)
    assert not list(tmp_path.iterdir())


def test_other_ranks_wait_for_rank_0_to_report_a_mistake(as_only_rank, monkeypatch, base, sums):
    """The launcher ends them meanwhile, so the mistake is reported once."""
    waits = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(fipo.time, "sleep", waits.append)
    sentence = as_only_rank(fipo.main, "eval", "--model", base, "--data", sums)
    assert waits == [10]
    assert sentence.startswith(f"fipo: rank 1: {NEED_EACH_OTHER}")


@pytest.mark.slow
def test_mistake_of_two_ranks_is_reported_once(base, sums):
    words = ["eval", "--model", base, "--data", sums, "--max_response", "8"]
    output = finished(launch([str(ROOT / "fipo.py"), *words], ranks=2), status=1)
    assert output.count(NEED_EACH_OTHER) == 1, output
    assert 'fipo.py", line' not in output, output  # torchrun prints a traceback of its own
    assert "IndexError" not in output, output


def test_hf_sampler_refuses_a_policy_sharded_by_zero_3():
    policy = types.SimpleNamespace(sharded=True)  # as in test_result_does_not_depend_on_the_split
    message = "--sampler hf cannot read a model sharded by ZeRO-3: use --sampler vllm"
    with pytest.raises(fipo.FipoError, match=message):
        fipo.HFSampler(policy)


@pytest.mark.slow
def test_missing_compiler_is_reported(sharded, tmp_path):
    """DeepSpeed compiles an extension at its first start."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("torchrun", "ninja"):  # and neither g++ nor c++
        (tools / name).symlink_to(SCRIPTS / name)
    words = [str(ROOT / "fipo.py"), "train", *flags(sharded)]
    process = launch(words, 1, PATH=str(tools), TORCH_EXTENSIONS_DIR=str(tmp_path))
    output = finished(process, status=1)
    assert "starting DeepSpeed (its extension needs g++ and ninja) failed" in output, output
    assert 'fipo.py", line' not in output, output


# --------------------------------------------------------------------------- what train_32b.sh says


def test_recipe_of_train_32b_equals_the_defaults():
    """A run that is started without train_32b.sh trains with the same numbers."""
    script = (ROOT / "train_32b.sh").read_text()
    recipe = re.search(r"^recipe=\((.*?)^\)", script, re.S | re.M)[1]
    without_comments = re.sub("#.*", "", recipe)
    words = without_comments.split()
    given = fipo.Parser(fipo.Config).parse_args(words)
    default = fipo.resolve(fipo.Config(model="m", data="d", out="o"))
    assert default.weight_range == [1, 1.2]
    assert default.clip_high == 0.28
    assert default.dual_clip == 10
    assert default.overlong_buffer == 4096
    names = [word[2:] for word in words if word.startswith("--")]
    names.remove("prompts_per_round")
    assert len(names) > 17
    assert given.prompts_per_round == 2048
    for name in names:
        assert getattr(given, name) == getattr(default, name), name
