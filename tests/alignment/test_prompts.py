"""Prompts with completions, and conversations in two chat templates."""

import functools

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokens import trained
from tokens.texts import DECOMPOSED, FEW, PIECES, texts

from xtoken_jax.alignment.align import collate, token_rows
from xtoken_jax.alignment.chat import align_chats
from xtoken_jax.alignment.prompts import align_completions
from xtoken_jax.alignment.render import render
from xtoken_jax.alignment.rows import with_document_marks
from xtoken_jax.alignment.spans import align_texts
from xtoken_jax.errors import UserError
from xtoken_jax.tokens.tokenizer import TokenizerPair

PAIRS = [(trained.three_digits, trained.single_digits), (trained.composing, trained.sentencepiece)]
HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
)
# Keeps the thinking of the last turn alone, as Qwen 3's template does.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% set parts = m.content.split('</think>') %}{% if loop.last %}<think>\n"
    "{{ parts[0].split('<think>')[-1].strip('\\n') if parts | length > 1 else '' }}\n</think>\n\n{% endif %}"
    "{{ parts[-1].lstrip('\\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
)


def headers():
    tokenizer, _ = trained.three_digits()
    tokenizer.add_special_tokens(["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"])
    return tokenizer, {"bos_token": "<|begin|>", "eos_token": "<|eot_id|>", "chat_template": HEADERS}


def thinking():
    tokenizer, _ = trained.single_digits()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer, {
        "eos_token": "<|im_end|>",
        "chat_template": [{"name": "default", "template": THINKING}],
    }


@functools.cache
def chat_pair():
    return trained.pair(headers, thinking)


def pieces(tokenizer, side, chosen):
    return b"".join(tokenizer.bytes_of(int(i)) or b"" for i in side.ids[chosen])


@FEW
@given(texts(PIECES + DECOMPOSED), texts(PIECES + DECOMPOSED))
@example("12 + 189 =", " 201")
@example("", "201")
@example("the c", "at")
@pytest.mark.parametrize("makes", PAIRS, ids=["faithful", "normalizing"])
def test_only_completions_are_targets(makes, prompt, completion):
    pair = trained.pair(*makes)
    (row,) = align_completions(pair, [prompt], [completion])
    (whole,) = align_texts(pair, [prompt + completion])
    border = len(prompt.encode())
    for side, plain, tokenizer in (
        (row.student, whole.student, pair.student), (row.teacher, whole.teacher, pair.teacher),
    ):  # fmt: skip
        assert side.ids.tolist() == plain.ids.tolist()
        assert side.chunks.tolist() == plain.chunks.tolist()
        # The targets are the end of the row.
        assert np.all(np.diff(side.targets.astype(int)) >= 0)
        if makes is PAIRS[0]:
            written = np.cumsum([len(tokenizer.bytes_of(int(i))) for i in side.ids], dtype=int)
            # A token with one byte of the completion is a target.
            assert side.targets.tolist() == [end > border for end in written]
    marked = with_document_marks(pair, row)
    valid = collate([marked], 256, 256).valid[0]
    for chunk in range(marked.chunk_count):
        inside = all(np.all(s.targets[s.chunks == chunk]) for s in (marked.student, marked.teacher))
        opens = chunk in (marked.student.chunks[0], marked.teacher.chunks[0])
        assert valid[chunk] == (marked.exact[chunk] and inside and not opens)


def test_a_chunk_with_a_token_of_the_prompt_alone_does_not_count():
    pair = trained.pair(trained.three_digits, trained.single_digits)
    (row,) = align_completions(pair, ["a 20"], ["1 b"])
    (token,) = np.flatnonzero([pair.student.bytes_of(int(i)) == b"201" for i in row.student.ids])
    assert row.student.targets[token]
    assert row.teacher.targets.tolist() == [False] * 4 + [True] * 2
    valid = collate([row], 8, 8).valid[0]
    assert valid.tolist()[: row.chunk_count] == [False, False, False, True]
    rows = token_rows([row.teacher], 8, 0)
    assert rows.targets[0].tolist() == [False] * 4 + [True] * 2 + [False] * 2
    assert rows.segments[0].tolist() == [1] * 6 + [0] * 2


def test_as_many_prompts_as_completions():
    with pytest.raises(UserError, match="2 prompts for 1 completions"):
        align_completions(trained.pair(*PAIRS[0]), ["a", "b"], ["c"])


CONVERSATION = [
    {"role": "user", "content": "  How many: 12 + 189?"},
    {"role": "assistant", "content": "<think>\nsum of 201\n</think>\n\nIt's 201."},
    {"role": "user", "content": "Sure?\n"},
    {"role": "assistant", "content": "<think>\nthe cat\n</think>\n\nHello 222"},
]


