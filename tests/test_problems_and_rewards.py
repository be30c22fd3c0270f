"""Problems, prompts and rewards: what is read, what is dropped, and what counts as right."""

import itertools
import json
import math
import os
import time
from decimal import Decimal
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from conftest import shared_data, write_jsonl
from transformers import AutoTokenizer

import fipo
from fipo import FipoError, load_problems, overlong_penalty, verify, verify_math

CASES = json.loads((Path(__file__).parent / "data" / "verifier.json").read_text())["cases"]

# ------------------------------------------------------------------------------------ the verifiers


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["response"][-24:])
def test_dapo_verdicts_match_the_release(case):
    assert verify(case["response"], case["ground_truth"]) == case["correct"]
    extracted = fipo.extract_answer(case["response"])
    assert (extracted or "[INVALID]") == case["prediction"]


RIGHT = [
    "Answer: $34$",
    r"Answer: \boxed{34}",
    "Answer: x = 34",
    "Answer:\n34",
    "Answer: 34 degrees",
    "answer : 34",
    "Answer: 1\nAnswer: 34",
]
WRONG = [
    "**Answer:** 34",
    "Answer: 34.",
    "Answer: 034",
    "Answer: 34.0",
    r"Answer: \(34\)",
    r"\boxed{34}",
    "34",
    "",
    "Answer: 34\nAnswer: 7",
    "Answer: 34" + " " * 300,
]


@pytest.mark.parametrize("text", RIGHT)
def test_dapo_accepts(text):
    assert verify(text, "34")


@pytest.mark.parametrize("text", WRONG)
def test_dapo_rejects(text):
    assert not verify(text, "34")


def test_dapo_normalizes_answer_and_ground_truth():
    assert verify("Answer: 1450000", "1,450,000")
    assert verify(r"Answer: \frac12", r"\frac{1}{2}")


MATH_VERDICTS = [  # the ground truth, the text after "Answer:", whether it is right
    (r"2\pi", r"2\pi", True),
    ("2", r"2\pi", False),
    (r"2\pi", "2π", True),
    (r"2\pi", r"2\pi cm long", True),
    ("5", r"\sqrt{7}", False),
    (r"\sqrt{7}", "√7", True),
    (r"\sqrt{7}", "sqrt(7)", True),
    ("3", r"\log_2 3", False),
    (r"\{1,2\}", "{1, 2}", True),
    (r"\{1,2\}", "1 and 2", True),
    (r"\{1,2\}", "1", False),
    ("2", "1 or 2", False),
    ("20", "20%", True),
    ("12.5", "12.5%", True),
    (r"50\%", "1/2", True),
    (r"50\%", "0.5%", False),
    ("20", "2%", False),
    (r"\infty", "infinity", True),
    (r"\infty", "-infinity", False),
    (r"(-\infty, 2)", "(-∞, 2)", True),
    ("12", "$12$ and done", True),
    ("12", "12 and done", True),
    ("12", "12 since 3 + 4 + 5 = 12", True),
    ("12", "the result is 12", True),
    ("12", "12.", True),
    ("12", "**12**.", True),
    ("12", r"\(12\)", True),
    ("12", r"\boxed{12}", True),
    ("12", "12 km/h", True),
    ("12", r"12~\text{cm}^2", True),
    ("12", "$12 per day", True),
    ("12", "13", False),
    ("12", "", False),
    ("5", "", False),
    ("5", "**", False),
    ("5", "none", False),
    (r"\frac{7}{2}", "3 1/2", True),
    (r"\frac{7}{2}", "3/2", False),
    ("0.5", r"$\frac12$", True),
    ("8", "2**3", True),
    ("1,000,000", "$1000000$", True),
    (r"3 \times 10^8", "3·10^8", True),
    ("30^\\circ", "30°", True),
    (r"(3, \frac{\pi}{2})", "(3, pi/2)", True),
    (r"(3, \frac{\pi}{2})", r"(\frac{\pi}{2}, 3)", False),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"$\begin{pmatrix}1\\2\end{pmatrix}$", True),
    (r"\pm 5", "x = ±5", True),
    (r"\pm 5", "5", False),
    ("2x+1", "y = 2x + 1", True),
    (r"\theta", "theta", True),
    (r"\text{Evelyn}", "Evelyn", True),
    ("Evelyn", r"\text{Evelyn}", True),
    (r"\text{Evelyn}", "Carla", False),
    (r"\text{no solution}", "No solution.", True),
    (r"[1,2)", "[1, 2)", True),
    (r"[1,2)", "[1, 2]", False),
    ("5", "__5__", True),
    ("x^2+1", "x² + 1", True),
    ("10000", r"$10\,000$", True),
    ("0", r"1\,000", False),
    ("12000", "12 000", True),
    ("-5", "minus 5", True),
    ("5", "minus 5", False),
    ("-5", "–5", True),
    ("42", "≥ 42", False),
    ("5", "more than 5", False),
    ("5", "5 million", False),
    ("5", "5 times 3", False),
    (r"\sqrt{3.5}", "√3.5", True),
    ("12", "12 cm²", True),
    (r"[0, \infty)", "[0, inf)", True),
    ("12", "€12", True),
]


