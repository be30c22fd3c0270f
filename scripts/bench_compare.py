"""Compares FIPO, DAPO and GRPO on the embedded task over seeds, with ablations and a longer task.

python scripts/bench_compare.py run [GROUP …]   # the runs that are not done yet, into runs/compare
python scripts/bench_compare.py report          # compare.csv and compare.json, then pictures
python scripts/bench_compare.py pictures        # compare.png and qwen.png, from assets/results

GROUP is tune (learning rates), main, range, tau, updates, without_m or long. The default is all of
them. Two runs go at a time, with one thread each. A run takes 2.5 minutes on one core, and all of
them take about three hours on two. `tune` chooses the learning rate of each algorithm on seeds of
its own. All other settings are the paper's, except what an ablation changes.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib.pyplot as plt
import pandas
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import fipo
import train_small

ROOT = Path(__file__).parents[1]
RUNS = Path(os.environ.get("COMPARE_RUNS", ROOT / "runs" / "compare"))
GROUPS = ("tune", "main", "range", "tau", "updates", "without_m", "long")
ALGORITHMS = {
    "dapo": "--algorithm dapo",
    "fipo": "--algorithm fipo",  # the paper's 32B values: f in [1, 1.2], safety 10
    "fipo7b": "--algorithm fipo --weight_range 0.8 1.2 --safety 3",
    "grpo": "--algorithm grpo",
}
LABELS = {
    "dapo": "DAPO",
    "fipo": "FIPO, f in [1, 1.2]",
    "fipo7b": "FIPO, f in [0.8, 1.2]",
    "grpo": "GRPO",
}
COLORS = {  # one color for each method in all pictures, from the palette of Okabe and Ito
    "dapo": "#0072b2",
    "fipo": "#d55e00",
    "fipo7b": "#d55e00",
    "grpo": "#777777",
}
RATES = ("5e-5", "1e-4", "2e-4", "4e-4")
BEST_LR = "2e-4"  # the choice of `tune` for each of the four algorithms
# The two-sided 95 % quantile of Student's t for 2, 3, …, 10 values.
STUDENT_T = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
MEASURES = ("area", "final", "length", "longest")
ASSETS = ROOT / "assets"
RESULTS = ASSETS / "results"

# ---------------------------------------------------------------------------------------- the runs


@dataclass
class PlannedRun:
    """A run of train_small.py. The runs of a family differ only in their seeds."""

    run: str  # its name and folder
    group: str
    family: str
    seed: int
    flags: str

    @property
    def folder(self) -> Path:
        return RUNS / self.run

    @property
    def is_done(self) -> bool:
        return (self.folder / "done").exists()


def planned_runs() -> list[PlannedRun]:
    """All runs of all groups."""
    runs = []

    def add(group: str, family: str, flags: str, seeds: range) -> None:
        for seed in seeds:
            runs.append(PlannedRun(f"{family}-{seed}", group, family, seed, flags))

    best = f"--lr {BEST_LR}"
    fipo_best = f"--algorithm fipo {best}"
    for lr in RATES:
        for name, flags in ALGORITHMS.items():
            add("tune", f"tune-{name}-{lr}", f"{flags} --lr {lr}", range(100, 102))
    for name, flags in ALGORITHMS.items():
        add("main", f"main-{name}", f"{flags} {best}", range(10))
    add("range", "range-0.8", f"--algorithm fipo --weight_range 0.8 1.2 {best}", range(5))
    for tau in (8, 128):
        add("tau", f"tau-{tau}", f"{fipo_best} --tau {tau}", range(5))
    # A batch has 32 prompts, so these are 1, 2 and 4 updates. `main` has 8. With one update, both
    # algorithms are equal to the last digit, so two seeds suffice.
    for prompts in (32, 16, 8):
        seeds = range(2 if prompts == 32 else 5)
        for name in ("dapo", "fipo"):
            flags = f"--algorithm {name} {best} --prompts_per_mini_batch {prompts}"
            add("updates", f"updates-{prompts}-{name}", flags, seeds)
    add("without_m", "without_m", fipo_best, range(5))
    for name in ("dapo", "fipo"):
        add("long", f"long-{name}", f"--algorithm {name} {best} --pretrain_steps 3000", range(5))
    return runs


def run_in_own_process(planned: PlannedRun) -> None:
    """Do a run, unless it is done or another process is doing it."""
    if planned.is_done:
        return
    lock = RUNS / f"{planned.run}.lock"
    try:
        lock.mkdir(parents=True)
    except FileExistsError:
        return
    shutil.rmtree(planned.folder, ignore_errors=True)
    words = [sys.executable, __file__, "one", planned.group, *planned.flags.split()]
    words += ["--seed", str(planned.seed), "--out", str(planned.folder)]
    words += "--eval_every 2 --save_every 1000 --log_samples 1 --study_seeds 0".split()
    changes = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    environment = os.environ | changes
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode == 0:
        (planned.folder / "done").touch()
        shutil.rmtree(planned.folder / "checkpoints")
        print(f"{planned.run}: done", flush=True)
    else:
        print(f"{planned.run}: {done.stderr[-300:]}", flush=True)
    lock.rmdir()


def run_all(groups: list[str]) -> None:
    """Do the runs of the groups, two at a time. The first seeds of all families come first."""
    wanted = [planned for planned in planned_runs() if planned.group in (groups or GROUPS)]
    wanted.sort(key=lambda planned: planned.seed)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run_in_own_process, wanted))


def run_one(group: str, argv: list[str]) -> None:
    """Call train_small.py with the changes that no flag can make."""
    if group == "without_m":
        remove_m_filter()
    if group == "long":
        lengthen_the_task()
    train_small.main(argv)


def remove_m_filter() -> None:
    """Let the Future-KL count tokens above the dual-clip ratio too.

    The mask then has to exclude nothing: Δ is 0 where there is no token.
    """
    future_kl = fipo.future_kl

    def unfiltered(delta_logp: torch.Tensor, mask: torch.Tensor, tau: float) -> torch.Tensor:
        return future_kl(delta_logp, torch.ones_like(mask), tau)

    fipo.future_kl = unfiltered


# ------------------------------------------------------------------- a task with a longer horizon

# Chance of a slip in each addition, for each pass of a style.
PASSES = {
    "short": [],
    "once": [0.2],
    "twice": [0.2, 0.1],
    "thrice": [0.2, 0.1, 0.05],
    "four times": [0.2, 0.1, 0.05, 0],
}
# As train_small.STYLES: style, share of the corpus, slips (PASSES has them), documents per batch.
LONG_STYLES = [
    ("short", 0.8, None, 32),
    ("once", 0.12, None, 16),
    ("twice", 0.05, None, 10),
    ("thrice", 0.02, None, 6),
    ("four times", 0.01, None, 4),
]


def lengthen_the_task() -> None:
    """Make the base model do the same sums up to four times.

    Each further pass slips less, and the last one gives the answer. About 20, 41, 66, 81 and 100 %
    of the answers in the corpus are right, at 10, 37, 64, 91 and 118 tokens. Longer answers are
    rarer. The model could also learn not to slip in the first pass.
    """
    train_small.STYLES = LONG_STYLES
    train_small.EMBEDDED["max_response"] = 160
    short_answer = train_small.answer

    def answer(digits: list[int], style: str, slip: None, rng: random.Random) -> str:
        if style == "short":
            return short_answer(digits, style, slip, rng)
        text = ""
        order = list(digits)
        for chance in PASSES[style]:
            work, total = train_small.worked_sum(order, chance, rng)
            text += work
            order.reverse()
        return f"{text}Answer: {total}"

    train_small.answer = answer


# -------------------------------------------------------------------------------------- the report


def read_curve(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl with an evaluation."""
    lines = train_small.read_jsonl(folder / "metrics.jsonl")
    return [line for line in lines if "eval/accuracy" in line]


