"""Problems, prompts and rewards: what is read, what is dropped, what counts as right."""

import itertools
import json
import math
import os
import time
from decimal import Decimal
from pathlib import Path

import pyarrow
import pyarrow.parquet
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


MATH_VERDICTS = [  # ground truth, what stands after "Answer:", right
    (r"2\pi", r"2\pi", True), ("2", r"2\pi", False), (r"2\pi", "2π", True), (r"2\pi", r"2\pi cm long", True),
    ("5", r"\sqrt{7}", False), (r"\sqrt{7}", "√7", True), (r"\sqrt{7}", "sqrt(7)", True), ("3", r"\log_2 3", False),
    (r"\{1,2\}", "{1, 2}", True), (r"\{1,2\}", "1 and 2", True), (r"\{1,2\}", "1", False), ("2", "1 or 2", False),
    ("20", "20%", True), ("12.5", "12.5%", True), (r"50\%", "1/2", True), (r"50\%", "0.5%", False), ("20", "2%", False),
    (r"\infty", "infinity", True), (r"\infty", "-infinity", False), (r"(-\infty, 2)", "(-∞, 2)", True),
    ("12", "$12$ and done", True), ("12", "12 and done", True), ("12", "12 since 3 + 4 + 5 = 12", True),
    ("12", "the result is 12", True), ("12", "12.", True), ("12", "**12**.", True), ("12", r"\(12\)", True),
    ("12", r"\boxed{12}", True), ("12", "12 km/h", True), ("12", r"12~\text{cm}^2", True), ("12", "$12 per day", True),
    ("12", "13", False), ("12", "", False), ("5", "", False), ("5", "**", False), ("5", "none", False),
    (r"\frac{7}{2}", "3 1/2", True), (r"\frac{7}{2}", "3/2", False), ("0.5", r"$\frac12$", True), ("8", "2**3", True),
    ("1,000,000", "$1000000$", True), (r"3 \times 10^8", "3·10^8", True), ("30^\\circ", "30°", True),
    (r"(3, \frac{\pi}{2})", "(3, pi/2)", True), (r"(3, \frac{\pi}{2})", r"(\frac{\pi}{2}, 3)", False),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"$\begin{pmatrix}1\\2\end{pmatrix}$", True), (r"\pm 5", "x = ±5", True),
    (r"\pm 5", "5", False), ("2x+1", "y = 2x + 1", True), (r"\theta", "theta", True),
    (r"\text{Evelyn}", "Evelyn", True), ("Evelyn", r"\text{Evelyn}", True), (r"\text{Evelyn}", "Carla", False),
    (r"\text{no solution}", "No solution.", True),
    (r"[1,2)", "[1, 2)", True), (r"[1,2)", "[1, 2]", False), ("5", "__5__", True), ("x^2+1", "x² + 1", True),
    ("10000", r"$10\,000$", True), ("0", r"1\,000", False), ("12000", "12 000", True), ("-5", "minus 5", True),
    ("5", "minus 5", False), ("-5", "–5", True), ("42", "≥ 42", False), ("5", "more than 5", False),
    ("5", "5 million", False), ("5", "5 times 3", False), (r"\sqrt{3.5}", "√3.5", True),
    ("12", "12 cm²", True), (r"[0, \infty)", "[0, inf)", True), ("12", "€12", True),
]  # fmt: skip


@pytest.mark.parametrize("truth, answer, right", MATH_VERDICTS, ids=str)
def test_math_verify_grades_the_answer_line(truth, answer, right):
    assert verify_math(f"From $x=5$ we get the length.\nAnswer: {answer}", truth) == right
    assert (
        verify_math(f"From $x=5$ we get the length.\n**Answer:** {answer}\n\nThis is it.", truth)
        == right
    )


