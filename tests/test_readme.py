"""README.md and scripts/*.md: snippets run, the example is right, links lead somewhere."""

import ast
import doctest
import inspect
import json
import operator
import os
import re
import shlex
import subprocess

import pytest
import torch
from conftest import ROOT
from transformers import Qwen2Config

import fipo
import train_small

README = (ROOT / "README.md").read_text()
FOLDERS = (".", "scripts", "assignment")
PAGES = [str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).glob("*.md")]


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands(program):
    """The commands of README's shell blocks that call `program`, as lists of words."""
    text = "".join(blocks("bash")).replace("\\\n", " ")
    lines = [line for line in text.splitlines() if program in line]
    return [shlex.split(line, comments=True) for line in lines]


def row_of(name):
    """The numbers of the example's row that begins with `name`."""
    line = re.search(rf"^\| {name} \|(.*)\|$", README, re.MULTILINE).group(1)
    return [float(cell.replace("−", "-")) for cell in line.split("|")]


def test_the_example_to_check_by_hand_is_right():
    delta = torch.tensor([row_of("Δ")])
    one = torch.ones_like(delta)
    F, f = fipo.influence_weight(delta, advantages=one, mask=one, tau=1.0)
    torch.testing.assert_close(F[0], torch.tensor(row_of("F")), atol=0.0051, rtol=0)
    torch.testing.assert_close(f[0], torch.tensor(row_of("f")), atol=0.0051, rtol=0)


def test_the_python_snippets_run():
    names = {}
    for block in blocks("python"):
        exec(block, names)
    # The loss has a gradient, and the micro-batches add up to the loss of the whole mini-batch.
    logp = names["logp"].detach().requires_grad_()
    inputs = [names[name] for name in ("old_logp", "advantages", "mask")]
    fipo.fipo_loss(logp, *inputs)[0].backward()
    assert logp.grad.abs().sum() > 0
    torch.testing.assert_close(names["logp"].grad, logp.grad)
    # The reward does what its docstring shows.
    (example,) = doctest.DocTestFinder().find(names["ends_with"], "ends_with", globs=names)
    runner = doctest.DocTestRunner()
    runner.run(example)
    assert (runner.tries, runner.failures) == (1, 0)
    assert not names["ends_with"]("The capital of France is Lyon.", "Paris")


def test_the_row_of_data_can_be_loaded(tmp_path):
    row = re.search(r'`(\{"question".*?\})`', README, re.DOTALL).group(1).replace("\n", " ")
    path = tmp_path / "data.jsonl"
    path.write_text(row)
    (problem,) = fipo.load_problems(str(path))
    assert json.loads(row)["question"] in problem.prompt[0]["content"]
    assert problem.answer == json.loads(row)["answer"]


def test_the_table_of_arguments_names_those_of_fipo_loss_with_their_defaults():
    table = README.split("| argument | default |")[1].split("\n\n")[0]
    parameters = inspect.signature(fipo.fipo_loss).parameters
    named = []
    for line in table.splitlines()[2:]:
        names, defaults, _ = line.strip("|").split("|")
        names = re.findall(r"`(\w+)`", names)
        named += names
        values = [parameters[name].default for name in names]
        if None not in values:
            assert ast.literal_eval(f"[{defaults}]") == values
    optional = [name for name, item in parameters.items() if item.default is not item.empty]
    assert sorted(named) == sorted(optional)


def test_the_steps_of_the_loop_name_functions_of_fipo():
    steps = README.split("## Read the code")[1].split("## ")[0]
    for name in re.findall(r"`(\w+(?:\.\w+)?)`", steps):
        if name != "fipo.py":
            assert callable(operator.attrgetter(name)(fipo))


def test_the_metrics_of_the_table_are_logged():
    table = README.split("| in `metrics.jsonl` |")[1].split("\n\n")[0]
    source = (ROOT / "fipo.py").read_text()
    names = re.findall(
        r"`([\w/]+)`", "\n".join(row.split("|")[1] for row in table.splitlines()[2:])
    )
    assert len(names) == 8
    for name in names:
        assert f'"{name}"' in source


def test_the_commands_have_settings_that_exist():
    programs = [words for words in commands("train_small.py") if words[0] == "python"]
    assert programs
    for words in programs:
        train_small.parser().parse_args(words[2:])
    exercises = re.findall(r"^\d+\. `(--[^`]+)`", README, re.MULTILINE)
    assert len(exercises) == 4
    for words in exercises:
        train_small.parser().parse_args(shlex.split(words))


@pytest.mark.slow
def test_the_7b_command_fits_on_one_node_as_the_readme_says(tmp_path, sums):
    (words,) = [words for words in commands("train_32b.sh") if words[0].startswith("MODEL=")]
    shape = Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=32768,
    )
    shape.save_pretrained(tmp_path)
    given = dict(word.split("=") for word in words if re.match("[A-Z]+=", word))
    local = {"MODEL": str(tmp_path), "DATA": sums, "EVAL_DATA": "", "DRY_RUN": "1"}
    arguments = words[words.index("bash") + 2 :]
    done = subprocess.run(
        ["bash", str(ROOT / "train_32b.sh"), *arguments],
        env=os.environ | given | local,
        capture_output=True,
        text=True,
        check=True,
    )
    training, sampling = re.search(r"\n +8 .*?\| +([\d.]+) +([\d.]+)", done.stdout).groups()
    expected = f"{float(training):.0f} GiB per GPU in training and {float(sampling):.0f} GiB while"
    assert expected in " ".join(README.split())


def anchors(text):
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return [heading.replace(" ", "-") for heading in plain]


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_exist(page):
    text = (ROOT / page).read_text()
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert links or page == "scripts/EXERCISES.md"
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text()), link
