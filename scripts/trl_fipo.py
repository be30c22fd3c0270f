"""FIPO in TRL 1.16: a GRPOTrainer whose loss is this project's fipo_loss. A file to copy.

    from trl_fipo import FIPOTrainer
    FIPOTrainer(model=…, args=GRPOConfig(…), reward_funcs=…, train_dataset=…).train()

f differs from 1 only where rollouts feed several updates: set `num_iterations` above 1, or `steps_per_generation` above
`gradient_accumulation_steps`. FIPO's own values are fipo_loss's defaults, the paper's at 32B; its statistics are logged
as fipo/….

TRL's stay: rollouts, rewards (yours), advantages (divided by std + 1e-4), the optimiser. TRL has no dynamic sampling.
The loss takes its clip ratios from fipo_loss and ignores GRPOConfig's `loss_type`, `beta` and `epsilon`; images and
tools are not passed on. A response that fipo_loss drops leaves the sum, but not TRL's count of tokens.
tests/test_elsewhere.py trains with this class and finds the loss equal to this project's on every batch; `.ci/run` runs
that with TRL 1.16.0.

Whoever copies this file copies future_kl, influence_weight and fipo_loss of fipo.py too; they need only torch.

    python scripts/trl_fipo.py --help     # prints this; there is nothing else to run
"""

import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before TRL is imported: to read this, it need not be installed
    print(__doc__)
    sys.exit()

import torch
from trl import GRPOTrainer

sys.path.insert(0, str(Path(__file__).parents[1]))  # the folder of fipo.py
from fipo import fipo_loss


class FIPOTrainer(GRPOTrainer):
    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)  # [B, P + T], prompts padded on the left
        seen = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        T = inputs["completion_ids"].shape[1]
        logp, *_ = self._get_per_token_logps_and_entropies(model, ids, seen, T)  # [B, T]
        old_logp = inputs.get("old_per_token_logps")  # none: the policy has not moved since the rollouts
        tokens = inputs["num_items_in_batch"] / self.accelerator.num_processes  # of all updates of these rollouts
        tokens = tokens * self.current_gradient_accumulation_steps / self.args.steps_per_generation
        loss, metrics = fipo_loss(logp, logp.detach() if old_logp is None else old_logp, inputs["advantages"],
                                  inputs["completion_mask"], num_tokens=tokens)  # fmt: skip
        for name, value in metrics.items():
            self._metrics["train" if model.training else "eval"][f"fipo/{name}"].append(value)
        return loss
