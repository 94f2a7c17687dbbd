"""Targets of conversations: kinds of templates on real tokenizers, the written text stated by hand.

The second part of each kind is what the model has to write. The expected targets follow from it and from the
bytes of the tokens, not from how the package locates a turn.
"""

import functools
import re
from dataclasses import replace

import numpy as np
import pytest
from alignment.chat_kinds import KINDS as FAMILIES
from alignment.test_chat_kinds import chats, check_chat
from hypothesis import given, settings
from hypothesis import strategies as st
from real_tokenizers import NAMES, load

from xtoken_jax.alignment.chat import align_chats
from xtoken_jax.errors import UserError
from xtoken_jax.tokens.tokenizer import TokenizerPair

# {user} and {answer} are contents; END is the tokenizer's own end of a turn.
KINDS = {
    "chatml": ("<|user|>\n{user}{END}\n<|assistant|>\n", "{answer}{END}", "\n"),
    "blank first": ("[INST] {user} [/INST]", " {answer}{END}", ""),
    "blank in the prompt": ("USER: {user} ASSISTANT: ", "{answer}{END}", ""),
    "blank before the end": ("Q: {user}\nA: ", "{answer} {END}", "\n"),
    "line end before the end": ("Q: {user}\nA:\n", "{answer}\n{END}", "\n"),
    "tab": ("# {user}\n\t", "{answer}{END}", "\n"),
    "bracket": ("{user}(", "{answer}{END}", ")\n"),
    "digit": ("{user} 1", "{answer}{END}", "\n"),
    "ideographic blank": ("問{user}　", "{answer}{END}", "\n"),
}
CONVERSATIONS = {
    "a word": [("Is it even?", "Yes")],
    "two turns": [("What is 3+4?", "7, of course."), ("And doubled?", "14.")],
    "self": [("Complete", "self, other): return"), ("More", "2 + 2")],
    "Han": [("二加二?", "四。你好")],
    "inner blanks": [("Go", "one  two\n\n    three")],
}


def end_of(tokenizer):
    role = next(role for role in ("turn_end", "eos", "document_end") if role in tokenizer.roles)
    return tokenizer.backend.id_to_token(tokenizer.roles[role])


def template_of(kind, end):
    before, written, after = (part.replace("{END}", end) for part in KINDS[kind])

    def jinja(part):
        pieces = re.split(r"(\{user\}|\{answer\})", part)
        return "".join(
            "{{ m['content'] }}" if p in ("{user}", "{answer}") else "{{ " + repr(p) + " }}"
            for p in pieces
            if p
        )

    return (
        "{% for m in messages %}{% if m['role'] == 'user' %}"
        + jinja(before)
        + "{% else %}"
        + jinja(written + after)
        + "{% endif %}{% endfor %}"
    )


def expected(kind, turns, end):
    """The rendered text as bytes, and bool a byte: whether the model writes it."""
    raw, learnt = b"", []
    for user, answer in turns:
        for part, ours in zip(KINDS[kind], (False, True, False), strict=True):
            text = part.replace("{END}", end).replace("{user}", user).replace("{answer}", answer).encode()
            raw += text
            # A blank that only the template writes before the answer belongs to no one: see the rule on
            # tokens that join it with the answer.
            stripped = len(text) - len(text.lstrip()) if ours else 0
            learnt += [False] * stripped + [ours] * (len(text) - stripped)
    return raw, np.array(learnt, bool)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("bert", "claude")])
