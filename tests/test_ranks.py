"""Many ranks, by the real DeepSpeed: whoever does the work, the result is the same, and nobody waits for the dead."""

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import tempfile
from pathlib import Path

import psutil
import pytest
import torch
from conftest import (
    ROOT,
    SCRIPTS,
    ZERO_3,
    alike,
    finished,
    flags,
    free_port,
    launch,
    second_rank,
    wait_for_step,
)
from transformers import AutoModelForCausalLM

import fipo

# --------------------------------------------------------------------------------------------- sharing out the work


def rollouts(lengths):
    return [fipo.Rollout(fipo.Problem("", "", [0] * 3), fipo.array("i", [1] * n)) for n in lengths]


@pytest.mark.parametrize(
    "lengths", [[5] * 16, [1, 2, 3, 50, 4, 40, 3, 3, 9], [7], [100] + [1] * 30]
)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_rank_has_the_same_number_of_passes_and_about_as_many_tokens(
    monkeypatch, lengths, ranks
):
    mini, shares = rollouts(lengths), []
    for me in range(ranks):
        monkeypatch.setattr(fipo, "world", lambda: ranks)
        monkeypatch.setattr(fipo, "rank", lambda me=me: me)
        shares.append(fipo.micro_batches(mini, max_tokens=60))
    assert len({len(passes) for passes in shares}) == 1
    everyone = [id(r) for passes in shares for part in passes for r in part]
    assert sorted(everyone) == sorted(id(r) for r in mini), "each response has one rank"
    loads = [sum(len(r) for part in passes for r in part) for passes in shares]
    assert max(loads) - min(loads) <= max(len(r) for r in mini)


def test_a_row_that_counts_in_nothing_stands_for_an_empty_pass():
    ids, mask, old_logp, advantage = fipo.collate([], fipo.CPU)
    assert ids.shape == (1, 2) and not mask.any() and not old_logp.any() and not advantage.any()


# -------------------------------------------------------------------------------- the same result however it is split


@pytest.fixture(scope="module")
def given(base, sums, tmp_path_factory):
    """Settings and scored rollouts for three updates, one of which drops a response; run by three_updates.py."""
    folder = tmp_path_factory.mktemp("given")
    cfg = fipo.resolve(fipo.Config(
        model=base, data=sums, out=str(folder), group_size=8, prompts_per_batch=6, prompts_per_mini_batch=2,
        max_prompt=16, max_response=32, overlong_buffer=8, tokens_per_micro_batch=200, dtype="float32",
    ))  # fmt: skip
    policy = fipo.Policy(base, cfg)
    problems = fipo.encode_problems(sums, policy, cfg)
    groups, _, _ = fipo.collect_rollouts(fipo.HFSampler(policy), problems, cfg, 1, 0)
    fipo.assign_rewards(groups, cfg)
    fipo.assign_advantages(groups)
    rows = [
        [
            {"prompt_ids": r.problem.prompt_ids, "response_ids": list(r.response_ids),
             "sampler_logp": list(r.sampler_logp), "advantage": r.advantage}
            for r in group
        ]
        for group in groups
    ]  # fmt: skip
    runaway = next(row["response_ids"] for group in rows for row in group if row["advantage"] < 0)

    def run(ranks: int = 0, broken: int = -1, **change):
        changed = dataclasses.asdict(dataclasses.replace(cfg, **change))
        settings, result = (
            Path(tempfile.mkstemp(dir=folder)[1]),
            Path(tempfile.mkstemp(dir=folder)[1]),
        )
        settings.write_text(
            json.dumps({"config": changed, "groups": rows, "runaway": runaway, "broken": broken})
        )
        finished(
            launch([str(ROOT / "tests" / "three_updates.py"), str(settings), str(result)], ranks)
        )
        return torch.load(result)

    return run


@pytest.fixture(scope="module")
def plain(given):
    return given()


SPLITS = {  # under ZeRO-3 every parameter is gathered when needed, none kept, as the large ones are at 32B
    "plain torch, one pass": dict(tokens_per_micro_batch=100_000),
    "ZeRO-3, one rank": dict(ranks=1),
    "ZeRO-3, two ranks, activations recomputed": dict(ranks=2, gradient_checkpointing=True),
    "ZeRO-3, two ranks, offload, a pass per response": dict(
        ranks=2, offload=True, tokens_per_micro_batch=1
    ),
    "ZeRO-2, two ranks": dict(ranks=2, stage=2),
}


