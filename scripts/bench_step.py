"""The whole step, side by side with TRL's GRPOTrainer: 32 prompts × 16 responses, 4 updates, at most 64 new tokens.

pip install trl==1.16.0 && python scripts/bench_step.py   # writes assets/results/step.csv; 5 minutes, two idle cores
python scripts/bench_step.py vllm                         # this project with vLLM and Hugging Face: step_vllm.csv

Both train the same Qwen2 (4 layers of width 128, float32) on the same prompts. Two workloads: `equal`, in which the EOS
is outside the vocabulary, so that every response has 64 tokens and there is nothing to save; and `real`, the embedded
task at its base model, where most responses are short. Each run is a process of its own, the two projects take turns,
and what counts are the ratios of one such series. Each has its fastest settings here: TRL passes of 128 responses, no
gradient checkpointing; this project passes of 2048 tokens. (Beside other work, OMP_WAIT_POLICY=passive is slower
and steadier.)
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from contextlib import redirect_stdout
from pathlib import Path
from statistics import median
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import that reads it
sys.path.insert(0, str(Path(__file__).parents[1]))
import datasets
import torch
from transformers import Qwen2ForCausalLM, Qwen2Tokenizer

import fipo
import train_small

RESULTS = Path(__file__).parents[1] / "assets" / "results"
PROMPTS, GROUP, UPDATES, TOKENS, LR = 32, 16, 4, 64, 1e-6  # this rate leaves the workload as it is
STEPS, REPEATS = 3, 3  # batches measured per process, after one that warms up; processes of each kind


def of_four_layers(folder: Path, path: Path) -> None:
    """The embedded base model with two more layers that add nothing: the same policy at the price of four layers."""
    model = Qwen2ForCausalLM.from_pretrained(folder)
    config = model.config
    config.num_hidden_layers, config.layer_types = 4, ["full_attention"] * 4
    deeper = Qwen2ForCausalLM(config)
    deeper.load_state_dict(model.state_dict(), strict=False)
    for layer in deeper.model.layers[2:]:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    deeper.save_pretrained(path)
    train_small.character_tokenizer().save_pretrained(path)


def without_end(path: Path) -> None:
    """The same model, whose vocabulary ends before the EOS: it cannot be sampled."""
    every = train_small.character_tokenizer().get_vocab()
    characters = [c for c in sorted(every, key=every.get) if c != train_small.END]
    vocabulary = {c: i for i, c in enumerate([*characters, train_small.END])}
    end = dict(eos_token=train_small.END, unk_token=train_small.END)
    Qwen2Tokenizer(vocab=vocabulary, merges=[], pad_token="?", **end).save_pretrained(path)
    model = Qwen2ForCausalLM.from_pretrained(path)
    model.resize_token_embeddings(len(characters))
    model.config.eos_token_id = model.generation_config.eos_token_id = len(characters)
    model.config.pad_token_id = model.generation_config.pad_token_id = vocabulary["?"]
    model.save_pretrained(path)


def by_chance(response: str, answer: str) -> bool:
    """Random characters are never right; half of them shall be, so that there is something to learn."""
    return zlib.crc32(response.encode()) % 2 == 0


def run_fipo(folder: Path, workload: str, sampler: str) -> dict[str, float]:
    if workload == "equal":
        fipo.VERIFY["dapo"] = by_chance
    cfg = fipo.Config(
        model=str(folder / workload), data=str(folder / "problems" / "data.jsonl"), out=str(folder / "out"),
        sampler=sampler, steps=STEPS + 2, prompts_per_batch=PROMPTS, group_size=GROUP, lr=LR, warmup_steps=0,
        prompts_per_mini_batch=PROMPTS // UPDATES, max_prompt=16, max_response=TOKENS, overlong_buffer=0,
        rollout_rows=PROMPTS * GROUP, tokens_per_micro_batch=2048, dynamic_sampling=False, dtype="float32",
        save_every=1000,
    )  # fmt: skip
    starts, collect_rollouts = [], fipo.collect_rollouts

    def timed(*given: Any, **how: Any) -> Any:  # every step begins with it
        starts.append(time.perf_counter())
        return collect_rollouts(*given, **how)

    fipo.collect_rollouts = timed
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fipo.train(cfg)
    lines = train_small.read_jsonl(folder / "out" / "metrics.jsonl")[2 : 2 + STEPS]  # line 0 is before the first step
    spans = {name: sum(line[f"time/{name}"] for line in lines) / STEPS for name in ("rollout", "score", "update")}
    seconds = (starts[1 + STEPS] - starts[1]) / STEPS
    length = sum(line["response_length/mean"] for line in lines) / STEPS
    return spans | {"seconds": seconds, "length": length, "peak_gib": peak_above(before)}


def run_trl(folder: Path, workload: str) -> dict[str, float]:
    from trl import GRPOConfig, GRPOTrainer

    rows = train_small.read_jsonl(folder / "problems" / "data.jsonl")
    spent = {"generation": 0.0, "scoring": 0.0}
    starts: list[float] = []
    lengths: list[int] = []
    verify = by_chance if workload == "equal" else fipo.verify

    def reward(completions: list[str], answer: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        lengths.extend(map(len, completion_ids))
        return [1.0 if verify(c, a) else -1.0 for c, a in zip(completions, answer)]

    class Timed(GRPOTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            starts.append(time.perf_counter())
            result = super()._generate_and_score_completions(inputs)
            spent["generation"] += time.perf_counter() - starts[-1]
            return result

        def _get_per_token_logps_and_entropies(self, *given: Any, **how: Any) -> Any:
            start = time.perf_counter()
            result = super()._get_per_token_logps_and_entropies(*given, **how)
            if not torch.is_grad_enabled():
                spent["scoring"] += time.perf_counter() - start
            return result

        def training_step(self, *given: Any) -> Any:
            if len(starts) == 1 and self.state.global_step == UPDATES:  # warm from here
                spent.update(generation=0.0, scoring=0.0)
                lengths.clear()
            return super().training_step(*given)

    how = GRPOConfig(
        output_dir=str(folder / "out"), loss_type="dapo", num_iterations=1, steps_per_generation=UPDATES,
        per_device_train_batch_size=PROMPTS * GROUP // UPDATES, num_generations=GROUP, max_completion_length=TOKENS,
        max_steps=UPDATES * (STEPS + 1) + 1, gradient_checkpointing=False, bf16=False, use_cpu=True, report_to="none",
        lr_scheduler_type="constant", save_strategy="no", logging_steps=10_000, disable_tqdm=True,
        epsilon=0.2, epsilon_high=0.28, learning_rate=LR,
    )  # fmt: skip
    model = Qwen2ForCausalLM.from_pretrained(folder / workload)
    tokenizer = Qwen2Tokenizer.from_pretrained(folder / workload, padding_side="left")
    trainer = Timed(model=model, args=how, reward_funcs=reward, processing_class=tokenizer,
                    train_dataset=datasets.Dataset.from_list(rows))  # fmt: skip
    before, measured = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, {}
    generate = trainer._generate_and_score_completions

    def last(inputs: Any) -> Any:  # the batch behind the last measured one only ends the clock
        if len(starts) == STEPS + 1:
            measured.update({name: value / STEPS for name, value in spent.items()}, length=sum(lengths) / len(lengths))
        return generate(inputs)

    trainer._generate_and_score_completions = last
    trainer.train()
    seconds, rollout = (starts[1 + STEPS] - starts[1]) / STEPS, measured["generation"] - measured["scoring"]
    update = seconds - rollout - measured["scoring"]
    return {"rollout": rollout, "score": measured["scoring"], "update": update, "seconds": seconds,
            "length": measured["length"], "peak_gib": peak_above(before)}  # fmt: skip


def peak_above(before: int) -> float:
    """GiB by which the process grew since it held `before` KiB."""
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20


def run_child(folder: Path, workload: str, kind: str) -> dict[str, Any]:
    """One run in a process of its own, so that its memory is its own too."""
    words = [sys.executable, __file__, "--child", str(folder), workload, kind]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    shutil.rmtree(folder / "out")
    row = {"workload": workload, "who": kind} | json.loads(done.stdout)
    row["samples_per_second"] = PROMPTS * GROUP / row["seconds"]
    print("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
    return row


def child(folder: Path, workload: str, kind: str) -> None:
    with redirect_stdout(sys.stderr):
        measured = run_trl(folder, workload) if kind == "trl hf" else run_fipo(folder, workload, kind.split()[1])
    print(json.dumps(measured))


def compare(kinds: tuple[str, str], workloads: tuple[str, ...], csv: Path) -> None:
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        embedded = train_small.embedded_settings(folder, pretrain_steps=1000)
        train_small.make_embedded(embedded, pretrain_steps=1000)
        of_four_layers(Path(embedded["model"]), folder / "real")
        of_four_layers(Path(embedded["model"]), folder / "equal")
        without_end(folder / "equal")
        for workload in workloads:
            both = [[], []]
            for _ in range(REPEATS):  # in turns
                for kind, speeds in zip(kinds, both):
                    rows.append(run_child(folder, workload, kind))
                    speeds.append(rows[-1]["samples_per_second"])
            a, b = map(median, both)
            print(f"{workload}: {kinds[0]} : {kinds[1]} = {a:.0f} : {b:.0f} samples/s = {a / b:.2f}", flush=True)
    datasets.Dataset.from_list(rows).to_csv(csv)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("trl", "vllm"), default="trl", help="beside what (default: trl)")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(Path(given.child[0]), *given.child[1:])
    elif given.what == "trl":
        compare(("fipo hf", "trl hf"), ("equal", "real"), RESULTS / "step.csv")
    else:  # vLLM refuses an EOS that is not in its vocabulary: no `equal`
        compare(("fipo hf", "fipo vllm"), ("real",), RESULTS / "step_vllm.csv")


if __name__ == "__main__":
    main()
