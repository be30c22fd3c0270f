"""Compares one whole step with TRL's GRPOTrainer: 32 prompts × 16 responses, 4 updates.

pip install trl==1.16.0 && python scripts/bench_step.py   # five minutes on two idle cores
python scripts/bench_step.py vllm                         # vLLM instead of TRL

The first command writes assets/results/step.csv. The second compares this project's two samplers,
Hugging Face and vLLM, and writes step_vllm.csv.

Both projects train the same Qwen2 (4 layers of width 128, float32) on the same prompts, with at
most 64 new tokens. There are two workloads. In `equal`, the EOS is outside the vocabulary, so every
response has 64 tokens and nothing can be saved. `real` is the embedded task at its base model,
where most responses are short. Each run has its own process, and the projects take turns. Compare
only the ratios within such a series. Each project has its fastest settings here: TRL passes of 128
responses without gradient checkpointing, this project passes of 2048 tokens. Next to other work,
OMP_WAIT_POLICY=passive gives slower but steadier times.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from contextlib import redirect_stdout
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from statistics import fmean, median
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import that reads it
sys.path.insert(0, str(Path(__file__).parents[1]))
import datasets
import pandas
import torch
from transformers import Qwen2ForCausalLM, Qwen2Tokenizer

import fipo
import train_small
from bench_future_kl import print_row

RESULTS = Path(__file__).parents[1] / "assets" / "results"
PROMPTS = 32
GROUP = 16
UPDATES = 4
TOKENS = 64
LR = 1e-6  # small enough to leave the workload as it is
STEPS = 3  # measured batches per process, after one that warms up
REPEATS = 3  # processes of each kind

# ------------------------------------------------------------------------------------ the workloads


def save_four_layers(base: Path, path: Path) -> None:
    """Add two layers that change nothing: the same policy at the cost of four layers."""
    model = Qwen2ForCausalLM.from_pretrained(base)
    config = model.config
    config.num_hidden_layers = 4
    config.layer_types = ["full_attention"] * 4
    deeper = Qwen2ForCausalLM(config)
    deeper.load_state_dict(model.state_dict(), strict=False)
    for layer in deeper.model.layers[2:]:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    deeper.save_pretrained(path)
    train_small.character_tokenizer().save_pretrained(path)


def remove_eos(path: Path) -> None:
    """Take the EOS out of the model's vocabulary, so that it cannot be sampled."""
    # 1) a tokenizer whose last token is the EOS
    vocabulary = train_small.character_tokenizer().get_vocab()
    characters = sorted(vocabulary, key=vocabulary.get)
    characters.remove(train_small.END)
    token_ids = {}
    for token in [*characters, train_small.END]:
        token_ids[token] = len(token_ids)
    tokenizer = Qwen2Tokenizer(
        vocab=token_ids,
        merges=[],
        pad_token="?",
        eos_token=train_small.END,
        unk_token=train_small.END,
    )
    tokenizer.save_pretrained(path)

    # 2) a model with logits for all tokens but the last
    model = Qwen2ForCausalLM.from_pretrained(path)
    model.resize_token_embeddings(len(characters))
    for config in (model.config, model.generation_config):
        config.eos_token_id = len(characters)
        config.pad_token_id = token_ids["?"]
    model.save_pretrained(path)


def random_verdict(response: str, answer: str) -> bool:
    """Call half of the responses right. Random characters never are, so no step would learn."""
    return zlib.crc32(response.encode()) % 2 == 0


# ------------------------------------------------------------------------------------- the two runs


def resident_gib() -> float:
    """The largest memory of this process so far."""
    return getrusage(RUSAGE_SELF).ru_maxrss / 2**20


def run_fipo(folder: Path, workload: str, sampler: str) -> dict[str, float]:
    """Train with this project and measure STEPS batches after the first."""
    if workload == "equal":
        fipo.VERIFY["dapo"] = random_verdict
    cfg = fipo.Config(
        model=str(folder / workload),
        data=str(folder / "problems" / "data.jsonl"),
        out=str(folder / "out"),
        sampler=sampler,
        steps=STEPS + 2,
        prompts_per_batch=PROMPTS,
        group_size=GROUP,
        lr=LR,
        warmup_steps=0,
        prompts_per_mini_batch=PROMPTS // UPDATES,
        max_prompt=16,
        max_response=TOKENS,
        overlong_buffer=0,
        rollout_rows=PROMPTS * GROUP,
        tokens_per_micro_batch=2048,
        dynamic_sampling=False,
        dtype="float32",
        save_every=1000,
    )
    starts = []
    collect_rollouts = fipo.collect_rollouts

    def timed_collect_rollouts(*args: Any, **kwargs: Any) -> Any:
        """Every step begins with this call."""
        starts.append(time.perf_counter())
        return collect_rollouts(*args, **kwargs)

    fipo.collect_rollouts = timed_collect_rollouts
    before = resident_gib()
    fipo.train(cfg)
    lines = train_small.read_jsonl(folder / "out" / "metrics.jsonl")
    measured = lines[2 : 2 + STEPS]  # line 0 is from before the first step, line 1 warms up

    def mean(name: str) -> float:
        return fmean(line[name] for line in measured)

    return {
        "rollout": mean("time/rollout"),
        "score": mean("time/score"),
        "update": mean("time/update"),
        "seconds": (starts[1 + STEPS] - starts[1]) / STEPS,
        "length": mean("response_length/mean"),
        "peak_gib": resident_gib() - before,
    }


