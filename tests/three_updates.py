"""Three updates on given rollouts, with each of several settings.

A launcher starts this script on one or more ranks: it reads jobs.json and writes result.pt.
"""

import functools
import gc
import json
import math
import sys
import warnings
from array import array
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.distributed import distributed_c10d

sys.path.insert(0, str(Path(__file__).parent.parent))

import fipo  # noqa: E402

SEND_BUFFER = 10**8  # bytes; DeepSpeed's buffers are at least as large


def tensor_bytes() -> int:
    """Bytes of all floating-point tensors of this process, except DeepSpeed's send buffers."""
    sizes = {}
    # Not isinstance, which looks at attributes of other objects that are deprecated.
    tensors = [value for value in gc.get_objects() if issubclass(type(value), torch.Tensor)]
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.device.type == "cpu":
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(size for size in sizes.values() if size < SEND_BUFFER)


def to_rollouts(groups: list[list[dict]]) -> fipo.Groups:
    result = []
    for group in groups:
        rollouts = []
        for row in group:
            rollout = fipo.Rollout(
                fipo.Problem("", "", row["prompt_ids"]),
                array("i", row["response_ids"]),
                array("f", row["sampler_logp"]),
                advantage=row["advantage"],
            )
            rollouts.append(rollout)
        result.append(rollouts)
    return result


def run_job(job: dict, groups: list[list[dict]], runaway: list[int]) -> dict[str, Any]:
    """Three updates with one setting. The response `runaway` is dropped in one of them.

    In update number job["broken"], if there is one, the gradient is not finite.
    """
    cfg = fipo.resolve(fipo.Config(**job["config"]))
    policy_class = fipo.DeepSpeedPolicy if cfg.deepspeed else fipo.Policy
    policy = policy_class(cfg.model, cfg)
    # ZeRO-3 leaves empty tensors in place of the weights.
    largest = max(weight.numel() for weight in policy.model.parameters())
    mini_batches = fipo.split_mini_batches(to_rollouts(groups), cfg, step=1)
    scored = fipo.score_old_logp(policy, mini_batches)
    for rollout in fipo.flatten(mini_batches):
        if rollout.old_logp is not None and list(rollout.response_ids) == runaway:
            rollout.old_logp = rollout.old_logp - 3.0  # as if the policy had moved far
    updates = []
    shares = []
    for i, mini_batch in enumerate(mini_batches):
        if job.get("broken") == i:
            for rollout in mini_batch:
                rollout.advantage = math.nan
        before = [weight.clone() for _, weight in policy.weights()]
        update = fipo.add_gradients(policy, mini_batch, cfg)
        update["grad_norm"] = policy.step(1e-4)
        after = [weight for _, weight in policy.weights()]
        is_equal = [torch.equal(old, new) for old, new in zip(before, after)]
        update["moved"] = float(not all(is_equal))
        updates.append(update)
        own_parts = fipo.micro_batches(mini_batch, cfg.tokens_per_micro_batch)
        shares.append(len(fipo.flatten(own_parts)))
    del before, after
    held = tensor_bytes()
    return {
        "scored": scored,
        "updates": updates,
        "weights": {name: weight.clone() for name, weight in policy.weights()},
        "shares": fipo.all_gather(shares),
        "held": held,
        "largest": largest,
        "sharded": policy.sharded,
    }


def process_group() -> dict[str, Any]:
    """What is known of the groups that joined_ranks has made."""
    import deepspeed

    total = torch.ones(1)
    deepspeed.comm.all_reduce(total)
    hours = []
    for group in (distributed_c10d._get_default_group(), fipo.GLOO["hosts"]):
        timeout = group._get_backend(fipo.CPU).options._timeout
        hours.append(timeout.total_seconds() / 3600)
    return {
        "backend": torch.distributed.get_backend(),
        "deepspeed has adopted it": deepspeed.comm.comm.cdb is not None,
        "deepspeed's ranks": deepspeed.comm.get_world_size(),
        "sum of ones": total.item(),
        "timeouts in hours": hours,
        "device": torch.distributed.group.WORLD.bound_device_id,
    }


def run_jobs(settings: dict) -> list[dict[str, Any]]:
    # Each pass gets many chunks of logits, as long responses do.
    in_chunks = functools.partial(fipo.token_logprobs, chunk=16)
    results = []
    with mock.patch.object(fipo, "token_logprobs", in_chunks):
        for job in settings["jobs"]:
            results.append(run_job(job, settings["groups"], settings["runaway"]))
    return results


def main(settings_path: str, result_path: str) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    settings = json.loads(Path(settings_path).read_text())
    with fipo.report_errors(), fipo.joined_ranks("ds_config.json"):
        group = process_group()
        results = run_jobs(settings)
        if fipo.rank() == 0:
            torch.save({"process group": group, "jobs": results}, result_path)


if __name__ == "__main__":
    main(*sys.argv[1:])
