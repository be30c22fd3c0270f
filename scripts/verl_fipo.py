"""FIPO in verl 0.9: this project's fipo_loss as a policy loss that verl knows as `fipo`. A file to copy.

    export PYTHONPATH=$PWD/scripts VERL_USE_EXTERNAL_MODULES=verl_fipo  # in every worker: `import verl` imports it too
    python -m verl.trainer.main_ppo … actor_rollout_ref.actor.policy_loss.loss_mode=fipo \\
        actor_rollout_ref.actor.clip_ratio_high=0.28 actor_rollout_ref.actor.clip_ratio_c=10

f differs from 1 only where rollouts feed several updates: set `train_batch_size` above `ppo_mini_batch_size`, or
`ppo_epochs` above 1. verl's configuration rejects fields it does not know. So FIPO's own values (τ, range of f, safety)
stand in the code below; the clip ratios are verl's. FIPO's statistics are logged as actor/fipo_….

verl's stay: rollouts, rewards, advantages, dynamic sampling, the optimiser. A response that fipo_loss drops leaves the
sum, but not verl's count of tokens. tests/test_elsewhere.py calls the function through verl's own actor loss and finds
the mean over two ranks equal to this project's loss, and that `import verl` registers it; `.ci/run` runs that with
verl 0.9.1. A training by verl was not run.

Whoever copies this file copies future_kl, influence_weight and fipo_loss of fipo.py too; they need only torch.

    python scripts/verl_fipo.py --help     # prints this; there is nothing else to run
"""

import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before verl is imported: to read this, it need not be installed
    print(__doc__)
    sys.exit()

import torch
from verl.trainer.ppo.core_algos import register_policy_loss

sys.path.insert(0, str(Path(__file__).parents[1]))  # the folder of fipo.py
from fipo import fipo_loss


@register_policy_loss("fipo")
def fipo_policy_loss(
    old_log_prob: torch.Tensor,  # [B, T], as advantages and response_mask
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, Any]]:
    if loss_agg_mode != "token-mean" or rollout_is_weights is not None:
        raise ValueError("FIPO is a mean over tokens, without rollout correction.")
    info = config.global_batch_info  # of the mini-batch over all ranks; verl averages gradients over dp_size ranks
    tokens = info.get("batch_num_tokens") or response_mask.sum()
    loss, metrics = fipo_loss(log_prob, old_log_prob, advantages, response_mask, tau=32.0, weight_range=(1.0, 1.2),
                              safety=10.0, clip_low=config.clip_ratio_low, clip_high=config.clip_ratio_high,
                              dual_clip=config.clip_ratio_c, num_tokens=tokens / info.get("dp_size", 1))  # fmt: skip
    return loss, {f"actor/fipo_{name}": value for name, value in metrics.items()}