def run_trl(folder: Path, workload: str) -> dict[str, float]:
    """Train with TRL and measure STEPS batches after the first."""
    from trl import GRPOConfig, GRPOTrainer

    verify = random_verdict if workload == "equal" else fipo.verify
    starts = []  # of batches
    times = {"batch": 0.0, "score": 0.0}  # seconds of making a batch, and of scoring in it
    lengths = []
    measured = {}

    def reward(
        completions: list[str], answer: list[str], completion_ids: list[list[int]], **_: Any
    ) -> list[float]:
        lengths.extend(map(len, completion_ids))
        rewards = []
        for completion, right in zip(completions, answer):
            rewards.append(1.0 if verify(completion, right) else -1.0)
        return rewards

    class TimedTrainer(GRPOTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            if (
                len(starts) == STEPS + 1
            ):  # the batch after the last measured one only stops the clock
                measured.update(times, length=fmean(lengths))
            start = time.perf_counter()
            starts.append(start)
            result = super()._generate_and_score_completions(inputs)
            times["batch"] += time.perf_counter() - start
            return result

        def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
            if not torch.is_grad_enabled():
                times["score"] += time.perf_counter() - start
            return result

        def training_step(self, *args: Any) -> Any:
            is_warm = self.state.global_step == UPDATES
            if is_warm and len(starts) == 1:
                times.update(batch=0.0, score=0.0)
                lengths.clear()
            return super().training_step(*args)

    settings = GRPOConfig(
        output_dir=str(folder / "out"),
        loss_type="dapo",
        num_iterations=1,
        steps_per_generation=UPDATES,
        per_device_train_batch_size=PROMPTS * GROUP // UPDATES,
        num_generations=GROUP,
        max_completion_length=TOKENS,
        max_steps=UPDATES * (STEPS + 1) + 1,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        lr_scheduler_type="constant",
        save_strategy="no",
        logging_steps=10_000,
        disable_tqdm=True,
        epsilon=0.2,
        epsilon_high=0.28,
        learning_rate=LR,
    )
    problems = train_small.read_jsonl(folder / "problems" / "data.jsonl")
    trainer = TimedTrainer(
        model=Qwen2ForCausalLM.from_pretrained(folder / workload),
        args=settings,
        reward_funcs=reward,
        processing_class=Qwen2Tokenizer.from_pretrained(folder / workload, padding_side="left"),
        train_dataset=datasets.Dataset.from_list(problems),
    )
    before = resident_gib()
    trainer.train()
    seconds = (starts[1 + STEPS] - starts[1]) / STEPS
    score = measured["score"] / STEPS
    rollout = measured["batch"] / STEPS - score
    return {
        "rollout": rollout,
        "score": score,
        "update": seconds - rollout - score,
        "seconds": seconds,
        "length": measured["length"],
        "peak_gib": resident_gib() - before,
    }


# ----------------------------------------------------------------------------------- the comparison


def run_child(folder: Path, workload: str, kind: str) -> None:
    """One run, in the process that `run_in_own_process` starts. Prints its results as JSON."""
    project, sampler = kind.split()
    with redirect_stdout(sys.stderr):
        if project == "trl":
            measured = run_trl(folder, workload)
        else:
            measured = run_fipo(folder, workload, sampler)
    print(json.dumps(measured))


def run_in_own_process(folder: Path, workload: str, kind: str) -> dict[str, Any]:
    """One run in its own process, so that its peak memory is its own too."""
    words = [sys.executable, __file__, "--child", str(folder), workload, kind]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    shutil.rmtree(folder / "out")
    row = {"workload": workload, "who": kind} | json.loads(done.stdout)
    row["samples_per_second"] = PROMPTS * GROUP / row["seconds"]
    print_row(row)
    return row


def make_workloads(folder: Path) -> None:
    """Make the problems and the models of both workloads."""
    settings = train_small.embedded_settings(folder, pretrain_steps=1000)
    train_small.make_embedded(settings, pretrain_steps=1000)
    for workload in ("real", "equal"):
        save_four_layers(Path(settings["model"]), folder / workload)
    remove_eos(folder / "equal")


def compare(kinds: tuple[str, str], workloads: tuple[str, ...], csv: Path) -> None:
    """Run both kinds in turns on each workload, print the ratio of their speeds, write the CSV."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_workloads(folder)
        for workload in workloads:
            speeds = {kind: [] for kind in kinds}
            for _ in range(REPEATS):
                for kind in kinds:
                    row = run_in_own_process(folder, workload, kind)
                    speeds[kind].append(row["samples_per_second"])
                    rows.append(row)
            first, second = (median(speeds[kind]) for kind in kinds)
            samples = f"{first:.0f} : {second:.0f} samples/s = {first / second:.2f}"
            print(f"{workload}: {kinds[0]} : {kinds[1]} = {samples}", flush=True)
    pandas.DataFrame(rows).to_csv(csv, index=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what",
        nargs="?",
        choices=("trl", "vllm"),
        default="trl",
        help="what to compare with (default: trl)",
    )
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        folder, workload, kind = given.child
        run_child(Path(folder), workload, kind)
    elif given.what == "trl":
        compare(("fipo hf", "trl hf"), ("equal", "real"), RESULTS / "step.csv")
    else:
        # vLLM refuses an EOS that is outside its vocabulary, so `equal` is left out.
        compare(("fipo hf", "fipo vllm"), ("real",), RESULTS / "step_vllm.csv")


if __name__ == "__main__":
    main()
