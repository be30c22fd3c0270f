"""Three updates on rollouts that are given, under whatever launcher started this: settings.json in, result.pt out."""

import gc
import json
import math
import sys
import warnings
from array import array
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import fipo  # noqa: E402


def held(bucket: int) -> int:
    """Bytes of all floating-point tensors alive in this process, DeepSpeed's send buffers aside."""
    alive = [
        x
        for x in gc.get_objects()
        if isinstance(x, torch.Tensor) and x.is_floating_point() and x.device.type == "cpu"
    ]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in alive}
    return sum(size for size in storages.values() if size < bucket)


torch.set_num_threads(1)
fipo.token_logprobs.__defaults__ = (
    1.0,
    16,
    True,
)  # many chunks of logits a pass, as long responses have
warnings.filterwarnings("ignore", category=FutureWarning)
argv = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
settings, result = json.loads(Path(argv[0]).read_text()), Path(argv[1])
cfg = fipo.resolve(fipo.Config(**settings["config"]))
with fipo.report_errors(), fipo.joined_ranks(cfg.deepspeed):
    policy = (fipo.DeepSpeedPolicy if cfg.deepspeed else fipo.Policy)(cfg.model, cfg)
    groups = [
        [
            fipo.Rollout(
                fipo.Problem("", "", r["prompt_ids"]), array("i", r["response_ids"]), array("f", r["sampler_logp"]),
                advantage=r["advantage"],
            )
            for r in group
        ]
        for group in settings["groups"]
    ]  # fmt: skip
    largest = max(
        p.numel() for p in policy.model.parameters()
    )  # a shard is not counted: 0 if nothing is whole
    mini_batches = fipo.split_mini_batches(groups, cfg, step=1)
    scored = fipo.score_old_logp(policy, mini_batches)
    for rollout in (r for mini in mini_batches for r in mini if r.old_logp is not None):
        if (
            list(rollout.response_ids) == settings["runaway"]
        ):  # as if the policy had moved far: it is dropped
            rollout.old_logp = rollout.old_logp - 3.0
    updates = []
    for i, mini in enumerate(mini_batches):
        if settings.get("broken") == i:  # a gradient that is not finite
            for rollout in mini:
                rollout.advantage = math.nan
        before = [weight.clone() for _, weight in policy.weights()]
        updates.append(fipo.add_gradients(policy, mini, cfg) | {"grad_norm": policy.step(1e-4)})
        moved = [not torch.equal(old, new) for old, (_, new) in zip(before, policy.weights())]
        updates[-1]["moved"] = float(any(moved))
    del before
    memory = held(bucket=10**8)
    weights = {name: weight.clone() for name, weight in policy.weights()}
    mine = [
        sum(len(part) for part in fipo.micro_batches(mini, cfg.tokens_per_micro_batch))
        for mini in mini_batches
    ]
    shares = fipo.all_gather(mine)
    if fipo.rank() == 0:
        torch.save(
            {
                "scored": scored,
                "updates": updates,
                "weights": weights,
                "shares": shares,
                "held": memory,
                "largest": largest,
            },
            result,
        )
