"""Problems, prompts and rewards: what is read, what is dropped, what counts as right."""

import itertools
import json
from pathlib import Path

import pytest
from conftest import shared_data, write_jsonl
from transformers import AutoTokenizer

import fipo
from fipo import FipoError, load_problems, overlong_penalty, verify, verify_math

CASES = json.loads((Path(__file__).parent / "data" / "verifier.json").read_text())["cases"]

# ---------------------------------------------------------------------------------------------------- the verifier


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["response"][-24:])
def test_verdicts_are_the_release_s(case):
    assert verify(case["response"], case["ground_truth"]) == case["correct"]
    extracted = fipo.extract_answer(case["response"])
    assert (extracted or "[INVALID]") == case["prediction"]


@pytest.mark.parametrize("text", ["Answer: $34$", r"Answer: \boxed{34}", "Answer: x = 34", "Answer:\n34",
                                  "Answer: 34 degrees", "answer : 34", "Answer: 1\nAnswer: 34"])  # fmt: skip
def test_right(text):
    assert verify(text, "34")


@pytest.mark.parametrize("text", ["**Answer:** 34", "Answer: 34.", "Answer: 034", "Answer: 34.0", r"Answer: \(34\)",
                                  r"\boxed{34}", "34", "", "Answer: 34\nAnswer: 7",
                                  "Answer: 34" + " " * 300])  # fmt: skip
def test_wrong(text):
    assert not verify(text, "34")


def test_both_sides_are_normalised():
    assert verify("Answer: 1450000", "1,450,000") and verify(r"Answer: \frac12", r"\frac{1}{2}")


def test_math_verify_accepts_free_forms():
    assert verify_math(r"so it is $\boxed{\frac{1}{2}}$", "0.5")
    assert verify_math("The answer is $x = 34$.", "34")
    assert verify_math(r"\boxed{34}", r"We find \boxed{34}.")  # a MATH solution as ground truth
    assert not verify_math(r"$\boxed{35}$", "34") and not verify_math("no idea", "34")


def test_overlong_penalty_is_linear_inside_the_buffer():
    assert [overlong_penalty(n, 100, 20) for n in (1, 80, 90, 100)] == [0.0, 0.0, -0.5, -1.0]
    assert overlong_penalty(100, 100, 0) == 0.0


# ------------------------------------------------------------------------------------------------------- problems


def test_schemas_are_told_apart_without_being_named(tmp_path):
    chat = [{"role": "user", "content": "2+2?"}]
    rows = {
        "verl": {"prompt": chat, "reward_model": {"ground_truth": "4", "style": "rule"}, "data_source": "x"},
        "gsm8k": {"question": "2+2?", "answer": "2+2=<<2+2=4>>4\n#### 4"},
        "problem": {"problem": "2+2?", "solution": "4"},
        "text": {"prompt": "2+2=", "answer": 4},
    }
    for name, row in rows.items():
        write_jsonl(tmp_path / f"{name}.jsonl", [row])
        (problem,) = load_problems(str(tmp_path / f"{name}.jsonl"))
        assert problem.answer == "4", name
        text = problem.prompt if isinstance(problem.prompt, str) else problem.prompt[0]["content"]
        assert {"verl": text == "2+2?", "text": text == "2+2="}.get(name, "Answer:" in text and "2+2?" in text), name


def test_json_and_parquet(tmp_path):
    import datasets

    rows = [{"question": "1+1?", "answer": "2"}, {"question": "1+2?", "answer": "3"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    assert load_problems(str(tmp_path / "a.json")) == load_problems(str(tmp_path / "a.parquet"))


def test_repeated_prompts_are_dropped_and_counted(tmp_path, capsys):
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "1+1=", "answer": "2"}] * 5 + [{"prompt": "1+2=", "answer": "3"}])
    assert len(load_problems(str(tmp_path / "a.jsonl"))) == 2
    assert "4 of 6 rows" in capsys.readouterr().out


def test_gsm8k_and_aime_files():
    gsm8k = load_problems(shared_data("gsm8k/train.jsonl"))
    assert len(gsm8k) == 7473 and gsm8k[0].answer == "72" and "Natalia" in gsm8k[0].prompt[0]["content"]
    aime = load_problems(shared_data("aime24/aime-2024.parquet"))
    assert len(aime) == 30 and all(p.answer.isdigit() for p in aime)


