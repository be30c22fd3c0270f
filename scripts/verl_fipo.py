"""FIPO in verl 0.9: registers this project's fipo_loss as the policy loss `fipo`. A file to copy.

    export PYTHONPATH=$PWD/scripts VERL_USE_EXTERNAL_MODULES=verl_fipo
    python -m verl.trainer.main_ppo … actor_rollout_ref.actor.policy_loss.loss_mode=fipo \\
        actor_rollout_ref.actor.clip_ratio_high=0.28 actor_rollout_ref.actor.clip_ratio_c=10

The two variables must be set in every worker. `import verl` then imports this module.

FIPO's weight f differs from 1 only if rollouts are used for several updates. Set `train_batch_size`
above `ppo_mini_batch_size`, or `ppo_epochs` above 1.

- The clip ratios are those of verl's configuration. It rejects fields that it does not know, so
  FIPO's own values (τ, the range of f and the safety threshold) are set in the code below.
- FIPO's statistics are logged as actor/fipo_….
- Rollouts, rewards, advantages, dynamic sampling and the optimiser are verl's.
- A response that fipo_loss drops does not contribute to the sum over tokens, but verl's token
  count, by which the sum is divided, still includes it.

tests/test_elsewhere.py checks that `import verl` registers the function, calls it through verl's
own actor loss, and checks that the mean over two ranks equals this project's loss. `.ci/run` runs
it with verl 0.9.1. No training run with verl has been made.

If you copy this file, also copy future_kl, influence_weight and fipo_loss from fipo.py, with the
helpers they call. They need only torch.

    python scripts/verl_fipo.py --help     # prints this text; there is nothing else to run
"""

import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before the import of verl, so that --help works without it
    print(__doc__)
    sys.exit()

import torch
from verl.trainer.ppo.core_algos import register_policy_loss

sys.path.insert(0, str(Path(__file__).parents[1]))  # the folder of fipo.py
from fipo import fipo_loss


@register_policy_loss("fipo")
def fipo_policy_loss(
    old_log_prob: torch.Tensor,  # [B, T], like the next three
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, Any]]:
    if loss_agg_mode != "token-mean" or rollout_is_weights is not None:
        raise ValueError("FIPO is a mean over tokens, without rollout correction.")
    # The count is of the mini-batch over all ranks. verl averages gradients over dp_size ranks.
    info = config.global_batch_info
    tokens = info.get("batch_num_tokens") or response_mask.sum()
    loss, metrics = fipo_loss(
        log_prob,
        old_log_prob,
        advantages,
        response_mask,
        tau=32.0,
        weight_range=(1.0, 1.2),
        safety=10.0,
        clip_low=config.clip_ratio_low,
        clip_high=config.clip_ratio_high,
        dual_clip=config.clip_ratio_c,
        num_tokens=tokens / info.get("dp_size", 1),
    )
    return loss, {f"actor/fipo_{name}": value for name, value in metrics.items()}