def test_contents_are_aligned_and_markup_is_not():
    pair = chat_pair()
    (row,) = align_chats(pair, [CONVERSATION])
    said = []
    for tokenizer, side in ((pair.student, row.student), (pair.teacher, row.teacher)):
        inside = side.chunks >= 0
        assert not set(side.ids[inside].tolist()) & tokenizer.token_bytes.special
        said.append(pieces(tokenizer, side, inside))
        text = render(tokenizer, tokenizer.chat_template, CONVERSATION, "")
        encoding = tokenizer.markup_backend.encode(text, add_special_tokens=False)
        assert side.ids.tolist() == encoding.ids
    # The student's template keeps all thinking, the teacher's that of the last turn: the sum of 201 is in
    # no chunk. Blanks that one side trims or merges with its markup are not either.
    for text in said:
        assert b"201" in text
        assert b"sum of" not in text
        assert b"the cat" in text
        assert b"Hello 222" in text
        assert b"think" not in text
    assert said[0].replace(b"\n", b"").strip() == said[1].replace(b"\n", b"").strip()


def test_what_is_learnt_of_a_conversation():
    pair = chat_pair()
    (row,) = align_chats(pair, [CONVERSATION])
    student, teacher = (
        pieces(tokenizer, side, side.targets)
        for tokenizer, side in ((pair.student, row.student), (pair.teacher, row.teacher))
    )
    assert student == (b"<think>\nsum of 201\n</think>\n\nIt's 201.<think>\nthe cat\n</think>\n\nHello 222")
    assert teacher == b"It's 201.<think>\nthe cat\n</think>\n\nHello 222"
    for tokenizer, side in ((pair.student, row.student), (pair.teacher, row.teacher)):
        ends = np.isin(side.ids, [tokenizer.backend.token_to_id(t) for t in ("<|eot_id|>", "<|im_end|>")])
        assert side.targets[ends].tolist() == [False, True, False, True]
    (everything,) = align_chats(pair, [CONVERSATION], targets="all")
    assert np.all(everything.student.targets)
    valid = collate([row], 128, 128).valid[0][: row.chunk_count]
    users = collate([everything], 128, 128).valid[0][: row.chunk_count]
    assert 0 < valid.sum() < users.sum()


SAID = texts([p for p in PIECES if "think" not in p])


@FEW
@given(st.lists(SAID, min_size=1, max_size=4))
@example(["<|eot_id|> and <|im_end|>201", "<|im_start|>user\n"])
@example(["user", "assistant", "user\n"])
@example(["", " ", "\n\n"])
@example(["\U000f0000", "\U000f00010\U000f0001"])
def test_any_content_keeps_its_place(contents):
    """Contents that look like markup or spell special tokens stay text, and are aligned as text is."""
    pair = chat_pair()
    roles = ["user", "assistant"] * 2
    conversation = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    (row,) = align_chats(pair, [conversation])
    for tokenizer, side, ending in (
        (pair.student, row.student, "<|eot_id|>"),
        (pair.teacher, row.teacher, "<|im_end|>"),
    ):
        assert np.sum(side.ids == tokenizer.backend.token_to_id(ending)) == len(contents)
        inside = side.chunks[side.chunks >= 0]
        assert np.all(np.diff(inside) >= 0)
        assert sorted(set(inside.tolist())) == list(range(row.chunk_count))
    for chunk in range(row.chunk_count):
        written = [
            pieces(tokenizer, side, side.chunks == chunk)
            for tokenizer, side in ((pair.student, row.student), (pair.teacher, row.teacher))
        ]
        assert row.exact[chunk] == (written[0] == written[1])
    # All but the ends of each message, which templates trim and markup merges with, is in exact chunks.
    exact = b"".join(
        pieces(pair.student, row.student, row.student.chunks == c) for c in np.flatnonzero(row.exact)
    )
    for content in contents:
        middle = content.strip().split()
        for word in middle[1:-1]:
            assert word.encode() in exact


def test_what_a_template_says_twice_is_aligned_once():
    pair = chat_pair()
    template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}again: {{ messages[0].content }}!"
    conversation = [{"role": "user", "content": "the cat 201"}, {"role": "assistant", "content": "dogs ran"}]
    (row,) = align_chats(pair, [conversation], teacher_template=template)
    inside = row.teacher.chunks >= 0
    assert pieces(pair.teacher, row.teacher, inside) == b"the cat 201dogs ran"
    assert np.all(np.diff(row.teacher.chunks[inside]) >= 0)
    assert row.exact.all()