def summary(curve: list[dict]) -> dict[str, float]:
    """The area under the accuracy curve, final accuracy and length, and the largest length.

    The area is the mean accuracy over the run. A length is the mean of an evaluation.
    """
    area = 0.0
    for before, after in zip(curve, curve[1:]):
        width = after["step"] - before["step"]
        area += width * (before["eval/accuracy"] + after["eval/accuracy"]) / 2
    lengths = [line["eval/response_length"] for line in curve]
    return {
        "area": area / curve[-1]["step"],
        "final": curve[-1]["eval/accuracy"],
        "length": lengths[-1],
        "longest": max(lengths),
    }


def interval(values: list[float]) -> tuple[float, float | None]:
    """The mean and half of the width of its 95 % interval."""
    n = len(values)
    if n == 1:
        return values[0], None
    return mean(values), STUDENT_T[n - 2] * stdev(values) / n**0.5


def are_identical(curve: list[dict], other: list[dict]) -> bool:
    """Tell whether two runs have the same steps, accuracies and lengths."""
    if len(curve) != len(other):
        return False
    for line, other_line in zip(curve, other):
        for name in ("step", "eval/accuracy", "eval/response_length"):
            if line[name] != other_line[name]:
                return False
    return True


def compared_with(family: str) -> str | None:
    """DAPO under the same settings. For FIPO's own settings, FIPO with the paper's values."""
    if family.startswith(("range", "tau", "without_m")):
        return "main-fipo"
    other = family.replace("fipo7b", "dapo").replace("fipo", "dapo").replace("grpo", "dapo")
    return None if other == family else other