@pytest.mark.parametrize("rows, said", [
    ([{"foo": 1, "bar": 2}], r"\['foo', 'bar'\]"),
    ([{"prompt": "a"}], "reward_model, answer, solution"),
    ([{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": None}], "row 2 has no answer"),
    ([{"prompt": "a", "reward_model": {"style": "rule"}}], "row 1 has no reward_model"),
    ([{"prompt": "", "answer": "1"}], "row 1 has no prompt"),
])  # fmt: skip
def test_bad_rows_are_named(tmp_path, rows, said):
    write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(FipoError, match=said):
        load_problems(str(tmp_path / "a.jsonl"))


BAD_FILES = {
    "missing.jsonl": (None, "No such file"),
    "missing.parquet": (None, "No such file"),
    "empty.jsonl": (b"", "is empty"),
    "blank.jsonl": (b"\n\n", "failed"),
    "broken.jsonl": (b"{not json", "failed: JSON"),
    "broken.parquet": (b"not parquet", "failed"),
    "latin.jsonl": (b'{"prompt": "caf\xe9", "answer": "1"}\n', "failed: .*utf-8"),
    "late.jsonl": (b'{"prompt": "a", "answer": "1"}\n' * 5000 + b'{"prompt": "caf\xe9", "answer": "1"}\n', "utf-8"),
    "cut.jsonl": (b'{"prompt": "a", "answer": "1"}\n' * 5000 + b'{"prompt": "b", "ans', "failed: JSON"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_named(tmp_path, name):
    content, said = BAD_FILES[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(FipoError, match=rf"(?i){tmp_path / name}.*{said}") as sentence:
        load_problems(str(tmp_path / name))
    assert len(str(sentence.value).splitlines()) == 1


# -------------------------------------------------------------------------------------------------------- prompts


def test_chat_template_where_there_is_one_plain_text_where_there_is_none(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    messages = [{"role": "user", "content": "1+2=?"}]
    assert fipo.encode_prompt("1+2=?\n", tokenizer) == tokenizer("1+2=?\n")["input_ids"]
    assert fipo.encode_prompt(messages, tokenizer) == tokenizer("1+2=?\n\n")["input_ids"]
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }},{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    )
    assert fipo.encode_prompt(messages, tokenizer) == fipo.encode_prompt("1+2=?", tokenizer)
    assert tokenizer.decode(fipo.encode_prompt(messages, tokenizer)) == "1+2=?,:"


def test_the_first_problems_are_taken_and_long_prompts_dropped_and_counted(base, tmp_path, capsys):
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "1" * n, "answer": "2"} for n in (3, 5, 9)])
    cfg = fipo.EvalConfig(model=base, data=str(tmp_path / "a.jsonl"), max_prompt=5, max_response=8)
    policy = fipo.Policy(base, cfg)
    assert [len(p.prompt_ids) for p in fipo.encode_problems(cfg.data, policy, cfg)] == [3, 5]
    assert "of the first 3 of 3 problems, 2 are within --max_prompt" in capsys.readouterr().out
    cfg.problems = 1
    assert [len(p.prompt_ids) for p in fipo.encode_problems(cfg.data, policy, cfg)] == [3]
    assert "a.jsonl: of the first 1 of 3 problems, 1 are within --max_prompt" in capsys.readouterr().out
    cfg.problems = 9
    assert len(fipo.encode_problems(cfg.data, policy, cfg)) == 2, "more than there are: all"
    cfg.max_prompt = 2
    with pytest.raises(FipoError, match="every prompt is longer"):
        fipo.encode_problems(cfg.data, policy, cfg)
    cfg.max_prompt, cfg.max_response = 9, 248
    with pytest.raises(FipoError, match="context of 256"):
        fipo.encode_problems(cfg.data, policy, cfg)


def test_numbers_as_answers(tmp_path):
    """A column with one float makes all its integers floats; 34 must not become "34.0"."""
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "answer": 34}, {"prompt": "b", "answer": 0.5}])
    assert [p.answer for p in load_problems(str(tmp_path / "a.jsonl"))] == ["34", "0.5"]


def test_the_stream_of_problems_shows_each_once_an_epoch_and_can_be_entered_anywhere():
    problems = [fipo.Problem(str(i), "1") for i in range(7)]
    stream = fipo.draw_problems(problems, 0, 21, seed=3)
    epochs = [[p.prompt for p in stream[i : i + 7]] for i in (0, 7, 14)]
    assert all(sorted(e) == sorted("0123456") for e in epochs) and epochs[0] != epochs[1]
    for start, n in itertools.product(range(14), range(1, 7)):
        assert fipo.draw_problems(problems, start, n, seed=3) == stream[start : start + n]
