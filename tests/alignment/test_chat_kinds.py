"""Targets of conversations in every kind of chat template, stated by hand; rendering as in transformers."""

import dataclasses
import datetime
import functools
import json
import re
import unicodedata

import numpy as np
import pytest
from alignment.chat_kinds import KINDS
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokens import trained
from tokens.texts import FEW

from xtoken_jax.alignment.chat import align_chats
from xtoken_jax.alignment.render import render
from xtoken_jax.errors import UserError
from xtoken_jax.tokens.tokenizer import TokenizerPair


@functools.cache
def load(kind, made=None):
    """A kind's tokenizer: one token a byte, or another with the kind's added tokens."""

    def make():
        if made:
            tokenizer, _ = made()
        else:
            alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
            tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(list(KINDS[kind].special))
        tokenizer.add_tokens(list(KINDS[kind].ordinary))
        special = KINDS[kind].special
        config = {"bos_token": special[0], "eos_token": special[-1], "chat_template": KINDS[kind].template}
        return tokenizer, config

    make.__name__ = f"{kind} {made and made.__name__}"
    return dataclasses.replace(trained.load(make), day=datetime.date(2030, 1, 2))


def spelled(tokenizer, side):
    """The text of the tokens, with « and » around the targets."""
    text, inside = "", False
    for token, target in zip(side.ids.tolist(), side.targets.tolist(), strict=True):
        if target != inside:
            text += "«" if target else "»"
            inside = target
        content = tokenizer.bytes_of(token)
        text += tokenizer.backend.id_to_token(token) if content is None else content.decode()
    return text + "»" * inside


CASES = [(kind, case) for kind in KINDS for case in range(len(KINDS[kind].cases))]


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_what_is_learnt(kind, case):
    chat, expected, endless = KINDS[kind].cases[case]
    tokenizer = load(kind)
    (row,) = align_chats(TokenizerPair(tokenizer, tokenizer), [chat])
    assert spelled(tokenizer, row.student) == expected
    assert row.student.endless == row.teacher.endless == endless


@pytest.mark.parametrize(("kind", "case"), CASES)
@pytest.mark.parametrize("answer", [False, True])
def test_rendering_is_that_of_transformers(kind, case, answer):
    from transformers.utils import chat_template_utils

    chat, _, _ = KINDS[kind].cases[case]
    chat = [dict(message) for message in chat]
    template = KINDS[kind].template.replace("strftime_now(", "(")  # the day of the test
    tools = chat[0].pop("tools", None)
    names = {"bos_token": KINDS[kind].special[0], "eos_token": KINDS[kind].special[-1]}
    # The forms that these templates read.
    messages = [m if m.get("content") or "is none" in template else m | {"content": ""} for m in chat]
    if "+ c.function.arguments" in template:
        messages = json.loads(json.dumps(messages).replace('{"zone": "CET"}', json.dumps('{"zone": "CET"}')))
    ((expected,), _) = chat_template_utils.render_jinja_template(
        [messages], tools=tools, chat_template=template, add_generation_prompt=answer, **names
    )
    if tools:
        chat[0]["tools"] = tools
    assert render(load(kind), template, chat, str, answer=answer) == expected


CONTENTS = st.one_of(
    st.sampled_from(["", " ", "\n", "Yes", " Yes", "Yes\n", "a\r\nb", "201", "\t(self)"]),
    st.sampled_from(["é e\u0301", "日本", "\u3000x", "\ufeffx"]),
    st.sampled_from(["<|im_end|>", "</s> x", "<think>", "</think>", "[INST] a [/INST]", "<|user|>"]),
    st.sampled_from(["One", "ne\n", "«»", "{{ x }}", "ASSISTANT:", "tool_call", "\\n", "A: "]),
    st.text(max_size=8),
)
USER = "\u0416"  # stands around all that others than the assistant say
ANSWERS = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": CONTENTS},
    optional={"reasoning_content": CONTENTS, "weight": st.sampled_from([0, 1])},
)
KEYS = st.sampled_from(["zone", "n", "é"])
ARGUMENTS = st.dictionaries(KEYS, st.one_of(CONTENTS, st.integers()), max_size=2)


@st.composite
def chats(draw):
    """Turns of a user and the assistant; now and then the assistant calls a tool first."""
    chat = []
    for _ in range(draw(st.integers(1, 3))):
        chat.append({"role": "user", "content": f"{USER}{draw(CONTENTS)}{USER}"})
        if draw(st.integers(0, 3)) == 0:
            function = {"name": draw(st.sampled_from(["time", "get_x"])), "arguments": draw(ARGUMENTS)}
            call = {"type": "function", "id": "call12345", "function": function}
            chat.append({"role": "assistant", "content": None, "tool_calls": [call]})
            chat.append({"role": "tool", "content": USER + draw(CONTENTS), "tool_call_id": "call12345"})
        chat.append(draw(ANSWERS))
    return chat


def text_of(tokenizer, ids):
    """The bytes of tokens, added ones as they are spelled."""
    contents = ((tokenizer.bytes_of(i), i) for i in ids.tolist())
    return b"".join(tokenizer.backend.id_to_token(i).encode() if c is None else c for c, i in contents)


def composed(content):
    """Bytes as text in the normal form that some tokenizers write."""
    return unicodedata.normalize("NFC", content.decode("utf-8", "replace"))


def check_chat(pair, chat):
    """Check an aligned conversation, or that it is refused in one line, which is returned."""
    line = ""
    try:
        (row,) = align_chats(pair, [chat])
    except UserError as error:
        line = str(error)
    if line:
        assert "\n" not in line
        return line
    for tokenizer, side in ((pair.student, row.student), (pair.teacher, row.teacher)):
        learnt = composed(text_of(tokenizer, side.ids[side.targets]))
        at = 0
        for message in chat:
            if message["role"] != "assistant" or message.get("weight") == 0:
                continue
            parts = [message["content"] or ""]
            parts += [call["function"]["name"] for call in message.get("tool_calls", ())]
            for part in parts:
                # Thinking of earlier turns may be gone, and blanks around a content.
                for piece in re.split("</?think>", part)[-1:]:
                    wanted = composed(piece.strip().encode())
                    found = learnt.find(wanted, at)
                    assert found >= 0, (piece, learnt)
                    at = found + len(wanted)
        # Nothing of the users is learnt, and targets begin once a turn.
        assert USER not in learnt
        runs = np.flatnonzero(np.diff(np.concatenate([[False], side.targets]).astype(int)) == 1)
        turns = sum(m["role"] == "assistant" and m.get("weight") != 0 for m in chat)
        assert len(runs) <= turns
        inside = side.chunks[side.chunks >= 0]
        assert np.all(np.diff(inside) >= 0)
        assert sorted(set(inside.tolist())) == list(range(row.chunk_count))
    for chunk in np.flatnonzero(row.exact).tolist():
        texts = [
            text_of(tokenizer, side.ids[side.chunks == chunk])
            for tokenizer, side in ((pair.student, row.student), (pair.teacher, row.teacher))
        ]
        assert texts[0] == texts[1]
    return ""


MADE = (None, trained.three_digits, trained.sentencepiece)
SIDES = st.tuples(st.sampled_from([*KINDS]), st.sampled_from(MADE))


@settings(parent=FEW, max_examples=150)
@given(SIDES, SIDES, chats())
def test_any_conversation(student, teacher, chat):
    check_chat(TokenizerPair(load(*student), load(*teacher)), chat)
