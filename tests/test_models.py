"""Models and tokenizers other than Qwen2: they train correctly, or they are refused in one sentence."""

import dataclasses
import json

import pytest
import torch
from conftest import read_jsonl, write_jsonl
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import fipo
import train_small

SHAPE = dict(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64)  # fmt: skip
MAMBA = dict(mamba_d_state=8, mamba_expand=2, mamba_n_groups=1)
FAMILIES = {
    "gpt2": dict(vocab_size=32, n_embd=32, n_layer=2, n_head=4, n_positions=64),  # dropout 0.1
    "openai-gpt": dict(vocab_size=32, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "qwen2": SHAPE | dict(attention_dropout=0.02),
    "mixtral": SHAPE | dict(num_local_experts=4, num_experts_per_tok=2, output_router_logits=True,
                            router_jitter_noise=0.1),  # fmt: skip
    # It names no max_position_embeddings, and has a dropout in a part of its config.
    "mpt": dict(vocab_size=32, d_model=32, n_heads=4, n_layers=2, max_seq_len=64, attn_config=dict(attn_pdrop=1)),
    "qwen3_5_text": SHAPE | dict(head_dim=8, layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2,
                                 linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8),
    "bamba": SHAPE | MAMBA | dict(attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=16),
    "falcon_h1": SHAPE | MAMBA | dict(head_dim=8, mamba_n_heads=4, mamba_d_head=16, mamba_d_ssm=64),
    "lfm2": SHAPE | dict(layer_types=["conv", "full_attention"], block_ff_dim=64),
    "gemma2": SHAPE | dict(head_dim=8, final_logit_softcapping=30.0),
    "granite": SHAPE | dict(logits_scaling=8.0),
    "cohere": SHAPE | dict(logit_scale=0.0625),
    "llama4_text": SHAPE | dict(head_dim=8, num_local_experts=2, intermediate_size_mlp=64),
}  # fmt: skip
SUMS = [
    {"prompt": f"1+{i}=?\n" if i % 2 else f"1+2+{i}=?\n", "answer": str(i)} for i in range(1, 9)
]


@pytest.fixture
def family(tmp_path):
    """Build a tiny model of a family with random weights, and settings of a run with it."""

    def build(name: str, **settings) -> fipo.Config:
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            name, **FAMILIES[name], eos_token_id=0, bos_token_id=0, pad_token_id=0
        )
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter_name, weight in model.named_parameters():
                if weight.dim() == 2 and "conv" not in parameter_name:
                    weight.mul_(4)  # as sharp as a trained model
        model.generation_config.eos_token_id = 0
        model.save_pretrained(tmp_path / "model")
        train_small.character_tokenizer().save_pretrained(tmp_path / "model")
        write_jsonl(tmp_path / "sums.jsonl", SUMS)
        return fipo.Config(
            model=str(tmp_path / "model"), data=str(tmp_path / "sums.jsonl"), out=str(tmp_path / "run"), sampler="hf",
            steps=1, group_size=4, prompts_per_batch=4, prompts_per_mini_batch=2, dynamic_sampling=False,
            max_prompt=16, max_response=12, overlong_buffer=0, lr=1e-3, warmup_steps=1, **settings,
        )  # fmt: skip

    return build


@pytest.fixture
def any_verdict(monkeypatch):
    """Random models never answer: every other response counts as right."""
    verdicts = iter([True, False] * 10_000)
    monkeypatch.setitem(fipo.VERIFY, "dapo", lambda response, answer: next(verdicts))


# ----------------------------------------------------------------------------------------------------------- families


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name", ["gpt2", "qwen2", "mixtral", "mpt", "qwen3_5_text", "bamba", "falcon_h1", "lfm2"]
)
def test_f_is_exactly_1_at_the_first_update_of_every_family(family, any_verdict, name, dtype):
    """Dropout and router noise are off, caches are reordered correctly, and sampler and trainer agree."""
    cfg = family(name, dtype=dtype, gradient_checkpointing=dtype == "float32")
    fipo.train(cfg)
    step = read_jsonl(f"{cfg.out}/metrics.jsonl")[1]
    assert step["influence_first"] == 1 and step["ppo_kl_first"] == 0
    assert step["influence_last"] != 1
    assert step["sampler_mismatch"] < (0.01 if dtype == "bfloat16" else 1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["gemma2", "granite", "cohere"])