Rows = dict[int, dict[str, Any]]  # results of a family by seed


def compare(rows: Rows, others: Rows, curves: dict[str, list[dict]]) -> dict[str, Any]:
    """Differences between two families, paired by seed."""
    pairs = [(rows[seed], others[seed]) for seed in rows if seed in others]
    result = {}
    for name in MEASURES:
        result[f"{name}_difference"] = interval([row[name] - other[name] for row, other in pairs])
    identical = 0
    for row, other in pairs:
        identical += are_identical(curves[row["run"]], curves[other["run"]])
    result["identical_runs"] = identical
    return result


def print_result(family: str, result: dict[str, Any]) -> None:
    words = []
    for name, value in result.items():
        if isinstance(value, tuple):
            center, half_width = value
            shown = "nan" if half_width is None else f"{half_width:.2g}"
            value = f"{center:.4g} ± {shown}"
        words.append(f"{name} {value}")
    print(f"{family:20}" + "  ".join(words))


def report() -> None:
    """Write the results of all finished runs, and print a line for each family."""
    # 1) a row for each run
    rows = []
    curves = {}
    families: dict[str, Rows] = {}
    for planned in planned_runs():
        if planned.is_done:
            curves[planned.run] = read_curve(planned.folder)
            row = asdict(planned) | summary(curves[planned.run])
            rows.append(row)
            families.setdefault(planned.family, {})[planned.seed] = row
    pandas.DataFrame(rows).to_csv(RESULTS / "compare.csv", index=False)

    # 2) means over seeds, and differences
    results = {}
    for family, by_seed in families.items():
        result: dict[str, Any] = {"runs": len(by_seed)}
        for name in MEASURES:
            result[name] = interval([row[name] for row in by_seed.values()])
        other = compared_with(family)
        if other in families:
            result["compared_with"] = other
            result |= compare(by_seed, families[other], curves)
        print_result(family, result)
        results[family] = result
    (RESULTS / "compare.json").write_text(json.dumps(results, indent=1) + "\n")

    # 3) the picture
    pictures()


# ------------------------------------------------------------------------------------ the pictures

STYLE = {  # for a figure of 8 inches, which a page shows at 800 pixels
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.grid": True,
    "grid.alpha": 0.3,
    "lines.linewidth": 2,
    "savefig.dpi": 200,
    "figure.constrained_layout.use": True,
}


