"""Texts as rows: the prompt is the template's own, thoughts are left out, and the token that ends a turn is learnt."""

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from hominem_mlx.errors import TrainingError
from hominem_mlx.records import Preference, SftPair, Turn
from hominem_mlx.training.rows import collate, spoken, to_row

HEAD = "{{ '<|im_start|>assistant\\n' }}"
BARE = "{% if add_generation_prompt %}" + HEAD + "{% endif %}"
# As Qwen3's: an empty thought stands before the reply that comes next, and before no earlier one.
SWITCHED = "{% if add_generation_prompt %}" + HEAD + "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
# As those of models that always think: the prompt opens a thought, whatever it is told.
ALWAYS = "{% if add_generation_prompt %}" + HEAD + "{{ '<think>\\n' }}{% endif %}"


def template(generation_prompt, *, end="<|im_end|>", last_reply=""):
    """A template whose last reply follows `last_reply`."""
    return (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
        "{% if loop.last and m['role'] == 'assistant' %}{{ '" + last_reply + "' }}{% endif %}"
        "{{ m['content'] + '" + end + "\\n' }}{% endfor %}" + generation_prompt
    )


@pytest.fixture
def speaker(tiny):
    """A random model with another chat template."""

    def make(text):
        lm = tiny()
        lm.tokenizer.chat_template = text
        return lm

    return make


EMPTY_THOUGHT = "<think>\\n\\n</think>\\n\\n"
TEMPLATES = {"bare": template(BARE), "switched": template(SWITCHED, last_reply=EMPTY_THOUGHT)}
TALK = [Turn(role="user", content="My dog is Rex."), Turn(role="assistant", content="A fine name.")]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("reply", ["Rex.", "<think>\nWhich dog?\n</think>\n\nRex.", "Which dog?</think>Rex."])
@pytest.mark.parametrize("history", [[], TALK])
def test_a_row_is_what_the_template_makes_of_the_answered_conversation(speaker, name, reply, history):
    lm = speaker(TEMPLATES[name])
    row, lost = to_row(lm, "What is he called?", reply, history=history, system="Be kind.", max_tokens=512)
    messages = [turn.model_dump() for turn in history]
    messages = [{"role": "system", "content": "Be kind."}, *messages, {"role": "user", "content": "What is he called?"}]
    answered = [*messages, {"role": "assistant", "content": "Rex."}]
    whole = lm.tokenizer.apply_chat_template(answered, enable_thinking=False)
    assert whole[: len(row.prompt)] == row.prompt == lm.chat_tokens(messages)
    assert whole[len(row.prompt) :][: len(row.response)] == row.response and lost == 0
    assert lm.tokenizer.decode(row.response) == "Rex.<|im_end|>"
    # every token of the reply is learnt, the last one included, and no other is
    batch = collate([row])
    [block] = batch.blocks
    assert block.targets.tolist() == row.response and batch.lengths.tolist() == [len(row.response)]
    assert block.where.tolist() == [len(row.prompt) - 1 + i for i in range(len(row.response))]


def test_the_bundled_student_and_its_template_agree(student):
    row, _ = to_row(student, "What is my sister called?", "Nora.", max_tokens=512)
    said = [{"role": "user", "content": "What is my sister called?"}, {"role": "assistant", "content": "Nora."}]
    whole = student.tokenizer.apply_chat_template(said)
    assert whole[: row.num_tokens] == row.prompt + row.response
    assert row.response[-1] == student.end_of_turn == student.tokenizer.eos_token_id


@pytest.mark.parametrize(
    "text",
    [
        template(ALWAYS),  # a thought is opened and never closed
        template(
            ALWAYS, last_reply=EMPTY_THOUGHT
        ),  # the prompt is how the answer begins, but the reply does not follow
        template(BARE, last_reply="Well: "),
    ],
)
def test_a_template_that_writes_replies_elsewhere_is_refused_by_name_and_without_the_texts(speaker, text):
    lm = speaker(text)
    with pytest.raises(TrainingError) as caught:
        to_row(lm, "a secret?", "a secret.", max_tokens=512, name="memory m-7")
    said = str(caught.value)
    assert said.startswith("memory m-7: ") and lm.name in said and "instruct model" in said and "secret" not in said