def test_a_model_that_changes_its_logits_behind_the_head_is_refused(family, name, dtype):
    with pytest.raises(
        fipo.FipoError, match="cannot be trained: its logits are not just its head applied"
    ):
        fipo.train(family(name, dtype=dtype))


def test_evaluation_samples_from_a_model_that_changes_its_logits(family):
    cfg = family("gemma2")
    sampler = fipo.HFSampler(policy_of(cfg, training=False))
    (group,) = sampler.generate([fipo.Problem("", "", [1, 2])], [0], 2, 8, 1.0, 1.0)
    assert len(group) == 2


def test_a_model_without_separate_hidden_states_is_refused_in_one_sentence(family):
    with pytest.raises(
        fipo.FipoError, match="^computing log-probs with Llama4ForCausalLM failed: "
    ):
        fipo.train(family("llama4_text"))


def test_weights_that_the_checkpoint_lacks_are_named(family):
    """transformers would fill them with random numbers."""
    cfg = family("qwen2")
    model = AutoModelForCausalLM.from_pretrained(cfg.model)
    weights = {
        name: weight for name, weight in model.state_dict().items() if "layers.1.mlp" not in name
    }
    model.save_pretrained(cfg.model, state_dict=weights)
    with pytest.raises(
        fipo.FipoError,
        match="lacks 3 weights of Qwen2ForCausalLM, such as .*layers.1.mlp.down_proj",
    ):
        fipo.train(cfg)


def test_a_context_shorter_than_the_check_is_no_obstacle(family, any_verdict):
    cfg = dataclasses.replace(family("gpt2"), max_response=8, max_prompt=8)
    config = AutoConfig.from_pretrained(cfg.model, n_positions=24)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = 0
    model.save_pretrained(cfg.model)
    fipo.train(cfg)


def test_a_model_without_gradient_checkpointing_is_refused_in_one_sentence(family):
    with pytest.raises(
        fipo.FipoError, match="OpenAIGPTLMHeadModel does not support gradient checkpointing"
    ):
        fipo.train(family("openai-gpt", gradient_checkpointing=True))


def test_damaged_weights_are_named(family):
    cfg = family("qwen2")
    model = AutoModelForCausalLM.from_pretrained(cfg.model)
    model.model.norm.weight.data[0] = float("nan")
    model.save_pretrained(cfg.model)
    with pytest.raises(fipo.FipoError, match="gives NaN or infinite logits"):
        fipo.train(cfg)
    with pytest.raises(fipo.FipoError, match="logits are NaN or infinite"):
        fipo.HFSampler(policy_of(cfg, training=False))


def policy_of(cfg: fipo.Config, training: bool = True) -> fipo.Policy:
    return fipo.Policy(
        cfg.model, cfg if training else fipo.EvalConfig(model=cfg.model, sampler="hf")
    )


# ------------------------------------------------------------------------------------------------------------ bfloat16


def test_the_head_runs_in_float32_under_autocast(base):
    """bfloat16 logits are rounded to 1/16 near 10. The float32 head leaves only the rounding of the hidden states."""
    policy = fipo.Policy(base, fipo.Config(model=base, dtype="bfloat16"))
    ids = torch.tensor(
        [policy.tokenizer("1+2+3+4+5=?\n1+2=3,3+3=6,6+4=10,10+5=15\nAnswer: 15")["input_ids"]]
    )
    is_response = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        logp, _ = policy.logprobs(ids, is_response)
        with policy.autocast():
            hidden = policy.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            rounded = policy.model(input_ids=ids, use_cache=False).logits
        expected = (hidden.float() @ policy.model.lm_head.weight.T).log_softmax(-1)
        rounded = rounded.float().log_softmax(-1)

    def largest_error(all_logp: torch.Tensor) -> float:
        return (
            (logp[0, 1:] - all_logp[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]).abs().max().item()
        )

    assert largest_error(expected) < 1e-5
    assert largest_error(rounded) > 1e-3


