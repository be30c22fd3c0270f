"""Models and tokenizers other than Qwen2: they train correctly or are refused in one sentence."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from conftest import read_jsonl, write_jsonl
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import fipo
import train_small

SHAPE = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT = {"vocab_size": 32, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTER = {"output_router_logits": True, "router_jitter_noise": 0.1}
# MPT has no max_position_embeddings, and a dropout in a part of its config.
MPT = {"vocab_size": 32, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}
MAMBA = {"mamba_d_state": 8, "mamba_expand": 2, "mamba_n_groups": 1}
MAMBA |= {"mamba_n_heads": 4, "mamba_d_head": 16}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
CONV = {"layer_types": ["conv", "full_attention"], "block_ff_dim": 64}
FAMILIES = {
    "gpt2": GPT,  # with a dropout of 0.1
    "openai-gpt": GPT,
    "qwen2": SHAPE | {"attention_dropout": 0.02},
    "mixtral": SHAPE | EXPERTS | ROUTER,
    "mpt": MPT | {"attn_config": {"attn_pdrop": 1}},
    "qwen3_5_text": SHAPE | LINEAR | {"head_dim": 8},
    "bamba": SHAPE | MAMBA | {"attn_layer_indices": [1]},
    "falcon_h1": SHAPE | MAMBA | {"head_dim": 8, "mamba_d_ssm": 64},
    "lfm2": SHAPE | CONV,
    "gemma2": SHAPE | {"head_dim": 8, "final_logit_softcapping": 30.0},
    "granite": SHAPE | {"logits_scaling": 8.0},
    "cohere": SHAPE | {"logit_scale": 0.0625},
    "llama4_text": SHAPE | {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 64},
}
TRAINED = ["gpt2", "qwen2"]
for slow_name in ["mixtral", "mpt", "qwen3_5_text", "bamba", "falcon_h1", "lfm2"]:
    TRAINED.append(pytest.param(slow_name, marks=pytest.mark.slow))
QUESTIONS = ["1+{}=?\n", "1+2+{}=?\n"]  # of different lengths


def save_model(model, folder: str) -> None:
    model.generation_config.eos_token_id = 0
    model.save_pretrained(folder)


@pytest.fixture
def family(tmp_path):
    """Build a tiny model of a family with random weights, and settings of a run with it."""

    def build(name: str, **settings) -> fipo.Config:
        torch.manual_seed(0)
        tokens = {"eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 0}
        config = AutoConfig.for_model(name, **FAMILIES[name], **tokens)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter_name, weight in model.named_parameters():
                if weight.dim() == 2 and "conv" not in parameter_name:
                    weight.mul_(4)  # as sharp as a trained model
        folder = str(tmp_path / "model")
        save_model(model, folder)
        train_small.character_tokenizer().save_pretrained(folder)
        rows = []
        for i in range(1, 9):
            rows.append({"prompt": QUESTIONS[i % 2].format(i), "answer": str(i)})
        data = tmp_path / "sums.jsonl"
        write_jsonl(data, rows)
        return fipo.Config(
            model=folder,
            data=str(data),
            out=str(tmp_path / "run"),
            steps=1,
            group_size=4,
            prompts_per_batch=4,
            prompts_per_mini_batch=2,
            dynamic_sampling=False,
            max_prompt=16,
            max_response=12,
            overlong_buffer=0,
            lr=1e-3,
            warmup_steps=1,
            **settings,
        )

    return build


@pytest.fixture
def any_verdict(monkeypatch):
    """Let every other response count as right, because random models never answer."""
    verdicts = iter([True, False] * 10_000)
    monkeypatch.setitem(fipo.VERIFY, "dapo", lambda response, answer: next(verdicts))


def eval_policy(folder: str | Path) -> fipo.Policy:
    return fipo.Policy(str(folder), fipo.EvalConfig(model=str(folder)))


# ---------------------------------------------------------------------------------------- families


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", TRAINED)
def test_f_is_exactly_1_at_the_first_update_of_every_family(family, any_verdict, name, dtype):
    """Dropout and router noise are off, caches are reordered correctly, and log-probs agree."""
    cfg = family(name, dtype=dtype, gradient_checkpointing=dtype == "float32")
    fipo.train(cfg)
    step = read_jsonl(Path(cfg.out) / "metrics.jsonl")[1]
    assert step["influence_first"] == 1
    assert step["ppo_kl_first"] == 0
    assert step["influence_last"] != 1
    assert step["sampler_mismatch"] < (0.01 if dtype == "bfloat16" else 1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["gemma2", "granite", "cohere"])
def test_models_that_change_their_logits_behind_the_head_are_not_trained(family, name, dtype):
    message = "cannot be trained: its logits are not just its head applied"
    with pytest.raises(fipo.FipoError, match=message):
        fipo.train(family(name, dtype=dtype))


def test_models_that_change_their_logits_behind_the_head_are_evaluated(family):
    sampler = fipo.HFSampler(eval_policy(family("gemma2").model))
    (group,) = sampler.generate([fipo.Problem("", "", [1, 2])], [0], 2, 8, 1.0, 1.0)
    assert len(group) == 2


def test_models_without_separate_hidden_states_are_refused(family):
    message = "^computing log-probs with Llama4ForCausalLM failed: "
    with pytest.raises(fipo.FipoError, match=message):
        fipo.train(family("llama4_text"))


def test_models_without_gradient_checkpointing_are_refused_with_it(family):
    message = "OpenAIGPTLMHeadModel does not support gradient checkpointing"
    with pytest.raises(fipo.FipoError, match=message):
        fipo.train(family("openai-gpt", gradient_checkpointing=True))


def test_a_folder_without_some_weights_is_refused(family):
    """transformers would fill them with random numbers."""
    cfg = family("qwen2")
    model = AutoModelForCausalLM.from_pretrained(cfg.model)
    weights = model.state_dict()
    for name in list(weights):
        if "layers.1.mlp" in name:
            del weights[name]
    model.save_pretrained(cfg.model, state_dict=weights)
    message = "lacks 3 weights of Qwen2ForCausalLM, such as .*layers.1.mlp.down_proj"
    with pytest.raises(fipo.FipoError, match=message):
        fipo.train(cfg)


def test_models_with_nan_weights_are_neither_trained_nor_sampled(family):
    cfg = family("qwen2")
    model = AutoModelForCausalLM.from_pretrained(cfg.model)
    model.model.norm.weight.data[0] = float("nan")
    model.save_pretrained(cfg.model)
    with pytest.raises(fipo.FipoError, match="gives NaN or infinite logits"):
        fipo.train(cfg)
    with pytest.raises(fipo.FipoError, match="logits are NaN or infinite"):
        fipo.HFSampler(eval_policy(cfg.model))


def test_a_context_shorter_than_the_check_of_log_probs_is_trained(family, any_verdict):
    cfg = dataclasses.replace(family("gpt2"), max_response=8, max_prompt=8)
    config = AutoConfig.from_pretrained(cfg.model, n_positions=24)
    save_model(AutoModelForCausalLM.from_config(config), cfg.model)
    fipo.train(cfg)


# ---------------------------------------------------------------------------------------- bfloat16


def test_the_head_runs_in_float32_under_autocast(base):
    """bfloat16 logits near 10 are rounded to 1/16. Only the hidden states may be rounded."""
    policy = fipo.Policy(base, fipo.Config(model=base, dtype="bfloat16"))
    text = "1+2+3+4+5=?\n1+2=3,3+3=6,6+4=10,10+5=15\nAnswer: 15"
    ids = torch.tensor([policy.tokenizer(text)["input_ids"]])
    is_response = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        logp, _ = policy.logprobs(ids, is_response)
        with policy.autocast():
            hidden = policy.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            bfloat16_logits = policy.model(input_ids=ids, use_cache=False).logits
        float32_logits = hidden.float() @ policy.model.lm_head.weight.T

    def largest_error(logits: torch.Tensor) -> float:
        all_logp = logits.float().log_softmax(-1)[0, :-1]
        expected = all_logp.gather(-1, ids[0, 1:, None])[:, 0]
        return (logp[0, 1:] - expected).abs().max().item()

    assert largest_error(float32_logits) < 1e-5
    assert largest_error(bfloat16_logits) > 1e-3


def test_sync_copies_the_trained_weights_into_the_bfloat16_sampler(base):
    policy = fipo.Policy(base, fipo.Config(model=base, dtype="bfloat16"))
    sampler = fipo.HFSampler(policy)
    assert sampler.model.dtype == torch.bfloat16
    assert policy.model.dtype == torch.float32
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.mul_(1.1)
    sampler.sync()
    for copied, trained in zip(sampler.model.parameters(), policy.model.parameters(), strict=True):
        assert torch.equal(copied, trained.bfloat16())


def test_the_warning_about_f_does_not_depend_on_the_drift(capsys):
    fipo.check_first_update({"drift": 0.0, "influence_mean": 1.0}, tolerance=0.1)
    fipo.check_first_update({"drift": 1e-6, "influence_mean": 1.00001}, tolerance=0.1)
    assert not capsys.readouterr().out
    warning = "warning: f must be 1 before the first update, but it is 1.0180"
    for drift in (1e-4, 0.01, 0.09):
        fipo.check_first_update({"drift": drift, "influence_mean": 1.018}, tolerance=0.1)
        assert capsys.readouterr().out.startswith(warning)


# ------------------------------------------------------------------------ tokenizers and templates

# The chat template of Qwen. The others below are variants of it.
TURN = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
OPEN = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def for_each_message(text: str, condition: str = "") -> str:
    return "{% for m in messages " + condition + " %}" + text + "{% endfor %}"


CHAT = for_each_message(TURN) + OPEN


@pytest.fixture
def chat_policy(reader, tmp_path):
    """Build a policy that reads any text, with a chat template whose end of turn is not its EOS."""

    def build(template: str, vocabulary: int = 300) -> fipo.Policy:
        folder = tmp_path / "chat"
        tokenizer = AutoTokenizer.from_pretrained(reader)
        tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])
        tokenizer.chat_template = template
        model = AutoModelForCausalLM.from_pretrained(reader)
        model.resize_token_embeddings(vocabulary)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return eval_policy(folder)

    return build


@pytest.fixture
def encoded(tmp_path):
    """Encode prompts as problems, and return them decoded."""

    def encode(policy: fipo.Policy, *prompts) -> list[str]:
        data = tmp_path / "prompts.jsonl"
        write_jsonl(data, [{"prompt": prompt, "answer": "1"} for prompt in prompts])
        cfg = fipo.EvalConfig(max_prompt=256, max_response=32)
        problems = fipo.encode_problems(str(data), policy, cfg)
        return [policy.tokenizer.decode(problem.prompt_ids) for problem in problems]

    return encode


def test_the_end_of_a_turn_ends_a_response(chat_policy):
    """As in SmolLM2, where the template ends a turn with <|im_end|> and EOS is <|endoftext|>."""
    policy = chat_policy(CHAT)
    eos, end_of_turn = policy.tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert policy.eos == sorted([eos, end_of_turn])
    assert policy.tokenizer.eos_token_id == eos
    assert policy.model.generation_config.eos_token_id == eos


ONLY_USERS = for_each_message("{{ raise_exception('Only users') }}", "if m['role'] != 'user'")
NO_END_OF_TURN = {
    "refuses the assistant": ONLY_USERS + CHAT,
    "ends turns with text": for_each_message("{{ m['role'] + ': ' + m['content'] + '\n\n' }}"),
    "omits the assistant": for_each_message(TURN, "if m['role'] == 'user'"),
}


@pytest.mark.parametrize("kind", NO_END_OF_TURN)
def test_templates_without_an_end_of_turn_add_no_eos(chat_policy, kind):
    policy = chat_policy(NO_END_OF_TURN[kind])
    assert policy.eos == [policy.tokenizer.eos_token_id]


def test_a_token_between_answer_and_end_of_turn_is_not_the_end(chat_policy):
    thinking = CHAT.replace("m['content'] + '<|im_end|>", "m['content'] + '</think><|im_end|>")
    tokenizer = chat_policy(thinking).tokenizer
    tokenizer.add_tokens(["</think>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    assert tokenizer.convert_ids_to_tokens(fipo.end_of_turn(tokenizer)) == ["<|im_end|>"]


def test_the_end_of_a_turn_is_not_part_of_the_answer(chat_policy):
    """<|im_end|> is an added token here, but not a special one, so decoding keeps it."""
    policy = chat_policy(CHAT)
    ids = policy.tokenizer("Answer: 34<|im_end|>")["input_ids"]
    rollout = fipo.Rollout(fipo.Problem("", "34", [1]), ids)
    fipo.grade([rollout], policy, "dapo")
    assert rollout.text == "Answer: 34"
    assert rollout.correct


QUESTION = {"role": "user", "content": "1+1=?"}
BEGUN = {"role": "assistant", "content": "The sum"}


def test_a_prompt_that_ends_with_the_assistant_is_continued(chat_policy, encoded):
    opened, continued = encoded(chat_policy(CHAT), [QUESTION], [QUESTION, BEGUN])
    assert opened.endswith("1+1=?<|im_end|>\n<|im_start|>assistant\n")
    assert continued.endswith("1+1=?<|im_end|>\n<|im_start|>assistant\nThe sum")


def test_a_prompt_that_ends_with_the_assistant_is_continued_without_a_template(reader, encoded):
    assert encoded(eval_policy(reader), [QUESTION, BEGUN]) == ["1+1=?\n\nThe sum"]


NO_QUESTION = {
    "writes nothing": "{# nothing #}",
    "expects lists of parts": for_each_message("{{ '<|im_start|>' + m['role'] + '<|im_end|>' }}"),
}


@pytest.mark.parametrize("kind", NO_QUESTION)
def test_templates_that_drop_the_question_are_refused(chat_policy, encoded, kind):
    message = "chat template alters the last message, '1[+]1=.'"
    with pytest.raises(fipo.FipoError, match=message):
        encoded(chat_policy(NO_QUESTION[kind]), "1+1=?")


def test_the_error_of_a_template_is_reported_in_one_sentence(chat_policy, encoded):
    refuse = "{{ raise_exception('System role not supported') }}"
    policy = chat_policy(for_each_message(refuse, "if m['role'] == 'system'") + CHAT)
    chat = [{"role": "system", "content": "Be brief."}, QUESTION]
    message = "prompts.jsonl: encoding .* failed: System role not supported"
    with pytest.raises(fipo.FipoError, match=message):
        encoded(policy, chat)


def test_tokens_without_an_embedding_are_refused(chat_policy, encoded):
    message = "a prompt contains token 25[78], but the model knows only 257 tokens"
    with pytest.raises(fipo.FipoError, match=message):
        encoded(chat_policy(CHAT, vocabulary=257), "1+1=?")


def test_eos_that_the_tokenizer_appends_to_a_prompt_is_removed(reader):
    """A response would begin after its own end. EOS in the prompt itself is kept."""
    plain = AutoTokenizer.from_pretrained(reader)
    end = plain.eos_token
    end_id = plain.eos_token_id
    pieces = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": end, "type_id": 0}}]
    append_eos = {
        "type": "TemplateProcessing",
        "single": pieces,
        "pair": pieces,
        "special_tokens": {end: {"id": end, "ids": [end_id], "tokens": [end]}},
    }
    tokenizer = AutoTokenizer.from_pretrained(reader)
    state = json.loads(tokenizer.backend_tokenizer.to_str()) | {"post_processor": append_eos}
    tokenizer._tokenizer = tokenizer.backend_tokenizer.from_str(json.dumps(state))
    assert tokenizer("1+1")["input_ids"][-1] == end_id
    assert fipo.encode_prompt("1+1", tokenizer) == plain("1+1")["input_ids"]
    assert fipo.encode_prompt("1+1" + end, tokenizer)[-1] == end_id
