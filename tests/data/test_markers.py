"""Texts that are rendered conversations: counted where markers are plain text, read as tokens on demand."""

import json

import pytest
from tokens import trained

from xtoken_jax.data.encode import encode
from xtoken_jax.data.ends import learnt_ends
from xtoken_jax.data.markers import spelled_markers
from xtoken_jax.data.records import Conversation, Exchange, Marked
from xtoken_jax.data.sources import Markers, SourceConfig, read_documents
from xtoken_jax.errors import UserError

CHAT = "<|open|>user\n12 + 189?<|shut|>\n<|open|>assistant\n201<|shut|>\n"


def with_markers(make, *markers):
    def made():
        tokenizer, config = make()
        tokenizer.add_special_tokens(list(markers))
        return tokenizer, config

    return made


@pytest.fixture(scope="module")
def pair():
    return trained.pair(
        with_markers(trained.three_digits, "<|open|>", "<|shut|>"),
        with_markers(trained.single_digits, "<|shut|>"),
    )


def line(pair, *documents, **options):
    return spelled_markers("a", documents, (pair.student, pair.teacher), **options)


def test_texts_that_spell_a_control_token_are_counted(pair):
    for none in ("12 + 189 = 201", "a <s>struck</s> word", "a <b>bold</b> [text] <|x|>"):
        assert line(pair, none) is None
    counted = line(pair, CHAT, "12", Exchange(CHAT, " yes"), option="data.train.a.markers")
    assert counted.startswith("source 'a': 2 of the 3 texts spell <|open|>, which is read as plain text;")
    assert "data.train.a.markers=tokens" in counted
    for text in ("[INST] a [/INST] b", "x<|im_start|>y", "<start_of_turn>user\nq"):
        assert "1 of the 1 texts spell" in line(pair, text), text
    assert line(pair, Conversation(({"role": "user", "content": CHAT},))) is None
    assert "does not have as a special token" in line(pair, Marked(CHAT))
    assert line(pair, Marked("12<|shut|>")) is None
    assert "1,000 of the first 1,000 texts" in line(pair, *[CHAT] * 1200)


def test_markers_become_tokens_only_where_asked(pair):
    pairs = {"one": pair}
    ids = {name: pair.student.backend.token_to_id(name) for name in ("<|open|>", "<|shut|>")}
    plain, marked = (encode(pairs, [kind(CHAT)])[0]["one"] for kind in (str, Marked))
    assert not set(plain.student.ids.tolist()) & set(ids.values())
    tokens = marked.student.ids.tolist()
    assert [tokens.count(i) for i in ids.values()] == [2, 2]
    assert marked.student.targets.all()
    # All other text is aligned, and each chunk is the same bytes on both sides.
    for chunk in range(marked.chunk_count):
        sides = ((pair.student, marked.student), (pair.teacher, marked.teacher))
        written = [t.token_bytes.join(side.ids[side.chunks == chunk]) for t, side in sides]
        assert written[0] == written[1] or not marked.exact[chunk]
    aligned = marked.student.ids[marked.student.chunks >= 0]
    assert b"12 + 189?" in pair.student.token_bytes.join(aligned)


def test_the_ends_that_texts_teach():
    student = trained.load(with_markers(trained.three_digits, "<|im_start|>", "<|im_end|>"))
    eos, end = student.roles["eos"], student.backend.token_to_id("<|im_end|>")
    chat = CHAT.replace("open", "im_start").replace("shut", "im_end")
    assert learnt_ends(student, {"a": [chat], "b": ["12", " "]}) == [eos]
    assert learnt_ends(student, {"a": [Marked(chat)]}) == sorted([eos, end])


def test_document_marks_that_a_text_spells_are_not_doubled(pair):
    student = pair.student
    bos, eos = (student.backend.id_to_token(student.roles[role]) for role in ("bos", "eos"))
    plain = encode({"one": pair}, [Marked("12 + 3")])[0]["one"].student.ids.tolist()
    for text in (f"{bos}12 + 3", f"12 + 3{eos}", f"{bos}12 + 3{eos}"):
        assert encode({"one": pair}, [Marked(text)])[0]["one"].student.ids.tolist() == plain


def test_the_option_of_a_source(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": CHAT}))
    plain, marked = (read_documents(SourceConfig(path=str(path), markers=kind)) for kind in Markers)
    assert not isinstance(plain[0], Marked)
    assert isinstance(marked[0], Marked)
    assert plain.digest != marked.digest
    path.write_text(json.dumps({"prompt": CHAT, "completion": "x"}))
    with pytest.raises(UserError, match="markers=tokens is for texts, but it holds prompts"):
        read_documents(SourceConfig(path=str(path), markers=Markers.tokens))
