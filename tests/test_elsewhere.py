"""scripts/trl_fipo.py and scripts/verl_fipo.py, run against TRL and verl where they are installed."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fipo

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture(autouse=True)
def scripts_can_be_imported(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)


@pytest.mark.parametrize("name", ["trl_fipo", "verl_fipo"])
def test_help_needs_neither_trl_nor_verl(name):
    words = [sys.executable, str(SCRIPTS / f"{name}.py"), "--help"]
    assert "A file to copy" in subprocess.run(words, capture_output=True, text=True, check=True).stdout


def test_trl_trains_with_fipo_and_computes_the_same_loss(base, sums, tmp_path):
    trl = pytest.importorskip("trl")
    import datasets
    from transformers import Qwen2ForCausalLM, Qwen2Tokenizer

    seen = []

    class Watched(importlib.import_module("trl_fipo").FIPOTrainer):
        def _compute_loss(self, model, inputs):
            loss = super()._compute_loss(model, inputs)
            ours = same_loss_by_fipo(model, inputs, self.args)
            seen.append((loss.item(), ours, self._metrics["train"]["fipo/influence_max"][-1]))
            return loss

    how = trl.GRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=16, num_generations=8, steps_per_generation=2,
        num_iterations=2, max_completion_length=64, max_steps=8, learning_rate=5e-4, lr_scheduler_type="constant",
        bf16=False, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    tokenizer = Qwen2Tokenizer.from_pretrained(base, padding_side="left")
    trainer = Watched(
        model=Qwen2ForCausalLM.from_pretrained(base), args=how, processing_class=tokenizer,
        reward_funcs=lambda completions, answer, **_: [float(fipo.verify(c, a)) for c, a in zip(completions, answer)],
        train_dataset=datasets.load_dataset("json", data_files=sums, split="train"),
    )  # fmt: skip
    trainer.train()
    assert len(seen) == 8
    for theirs, ours, _ in seen:
        assert theirs == pytest.approx(ours, abs=1e-5)
    influence = [largest for _, _, largest in seen]
    assert influence[0] == pytest.approx(1, abs=1e-5)  # nothing has moved yet
    assert max(influence) > 1.02  # several updates per rollout: FIPO acts


def same_loss_by_fipo(model, inputs, args) -> float:
    """The batch through this project's own log-probs: rows without TRL's padding on the left."""
    rows, masks, old = [], [], []
    for i, real in enumerate(inputs["prompt_mask"].bool()):
        prompt, count = inputs["prompt_ids"][i][real], int(inputs["completion_mask"][i].sum())
        rows.append(torch.cat([prompt, inputs["completion_ids"][i][:count]]))
        masks.append(torch.cat([torch.zeros(len(prompt)), torch.ones(count)]))
        old.append(torch.cat([torch.zeros(len(prompt)), inputs["old_per_token_logps"][i][:count]]))
    ids, mask, old = (torch.nn.utils.rnn.pad_sequence(x, batch_first=True) for x in (rows, masks, old))
    with torch.no_grad():
        logp, _ = fipo.token_logprobs(model, ids, mask, args.temperature)
        tokens = inputs["num_items_in_batch"] / args.steps_per_generation
        return fipo.fipo_loss(logp, old, inputs["advantages"], mask, num_tokens=tokens)[0].item()


def verl_batch(rows: int, T: int) -> dict[str, torch.Tensor]:
    """A batch as verl's actor has it, in which f differs from 1 and one response is shorter."""
    torch.manual_seed(0)
    mask = torch.ones(rows, T)
    mask[1, T // 2 :] = 0
    old = -torch.rand(rows, T)
    return {"old_log_prob": old, "log_prob": old + 0.1 * torch.randn(rows, T), "response_mask": mask,
            "advantages": torch.randn(rows, 1).expand(rows, T) * mask}  # fmt: skip


def test_verl_calls_the_registered_loss_and_its_ranks_average_to_ours():
    pytest.importorskip("verl")
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.workers.config import ActorConfig

    importlib.import_module("verl_fipo")  # registers the loss
    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio_low=0.2,
                         clip_ratio_high=0.28, clip_ratio_c=10.0)  # fmt: skip
    batch = verl_batch(4, 64)
    registered = get_policy_loss_fn("fipo")
    whole, metrics = registered(**batch, config=config)
    ours, expected = fipo.fipo_loss(
        batch["log_prob"], batch["old_log_prob"], batch["advantages"], batch["response_mask"]
    )
    assert whole.item() == pytest.approx(ours.item(), abs=1e-6)
    assert metrics["actor/fipo_influence_mean"] == pytest.approx(expected["influence_mean"]) != 1
    config.global_batch_info.update(dp_size=2, batch_num_tokens=int(batch["response_mask"].sum()))
    ranks = [
        registered(**{k: v[rows] for k, v in batch.items()}, config=config)[0] for rows in (slice(0, 1), slice(1, 4))
    ]
    assert sum(ranks).item() / 2 == pytest.approx(ours.item(), abs=1e-6)  # gradients are averaged over the ranks


def test_import_verl_registers_it_in_any_process():
    pytest.importorskip("verl")
    path = os.pathsep.join([str(SCRIPTS), os.environ.get("PYTHONPATH", "")])
    code = "import verl; from verl.trainer.ppo.core_algos import get_policy_loss_fn as f; print(f('fipo').__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": path, "VERL_USE_EXTERNAL_MODULES": "verl_fipo"})  # fmt: skip
    assert done.stdout.split()[-1:] == ["fipo_policy_loss"], done.stderr


def test_verl_s_own_actor_loss_reaches_it():
    pytest.importorskip("verl")
    from tensordict import TensorDict
    from verl.utils.tensordict_utils import assign_non_tensor
    from verl.workers.config import ActorConfig, PolicyLossConfig
    from verl.workers.utils import losses

    importlib.import_module("verl_fipo")  # registers the loss
    batch = verl_batch(4, 64)
    fipo_loss = PolicyLossConfig(loss_mode="fipo")
    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio_low=0.2,
                         clip_ratio_high=0.28, clip_ratio_c=10.0, policy_loss=fipo_loss)  # fmt: skip
    data = TensorDict({"response_mask": batch["response_mask"], "old_log_probs": batch["old_log_prob"],
                       "advantages": batch["advantages"]}, batch_size=4)  # fmt: skip
    assign_non_tensor(data, dp_size=1, batch_num_tokens=int(batch["response_mask"].sum()), global_batch_size=4)
    unpadded = losses.no_padding_2_padding
    losses.no_padding_2_padding = lambda values, _: values  # the batch is padded already
    try:
        loss, metrics = losses.ppo_loss(config, {"log_probs": batch["log_prob"]}, data)
    finally:
        losses.no_padding_2_padding = unpadded
    ours, _ = fipo.fipo_loss(batch["log_prob"], batch["old_log_prob"], batch["advantages"], batch["response_mask"])
    assert loss.item() == pytest.approx(ours.item(), abs=1e-6)
    assert "actor/fipo_future_kl_mean" in metrics