def test_white_space_around_a_reply_is_the_templates_affair(speaker):
    lm = speaker(template(BARE).replace("m['content']", "(m['content'] | trim)"))
    assert to_row(lm, "one?", "\n two \n", max_tokens=512)[0].response == lm.response_tokens("\n two \n")


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ("<think>\nhm\n</think>\n\nNora.", "Nora."),
        ("<think></think>Nora.", "Nora."),
        ("opened by the prompt</think>\nNora.", "Nora."),
        ("First. <think>hm</think> Then.", "First. Then."),
        ("<think>a</think>Nora. <think>cut short", "Nora."),
        ("<think>a</think>", ""),
        ("\n<think>cut short", ""),
        (" Nora. \n", " Nora. \n"),
        ("The <think> tag opens a thought.", "The <think> tag opens a thought."),
    ],
)
def test_thoughts_are_no_part_of_what_is_said(student, reply, said):
    assert student.spoken(reply) == said
    end = [student.end_of_turn]
    assert student.response_tokens(reply) == student.tokenizer.encode(said, add_special_tokens=False) + end


def test_the_tags_of_thoughts_are_the_tokenizers_own(tiny):
    lm = tiny()
    inner = lm.tokenizer._tokenizer
    inner.add_tokens(["<|think:start|>", "<|think:end|>"])
    lm.tokenizer = TokenizerWrapper(inner)
    assert lm.spoken("<|think:start|>hm<|think:end|>Nora.") == "Nora."
    assert lm.spoken("<think>hm</think>Nora.") == "<think>hm</think>Nora."


def test_thoughts_of_earlier_replies_are_not_read(tiny):
    lm = tiny()
    history = [turn.model_dump() for turn in TALK]
    thought = [history[0], {"role": "assistant", "content": "<think>hm</think>\nA fine name."}]
    assert lm.prompt_tokens("And?", history=thought) == lm.prompt_tokens("And?", history=history)


def test_records_that_say_nothing_are_left_out(tiny):
    lm = tiny()
    silent = "<think>hm</think>"
    memories = [SftPair(instruction="a", response=reply) for reply in (silent, silent + "b")]
    pairs = [Preference(prompt="a", chosen=c, rejected=r) for c, r in (("b", silent), (silent, "b"), ("b", "c"))]
    assert spoken(lm, memories) == memories[1:] and spoken(lm, pairs) == pairs[2:]


@pytest.mark.parametrize("end", ["<|endoftext|>", "<|im_end|>"])
def test_the_end_of_a_turn_is_the_templates_own(speaker, end):
    lm = speaker(template(BARE, end=end))
    lm.tokenizer.eos_token_ids = lm.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert lm.tokenizer.eos_token == "<|im_end|>"
    row, _ = to_row(lm, "a", "b", max_tokens=512)
    assert lm.tokenizer.decode(row.response) == "b" + end


def test_a_template_that_ends_no_turn_leaves_the_end_to_the_tokenizer(speaker):
    lm = speaker(template(BARE, end=""))
    assert lm.end_of_turn == lm.tokenizer.eos_token_id


def test_tokens_of_a_prompt_are_kept_but_never_those_of_another_template(tiny):
    lm = tiny()
    first = lm.prompt_tokens("Hello")
    first.append(1)  # the caller's own
    assert lm.prompt_tokens("Hello") == first[:-1]
    lm.tokenizer.chat_template = "Now: " + lm.tokenizer.chat_template
    assert lm.prompt_tokens("Hello") == lm.chat_tokens([{"role": "user", "content": "Hello"}]) != first[:-1]
