"""FIPO in TRL 1.16: a GRPOTrainer whose loss is this project's fipo_loss. A file to copy.

    from trl_fipo import FIPOTrainer
    FIPOTrainer(model=…, args=GRPOConfig(…), reward_funcs=…, train_dataset=…).train()

FIPO's weight f differs from 1 only if rollouts are used for several updates. Set `num_iterations`
above 1, or `steps_per_generation` above `gradient_accumulation_steps`.

- fipo_loss is called with its defaults, which are the paper's values at 32B. Its clip ratios are
  used, and GRPOConfig's `loss_type`, `beta` and `epsilon` are ignored.
- Its statistics are logged as fipo/….
- Rollouts, rewards (yours), advantages (divided by std + 1e-4) and the optimiser are TRL's. TRL has
  no dynamic sampling. Images and tools are not passed to the model.
- A response that fipo_loss drops does not contribute to the sum over tokens, but TRL's token count,
  by which the sum is divided, still includes it.

tests/test_elsewhere.py trains with this class and checks that the loss equals this project's on
every batch. `.ci/run` runs it with TRL 1.16.0.

If you copy this file, also copy future_kl, influence_weight and fipo_loss from fipo.py, with the
helpers they call. They need only torch.

    python scripts/trl_fipo.py --help     # prints this text; there is nothing else to run
"""

import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before the import of TRL, so that --help works without it
    print(__doc__)
    sys.exit()

import torch
from trl import GRPOTrainer

sys.path.insert(0, str(Path(__file__).parents[1]))  # the folder of fipo.py
from fipo import fipo_loss


class FIPOTrainer(GRPOTrainer):
    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        # Prompts are padded on the left, completions on the right.
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)  # [B, P + T]
        attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        T = inputs["completion_ids"].shape[1]
        logp, *_ = self._get_per_token_logps_and_entropies(model, ids, attention_mask, T)  # [B, T]

        # TRL leaves the old log-probs out while the policy is still the one that sampled.
        old_logp = inputs.get("old_per_token_logps")
        if old_logp is None:
            old_logp = logp.detach()

        # TRL counts the tokens of all ranks and of all updates on these rollouts. It averages
        # gradients over ranks.
        updates = self.args.steps_per_generation / self.current_gradient_accumulation_steps
        num_tokens = inputs["num_items_in_batch"] / self.accelerator.num_processes / updates

        mask = inputs["completion_mask"]
        loss, metrics = fipo_loss(logp, old_logp, inputs["advantages"], mask, num_tokens=num_tokens)
        log = self._metrics["train" if model.training else "eval"]
        for name, value in metrics.items():
            log[f"fipo/{name}"].append(value)
        return loss