def test_rollouts_in_bfloat16_follow_the_trained_weights(base):
    """HFSampler samples from a bfloat16 copy of the float32 weights. `sync` brings it up to date."""
    policy = fipo.Policy(base, fipo.Config(model=base, dtype="bfloat16"))
    sampler = fipo.HFSampler(policy)
    assert sampler.model.dtype == torch.bfloat16 and policy.model.dtype == torch.float32
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.mul_(1.1)
    sampler.sync()
    for copied, trained in zip(sampler.model.parameters(), policy.model.parameters(), strict=True):
        assert torch.equal(copied, trained.bfloat16())


def test_the_warning_for_f_at_the_first_update_does_not_grow_with_the_noise(capsys):
    fipo.check_first_update({"drift": 0.0, "influence_mean": 1.0}, tolerance=0.1)
    fipo.check_first_update({"drift": 1e-6, "influence_mean": 1.00001}, tolerance=0.1)
    assert not capsys.readouterr().out
    for drift in (1e-4, 0.01, 0.09):
        fipo.check_first_update({"drift": drift, "influence_mean": 1.018}, tolerance=0.1)
        assert capsys.readouterr().out.startswith(
            "warning: f must be 1 before the first update, but it is 1.0180"
        )


# --------------------------------------------------------------------------------------------- tokenizers and templates

TURNS = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
CHAT = TURNS + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


@pytest.fixture
def chat_reader(reader, tmp_path):
    """A model that reads any text, with a chat template whose end of turn is not its EOS."""

    def build(template: str, vocabulary: int = 300) -> str:
        folder = tmp_path / "chat"
        tokenizer = AutoTokenizer.from_pretrained(reader)
        tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])
        tokenizer.chat_template = template
        model = AutoModelForCausalLM.from_pretrained(reader)
        model.resize_token_embeddings(vocabulary)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return build


def problems_of(tmp_path, policy: fipo.Policy, *prompts) -> list[fipo.Problem]:
    write_jsonl(
        tmp_path / "prompts.jsonl", [{"prompt": prompt, "answer": "1"} for prompt in prompts]
    )
    cfg = fipo.EvalConfig(max_prompt=256, max_response=32)
    return fipo.encode_problems(str(tmp_path / "prompts.jsonl"), policy, cfg)


def test_the_end_of_a_turn_ends_a_response(chat_reader):
    """As in SmolLM2, where the template ends a turn with <|im_end|> and EOS is <|endoftext|>."""
    policy = fipo.Policy(chat_reader(CHAT), fipo.EvalConfig(sampler="hf"))
    ends = policy.tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert policy.eos == sorted(ends)
    assert (
        policy.tokenizer.eos_token_id == ends[0]
        and policy.model.generation_config.eos_token_id == ends[0]
    )


@pytest.mark.parametrize("template", [
    "{% for m in messages if m['role'] != 'user' %}{{ raise_exception('Only users') }}{% endfor %}" + CHAT,
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n\n' }}{% endfor %}",
    "{% for m in messages if m['role'] == 'user' %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}",
])  # fmt: skip
def test_a_template_without_an_end_of_turn_leaves_eos_as_it_is(chat_reader, template):
    """It refuses messages of the assistant, ends them with text, or does not write them."""
    policy = fipo.Policy(chat_reader(template), fipo.EvalConfig(sampler="hf"))
    assert policy.eos == [policy.tokenizer.eos_token_id]


def test_the_end_of_a_turn_is_no_part_of_the_answer(chat_reader):
    """`<|im_end|>` is an added token here, not a special one, so that decoding keeps it."""
    policy = fipo.Policy(chat_reader(CHAT), fipo.EvalConfig(sampler="hf"))
    ids = policy.tokenizer("Answer: 34<|im_end|>")["input_ids"]

    class Answers(fipo.HFSampler):
        def generate(self, problems, seeds, n, *settings):
            return [[fipo.Rollout(problem, ids, [0.0] * len(ids))] * n for problem in problems]

    sampler = Answers.__new__(Answers)
    sampler.policy, sampler.ranks = policy, 1
    ((rollout,),) = fipo.sample(
        sampler, [fipo.Problem("", "34", [1])], (0,), fipo.EvalConfig(), 1, 1.0, 1.0
    )
    assert rollout.text == "Answer: 34" and rollout.correct