def test_math_verify_reads_the_last_answer_line_even_if_it_is_a_display_or_empty():
    assert verify_math("Answer: 7\nAnswer: 12", "12") and not verify_math(
        "Answer: 12\nAnswer: 7", "12"
    )
    assert verify_math("**Final Answer:**\n\n\\[\n\\boxed{12}\n\\]", "12") and verify_math(
        "Answer:\n$$\n12\n$$", "12"
    )
    assert verify_math("Answer: The final result is:\n\\[\n12\n\\]", "12")
    assert verify_math("Answer: see below.\n\n$$\\boxed{12}$$", "12")
    assert not verify_math("From $x=5$ we get the length.\nAnswer:", "5")
    assert verify_math("Answer: 12" + " and so on" * 100, "12")
    assert verify_math("Answer: We add" + " and add" * 100 + " and get 12.", "12")


def test_math_verify_grades_endless_answer_lines_in_time():
    start = time.perf_counter()
    for endless in (
        ". " * 30000 + "x",
        " " * 60000 + "x",
        "(" * 60000,
        "√" * 60000,
        "1 " * 30000,
        "ab" * 30000,
    ):
        assert not verify_math(f"Answer: {endless}", "12")
    assert time.perf_counter() - start < 5


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
        "verl": {
            "prompt": chat,
            "reward_model": {"ground_truth": "4", "style": "rule"},
            "data_source": "x",
        },
        "gsm8k": {"question": "2+2?", "answer": "2+2=<<2+2=4>>4\n#### 4"},
        "problem": {"problem": "2+2?", "solution": "4"},
        "text": {"prompt": "2+2=", "answer": 4},
    }
    for name, row in rows.items():
        write_jsonl(tmp_path / f"{name}.jsonl", [row])
        (problem,) = load_problems(str(tmp_path / f"{name}.jsonl"))
        assert problem.answer == "4", name
        text = problem.prompt if isinstance(problem.prompt, str) else problem.prompt[0]["content"]
        assert {"verl": text == "2+2?", "text": text == "2+2="}.get(
            name, "Answer:" in text and "2+2?" in text
        ), name