@pytest.mark.parametrize("kind", KINDS)
def test_targets_are_the_tokens_with_a_byte_that_the_model_writes(name, kind):
    tokenizer = load(name)
    end = end_of(tokenizer)
    template = template_of(kind, end)
    chats = [
        [message for user, answer in turns for message in
         ({"role": "user", "content": user}, {"role": "assistant", "content": answer})]
        for turns in CONVERSATIONS.values()
    ]  # fmt: skip
    rows = align_chats(
        TokenizerPair(tokenizer, tokenizer), chats, student_template=template, teacher_template=template
    )
    end_id = tokenizer.backend.token_to_id(end)
    for (title, turns), row in zip(CONVERSATIONS.items(), rows, strict=True):
        raw, learnt = expected(kind, turns, end)
        at, wanted = 0, []
        for i in row.student.ids.tolist():
            content = tokenizer.bytes_of(i)
            content = end.encode() if i == end_id else content or b""
            if not raw.startswith(content, at):
                content = content.removeprefix(b" ")  # Llama 2 puts a blank before a text and after </s>
            assert raw[at : at + len(content)] == content, (title, at)
            wanted.append(bool(learnt[at : at + len(content)].any()))
            at += len(content)
        assert at == len(raw)
        assert row.student.targets.tolist() == wanted, title


@functools.cache
def with_template(name, family):
    """A tokenizer with its own template, or with a family's, whose markers are text to most tokenizers."""
    tokenizer = load(name)
    if family is None:
        return tokenizer
    changed = replace(tokenizer, chat_template=FAMILIES[family].template)
    vars(changed)["markup_backend"] = tokenizer.markup_backend  # seconds to build again
    return changed


OWN = [(name, None) for name in ("qwen3", "smollm2", "llama3_1", "gemma3", "deepseek_v3")]
OTHERS = [(name, family) for name in NAMES if name not in ("bert", "claude") for family in FAMILIES]
SIDES = st.one_of(st.sampled_from(OWN), st.sampled_from(OTHERS))


@settings(derandomize=True, max_examples=40, deadline=None, database=None)
@given(SIDES, SIDES, chats())
def test_any_conversation(student, teacher, chat):
    check_chat(TokenizerPair(with_template(*student), with_template(*teacher)), chat)


ASK = {"role": "user", "content": "Weather in Paris?"}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}],
}
PLAIN = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


@pytest.mark.parametrize(
    ("chat", "named"),
    [
        ([ASK | {"tools": TOOLS}, {"role": "assistant", "content": "Mild."}], "tools"),
        ([ASK, CALL], "tool_calls of message 1"),
        (
            [ASK, {"role": "assistant", "content": "Mild.", "reasoning": "It is May."}],
            "'reasoning' of message 1",
        ),
    ],
)
def test_a_template_that_leaves_out_what_is_to_be_learnt_is_refused(chat, named):
    pair = TokenizerPair(load("qwen3"), load("smollm2"))
    with pytest.raises(UserError, match=f"leaves out .*{named}"):
        align_chats(pair, [chat], teacher_template=PLAIN)


def test_a_tool_call_alone_is_learnt_to_its_end():
    qwen = load("qwen3")
    (row,) = align_chats(TokenizerPair(qwen, qwen), [[ASK | {"tools": TOOLS}, CALL]])
    learnt = row.student.ids[row.student.targets]
    spelled = "".join(qwen.backend.id_to_token(int(i)) for i in learnt)
    assert "<tool_call>" in spelled
    assert "Paris" in spelled
    assert spelled.endswith("</tool_call><|im_end|>")


@pytest.mark.parametrize(("weights", "wanted"), [((1, 1), "Hey!Fine?"), ((0, 1), "Fine?")])
def test_generation_blocks_decide(weights, wanted):
    smol = load("smollm2")
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>{{ 'bot: ' }}"
        "{% generation %}{{ m['content'] }}{{ '!?'[loop.index0 // 2] }}{% endgeneration %}<|im_end|>\n"
        "{% else %}{{ m['content'] }}\n{% endif %}{% endfor %}"
    )
    chat = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hey", "weight": weights[0]},
        {"role": "user", "content": "How?"},
        {"role": "assistant", "content": "Fine", "weight": weights[1]},
    ]
    (row,) = align_chats(
        TokenizerPair(smol, smol), [chat], student_template=template, teacher_template=template
    )
    assert smol.decode(row.student.ids[row.student.targets]).replace(" ", "") == wanted