def test_a_prompt_that_ends_with_the_assistant_is_continued(chat_reader, tmp_path):
    policy = fipo.Policy(chat_reader(CHAT), fipo.EvalConfig(sampler="hf"))
    question = {"role": "user", "content": "1+1=?"}
    begun = {"role": "assistant", "content": "The sum"}
    opened, continued = problems_of(tmp_path, policy, [question], [question, begun])
    text = [policy.tokenizer.decode(p.prompt_ids) for p in (opened, continued)]
    assert text[0].endswith("1+1=?<|im_end|>\n<|im_start|>assistant\n")
    assert text[1].endswith("1+1=?<|im_end|>\n<|im_start|>assistant\nThe sum")


def test_without_a_template_the_assistant_s_last_message_is_continued(reader, tmp_path):
    policy = fipo.Policy(reader, fipo.EvalConfig(sampler="hf"))
    chat = [{"role": "user", "content": "1+1=?"}, {"role": "assistant", "content": "The sum"}]
    (problem,) = problems_of(tmp_path, policy, chat)
    assert policy.tokenizer.decode(problem.prompt_ids) == "1+1=?\n\nThe sum"


@pytest.mark.parametrize("template", [
    "{# nothing #}",
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '<|im_end|>' }}{% endfor %}",  # it expects lists of parts
])  # fmt: skip
def test_a_template_that_drops_the_question_is_refused(chat_reader, tmp_path, template):
    policy = fipo.Policy(chat_reader(template), fipo.EvalConfig(sampler="hf"))
    with pytest.raises(
        fipo.FipoError, match="chat template does not write the last message as it is: '1[+]1=.'"
    ):
        problems_of(tmp_path, policy, "1+1=?")


def test_a_token_between_answer_and_end_of_turn_is_not_the_end(chat_reader):
    template = CHAT.replace("m['content'] + '<|im_end|>", "m['content'] + '</think><|im_end|>")
    folder = chat_reader(template)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["</think>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    assert tokenizer.convert_ids_to_tokens(fipo.end_of_turn(tokenizer)) == ["<|im_end|>"]


def test_a_template_that_refuses_the_system_role_gives_one_sentence(chat_reader, tmp_path):
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    policy = fipo.Policy(chat_reader(refuses + CHAT), fipo.EvalConfig(sampler="hf"))
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1=?"}]
    with pytest.raises(
        fipo.FipoError, match="prompts.jsonl: encoding .* failed: System role not supported"
    ):
        problems_of(tmp_path, policy, chat)


def test_a_token_without_an_embedding_is_refused(chat_reader, tmp_path):
    policy = fipo.Policy(chat_reader(CHAT, vocabulary=257), fipo.EvalConfig(sampler="hf"))
    with pytest.raises(
        fipo.FipoError, match="a prompt contains token 25[78], but the model knows only 257 tokens"
    ):
        problems_of(tmp_path, policy, "1+1=?")


def test_eos_that_the_tokenizer_appends_to_a_prompt_is_removed(reader, tmp_path):
    """A response would otherwise begin after its own end. EOS that the prompt itself contains is kept."""
    tokenizer = AutoTokenizer.from_pretrained(reader)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    end = tokenizer.eos_token
    pieces = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": end, "type_id": 0}}]
    special = {end: {"id": end, "ids": [tokenizer.eos_token_id], "tokens": [end]}}
    added = {
        "type": "TemplateProcessing",
        "single": pieces,
        "pair": pieces,
        "special_tokens": special,
    }
    state["post_processor"] = added
    tokenizer._tokenizer = tokenizer.backend_tokenizer.from_str(json.dumps(state))
    assert tokenizer("1+1")["input_ids"][-1] == tokenizer.eos_token_id
    assert (
        fipo.encode_prompt("1+1", tokenizer)
        == AutoTokenizer.from_pretrained(reader)("1+1")["input_ids"]
    )
    assert fipo.encode_prompt("1+1" + end, tokenizer)[-1] == tokenizer.eos_token_id