def test_several_conversations_at_once():
    pair = chat_pair()
    other = [{"role": "user", "content": "201"}, {"role": "assistant", "content": "the cat"}]
    together = align_chats(pair, [CONVERSATION, other, CONVERSATION])
    for conversation, row in zip([CONVERSATION, other, CONVERSATION], together, strict=True):
        (alone,) = align_chats(pair, [conversation])
        for name in ("ids", "chunks", "targets", "segments"):
            for side in ("student", "teacher"):
                np.testing.assert_array_equal(
                    getattr(getattr(row, side), name), getattr(getattr(alone, side), name)
                )
        assert row.exact.tolist() == alone.exact.tolist()
    assert align_chats(pair, []) == []


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ([{"role": "user", "content": "a\ud83d"}], "half of a surrogate pair"),
        ([{"content": "a"}], "message 0: not an object with a 'role'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "message 0: its content is no text"),
        (["a"], "message 0: not an object"),
        (
            [{"role": "assistant", "content": "a", "reasoning": ["b"]}],
            "message 0: its 'reasoning' is no text",
        ),
        (
            [{"role": "assistant", "content": "a", "tool_calls": ["b"]}],
            "message 0: a tool call without the name",
        ),
    ],
)
def test_conversations_that_are_none(conversation, message):
    with pytest.raises(UserError, match=message):
        align_chats(chat_pair(), [[{"role": "user", "content": "a"}], conversation][1:])


def test_templates_that_cannot_be_used():
    pair = chat_pair()
    conversation = [{"role": "user", "content": "Hello there"}]
    plain = TokenizerPair(pair.student, trained.load(trained.single_digits))
    with pytest.raises(UserError, match="no chat template"):
        align_chats(plain, [conversation])
    (row,) = align_chats(plain, [conversation], teacher_template="{{ messages[0].content }}")
    assert row.exact.all()
    for template, message in (
        ("{{ raise_exception('only two roles') }}", "refuses it: only two roles"),
        ("{% for", "refuses it"),
        ("a{{ messages[0].content | upper }}", "changes message 0"),
        ("{{ messages[0].content | length }}b{{ messages[0].content }}", "changes message 0"),
    ):
        with pytest.raises(UserError, match=message) as error:
            align_chats(plain, [conversation], teacher_template=template)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="targets='user'"):
        align_chats(pair, [conversation], targets="user")


@pytest.mark.parametrize(
    ("template", "role"),
    [
        ("{% for m in messages[-2:] %}{{ m.content }}{% endfor %}", "system"),
        ("{% for m in messages if m.role != 'user' %}{{ m.content }}{% endfor %}", "user"),
        ("{{ messages[2].content }}{{ messages[0].content }}{{ messages[1].content }}", "system"),
    ],
)
def test_a_template_that_leaves_out_or_moves_a_message_is_refused(template, role):
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "dogs ran"},
    ]
    with pytest.raises(UserError, match=f"leaves out or moves message ., of the role '{role}'"):
        align_chats(chat_pair(), [chat], teacher_template=template)


def test_a_first_word_is_distilled_where_both_templates_join_it_with_the_same_blank():
    pair = chat_pair()
    blank = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
    none = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "the cat sat"}]
    for teacher, distilled in ((blank, b" the cat sat"), (none, b" cat sat")):
        (row,) = align_chats(pair, [chat], student_template=blank, teacher_template=teacher)
        valid = collate([row], 64, 64).valid[0]
        inside = [i for i, c in enumerate(row.student.chunks.tolist()) if c >= 0 and valid[c]]
        assert pieces(pair.student, row.student, inside) == distilled
        # It is a target of the cross-entropy in either case.
        assert pieces(pair.student, row.student, row.student.targets) == b" the cat sat"


def test_names_and_arguments_of_calls_are_distilled():
    pair = chat_pair()
    qwen = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>"
        '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</tool_call>'
        "{% endfor %}{{ eos_token }}{% endfor %}"
    )
    deepseek = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}call "
        "{{ c.function.name + '\n' + c.function.arguments + '\n' }}{% endfor %}{{ eos_token }}{% endfor %}"
    )
    for arguments in ({"place": "the cat", "n": 201}, '{"place": "the cat", "n": 201}'):
        call = {"type": "function", "function": {"name": "find_it", "arguments": arguments}}
        chat = [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ]
        (row,) = align_chats(pair, [chat], student_template=qwen, teacher_template=deepseek)
        valid = collate([row], 128, 128).valid[0]
        inside = [i for i, c in enumerate(row.student.chunks.tolist()) if c >= 0 and valid[c]]
        distilled = pieces(pair.student, row.student, inside)
        assert b"find_it" in distilled
        assert b'place": "the cat", "n": 201' in distilled
        assert b"arguments" not in distilled
