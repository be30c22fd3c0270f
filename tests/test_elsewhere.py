"""scripts/trl_fipo.py and scripts/verl_fipo.py, run with TRL and verl if they are installed."""

import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch.nn.utils.rnn import pad_sequence

import fipo

SCRIPTS = ROOT / "scripts"


@pytest.mark.parametrize("name", ["trl_fipo", "verl_fipo"])
def test_help_needs_neither_trl_nor_verl(name):
    words = [sys.executable, str(SCRIPTS / f"{name}.py"), "--help"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "A file to copy" in done.stdout


# -------------------------------------------------------------------------------------------- TRL
def test_trl_trains_with_fipo_and_computes_the_same_loss(base, sums, tmp_path):
    trl = pytest.importorskip("trl")
    import datasets
    from transformers import Qwen2ForCausalLM, Qwen2Tokenizer

    from trl_fipo import FIPOTrainer

    theirs = []
    ours = []
    largest_f = []

    class Recorded(FIPOTrainer):
        def _compute_loss(self, model, inputs):
            loss = super()._compute_loss(model, inputs)
            theirs.append(loss.item())
            ours.append(same_loss_by_fipo(model, inputs, self.args))
            largest_f.append(self._metrics["train"]["fipo/influence_max"][-1])
            return loss

    def reward(completions, answer, **_):
        return [float(fipo.verify(text, a)) for text, a in zip(completions, answer)]

    config = trl.GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=16,
        num_generations=8,
        steps_per_generation=2,
        num_iterations=2,
        max_completion_length=64,
        max_steps=8,
        learning_rate=5e-4,
        lr_scheduler_type="constant",
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    trainer = Recorded(
        model=Qwen2ForCausalLM.from_pretrained(base),
        args=config,
        processing_class=Qwen2Tokenizer.from_pretrained(base, padding_side="left"),
        reward_funcs=reward,
        train_dataset=datasets.load_dataset("json", data_files=sums, split="train"),
    )
    trainer.train()
    assert len(theirs) == 8
    assert theirs == pytest.approx(ours, abs=1e-5)
    assert largest_f[0] == pytest.approx(1, abs=1e-5), "f is 1 before the first update"
    assert max(largest_f) > 1.02, "f must differ from 1 in later updates"


def same_loss_by_fipo(model, inputs, args) -> float:
    """Return the loss from this project's own log-probs, of rows without padding on the left."""
    rows = []
    masks = []
    old = []
    for i, is_prompt in enumerate(inputs["prompt_mask"].bool()):
        prompt = inputs["prompt_ids"][i][is_prompt]
        count = int(inputs["completion_mask"][i].sum())
        zeros = torch.zeros(len(prompt))
        rows.append(torch.cat([prompt, inputs["completion_ids"][i][:count]]))
        masks.append(torch.cat([zeros, torch.ones(count)]))
        old.append(torch.cat([zeros, inputs["old_per_token_logps"][i][:count]]))
    ids = pad_sequence(rows, batch_first=True)
    mask = pad_sequence(masks, batch_first=True)
    old_logp = pad_sequence(old, batch_first=True)
    tokens = inputs["num_items_in_batch"] / args.steps_per_generation
    with torch.no_grad():
        logp, *_ = fipo.token_logprobs(model, ids, mask, args.temperature)
    loss, _ = fipo.fipo_loss(logp, old_logp, inputs["advantages"], mask, num_tokens=tokens)
    return loss.item()


# ------------------------------------------------------------------------------------------- verl
@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """A batch in the form of verl's actor, in which f differs from 1 and one response is short."""
    torch.manual_seed(0)
    mask = torch.ones(4, 64)
    mask[1, 32:] = 0
    old = -torch.rand(4, 64)
    return {
        "old_log_prob": old,
        "log_prob": old + 0.1 * torch.randn(4, 64),
        "response_mask": mask,
        "advantages": torch.randn(4, 1).expand(4, 64) * mask,
    }


@pytest.fixture
def expected(batch):
    """The loss and the metrics of this project."""
    logp = batch["log_prob"]
    old_logp = batch["old_log_prob"]
    return fipo.fipo_loss(logp, old_logp, batch["advantages"], batch["response_mask"])


@pytest.fixture
def config():
    """The configuration of a verl actor, after the loss is registered."""
    return actor_config()


def actor_config(*settings):
    """Return what verl makes of its defaults and of these arguments after `policy_loss.`."""
    pytest.importorskip("verl")
    import hydra
    from verl.utils.config import omega_conf_to_dataclass

    import verl_fipo  # noqa: F401

    arguments = [
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
        "actor_rollout_ref.actor.clip_ratio_high=0.28",
        "actor_rollout_ref.actor.clip_ratio_c=10",
        "actor_rollout_ref.actor.policy_loss.loss_mode=fipo",
    ]
    for setting in settings:
        plus = "" if setting.startswith("_target_") else "+"
        arguments.append(f"{plus}actor_rollout_ref.actor.policy_loss.{setting}")
    with hydra.initialize_config_module("verl.trainer.config", version_base=None):
        config = hydra.compose("ppo_trainer", arguments)
    return omega_conf_to_dataclass(config.actor_rollout_ref.actor)


def test_verl_calls_the_registered_loss_and_its_ranks_average_to_ours(config, batch, expected):
    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    registered = get_policy_loss_fn("fipo")
    loss, metrics = registered(**batch, config=config)
    expected_loss, expected_metrics = expected
    assert loss.item() == pytest.approx(expected_loss.item(), abs=1e-6)
    influence = expected_metrics["influence_mean"]
    assert metrics["actor/fipo_influence_mean"] == pytest.approx(influence) != 1

    # verl averages the gradients over the ranks.
    tokens = int(batch["response_mask"].sum())
    config.global_batch_info.update(dp_size=2, batch_num_tokens=tokens)
    total = 0.0
    for rows in (slice(0, 1), slice(1, 4)):
        of_rank = {name: values[rows] for name, values in batch.items()}
        loss, _ = registered(**of_rank, config=config)
        total += loss.item()
    assert total / 2 == pytest.approx(expected_loss.item(), abs=1e-6)


def test_verl_s_own_actor_loss_calls_it(config, batch, expected, monkeypatch):
    from tensordict import TensorDict
    from verl.utils.tensordict_utils import assign_non_tensor
    from verl.workers.utils import losses

    fields = {
        "response_mask": batch["response_mask"],
        "old_log_probs": batch["old_log_prob"],
        "advantages": batch["advantages"],
    }
    data = TensorDict(fields, batch_size=4)
    tokens = int(batch["response_mask"].sum())
    assign_non_tensor(data, dp_size=1, batch_num_tokens=tokens, global_batch_size=4)
    # The batch is padded already.
    monkeypatch.setattr(losses, "no_padding_2_padding", lambda values, _: values)
    loss, metrics = losses.ppo_loss(config, {"log_probs": batch["log_prob"]}, data)
    expected_loss, _ = expected
    assert loss.item() == pytest.approx(expected_loss.item(), abs=1e-6)
    assert "actor/fipo_future_kl_mean" in metrics


TARGET = "_target_=verl_fipo.FIPOLossConfig"


def test_verl_s_configuration_passes_fipo_s_settings_to_the_loss(batch):
    config = actor_config(TARGET, "tau=8", "weight_range=[0.5,2]", "safety=1.05")
    logp = batch["log_prob"]
    old_logp = batch["old_log_prob"]
    expected, _ = fipo.fipo_loss(
        logp,
        old_logp,
        batch["advantages"],
        batch["response_mask"],
        tau=8.0,
        weight_range=(0.5, 2.0),
        safety=1.05,
    )
    import verl_fipo

    loss, metrics = verl_fipo.fipo_policy_loss(**batch, config=config)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert metrics["actor/fipo_influence_min"] < 1
    assert metrics["actor/fipo_influence_max"] > 1.2


def test_the_defaults_in_verl_are_those_of_the_paper():
    settings = actor_config(TARGET).policy_loss
    assert (settings.tau, settings.weight_range, settings.safety) == (32.0, (1.0, 1.2), 10.0)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("tau=0", "policy_loss.tau is 0: give a number above 0."),
        ("safety=high", "policy_loss.safety is 'high': give a number above 0."),
        ("weight_range=[1.2,0.8]", "policy_loss.weight_range is [1.2, 0.8]: give [low,high]"),
        ("weight_range=0.2", "policy_loss.weight_range is 0.2: give [low,high]"),
        ("taus=8", "unexpected keyword argument 'taus'"),
    ],
)
def test_verl_refuses_wrong_settings_of_fipo(setting, message):
    pytest.importorskip("verl")
    from hydra.errors import InstantiationException

    with pytest.raises(InstantiationException, match=re.escape(message)):
        actor_config(TARGET, setting)


def test_import_verl_registers_the_loss_in_a_new_process():
    pytest.importorskip("verl")
    code = (
        "import verl; from verl.trainer.ppo.core_algos import get_policy_loss_fn as get; "
        "print(get('fipo').__name__)"
    )
    path = os.pathsep.join([str(SCRIPTS), os.environ.get("PYTHONPATH", "")])
    variables = {"PYTHONPATH": path, "VERL_USE_EXTERNAL_MODULES": "verl_fipo"}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | variables)
    assert done.stdout.split()[-1:] == ["fipo_policy_loss"], done.stderr