@pytest.mark.parametrize("truth, answer, is_right", MATH_VERDICTS, ids=str)
def test_math_grades_the_answer_line(truth, answer, is_right):
    before = "From $x=5$ we get the length.\n"
    assert verify_math(f"{before}Answer: {answer}", truth) == is_right
    assert verify_math(f"{before}**Answer:** {answer}\n\nThis is it.", truth) == is_right


LAST_LINE_IS_12 = [
    "Answer: 7\nAnswer: 12",
    "**Final Answer:**\n\n\\[\n\\boxed{12}\n\\]",
    "Answer:\n$$\n12\n$$",
    "Answer: The final result is:\n\\[\n12\n\\]",
    "Answer: see below.\n\n$$\\boxed{12}$$",
    "Answer: 12" + " and so on" * 100,
    "Answer: We add" + " and add" * 100 + " and get 12.",
]


@pytest.mark.parametrize("response", LAST_LINE_IS_12)
def test_math_reads_the_last_answer_line_and_displays_after_it(response):
    assert verify_math(response, "12")


def test_math_does_not_look_beyond_the_last_answer_line():
    assert not verify_math("Answer: 12\nAnswer: 7", "12")
    assert not verify_math("From $x=5$ we get the length.\nAnswer:", "5")


def test_math_grades_very_long_answer_lines_in_time():
    start = time.perf_counter()
    for repeated in (". ", " ", "(", "√", "1 ", "ab"):
        line = repeated * (60000 // len(repeated))
        assert not verify_math(f"Answer: {line}x", "12")
        assert not verify_math(f"Answer: {line}", "12")
    assert time.perf_counter() - start < 5


def test_math_accepts_responses_without_an_answer_line():
    assert verify_math(r"so it is $\boxed{\frac{1}{2}}$", "0.5")
    assert verify_math("The answer is $x = 34$.", "34")
    assert verify_math(r"\boxed{34}", r"We find \boxed{34}.")  # a MATH solution as ground truth
    assert not verify_math(r"$\boxed{35}$", "34")
    assert not verify_math("no idea", "34")


def test_overlong_penalty_is_linear_inside_the_buffer():
    assert [overlong_penalty(n, 100, 20) for n in (1, 80, 90, 100)] == [0.0, 0.0, -0.5, -1.0]
    assert overlong_penalty(100, 100, 0) == 0.0


# ---------------------------------------------------------------------------------------- problems


@pytest.fixture
def load(tmp_path):
    """Write rows to a.jsonl and load them as problems."""

    def write_and_load(rows: list) -> list[fipo.Problem]:
        write_jsonl(tmp_path / "a.jsonl", rows)
        return load_problems(str(tmp_path / "a.jsonl"))

    return write_and_load


CHAT = [{"role": "user", "content": "2+2?"}]
ANSWER_4 = {"ground_truth": "4", "style": "rule"}


def test_schemas_are_recognized_by_their_columns(load):
    (problem,) = load([{"prompt": CHAT, "reward_model": ANSWER_4, "data_source": "x"}])
    assert problem == fipo.Problem(CHAT, "4")
    (problem,) = load([{"prompt": "2+2=", "answer": 4}])
    assert problem == fipo.Problem("2+2=", "4")
    gsm8k = {"question": "2+2?", "answer": "2+2=<<2+2=4>>4\n#### 4"}
    for row in (gsm8k, {"problem": "2+2?", "solution": "4"}):
        (problem,) = load([row])
        assert problem.answer == "4"
        (message,) = problem.prompt
        assert "Answer:" in message["content"]
        assert "2+2?" in message["content"]


def test_json_and_parquet_files_give_the_same_problems(tmp_path):
    rows = [{"question": "1+1?", "answer": "2"}, {"question": "1+2?", "answer": "3"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    problems = load_problems(str(tmp_path / "a.json"))
    assert problems == load_problems(str(tmp_path / "a.parquet"))
    assert [problem.answer for problem in problems] == ["2", "3"]


def test_repeated_prompts_are_dropped_and_counted(load, capsys):
    rows = [{"prompt": "1+1=", "answer": answer} for answer in ("2", "2", "3", 2)]
    problems = load([*rows, {"prompt": "1+2=", "answer": "3"}])
    assert [problem.answer for problem in problems] == ["2", "3"]
    expected = "3 of 5 rows repeat an earlier prompt and were dropped; 1 of them have another"
    assert expected in capsys.readouterr().out


FILE_NAMES = [
    "train[1].jsonl",
    "[D]x/a.jsonl",
    "a=1/b.json",
    "a:b:c.jsonl",
    "x* ?!.jsonl",
    "a b.JSONL",
    "k=v/a [0-9].parquet",
]


@pytest.mark.parametrize("name", FILE_NAMES)
def test_files_are_read_by_their_literal_name_and_without_a_cache(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    write_jsonl(tmp_path / "train1.jsonl", [{"prompt": "other", "answer": "0"}])
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    cached = set(cache.rglob("*"))
    for answer in ("1", "2"):  # both files have the same size and time
        rows = [{"prompt": "named", "answer": answer}]
        if path.suffix == ".parquet":
            datasets.Dataset.from_list(rows).to_parquet(path)
        else:
            write_jsonl(path, rows)
        os.utime(path, (1e9, 1e9))
        assert load_problems(str(path)) == [fipo.Problem("named", answer)]
    assert set(cache.rglob("*")) == cached


def test_empty_media_columns_are_accepted(load):
    no_image = {"bytes": None, "path": None}
    media = {"images": [None], "image": no_image, "videos": "[]"}
    assert len(load([{"prompt": "a", "answer": "1"} | media])) == 1


def test_gsm8k_and_aime_files():
    gsm8k = load_problems(shared_data("gsm8k/train.jsonl"))
    assert len(gsm8k) == 7473
    assert gsm8k[0].answer == "72"
    assert "Natalia" in gsm8k[0].prompt[0]["content"]
    aime = load_problems(shared_data("aime24/aime-2024.parquet"))
    assert len(aime) == 30
    assert all(problem.answer.isdigit() for problem in aime)


NO_PROMPT = "neither text nor chat messages"
NO_TRUTH = "row 1 has no reward_model.ground_truth"
TARGET = {"ground_truth": {"target": ["17"]}}
BAD_PROMPTS = [
    ("", "row 1 has no prompt"),
    ("[{'role': 'user', 'content': 'a'}]", "a prompt that looks like chat messages"),
    ([{"role": "user", "content": [{"type": "image"}]}], NO_PROMPT),
    ([{"role": "user"}], NO_PROMPT),
    (math.nan, NO_PROMPT),
    ('{"role": "user", "content": "a"}', NO_PROMPT),
    ('[{"from": "human", "value": "a"}]', NO_PROMPT),
    ("\ud800", "a.jsonl failed: .*surrogates not allowed"),
]
BAD_ANSWERS = [
    (math.nan, "row 1 has no answer"),
    (math.inf, "row 1 has no answer"),
    ([], "row 1 has no answer"),
    (" ", "row 1 has no answer"),
    (["1", "2"], "row 1: answer has the type list"),
    ('["1", "2"]', "row 1: answer has the type list"),
    (True, "row 1: answer has the type bool"),
    (2.0**53, "row 1 has the answer 9007199254740992.0, a float so large"),
]
BAD_REWARD_MODELS = [
    ({"style": "rule"}, NO_TRUTH),
    ("{'ground_truth': '17'}", NO_TRUTH),
    ("17", NO_TRUTH),
    (TARGET, "ground_truth has the type dict, but"),
]
MEDIA = [
    ([{"images": []}, {"images": None}, {"images": ["a.png"]}], "row 3 has images: only"),
    ([{"video": "x.mp4", "image_1": "y"}], "row 1 has video: only problems"),
    ([{"multi_modal_data": {"image": ["a.png"]}}], "row 1 has multi_modal_data: only"),
    ([{"image_path": ""}, {"image_path": "a.png"}], "row 2 has image_path: only"),
]


@pytest.mark.parametrize("prompt, pattern", BAD_PROMPTS, ids=repr)
def test_bad_prompts_are_refused_with_their_row(load, prompt, pattern):
    with pytest.raises(FipoError, match=pattern):
        load([{"prompt": prompt, "answer": "1"}])


@pytest.mark.parametrize("answer, pattern", BAD_ANSWERS, ids=repr)
def test_bad_answers_are_refused_with_their_row(load, answer, pattern):
    with pytest.raises(FipoError, match=pattern):
        load([{"prompt": "a", "answer": answer}])


@pytest.mark.parametrize("reward_model, pattern", BAD_REWARD_MODELS, ids=repr)
def test_bad_reward_models_are_refused_with_their_row(load, reward_model, pattern):
    with pytest.raises(FipoError, match=pattern):
        load([{"prompt": "a", "reward_model": reward_model}])


@pytest.mark.parametrize("columns, pattern", MEDIA, ids=str)
def test_media_are_refused_with_their_row(load, columns, pattern):
    with pytest.raises(FipoError, match=pattern):
        load([{"prompt": "a", "answer": "1"} | row for row in columns])


def test_missing_columns_and_answers_are_refused(load):
    with pytest.raises(FipoError, match=r"\['foo', 'bar'\]"):
        load([{"foo": 1, "bar": 2}])
    with pytest.raises(FipoError, match="reward_model, answer, solution"):
        load([{"prompt": "a"}])
    with pytest.raises(FipoError, match="row 2 has no answer"):
        load([{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": None}])


ROW = b'{"prompt": "a", "answer": "1"}\n'
LATIN = b'{"prompt": "caf\xe9", "answer": "1"}\n'
BAD_FILES = {
    "missing.jsonl": (None, "No such file"),
    "missing.parquet": (None, "No such file"),
    "empty.jsonl": (b"", "is empty"),
    "blank.jsonl": (b"\n\n", "is empty"),
    "broken.jsonl": (b"{not json", "line 1 is not valid JSON: Expecting property name"),
    "broken.parquet": (b"not parquet", "failed"),
    "latin.jsonl": (LATIN, "line 1 .*utf-8"),
    "late.jsonl": (ROW * 5000 + LATIN, "line 5001 .*utf-8"),
    "cut.jsonl": (ROW * 5000 + b'{"prompt": "b", "ans', "line 5001 is not valid JSON"),
    "cut.json": (ROW * 2 + b'{"prompt": "b", "ans', "line 3 is not valid JSON"),
    "broken.json": (b'[{"prompt": "a",\n"answer": 1},\n{"prompt": "b" 1}]', "line 3 column 16"),
    "empty.json": (b"[]", "is empty"),
    "text.jsonl": (b'"a"\n', "row 1 is not an object"),
    "notes.txt": (b"a", "is not a .jsonl, .json or .parquet file"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused_in_one_sentence(tmp_path, name):
    content, pattern = BAD_FILES[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(FipoError, match=rf"(?i){tmp_path / name}.*{pattern}") as error:
        load_problems(str(tmp_path / name))
    assert len(str(error.value).splitlines()) == 1


ANSWERS = [
    (34, "34"),
    (0.5, "0.5"),
    (17.0, "17"),
    (2**53 + 1, "9007199254740993"),
    (0.00001, "0.00001"),
    (-0.0, "0"),
    ("025", "025"),
    (["17"], "17"),
    ([[3.0]], "3"),
    ('["18"]', "18"),
    ("[0, 1]", "[0, 1]"),
    ("{1}", "{1}"),
]


def test_answers_keep_their_digits_beside_answers_of_other_types(load):
    """In one column of floats, 34 would become 34.0, and 2⁵³ + 1 would become even."""
    problems = load([{"prompt": str(i), "answer": value} for i, (value, _) in enumerate(ANSWERS)])
    assert [problem.answer for problem in problems] == [text for _, text in ANSWERS]


def test_json_text_in_columns_is_decoded(load):
    reward_model = json.dumps({"ground_truth": 4, "style": "rule"})
    not_json = '{"role": 1} is a dict?'
    rows = [
        {"prompt": json.dumps(CHAT, indent=1), "reward_model": reward_model},
        {"prompt": not_json, "answer": "yes", "images": None, "video": ""},
        {"question": CHAT + CHAT, "answer": "1"},
    ]
    problems = load(rows)
    assert [problem.prompt for problem in problems] == [CHAT, not_json, CHAT + CHAT]
    assert problems[0].answer == "4"


def parquet(path: Path, answers, column: str = "answer") -> str:
    """Write a parquet file with these answers. Returns its path."""
    prompts = [str(i) for i in range(len(answers))]
    pyarrow.parquet.write_table(pyarrow.table({"prompt": prompts, column: answers}), path)
    return str(path)


def test_decimals_in_parquet_lose_trailing_zeros(tmp_path):
    source = parquet(tmp_path / "a.parquet", [Decimal("17.00"), Decimal("0.50")])
    assert [problem.answer for problem in load_problems(source)] == ["17", "0.5"]


def test_prompts_in_parquet_may_begin_with_a_brace(tmp_path):
    rows = {"prompt": ["{1, 2} is a set. Its sum?"], "answer": ["3"]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "a.parquet")
    (problem,) = load_problems(str(tmp_path / "a.parquet"))
    assert problem.prompt == "{1, 2} is a set. Its sum?"


@pytest.mark.parametrize(
    "kind, large", [(pyarrow.float32(), "1234567.1"), (pyarrow.float64(), "1234567.125")]
)
def test_floats_in_parquet_have_the_digits_of_their_type(tmp_path, kind, large):
    values = pyarrow.array([0.1, 17, 1234567.125], kind)
    in_lists = [{"ground_truth": [value]} for value in values.to_pylist()]
    reward_model = pyarrow.struct([("ground_truth", pyarrow.list_(kind))])
    nested = pyarrow.array(in_lists, reward_model)
    sources = [
        parquet(tmp_path / "a.parquet", values),
        parquet(tmp_path / "b.parquet", nested, "reward_model"),
    ]
    for source in sources:
        assert [problem.answer for problem in load_problems(source)] == ["0.1", "17", large]


FLOAT32 = pyarrow.float32()
FLOAT64 = pyarrow.float64()
BAD_COLUMNS = [
    ([16777216], FLOAT32, "row 1 has the answer 16777216.0, a float so large"),
    ([0.5, 2**53], FLOAT64, "row 2 has the answer 9007199254740992.0, a float so large"),
    ([1, None], FLOAT64, "row 2 has no answer"),
    ([math.nan], FLOAT32, "row 1 has no answer"),
    ([b"17"], None, "row 1: answer has the type bytes"),
]


@pytest.mark.parametrize("values, kind, pattern", BAD_COLUMNS, ids=str)
def test_bad_answers_in_parquet_are_refused_with_their_row(tmp_path, values, kind, pattern):
    with pytest.raises(FipoError, match=pattern):
        load_problems(parquet(tmp_path / "a.parquet", pyarrow.array(values, kind)))


# ----------------------------------------------------------------------------------------- prompts


def test_prompts_use_the_chat_template_if_there_is_one(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    messages = [{"role": "user", "content": "1+2=?"}]
    assert fipo.encode_prompt("1+2=?\n", tokenizer) == tokenizer("1+2=?\n")["input_ids"]
    assert fipo.encode_prompt(messages, tokenizer) == tokenizer("1+2=?\n\n")["input_ids"]
    turns = "{% for m in messages %}{{ m.content }},{% endfor %}"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %}:{% endif %}"
    ids = fipo.encode_prompt(messages, tokenizer)
    assert ids == fipo.encode_prompt("1+2=?", tokenizer)
    assert tokenizer.decode(ids) == "1+2=?,:"


def test_problems_beyond_the_first_n_and_long_prompts_are_dropped(base, tmp_path, capsys):
    data = tmp_path / "a.jsonl"
    write_jsonl(data, [{"prompt": "1" * n, "answer": "2"} for n in (3, 5, 9)])
    cfg = fipo.EvalConfig(model=base, data=str(data), max_prompt=5, max_response=8)
    policy = fipo.Policy(base, cfg)

    def lengths() -> list[int]:
        problems = fipo.encode_problems(cfg.data, policy, cfg)
        return [len(problem.prompt_ids) for problem in problems]

    assert lengths() == [3, 5]
    assert "of the first 3 of 3 problems, 2 are within --max_prompt" in capsys.readouterr().out
    cfg.problems = 1
    assert lengths() == [3]
    expected = "a.jsonl: of the first 1 of 3 problems, 1 are within --max_prompt"
    assert expected in capsys.readouterr().out
    cfg.problems = 9  # more than there are
    assert lengths() == [3, 5]
    cfg.max_prompt = 2
    with pytest.raises(FipoError, match="every prompt is longer"):
        lengths()
    cfg.max_prompt = 9
    cfg.max_response = 248
    with pytest.raises(FipoError, match="context of 256"):
        lengths()


def test_answers_too_long_for_dapo_are_reported(base, tmp_path, capsys):
    data = tmp_path / "a.jsonl"
    write_jsonl(data, [{"prompt": "1+1=?\n", "solution": "We add. " * 20 + "Answer: $2$."}])
    cfg = fipo.EvalConfig(model=base, data=str(data), max_prompt=16, max_response=8)
    fipo.encode_problems(cfg.data, fipo.Policy(base, cfg), cfg)
    reported = "1 of 1 answers have over 100 characters, which the dapo verifier compares"
    assert reported in capsys.readouterr().out


@pytest.mark.parametrize("verifier", ["dapo", "math"])
def test_answers_with_leading_zeros_are_reported_for_dapo(base, tmp_path, capsys, verifier):
    answers = ["025", "$07$", "-03", "0", "0.5", ".05", "10", "-0.5"]
    rows = [{"prompt": f"{i}+1=", "answer": answer} for i, answer in enumerate(answers)]
    data = tmp_path / "a.jsonl"
    write_jsonl(data, rows)
    cfg = fipo.EvalConfig(model=base, data=str(data), max_response=8, verifier=verifier)
    fipo.encode_problems(cfg.data, fipo.Policy(base, cfg), cfg)
    is_reported = (
        "3 of 8 answers begin with 0, which the dapo verifier compares as text: use --verifier math"
        in capsys.readouterr().out
    )
    assert is_reported == (verifier == "dapo")


def test_the_stream_shows_each_problem_once_an_epoch_and_can_be_entered_anywhere():
    problems = [fipo.Problem(str(i), "1") for i in range(7)]
    stream = fipo.draw_problems(problems, 0, 21, seed=3)
    prompts = [problem.prompt for problem in stream]
    epochs = [prompts[:7], prompts[7:14], prompts[14:]]
    for epoch in epochs:
        assert sorted(epoch) == sorted("0123456")
    assert epochs[0] != epochs[1]
    for start, n in itertools.product(range(14), range(1, 7)):
        assert fipo.draw_problems(problems, start, n, seed=3) == stream[start : start + n]


def test_a_function_of_the_user_grades_responses(base, sums, tmp_path, monkeypatch, capsys):
    (tmp_path / "my_rewards.py").write_text(
        "def ends_in_4(response, answer):\n    return response.endswith('4')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "eval"
    command = f"eval --model {base} --data {sums} --problems 4 --eval_samples 4 --max_response 32"
    fipo.main([*command.split(), "--verifier", "my_rewards:ends_in_4", "--out", str(out)])
    rows = [json.loads(line) for line in (out / "responses.jsonl").read_text().splitlines()]
    verdicts = [row["correct"] for row in rows]
    assert verdicts == [row["response"].endswith("4") for row in rows]
    assert set(verdicts) == {True, False}
    assert f"avg@4 {sum(verdicts) / 16:.4g}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, message",
    [
        ("mth", "importing --verifier mth [(]choose dapo, math or MODULE:FUNCTION[)] failed"),
        ("json:nothing", "module 'json' has no attribute 'nothing'"),
        ("no_such_module:f", "No module named 'no_such_module'"),
    ],
)
def test_a_verifier_that_cannot_be_imported_is_refused(name, message):
    with pytest.raises(FipoError, match=message):
        fipo.check_values(fipo.EvalConfig(verifier=name))


def test_a_verifier_must_return_true_or_false(base, sums, tmp_path, monkeypatch):
    (tmp_path / "scores.py").write_text("def half(response, answer):\n    return 0.5\n")
    monkeypatch.syspath_prepend(tmp_path)
    cfg = fipo.EvalConfig(model=base, data=sums, max_response=8, problems=1, verifier="scores:half")
    with pytest.raises(FipoError, match="scores:half returned 0.5: it must return True or False"):
        fipo.run_eval(cfg)
