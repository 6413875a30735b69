"""Which tokens of a dialogue are targets, against token lists written by hand and a naive second derivation."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmtk.config.sections import DataConfig
from llmtk.data import Dialogue, EncodingReport, PromptCompletion, Row, encode
from llmtk.errors import ConfigurationError, DatasetError

if TYPE_CHECKING:
    from pathlib import Path

CHATML = DataConfig(template="chatml")
OWN = DataConfig()


def turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def dialogue(*contents: str, place: str = "row 1") -> Dialogue:
    roles = ["user", "assistant"] * len(contents)
    return Dialogue([turn(role, content) for role, content in zip(roles, contents, strict=False)], place=place)


def encoded(row: Row, tokenizer: Any, config: DataConfig = OWN) -> tuple[list[str], list[str], EncodingReport]:
    """All tokens, those that are targets, and the report."""
    data, report = encode([row], tokenizer, config)
    tokens = tokenizer.convert_ids_to_tokens(data[0]["input_ids"])
    targets = [token for token, target in zip(tokens, data[0]["targets"], strict=True) if target]
    return tokens, targets, report


def test_chatml_by_hand(chatml_tokenizer: Any) -> None:
    tokens, _, report = encoded(dialogue("a", "b", "c", "de"), chatml_tokenizer, CHATML)
    user, answer = [*"user", "Ċ"], [*"assistant", "Ċ"]
    start, end = "<|im_start|>", "<|im_end|>"
    expected = [
        *[(t, False) for t in [start, *user, "a", end, "Ċ", start, *answer]],
        ("b", True),
        (end, True),
        *[(t, False) for t in ["Ċ", start, *user, "c", end, "Ċ", start, *answer]],
        *[("d", True), ("e", True), (end, True), ("Ċ", False)],
    ]
    data, _ = encode([dialogue("a", "b", "c", "de")], chatml_tokenizer, CHATML)
    assert list(zip(tokens, data[0]["targets"], strict=True)) == expected
    assert report.notices == []


def test_chatml_without_its_markers_ends_turns_with_the_end_token(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(["</s>"], eos_token="</s>")
    tokens, targets, _ = encoded(dialogue("a", "b", "c", "d"), tokenizer, CHATML)
    assert targets == ["b", "</s>", "d", "</s>"]
    text = "<|im_start|>user\n{}</s>\n<|im_start|>assistant\n{}</s>\n" * 2
    assert tokenizer.decode(tokenizer.convert_tokens_to_ids(tokens)) == text.format(*"abcd")


def test_chatml_needs_something_that_ends_a_turn(make_tokenizer: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"neither <.im_end.> nor an end token"):
        encoded(dialogue("a", "b"), make_tokenizer(), CHATML)


def test_no_template_at_all(make_tokenizer: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"no chat template.*give data.template=chatml, or the file"):
        encoded(dialogue("a", "b"), make_tokenizer())


def test_template_from_a_file(make_tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text(
        "{% for m in messages %}{{ m.role[0] + ':' + m.content + eos_token }}{% endfor %}"
        "{{ 'a:' * add_generation_prompt }}"
    )
    tokenizer = make_tokenizer(["</s>"], eos_token="</s>")
    tokens, targets, _ = encoded(dialogue("x", "y"), tokenizer, DataConfig(template=str(path)))
    assert tokens == ["u", ":", "x", "</s>", "a", ":", "y", "</s>"]
    assert targets == ["y", "</s>"]
    with pytest.raises(ConfigurationError, match=r"data.template=no\.jinja is neither a file nor the name"):
        encoded(dialogue("x", "y"), tokenizer, DataConfig(template="no.jinja"))


LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)


def test_a_template_that_writes_the_first_token_itself(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(["<s>", "</s>"], bos=True, eos_token="</s>", chat_template=LLAMA2)
    tokens, targets, _ = encoded(dialogue("a", "b", "c", "d"), tokenizer)
    assert tokens.count("<s>") == 1
    assert targets == ["Ġ", "b", "Ġ", "</s>", "Ġ", "d", "Ġ", "</s>"]


PLAIN = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def test_an_end_token_is_added_where_the_template_has_none(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(["</s>"], eos_token="</s>", chat_template=PLAIN)
    tokens, targets, report = encoded(dialogue("a", "b", "c", "d"), tokenizer)
    assert targets == ["b", "Ċ", "d", "Ċ", "</s>"]
    assert tokens[-1] == "</s>"
    assert report.notices == [
        "The chat template puts no special token behind the assistant's last turn: the end token </s> is put there, "
        "and is a target."
    ]
    with pytest.raises(ConfigurationError, match="The tokenizer has no end token"):
        encoded(dialogue("a", "b"), make_tokenizer(chat_template=PLAIN))


def test_a_white_space_token_with_trimmed_offsets_is_still_a_target(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(["</s>"], trim=True, eos_token="</s>", chat_template=PLAIN)
    _, targets, _ = encoded(dialogue("a", "  b c "), tokenizer)
    assert targets == ["Ġ", "Ġ", "b", "Ġ", "c", "Ġ", "Ċ", "</s>"]


def test_an_end_token_that_closes_the_text_alone_is_not_taken_for_a_turn(make_tokenizer: Any) -> None:
    template = (
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>' }}{% else %}{{ eos_token }}{% endif %}"
    )
    tokenizer = make_tokenizer(["<|end|>", "</s>"], eos_token="</s>", chat_template=template)
    _, targets, _ = encoded(dialogue("a", "b", "c", "d"), tokenizer)
    assert targets == ["b", "<|end|>", "d", "<|end|>", "</s>"]


def test_messages_behind_the_last_answer_are_left_out(chatml_tokenizer: Any) -> None:
    with_question = encoded(dialogue("a", "b", "c"), chatml_tokenizer, CHATML)[0]
    assert with_question == encoded(dialogue("a", "b"), chatml_tokenizer, CHATML)[0]


def test_system_and_an_answer_that_comes_first(chatml_tokenizer: Any) -> None:
    row = Dialogue([turn("assistant", "hello"), turn("user", "a"), turn("assistant", "b")])
    assert encoded(row, chatml_tokenizer, CHATML)[1] == [*"hello", "<|im_end|>", "b", "<|im_end|>"]
    row = Dialogue([turn("system", "s"), turn("user", "a"), turn("assistant", "b"), turn("assistant", "c")])
    assert encoded(row, chatml_tokenizer, CHATML)[1] == ["b", "<|im_end|>", "c", "<|im_end|>"]


def test_of_a_conversational_completion_its_own_turns_alone_are_targets(chatml_tokenizer: Any) -> None:
    prompt, completion = dialogue("a", "b", "c").messages, [turn("assistant", "d")]
    tokens, targets, _ = encoded(PromptCompletion(prompt, completion), chatml_tokenizer, CHATML)
    assert targets == ["d", "<|im_end|>"]
    assert tokens == encoded(dialogue("a", "b", "c", "d"), chatml_tokenizer, CHATML)[0]


def test_a_token_across_the_boundary_is_a_target_and_said(make_tokenizer: Any) -> None:
    special = ["<|im_start|>", "<|im_end|>", "</s>"]
    tokenizer = make_tokenizer(special, [("Ċ", "Ċ")], eos_token="</s>")
    _, targets, report = encoded(dialogue("a", "\nb"), tokenizer, CHATML)
    assert targets == ["ĊĊ", "b", "<|im_end|>"]
    assert report.moved == 1
    assert report.notices[0].startswith("row 1: the token 'ĊĊ' joins the prompt's end with the answer's beginning.")


def test_a_special_token_for_the_unknown_is_no_stop_token(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(["<unk>", "</s>"], eos_token="</s>", unk_token="<unk>", chat_template=PLAIN)
    assert encoded(dialogue("a", "b<unk>"), tokenizer)[1] == ["b", "<unk>", "Ċ", "</s>"]


TOOLS = "{% for t in tools or [] %}{{ '[' + t.name + ']' }}{% endfor %}" + PLAIN


def test_tools_reach_the_template_or_their_loss_is_said(make_tokenizer: Any, chatml_tokenizer: Any) -> None:
    row = Dialogue(dialogue("a", "b").messages, [{"name": "add"}], place="x.jsonl:4")
    tokenizer = make_tokenizer(["</s>"], eos_token="</s>", chat_template=TOOLS)
    tokens, _, report = encoded(row, tokenizer)
    assert "".join(tokens).startswith("[add]user:")
    assert not any("tools" in notice for notice in report.notices)
    tokenizer = make_tokenizer(["</s>"], eos_token="</s>", chat_template=PLAIN)
    lost = "x.jsonl:4: the chat template doesn't show tools: the model will not see them."
    assert lost in encoded(row, tokenizer)[2].notices
    with pytest.raises(DatasetError, match=r"x\.jsonl:4: the chat template fails: chatml has no form for tools"):
        encoded(row, chatml_tokenizer, CHATML)


def test_tool_calls_that_the_template_does_not_show_are_said(make_tokenizer: Any) -> None:
    call = [{"type": "function", "function": {"name": "add", "arguments": {}}}]
    calling = turn("assistant", "one moment") | {"tool_calls": call}
    row = Dialogue([turn("user", "a"), calling, turn("tool", "2"), turn("assistant", "b")], place="x.jsonl:4")
    lost = "x.jsonl:4: the chat template doesn't show tool calls: a turn that makes one is learnt without it."
    showing = PLAIN.replace("m.content", "m.content + (m.tool_calls or '') | string")
    for template, is_lost in ((PLAIN, True), (showing, False)):
        tokenizer = make_tokenizer(["</s>"], eos_token="</s>", chat_template=template)
        assert (lost in encoded(row, tokenizer)[2].notices) is is_lost


# -- templates that cannot be used --------------------------------------------------------------------------------

STRIPS = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def test_a_template_that_strips_earlier_reasoning_is_refused(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(["</s>"], eos_token="</s>", chat_template=STRIPS)
    row = dialogue("a", "hm</think>b", "c", "hm</think>d", place="x.json: row 3")
    with pytest.raises(DatasetError) as caught:
        encoded(row, tokenizer)
    assert str(caught.value).startswith(
        "x.json: row 3: the chat template changes earlier text, so the tokens of message 2 (assistant) cannot be told"
    )
    assert "Give rows of prompt and completion (messages)" in str(caught.value)
    mended = PromptCompletion(row.messages[:3], row.messages[3:])
    assert encoded(mended, tokenizer)[1] == [*"hm</think>d", "</s>"]


def test_a_template_whose_prompt_is_not_in_the_dialogue_is_refused(make_tokenizer: Any) -> None:
    template = PLAIN.replace("'assistant: '", "'assistant: <think>'")
    tokenizer = make_tokenizer(["</s>"], eos_token="</s>", chat_template=template)
    with pytest.raises(DatasetError, match=r"row 1: .*what it asks an answer with is not what it puts before"):
        encoded(dialogue("a", "b"), tokenizer)


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__ }}",
        "{{ ''['__class__'] }}",
        "{{ '' | attr(\"__class__\") }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{% set x = messages.__class__.__mro__ %}",
    ],
)
def test_a_template_that_reaches_for_internals_is_refused(make_tokenizer: Any, text: str) -> None:
    tokenizer = make_tokenizer(["</s>"], eos_token="</s>", chat_template=PLAIN + "\n" + text)
    with pytest.raises(ConfigurationError, match=r"The tokenizer's chat template reaches for .*__class__.* in line 3"):
        encoded(dialogue("a", "b"), tokenizer)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{{ ('{0.__cla' + 'ss__.x}').format(1) }}", "__class__"),
        ("{{ raise_exception('roles must alternate') }}", "the chat template fails: roles must alternate"),
        ("{{ 1 / 0 }}", "the chat template fails: division by zero"),
        ("{{ messages[9].content.x }}", "the chat template fails: "),
    ],
)
def test_a_template_that_fails_names_the_row(make_tokenizer: Any, text: str, reason: str) -> None:
    tokenizer = make_tokenizer(["</s>"], eos_token="</s>", chat_template=text)
    with pytest.raises(DatasetError) as caught:
        encoded(dialogue("a", "b", place="x.jsonl:9"), tokenizer)
    assert str(caught.value).startswith("x.jsonl:9: the chat template fails: ")
    assert reason in str(caught.value)


def test_a_broken_template_is_told_with_its_line(make_tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "broken.jinja"
    path.write_text("one\n{{ 'two }}")
    with pytest.raises(ConfigurationError, match=r"broken\.jinja is broken in line 2"):
        encoded(dialogue("a", "b"), make_tokenizer(), DataConfig(template=str(path)))


# -- against a second derivation ----------------------------------------------------------------------------------

content = st.text(st.characters(codec="utf-8", exclude_characters="<>"), max_size=12)
answer = content.filter(str.strip)
ROLES = {"user": content, "assistant": answer, "system": content, "tool": content}
message = st.sampled_from(sorted(ROLES)).flatmap(lambda role: ROLES[role].map(lambda text: turn(role, text)))
some_dialogue = st.lists(message, max_size=6).flatmap(
    lambda start: answer.map(lambda text: Dialogue([turn("user", "?"), *start, turn("assistant", text)], place="row 1"))
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(row=some_dialogue)
def test_targets_are_the_answers_and_their_stop_tokens(chatml_tokenizer: Any, row: Dialogue) -> None:
    data, _ = encode([row], chatml_tokenizer, CHATML)
    ids, targets = data[0]["input_ids"], data[0]["targets"]
    answers = [m["content"] + "<|im_end|>" for m in row.messages if m["role"] == "assistant"]
    chosen = [token for token, target in zip(ids, targets, strict=True) if target]
    assert chatml_tokenizer.decode(chosen) == "".join(answers)
    # The second derivation: walk the bytes, with what stands between a header and a stop token as the answer.
    text = chatml_tokenizer.decode(ids)
    assert re.findall(r"<\|im_start\|>assistant\n((?s:.*?)<\|im_end\|>)", text) == answers