def test_json_and_parquet(tmp_path):
    import datasets

    rows = [{"question": "1+1?", "answer": "2"}, {"question": "1+2?", "answer": "3"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    assert load_problems(str(tmp_path / "a.json")) == load_problems(str(tmp_path / "a.parquet"))


def test_repeated_prompts_are_dropped_and_counted(tmp_path, capsys):
    write_jsonl(
        tmp_path / "a.jsonl",
        [{"prompt": "1+1=", "answer": "2"}] * 5 + [{"prompt": "1+2=", "answer": "3"}],
    )
    assert len(load_problems(str(tmp_path / "a.jsonl"))) == 2
    assert "4 of 6 rows" in capsys.readouterr().out


def test_repeats_with_another_answer_are_counted(tmp_path, capsys):
    rows = [{"prompt": "1+1=", "answer": answer} for answer in ("2", "2", "3", 2)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    assert [p.answer for p in load_problems(str(tmp_path / "a.jsonl"))] == ["2"]
    assert (
        "3 of 4 rows repeat an earlier prompt and were dropped; 1 of them have another"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("name", ["train[1].jsonl", "[D]x/a.jsonl", "a=1/b.json", "a:b:c.jsonl", "x* ?!.jsonl",
                                  "a b.JSONL", "k=v/a [0-9].parquet"])  # fmt: skip
def test_the_file_that_is_named_is_read_as_it_is_now(tmp_path, name):
    import datasets

    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    write_jsonl(tmp_path / "train1.jsonl", [{"prompt": "other", "answer": "0"}])
    datasets_cache = Path(datasets.config.HF_DATASETS_CACHE)
    cached = set(datasets_cache.rglob("*"))
    for answer in ("1", "2"):  # of the same size and time
        rows = [{"prompt": "named", "answer": answer}]
        if path.suffix == ".parquet":
            datasets.Dataset.from_list(rows).to_parquet(path)
        else:
            write_jsonl(path, rows)
        os.utime(path, (1e9, 1e9))
        assert load_problems(str(path)) == [fipo.Problem("named", answer)]
    assert set(datasets_cache.rglob("*")) == cached


def test_decimals_of_parquet_and_text_that_begins_with_a_brace(tmp_path):
    rows = {
        "prompt": ["{1, 2} is a set. Its sum?", "b"],
        "answer": [Decimal("17.00"), Decimal("0.50")],
    }
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "a.parquet")
    problems = load_problems(str(tmp_path / "a.parquet"))
    assert [(p.prompt, p.answer) for p in problems] == [
        ("{1, 2} is a set. Its sum?", "17"),
        ("b", "0.5"),
    ]


def test_empty_media_are_no_media(tmp_path):
    rows = [
        {
            "prompt": "a",
            "answer": "1",
            "images": [None],
            "image": {"bytes": None, "path": None},
            "videos": "[]",
        }
    ]
    write_jsonl(tmp_path / "a.jsonl", rows)
    assert len(load_problems(str(tmp_path / "a.jsonl"))) == 1


def test_answers_that_the_dapo_rule_cannot_match_are_counted(base, tmp_path, capsys):
    write_jsonl(
        tmp_path / "a.jsonl", [{"prompt": "1+1=?\n", "solution": "We add. " * 20 + "Answer: $2$."}]
    )
    policy = fipo.Policy(base, fipo.EvalConfig(sampler="hf"))
    fipo.encode_problems(
        str(tmp_path / "a.jsonl"), policy, fipo.EvalConfig(max_prompt=16, max_response=8)
    )
    assert (
        "1 of 1 answers have over 100 characters, which the dapo verifier compares"
        in capsys.readouterr().out
    )


def test_gsm8k_and_aime_files():
    gsm8k = load_problems(shared_data("gsm8k/train.jsonl"))
    assert (
        len(gsm8k) == 7473
        and gsm8k[0].answer == "72"
        and "Natalia" in gsm8k[0].prompt[0]["content"]
    )
    aime = load_problems(shared_data("aime24/aime-2024.parquet"))
    assert len(aime) == 30 and all(p.answer.isdigit() for p in aime)


@pytest.mark.parametrize("rows, said", [
    ([{"foo": 1, "bar": 2}], r"\['foo', 'bar'\]"),
    ([{"prompt": "a"}], "reward_model, answer, solution"),
    ([{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": None}], "row 2 has no answer"),
    ([{"prompt": "a", "reward_model": {"style": "rule"}}], "row 1 has no reward_model"),
    ([{"prompt": "", "answer": "1"}], "row 1 has no prompt"),
    ([{"prompt": "a", "answer": math.nan}], "row 1 has no answer"),
    ([{"prompt": "a", "answer": math.inf}], "row 1 has no answer"),
    ([{"prompt": "a", "answer": []}], "row 1 has no answer"),
    ([{"prompt": "a", "answer": " "}], "row 1 has no answer"),
    ([{"prompt": "a", "answer": ["1", "2"]}], "row 1: answer has the type list"),
    ([{"prompt": "a", "answer": '["1", "2"]'}], "row 1: answer has the type list"),
    ([{"prompt": "a", "answer": True}], "row 1: answer has the type bool"),
    ([{"prompt": "a", "answer": 2.0**53}], "row 1 has the answer 9007199254740992.0, a float so large"),
    ([{"prompt": "a", "reward_model": {"ground_truth": {"target": ["17"]}}}], "ground_truth has the type dict, but"),
    ([{"prompt": "a", "reward_model": "{'ground_truth': '17'}"}], "row 1 has no reward_model.ground_truth"),
    ([{"prompt": "a", "reward_model": "17"}], "row 1 has no reward_model.ground_truth"),
    ([{"prompt": "[{'role': 'user', 'content': 'a'}]", "answer": "1"}], "a prompt that looks like chat messages"),
    ([{"prompt": [{"role": "user", "content": [{"type": "image"}]}], "answer": "1"}], "neither text nor chat messages"),
    ([{"prompt": [{"role": "user"}], "answer": "1"}], "neither text nor chat messages"),
    ([{"prompt": math.nan, "answer": "1"}], "neither text nor chat messages"),
    ([{"prompt": "a", "answer": "1", "images": images} for images in ([], None, ["a.png"])], "row 3 has images: only"),
    ([{"prompt": "a", "answer": "1", "video": "x.mp4", "image_1": "y"}], "row 1 has video: only problems"),
    ([{"prompt": "a", "answer": "1", "multi_modal_data": {"image": ["a.png"]}}], "row 1 has multi_modal_data: only"),
    ([{"prompt": "a", "answer": "1", "image_path": path} for path in ("", "a.png")], "row 2 has image_path: only"),
    ([{"prompt": '{"role": "user", "content": "a"}', "answer": "1"}], "neither text nor chat messages"),
    ([{"prompt": '[{"from": "human", "value": "a"}]', "answer": "1"}], "neither text nor chat messages"),
    ([{"prompt": "\ud800", "answer": "1"}], "a.jsonl failed: .*surrogates not allowed"),
])  # fmt: skip
def test_bad_rows_are_named(tmp_path, rows, said):
    write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(FipoError, match=said):
        load_problems(str(tmp_path / "a.jsonl"))


ROW = b'{"prompt": "a", "answer": "1"}\n'
BAD_FILES = {
    "missing.jsonl": (None, "No such file"),
    "missing.parquet": (None, "No such file"),
    "empty.jsonl": (b"", "is empty"),
    "blank.jsonl": (b"\n\n", "is empty"),
    "broken.jsonl": (b"{not json", "line 1 is not valid JSON: Expecting property name"),
    "broken.parquet": (b"not parquet", "failed"),
    "latin.jsonl": (b'{"prompt": "caf\xe9", "answer": "1"}\n', "line 1 .*utf-8"),
    "late.jsonl": (ROW * 5000 + b'{"prompt": "caf\xe9", "answer": "1"}\n', "line 5001 .*utf-8"),
    "cut.jsonl": (ROW * 5000 + b'{"prompt": "b", "ans', "line 5001 is not valid JSON"),
    "cut.json": (ROW * 2 + b'{"prompt": "b", "ans', "line 3 is not valid JSON"),
    "broken.json": (b'[{"prompt": "a",\n"answer": 1},\n{"prompt": "b" 1}]', "line 3 column 16"),
    "empty.json": (b"[]", "is empty"),
    "text.jsonl": (b'"a"\n', "row 1 is not an object"),
    "notes.txt": (b"a", "is not a .jsonl, .json or .parquet file"),
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
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }},{% endfor %}{% if add_generation_prompt %}:{% endif %}"
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
    assert (
        "a.jsonl: of the first 1 of 3 problems, 1 are within --max_prompt"
        in capsys.readouterr().out
    )
    cfg.problems = 9
    assert len(fipo.encode_problems(cfg.data, policy, cfg)) == 2, "more than there are: all"
    cfg.max_prompt = 2
    with pytest.raises(FipoError, match="every prompt is longer"):
        fipo.encode_problems(cfg.data, policy, cfg)
    cfg.max_prompt, cfg.max_response = 9, 248
    with pytest.raises(FipoError, match="context of 256"):
        fipo.encode_problems(cfg.data, policy, cfg)


def test_answers_are_read_as_they_are_written(tmp_path):
    """A column keeps the types of its rows: beside one float, 34 must not become "34.0" and 2⁵³+1 must stay odd."""
    answers = [
        (34, "34"), (0.5, "0.5"), (17.0, "17"), (2**53 + 1, "9007199254740993"), (0.00001, "0.00001"), (-0.0, "0"),
        ("025", "025"), (["17"], "17"), ([[3.0]], "3"), ('["18"]', "18"), ("[0, 1]", "[0, 1]"), ("{1}", "{1}"),
    ]  # fmt: skip
    write_jsonl(
        tmp_path / "a.jsonl", [{"prompt": str(i), "answer": a} for i, (a, _) in enumerate(answers)]
    )
    assert [p.answer for p in load_problems(str(tmp_path / "a.jsonl"))] == [
        text for _, text in answers
    ]


def parquet(path: Path, answers: pyarrow.Array, column: str = "answer") -> str:
    prompts = [str(i) for i in range(len(answers))]
    pyarrow.parquet.write_table(pyarrow.table({"prompt": prompts, column: answers}), path)
    return str(path)


@pytest.mark.parametrize("kind", [pyarrow.float32(), pyarrow.float64()])
def test_floats_in_parquet_print_with_the_digits_of_their_type(tmp_path, kind):
    values = pyarrow.array([0.1, 17, 1234567.125], kind)
    read = ["0.1", "17", "1234567.1" if kind == pyarrow.float32() else "1234567.125"]
    nested = pyarrow.array([{"ground_truth": [x]} for x in values.to_pylist()],
                           pyarrow.struct([("ground_truth", pyarrow.list_(kind))]))  # fmt: skip
    for source in (
        parquet(tmp_path / "a.parquet", values),
        parquet(tmp_path / "b.parquet", nested, "reward_model"),
    ):
        assert [p.answer for p in load_problems(source)] == read


@pytest.mark.parametrize("values, said", [
    (pyarrow.array([16777216], pyarrow.float32()), "row 1 has the answer 16777216.0, a float so large"),
    (pyarrow.array([0.5, 2**53], pyarrow.float64()), "row 2 has the answer 9007199254740992.0, a float so large"),
    (pyarrow.array([1, None], pyarrow.float64()), "row 2 has no answer"),
    (pyarrow.array([math.nan], pyarrow.float32()), "row 1 has no answer"),
    (pyarrow.array([b"17"]), "row 1: answer has the type bytes"),
])  # fmt: skip
def test_bad_answers_in_parquet_are_named(tmp_path, values, said):
    with pytest.raises(FipoError, match=said):
        load_problems(parquet(tmp_path / "a.parquet", values))


def test_json_text_in_columns_is_decoded(tmp_path):
    chat = [{"role": "user", "content": "2+2?"}]
    write_jsonl(tmp_path / "a.jsonl", [
        {"prompt": json.dumps(chat, indent=1), "reward_model": json.dumps({"ground_truth": 4, "style": "rule"})},
        {"prompt": '{"role": 1} is a dict?', "answer": "yes", "images": None, "video": ""},
        {"question": chat + chat, "answer": "1"},
    ])  # fmt: skip
    problems = load_problems(str(tmp_path / "a.jsonl"))
    assert [p.prompt for p in problems] == [chat, '{"role": 1} is a dict?', chat + chat]
    assert problems[0].answer == "4"


@pytest.mark.parametrize("verifier", ["dapo", "math"])
def test_answers_with_leading_zeros_are_reported_for_the_dapo_verifier(
    base, tmp_path, capsys, verifier
):
    answers = ["025", "$07$", "-03", "0", "0.5", ".05", "10", "-0.5"]
    write_jsonl(
        tmp_path / "a.jsonl", [{"prompt": f"{i}+1=", "answer": a} for i, a in enumerate(answers)]
    )
    cfg = fipo.EvalConfig(
        model=base, data=str(tmp_path / "a.jsonl"), max_response=8, verifier=verifier
    )
    fipo.encode_problems(cfg.data, fipo.Policy(base, cfg), cfg)
    line = (
        "3 of 8 answers begin with 0, which the dapo verifier compares as text: use --verifier math"
    )
    assert (line in capsys.readouterr().out) == (verifier == "dapo")


def test_the_stream_of_problems_shows_each_once_an_epoch_and_can_be_entered_anywhere():
    problems = [fipo.Problem(str(i), "1") for i in range(7)]
    stream = fipo.draw_problems(problems, 0, 21, seed=3)
    epochs = [[p.prompt for p in stream[i : i + 7]] for i in (0, 7, 14)]
    assert all(sorted(e) == sorted("0123456") for e in epochs) and epochs[0] != epochs[1]
    for start, n in itertools.product(range(14), range(1, 7)):
        assert fipo.draw_problems(problems, start, n, seed=3) == stream[start : start + n]