def draw_differences(runs: pandas.DataFrame, path: Path) -> None:
    """Draw the differences to DAPO in area and final accuracy: every seed, mean and interval."""
    rows = {}  # family -> label
    for task, task_name in {"main": "embedded task", "long": "longer horizon"}.items():
        for algorithm in ("fipo", "fipo7b", "grpo"):
            family = f"{task}-{algorithm}"
            if family in set(runs["family"]):
                rows[family] = f"{LABELS[algorithm]}\n{task_name}"
    measures = {"area": "Mean accuracy over the run", "final": "Accuracy at the end"}
    percent = 100 * runs.pivot(index="seed", columns="family", values=list(measures))
    figure, panels = plt.subplots(1, 2, figsize=(8, 4), sharey=True)
    for axes, (measure, title) in zip(panels, measures.items()):
        for place, family in enumerate(rows):
            task, algorithm = family.split("-")
            difference = percent[measure, family] - percent[measure, f"{task}-dapo"]
            values = difference.dropna().tolist()
            center, half_width = interval(values)
            color = COLORS[algorithm]
            axes.errorbar(center, place, xerr=half_width, color=color, fmt="o", capsize=4)
            axes.scatter(values, [place + 0.28] * len(values), color=color, alpha=0.5, s=14)
        axes.axvline(0, color=COLORS["dapo"], zorder=1)
        axes.set_title(title)
        axes.set_yticks(range(len(rows)), rows.values())
    axes.invert_yaxis()  # of both panels
    figure.suptitle("FIPO and DAPO tie, GRPO is behind", fontweight="bold")
    figure.supxlabel(
        "difference from DAPO with the same seed, percentage points\n"
        "(bars: mean and 95 % interval; small dots: the seeds)",
        fontsize="medium",
    )
    figure.savefig(path)
    plt.close(figure)


def draw_qwen(run: pandas.DataFrame, path: Path) -> None:
    """Draw accuracy and entropy of the run on a real Qwen, and of the first five steps of DAPO."""
    figure, (accuracy, entropy) = plt.subplots(1, 2, figsize=(8, 3.8))
    run = run.assign(percent=100 * run["accuracy"], held_out=100 * run["eval/accuracy"])
    for algorithm, style in {"fipo": "-", "dapo": "--"}.items():
        rows = run[run["algorithm"] == algorithm]
        look = {"color": COLORS[algorithm], "linestyle": style}
        name = algorithm.upper()
        accuracy.plot(rows["step"], rows["percent"], label=f"{name}, rollouts", **look)
        entropy.plot(rows["step"], rows["entropy"], label=name, **look)
    evaluated = run.dropna(subset="held_out")
    accuracy.plot(evaluated["step"], evaluated["held_out"], "ko", label="FIPO, held out", zorder=3)
    for step, share in zip(evaluated["step"], evaluated["held_out"]):
        label = f"{share:.0f} %"
        accuracy.text(step, 90, label, ha="center", fontweight="bold")
        accuracy.vlines(step, share, 88, color="black", linewidth=0.8, linestyle=":")
    accuracy.set(title="Accuracy, %", xlabel="step", xlim=(-2, 22), ylim=(0, 100))
    accuracy.legend(loc="lower right")
    entropy.set(title="Entropy, nats per token", xlabel="step", xlim=(-2, 22), ylim=(0, 0.26))
    entropy.legend(loc="upper right")
    entropy.annotate(
        "entropy collapses\nby step 4",
        (4, run["entropy"][4]),
        (7, 0.1),
        arrowprops={"arrowstyle": "->"},
    )
    figure.suptitle("Qwen2.5-Coder-0.5B-Instruct learns to add four numbers", fontweight="bold")
    figure.savefig(path)
    plt.close(figure)


def pictures() -> None:
    """Draw the results in assets/results."""
    with plt.rc_context(STYLE):
        draw_differences(pandas.read_csv(RESULTS / "compare.csv"), ASSETS / "compare.png")
        draw_qwen(pandas.read_csv(RESULTS / "qwen.csv"), ASSETS / "qwen.png")


# -------------------------------------------------------------------------------- the command line


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="run | report | pictures"
    )
    commands.add_parser("run").add_argument("groups", nargs="*", metavar="GROUP", choices=GROUPS)
    commands.add_parser("report")
    commands.add_parser("pictures")
    # One run, in the process that `run` starts for it. `settings` are those of train_small.py.
    one = commands.add_parser("one")
    one.add_argument("group", choices=GROUPS)
    one.add_argument("settings", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    if given.command == "run":
        run_all(given.groups)
    elif given.command == "report":
        report()
    elif given.command == "pictures":
        pictures()
    else:
        run_one(given.group, given.settings)


if __name__ == "__main__":
    main()
