"""FIPO in verl 0.9: registers this project's fipo_loss as the policy loss `fipo`. A file to copy.

    export PYTHONPATH=$PWD/scripts VERL_USE_EXTERNAL_MODULES=verl_fipo
    python -m verl.trainer.main_ppo … actor_rollout_ref.actor.policy_loss.loss_mode=fipo \\
        actor_rollout_ref.actor.clip_ratio_high=0.28 actor_rollout_ref.actor.clip_ratio_c=10

`import verl` then imports this module. FIPO's weight f differs from 1 only if rollouts are used for
several updates. Set `train_batch_size` above `ppo_mini_batch_size`, or `ppo_epochs` above 1.

FIPO's own settings are the fields of FIPOLossConfig below, with the paper's values for 32B. verl's
own class for policy_loss rejects fields that it does not know, so `_target_` must name this class.
For example, add these arguments for the range [0.8, 1.2] and the safety threshold 3:

        actor_rollout_ref.actor.policy_loss._target_=verl_fipo.FIPOLossConfig \\
        '+actor_rollout_ref.actor.policy_loss.weight_range=[0.8,1.2]' \\
        +actor_rollout_ref.actor.policy_loss.safety=3

These settings reach the workers with the rest of verl's configuration. The two environment
variables must be set in every worker. If main_ppo starts Ray, its workers inherit them. If it joins
a running cluster, export them on every node before `ray start`, or add these arguments, which verl
passes to ray.init (the path must exist on every node):

        +ray_kwargs.ray_init.runtime_env.env_vars.PYTHONPATH=$PYTHONPATH \\
        +ray_kwargs.ray_init.runtime_env.env_vars.VERL_USE_EXTERNAL_MODULES=verl_fipo

- The clip ratios are verl's own settings, as in the command above.
- FIPO's statistics are logged as actor/fipo_….
- Rollouts, rewards, advantages, dynamic sampling and the optimiser are verl's.
- A response that fipo_loss drops does not contribute to the sum over tokens, but verl's token
  count, by which the sum is divided, still includes it.

tests/test_elsewhere.py checks that `import verl` registers the function, that the settings reach it
through verl's configuration, that verl's own actor loss calls it, and that the mean over two ranks
equals this project's loss. `.ci/run` runs it with verl 0.9.1. No training run with verl has been
made.

If you copy this file, also copy future_kl, influence_weight and fipo_loss from fipo.py, with the
helpers they call. They need only torch.

    python scripts/verl_fipo.py --help     # prints this text; there is nothing else to run
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before the import of verl, so that --help works without it
    print(__doc__)
    sys.exit()

import torch
from verl.trainer.ppo.core_algos import register_policy_loss
from verl.workers.config import PolicyLossConfig

sys.path.insert(0, str(Path(__file__).parents[1]))  # the folder of fipo.py
from fipo import fipo_loss


@dataclass
class FIPOLossConfig(PolicyLossConfig):
    """verl's settings of a policy loss, and FIPO's own (see influence_weight in fipo.py)."""

    tau: float = 32.0
    weight_range: Sequence[float] = (1.0, 1.2)
    safety: float = 10.0

    def __post_init__(self) -> None:
        for name in ("tau", "safety"):
            value = getattr(self, name)
            if not (isinstance(value, Real) and value > 0):
                raise ValueError(f"policy_loss.{name} is {value!r}: give a number above 0.")
        bounds = self.weight_range
        is_pair = isinstance(bounds, Sequence) and len(bounds) == 2
        are_numbers = is_pair and all(isinstance(bound, Real) for bound in bounds)
        if not (are_numbers and 0 <= bounds[0] <= bounds[1]):
            raise ValueError(
                f"policy_loss.weight_range is {bounds!r}: give [low,high] with 0 ≤ low ≤ high."
            )


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
    settings = config.policy_loss
    if not isinstance(settings, FIPOLossConfig):
        settings = FIPOLossConfig()  # the defaults
    # The count is of the mini-batch over all ranks. verl averages gradients over dp_size ranks.
    info = config.global_batch_info
    tokens = info.get("batch_num_tokens") or response_mask.sum()
    loss, metrics = fipo_loss(
        log_prob,
        old_log_prob,
        advantages,
        response_mask,
        tau=settings.tau,
        weight_range=tuple(settings.weight_range),
        safety=settings.safety,
        clip_low=config.clip_ratio_low,
        clip_high=config.clip_ratio_high,
        dual_clip=config.clip_ratio_c,
        num_tokens=tokens / info.get("dp_size", 1),
    )
    return loss, {f"actor/fipo_{name}": value for name, value in metrics.items()}