@pytest.mark.parametrize("split", SPLITS)
def test_same_result_however_it_is_split(given, plain, zero, split):
    """Loss, gradient norm, all metrics and the weights after three updates, one of which drops a response; float32."""
    how = dict(SPLITS[split])
    if "ranks" in how:
        how["deepspeed"] = zero(stage=how.pop("stage", 3), stage3_param_persistence_threshold=0)
    result = given(**how)
    assert plain["updates"][0]["dropped_sequences"] == 1 and all(
        u["grad_norm"] > 0 for u in plain["updates"]
    )
    assert sum(s[0] for s in result["shares"]) == 16 and all(s[0] for s in result["shares"])
    assert (result["largest"] == 0) == ("ZeRO-3" in split), (
        "after loading, no rank holds a whole weight"
    )
    for mine, theirs in zip(result["updates"], plain["updates"]):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=2e-5)
    assert (
        result["weights"].keys() == plain["weights"].keys() and "lm_head.weight" in plain["weights"]
    )
    for name, weight in result["weights"].items():
        torch.testing.assert_close(weight, plain["weights"][name], atol=4e-6, rtol=1e-4)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_gradient_that_is_not_finite_moves_nothing_under_deepspeed_either(given, zero, stage):
    updates = given(ranks=2, broken=1, deepspeed=zero(stage=stage), dtype="bfloat16")["updates"]
    assert [u["moved"] for u in updates] == [1.0, 0.0, 1.0] and math.isinf(updates[1]["grad_norm"])


# ----------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture
def sharded(small, sums, zero) -> fipo.Config:
    """A run of four steps under ZeRO-2, which the Hugging Face sampler can read."""
    return dataclasses.replace(
        small, deepspeed=zero(stage=2), sampler="hf", eval_data=sums, steps=4, dtype="float32"
    )


def train(cfg: fipo.Config, ranks: int = 0, *extra: str, by: str = "torchrun") -> subprocess.Popen:
    return launch([str(ROOT / "fipo.py"), "train", *flags(cfg), *extra], ranks, by)


def alone(cfg: fipo.Config, *extra: str) -> subprocess.Popen:
    """The only rank, as a launcher would start it: without its own lines about a failure."""
    how = dict(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port()
    )
    return launch([str(ROOT / "fipo.py"), "train", *flags(cfg), *extra], **how)


def test_two_ranks_log_what_one_logs_and_a_run_goes_on_as_it_was_begun(sharded, tmp_path):
    """Rollouts, evaluation and updates on two ranks and on one, by both launchers; not resumed by another number."""
    whole = dataclasses.replace(sharded, out=str(tmp_path / "whole"), deepspeed="")
    finished(train(whole))
    cfg = dataclasses.replace(sharded, out=str(tmp_path / "two"))
    finished(train(dataclasses.replace(cfg, steps=2), ranks=2))
    output = finished(alone(cfg, "--resume"), status=1)
    assert re.search(
        "reading the optimiser in .*step_000002 .by the engine and the number of ranks", output
    ), output
    assert "Traceback" not in output, output
    stale = (
        Path(cfg.out)
        / "checkpoints"
        / "partial"
        / "deepspeed"
        / "ranks"
        / "of_a_run_with_more_ranks.pt"
    )
    stale.parent.mkdir(parents=True)
    stale.touch()
    finished(train(cfg, 2, "--resume", by="deepspeed"))
    assert not list((Path(cfg.out) / "checkpoints").rglob(stale.name))
    alike(Path(cfg.out), Path(whole.out))
    with pytest.raises(fipo.FipoError, match="reading the optimiser in .*by the engine"):
        fipo.train(dataclasses.replace(cfg, deepspeed="", resume=True, steps=9))
    other_engine = dataclasses.replace(whole, deepspeed=ZERO_3, steps=9)
    output = finished(alone(other_engine, "--resume"), status=1)
    assert "reading the optimiser in" in output and "Traceback" not in output, output
    model = AutoModelForCausalLM.from_pretrained(Path(cfg.out) / "checkpoints" / "step_000004")
    other = AutoModelForCausalLM.from_pretrained(Path(whole.out) / "checkpoints" / "step_000004")
    for name, weight in other.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, atol=2e-5, rtol=1e-3)


def test_a_signal_to_one_rank_stops_all_and_they_resume_exactly(sharded, tmp_path):
    sharded = dataclasses.replace(sharded, steps=24, eval_every=12, save_every=12)
    whole, cut = (
        dataclasses.replace(sharded, out=str(tmp_path / name)) for name in ("whole", "cut")
    )
    finished(train(whole, 2))
    process = train(cut, 2)
    wait_for_step(Path(cut.out), 2, process)
    os.kill(second_rank(process), signal.SIGTERM)
    assert "--resume goes on from there" in finished(process, status=0, seconds=60)
    assert not list((Path(cut.out) / "checkpoints").glob("*024"))
    finished(train(cut, 2, "--resume"))
    alike(Path(cut.out), Path(whole.out), tolerance=0)


def test_when_a_rank_dies_the_others_end_with_a_message_and_the_checkpoint_is_whole(sharded):
    """Without a launcher that would end them: as on another node of a cluster."""
    cfg, port = dataclasses.replace(sharded, steps=1000, eval_data=""), str(free_port())
    both = [
        launch([str(ROOT / "fipo.py"), "train", *flags(cfg)], RANK=str(i), LOCAL_RANK=str(i), WORLD_SIZE="2",
               MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        for i in (0, 1)
    ]  # fmt: skip
    wait_for_step(Path(cfg.out), 3, both[0])
    both[1].send_signal(signal.SIGKILL)
    output, _ = both[0].communicate(timeout=30)
    assert (
        "Traceback" not in output and both[0].returncode != 0 and "another rank has ended" in output
    ), output
    assert fipo.newest_checkpoint(Path(cfg.out)).name.startswith("step_")


@pytest.mark.parametrize("change, said", [
    (dict(deepspeed=""), "--deepspeed and a launcher, as torchrun, need each other"),
    (dict(deepspeed="no.json"), "reading no.json failed"),
    (dict(deepspeed=ZERO_3), "cannot read a model that ZeRO-3 has cut into shards"),  # by both of two ranks
    (dict(deepspeed="broken"), "overlap_com Extra inputs are not permitted"),
    (dict(deepspeed="stage 1"), "zero_optimization.stage must be 2 or 3"),
    (dict(deepspeed={"gradient_accumulation_steps": 4}), "ds_config.json: gradient_accumulation_steps is 4"),
    (dict(deepspeed={"train_batch_size": 2}), "gradient_accumulation_steps is 2 (or follows from train_batch_size)"),
    (dict(deepspeed={"gradient_clipping": "auto"}), 'ds_config.json: gradient_clipping is "auto"'),
    (dict(deepspeed={"fp16": {"enabled": "auto"}}), 'ds_config.json: enabled is "auto"'),
    (dict(deepspeed={"optimizer": {"type": "AdamW"}}), "ds_config.json: remove optimizer"),
])  # fmt: skip
def test_mistakes_are_told_in_one_sentence(sharded, zero, tmp_path, change, said):
    if isinstance(change["deepspeed"], dict):
        config = json.loads(Path(ZERO_3).read_text()) | change["deepspeed"]
        (tmp_path / "ds_config.json").write_text(json.dumps(config))
        change = dict(deepspeed=str(tmp_path / "ds_config.json"))
    if change["deepspeed"] == "broken":
        change = dict(deepspeed=zero(overlap_com=True))
    if change["deepspeed"] == "stage 1":
        change = dict(deepspeed=zero(stage=1))
    cfg = dataclasses.replace(sharded, **change)
    process = train(cfg, 2, by="deepspeed") if change["deepspeed"] == ZERO_3 else alone(cfg)
    output = finished(process, status=1)
    assert output.count(said) == 1 and "Traceback" not in output, output


@pytest.mark.parametrize("script", ["fipo.py", "train_small.py"])
def test_without_deepspeed_a_launcher_is_refused_and_only_rank_0_says_so(
    base, sums, tmp_path, script
):
    words = {
        "fipo.py": ["eval", "--model", base, "--data", sums, "--max_response", "8"],
        "train_small.py": ["--out", str(tmp_path / "run")],
    }
    output = finished(launch([str(ROOT / script), *words[script]], ranks=2), status=1)
    assert output.count("--deepspeed and a launcher, as torchrun, need each other") == 1, output
    assert "IndexError" not in output and not list(tmp_path.iterdir())


GROUPS = """
import sys
import torch
from torch.distributed import distributed_c10d as c10d
sys.path.insert(0, sys.argv[1])
import fipo
with fipo.joined_ranks("ds_config.json"):
    import deepspeed
    adopted = deepspeed.comm.comm.cdb is not None and deepspeed.comm.get_world_size() == 2
    total = torch.ones(1)
    deepspeed.comm.all_reduce(total)
    groups = [c10d._get_default_group(), fipo.GLOO["hosts"]]
    hours = [group._get_backend(fipo.CPU).options._timeout.total_seconds() / 3600 for group in groups]
    bound = torch.distributed.group.WORLD.bound_device_id
    fipo.say(f"{torch.distributed.get_backend()} {adopted} {total.item()} {hours} {bound}")
"""


def test_deepspeed_adopts_the_process_group_with_its_timeout_and_without_a_device(tmp_path):
    (tmp_path / "groups.py").write_text(GROUPS)
    assert "gloo True 2.0 [6.0, 6.0] None" in finished(
        launch([str(tmp_path / "groups.py"), str(ROOT)], ranks=2)
    )


def test_a_missing_compiler_is_told(sharded, tmp_path):
    """DeepSpeed compiles an extension at its first start."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("torchrun", "ninja"):  # and neither g++ nor c++
        (tools / name).symlink_to(SCRIPTS / name)
    words = [str(ROOT / "fipo.py"), "train", *flags(sharded)]
    output = finished(
        launch(words, 1, PATH=str(tools), TORCH_EXTENSIONS_DIR=str(tmp_path)), status=1
    )
    assert "to compile its extension, g++ and ninja" in output and 'fipo.py", line' not in output, (
        output
    )


def test_the_lock_of_a_build_that_was_killed_is_named(sharded, tmp_path):
    """torch would wait for it in silence, and for ever."""
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    process = launch(
        [str(ROOT / "fipo.py"), "train", *flags(sharded)], 1, TORCH_EXTENSIONS_DIR=str(tmp_path)
    )
    line = next(line for line in process.stdout if str(lock) in line)
    assert "if nothing is, remove" in line
    assert process.poll() is None, "it waits"
    for waiting in (
        process,
        *psutil.Process(process.pid).children(recursive=True),
    ):  # for the lock: nothing is built
        waiting.kill()
    process.wait()


# ------------------------------------------------------------------------------------- what train_32b.sh promises


@pytest.mark.parametrize("ranks", [1, 2])
def test_plan_s_bytes_of_weights_gradients_and_optimiser_are_those_held_after_an_update(
    given, zero, base, ranks
):
    """All floating-point tensors alive under ZeRO-3 in bfloat16, with no parameter so small that it is kept whole."""
    from test_plan import plan

    result = given(
        ranks=ranks, deepspeed=zero(stage3_param_persistence_threshold=0), dtype="bfloat16"
    )
    _, parameters = plan.shape_of(base)
    assert result["held"] == pytest.approx(sum(plan.states(parameters, ranks)), rel=0.03)


def test_the_recipe_is_the_paper_s_and_the_defaults_are_the_same():
    """Whoever starts fipo.py without train_32b.sh trains with the same numbers."""
    script = (ROOT / "train_32b.sh").read_text()
    recipe = re.search(r"^recipe=\((.*?)^\)", script, re.S | re.M)[1]
    words = [word for line in recipe.splitlines() for word in line.split("#")[0].split()]
    parser = fipo.Parser(fipo.Config)
    given, default = (
        parser.parse_args(words),
        fipo.resolve(fipo.Config(model="m", data="d", out="o")),
    )
    assert (
        default.weight_range,
        default.clip_high,
        default.dual_clip,
        default.overlong_buffer,
    ) == (
        [1, 1.2],
        0.28,
        10,
        4096,
    )
    names = [word[2:] for word in words if word.startswith("--") and word != "--prompts_per_round"]
    assert len(names) > 17 and given.prompts_per_round == 2048
    assert {name: getattr(given, name) for name in names} == {
        name: getattr(default, name) for name in names
    }
