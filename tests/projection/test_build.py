"""The two-pass W of real tokenizers."""

import itertools

import numpy as np
import pytest
import tokenizers
from reference import projection as reference
from tokenizers import decoders, models, pre_tokenizers
from tokens import trained

from xtoken_jax.errors import UserError
from xtoken_jax.projection.build import build_projection
from xtoken_jax.projection.counts import count_rows
from xtoken_jax.projection.retokenize import tokenize_bytes
from xtoken_jax.projection.special import role_pairs, similar_pairs
from xtoken_jax.tokens.token_bytes import byte_alphabet
from xtoken_jax.tokens.tokenizer import Tokenizer, TokenizerPair

MAKES = [trained.single_digits, trained.three_digits, trained.composing, trained.sentencepiece]
PAIRS = [(s, t) for s in MAKES for t in MAKES if s is not t]
NAMES = [f"{s.__name__}-{t.__name__}" for s, t in PAIRS]


def row(projection, token_id):
    kept = projection.indices[token_id] >= 0
    return projection.indices[token_id][kept].tolist(), projection.weights[token_id][kept].tolist()


def twin_retokenize(tokenizer):
    """The tokenizer where it gives the bytes back, else its merges over the bytes."""
    alphabet = byte_alphabet()
    byte_level = tokenizer.token_bytes.kind == "byte_level"

    def spelled(piece):
        return bytes(alphabet[c] for c in piece) if byte_level else piece.replace("▁", " ").encode()

    merges = [tuple(map(spelled, merge)) for merge in trained.definition(tokenizer)["model"]["merges"]]
    written = [
        (content, i)
        for i, content in enumerate(tokenizer.token_bytes.table)
        if content and i not in tokenizer.token_bytes.shadowed
    ]
    ids = {content: min(i for other, i in written if other == content) for content, _ in written}

    def retokenize(content):
        try:
            found = tokenizer.encode(content.decode()).tolist()
        except UnicodeDecodeError:
            found = []
        if b"".join(tokenizer.bytes_of(i) or b"" for i in found) == content:
            return found
        units = [content[i : i + 1] for i in range(len(content))]
        if not byte_level:  # characters that have a piece, else their bytes
            parts = reference.characters(content)
            units = [u for c in parts for u in ([c] if c in ids else [bytes([b]) for b in c])]
        return [ids[part] for part in reference.merge(units, merges)]

    return retokenize


@pytest.mark.parametrize(("student", "teacher"), PAIRS, ids=NAMES)
def test_rows_are_stochastic_and_sorted(student, teacher):
    pair = trained.pair(student, teacher)
    projection = build_projection(pair)
    indices, weights = projection.indices, projection.weights
    assert indices.shape == weights.shape == (pair.student.size, 4)
    assert (indices.dtype, weights.dtype) == (np.int32, np.float32)
    sums = weights.astype(np.float64).sum(1)
    filled = indices[:, 0] >= 0
    np.testing.assert_allclose(sums[filled], 1.0, atol=1e-6)
    assert np.all(sums[~filled] == 0)
    assert np.array_equal(indices >= 0, weights > 0)
    assert np.all(np.diff(weights, axis=1) <= 0)
    assert np.all(indices < pair.teacher.size)
    for i in range(pair.student.size):
        assert len(set(row(projection, i)[0])) == len(row(projection, i)[0])


OPTIONS = [
    {},
    {"reverse": True},
    {"scale_trick": True},
    {"similar_special": True},
    {"entries": 2, "scale_trick": True},
    {"entries": 3, "reverse": True, "scale_trick": True, "similar_special": True},
    {"reverse": True, "scale_trick": True, "similar_special": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "paper")
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (trained.three_digits, trained.single_digits),
        (trained.composing, trained.sentencepiece),
        (trained.sentencepiece, trained.three_digits),
        (trained.three_digits, trained.sentencepiece),
    ],
)
def test_equals_the_twin(student, teacher, options):
    pair = trained.pair(student, teacher)
    projection = build_projection(pair, **options)
    tables = [
        [None if i in t.token_bytes.shadowed else content for i, content in enumerate(t.token_bytes.table)]
        for t in (pair.student, pair.teacher)
    ]
    partners = role_pairs(pair)
    named = dict(options)
    similar = list(similar_pairs(pair, partners)) if named.pop("similar_special", False) else []
    rows = reference.build(
        *tables,
        partners,
        twin_retokenize(pair.teacher),
        twin_retokenize(pair.student),
        similar=similar,
        **named,
    )
    for i, expected in enumerate(rows):
        ids, weights = row(projection, i)
        assert ids == [j for j, _ in expected], (i, tables[0][i])
        np.testing.assert_allclose(weights, [weight for _, weight in expected], rtol=1e-6)
    assert sum(len(r) > 1 for r in rows) > 20


@pytest.mark.parametrize("options", OPTIONS[1:], ids="-".join)
def test_every_option_shows(options):
    pair = trained.pair(trained.sentencepiece, trained.three_digits)
    plain, other = build_projection(pair), build_projection(pair, **options)
    assert plain.weights.shape != other.weights.shape or not np.array_equal(plain.weights, other.weights)


def test_two_builds_are_the_same_to_the_bit():
    for options in OPTIONS:
        one, two = (
            build_projection(trained.pair(trained.three_digits, trained.sentencepiece), **options)
            for _ in range(2)
        )
        assert one.indices.tobytes() == two.indices.tobytes()
        assert one.weights.tobytes() == two.weights.tobytes()


def merged(*merges):
    """A byte-level tokenizer of a, b, c, d and these merges, in order of their ids; no special tokens."""
    pieces = [*"abcd", *("".join(merge) for merge in merges)]
    tokenizer = tokenizers.Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return lambda: (tokenizer, {})


def test_the_reverse_pass_by_hand():
    student, teacher = merged(("a", "b"), ("c", "d")), merged(("b", "c"), ("a", "bc"))
    pair = TokenizerPair(trained.load(student), trained.load(teacher))
    a, b, c, d, ab, cd = range(6)  # the teacher's 4 and 5 are bc and abc
    plain, both = build_projection(pair), build_projection(pair, reverse=True)
    assert row(plain, ab)[0] == [a, b]
    np.testing.assert_allclose(row(plain, ab)[1], [10 / 11, 1 / 11], rtol=1e-6)
    # The student writes abc as ab, c. Equal weights: the lower id first.
    assert row(both, ab)[0] == [a, 5, b]
    np.testing.assert_allclose(row(both, ab)[1], [10 / 21, 10 / 21, 1 / 21], rtol=1e-6)
    assert row(both, cd)[0] == [c, d]
    for exact in (a, b, c, d):  # bc is written b, c, but these have their equals
        assert row(both, exact) == ([exact], [1.0])
    two = build_projection(pair, reverse=True, entries=2)
    assert row(two, ab) == ([a, 5], [0.5, 0.5])
    assert count_rows(pair, both) == {
        "bytes": 4, "role": 0, "similar": 0, "repeated": 0, "several": 2, "empty": 0
    }  # fmt: skip


def test_the_scale_trick_by_hand():
    pair = trained.pair(trained.three_digits, trained.single_digits)
    vocab = trained.definition(pair.student)["model"]["vocab"]
    projection = build_projection(pair, entries=3, scale_trick=True)
    ids, weights = row(projection, vocab["201"])
    # 0.9009, 0.0901 and 0.2 in place of 0.0090: the last digit is now the second.
    assert [pair.teacher.bytes_of(i) for i in ids] == [b"2", b"1", b"0"]
    total = 0.9 / 0.999 + 0.09 / 0.999 + 0.2
    np.testing.assert_allclose(weights, [0.9 / 0.999 / total, 0.2 / total, 0.09 / 0.999 / total], rtol=1e-6)
    assert row(projection, vocab["21"])[1] == pytest.approx([0.9 / 0.99, 0.09 / 0.99])  # no third entry
    assert row(projection, vocab["222"])[1] == [1.0]
    assert row(projection, vocab["7"])[1] == [1.0]


def test_special_tokens_spelled_alike_by_hand():
    student = with_added(
        trained.three_digits,
        *((s, True) for s in ("<|python_tag|>", "<|zzz|>", "<|reserved_special_token_3|>")),
    )
    teacher = with_added(
        trained.single_digits,
        *((s, True) for s in ("<|python_mark|>", "<|tag|>", "<|the_python_tag|>", "<unused3>")),
    )
    pair = TokenizerPair(student, teacher)
    plain, similar = build_projection(pair), build_projection(pair, similar_special=True)
    ids = {t: t_.backend.token_to_id for t, t_ in (("s", student), ("t", teacher))}
    tag = ids["s"]("<|python_tag|>")
    assert row(plain, tag) == ([], [])
    # 0.6 * 2M/(a+b) + 0.4 * (words in common) / (words in either), M letters in common:
    expected = {
        "<|the_python_tag|>": 0.6 * 28 / 32 + 0.4 * 2 / 3,
        "<|tag|>": 0.6 * 14 / 21 + 0.4 * 1 / 2,
        "<|python_mark|>": 0.6 * 24 / 29 + 0.4 * 1 / 3,
    }
    got, weights = row(similar, tag)
    names = [teacher.backend.id_to_token(j) for j in got]
    assert set(expected) <= set(names)
    assert "<unused3>" not in names
    for one, other in itertools.pairwise(expected):
        ratio = weights[names.index(one)] / weights[names.index(other)]
        assert ratio == pytest.approx(expected[one] / expected[other], rel=1e-5)
    assert sum(weights) == pytest.approx(1)
    for spelling in ("<|reserved_special_token_3|>", "<|zzz|>"):
        found = row(similar, ids["s"](spelling))[0]
        assert (found == []) == ("reserved" in spelling)  # `<|zzz|>` has its brackets in common
    # A partner by role is a partner by role.
    end = student.roles["eos"]
    assert row(similar, end) == ([teacher.roles["eos"]], [1.0])


def test_numbers():
    pair = trained.pair(trained.three_digits, trained.single_digits)
    projection = build_projection(pair)
    vocab = trained.definition(pair.student)["model"]["vocab"]

    def of(number):
        ids, weights = row(projection, vocab[number])
        return [pair.teacher.bytes_of(i).decode() for i in ids], weights

    digits, weights = of("201")
    assert digits == ["2", "0", "1"]
    np.testing.assert_allclose(weights, [0.9009, 0.0901, 0.0090], atol=5e-5)
    assert of("222") == (["2"], [1.0])
    assert of("7") == (["7"], [1.0])
    digits, weights = of("212")  # the repeated piece adds up
    assert digits == ["2", "1"]
    np.testing.assert_allclose(weights, [0.909 / 0.999, 0.09 / 0.999], rtol=1e-6)
    digits, weights = of("211")
    np.testing.assert_allclose(weights, [0.9 / 0.999, 0.099 / 0.999], rtol=1e-6)


def test_only_the_first_pieces_count():
    pair = trained.pair(trained.three_digits, trained.single_digits)
    token = trained.definition(pair.student)["model"]["vocab"]["201"]
    two = build_projection(pair, entries=2)
    assert two.indices.shape[1] == 2
    np.testing.assert_allclose(two.weights[token], [0.9 / 0.99, 0.09 / 0.99], rtol=1e-6)


def add_piece(piece, *, special=False):
    """A tokenizer with one more token that spells the same as one it has."""

    def edit(definition):
        vocab = definition["model"]["vocab"]
        definition["added_tokens"].append(
            {"id": len(vocab), "content": piece, "special": special, "normalized": False,
             "single_word": False, "lstrip": False, "rstrip": False}
        )  # fmt: skip

    return edit


def test_a_tie_goes_to_the_lowest_id():
    """A written blank is the byte-level token `Ġ` and, added as it reads, a second token."""
    teacher = trained.edited(trained.single_digits, add_piece(" "))
    blanks = [i for i in range(teacher.size) if teacher.bytes_of(i) == b" "]
    assert len(blanks) == 2
    student = trained.load(trained.three_digits)
    pair = TokenizerPair(student, teacher)
    (blank,) = (i for i in range(student.size) if student.bytes_of(i) == b" ")
    assert row(build_projection(pair), blank) == ([min(blanks)], [1.0])


def test_a_character_goes_to_its_piece_and_not_to_the_byte_it_shadows():
    pair = trained.pair(trained.single_digits, trained.sentencepiece)
    vocab = trained.definition(pair.teacher)["model"]["vocab"]
    projection = build_projection(pair)
    for character in "at,.":
        (token,) = (i for i in range(pair.student.size) if pair.student.bytes_of(i) == character.encode())
        assert vocab[f"<0x{ord(character):02X}>"] < vocab[character]
        assert row(projection, token) == ([vocab[character]], [1.0])
    (token,) = (i for i in range(pair.student.size) if pair.student.bytes_of(i) == b"<")
    assert row(projection, token) == ([vocab["<0x3C>"]], [1.0])
    # The other way round the shadowed bytes stay empty, and the characters keep their partner.
    backward = build_projection(trained.pair(trained.sentencepiece, trained.single_digits))
    assert row(backward, vocab["<0x61>"]) == ([], [])
    assert pair.student.bytes_of(row(backward, vocab["a"])[0][0]) == b"a"


def test_bytes_that_are_not_text_go_through_the_merges():
    student, teacher = trained.load(trained.composing), trained.load(trained.single_digits)
    halves = [b"\xe6", b"\xe6\x97", b"\x97\xa5\xe6", b"\xf0\x9f\x91", b"\xff\xfe", b"a\xcc"]
    for content, ids in zip(halves, tokenize_bytes(teacher, halves), strict=True):
        assert teacher.token_bytes.join(np.asarray(ids)) == content
        assert ids == twin_retokenize(teacher)(content)
    # Every byte of the student's is a byte of the teacher's.
    projection = build_projection(trained.pair(trained.composing, trained.single_digits))
    for i in range(student.size):
        if student.bytes_of(i) is not None:
            assert row(projection, i)[0]


def test_a_tokenizer_that_composes_still_maps_decomposed_bytes():
    """é written as two characters is not what its tokenizer gives back, so its merges are used."""
    teacher = trained.load(trained.composing)
    (ids,) = tokenize_bytes(teacher, ["e\u0301".encode()])
    assert teacher.token_bytes.join(np.asarray(ids)) == "e\u0301".encode()


def test_roles_map_to_roles():
    pair = trained.pair(trained.three_digits, trained.sentencepiece)
    projection = build_projection(pair)
    for role in ("bos", "eos"):
        assert row(projection, pair.student.roles[role]) == ([pair.teacher.roles[role]], [1.0])
    # No role on the other side: the row is empty.
    lone = trained.pair(trained.three_digits, trained.single_digits)
    projection = build_projection(lone)
    assert row(projection, lone.student.roles["bos"]) == ([], [])
    assert row(projection, lone.student.roles["eos"]) == ([lone.teacher.roles["eos"]], [1.0])


def test_text_in_a_role_stays_text(tmp_path):
    """A folder may name an ordinary token as its EOS; the student still writes it as text."""
    trained.save(tmp_path, trained.three_digits()[0], {"eos_token": "."})
    pair = TokenizerPair(Tokenizer.load(tmp_path), trained.load(trained.single_digits))
    ids, weights = row(build_projection(pair), pair.student.roles["eos"])
    assert [pair.teacher.bytes_of(i) for i in ids] == [b"."]
    assert weights == [1.0]


def test_a_special_token_does_not_match_text_that_spells_it():
    teacher = trained.edited(trained.single_digits, add_piece("<|begin|>"))
    student = trained.load(trained.three_digits)
    pair = TokenizerPair(student, teacher)
    assert row(build_projection(pair), student.roles["bos"]) == ([], [])


def with_added(make, *tokens):
    """A tokenizer with more added tokens, of (spelling, special)."""

    def edit(definition):
        for spelling, special in tokens:
            add_piece(spelling, special=special)(definition)
            definition["added_tokens"][-1]["id"] = next_id(definition)

    def next_id(definition):
        earlier = [t["id"] for t in definition["added_tokens"][:-1]]
        return 1 + max(*definition["model"]["vocab"].values(), *earlier)

    return trained.edited(make, edit)


def test_markers_map_by_role_even_where_they_are_text():
    """Qwen's `<think>` is literal text, and goes to the token that opens a thought elsewhere."""
    student = with_added(
        trained.three_digits, ("<think>", False), ("<tool_call>", False), ("<|im_start|>", True)
    )
    teacher = with_added(
        trained.single_digits,
        ("[THINK]", True),
        ("<start_of_turn>", True),
        ("<tool", False),
    )
    ids = {name: student.backend.token_to_id(name) for name in ("<think>", "<tool_call>", "<|im_start|>")}
    projection = build_projection(TokenizerPair(student, teacher))
    assert row(projection, ids["<think>"]) == ([teacher.backend.token_to_id("[THINK]")], [1.0])
    assert row(projection, ids["<|im_start|>"]) == ([teacher.backend.token_to_id("<start_of_turn>")], [1.0])
    # No such role over there: by its bytes.
    pieces = [teacher.bytes_of(j) for j in row(projection, ids["<tool_call>"])[0]]
    assert pieces[0] == b"<tool"
    counts = count_rows(TokenizerPair(student, teacher), projection)
    assert counts["role"] == 3  # with EOS
    assert sum(counts.values()) == student.size


def test_unused_ids_take_no_part():
    """A reserved token can be text too; its row stays empty and nothing is sent to it."""
    student = with_added(trained.three_digits, ("<unused7>", False), ("<unused8>", True))
    teacher = with_added(trained.single_digits, ("<unused7>", False), ("<unused8>", True))
    pair = TokenizerPair(student, teacher)
    for options in ({}, {"reverse": True, "similar_special": True}):
        projection = build_projection(pair, **options)
        for spelling in ("<unused7>", "<unused8>"):
            assert row(projection, student.backend.token_to_id(spelling)) == ([], [])
            assert teacher.backend.token_to_id(spelling) not in projection.indices
    (ids,) = tokenize_bytes(teacher, [b"<unused7>"])
    assert teacher.backend.token_to_id("<unused7>") not in ids
    assert teacher.token_bytes.join(np.asarray(ids)) == b"<unused7>"


def test_word_pieces_inside_a_word_are_found_longest_first():
    """WordPiece writes a blank before each word, so that it cannot write the rest of one as a text."""
    words = ["[UNK]", "a", "b", "c", "##a", "##b", "##bc", "##c", "."]
    tokenizer = tokenizers.Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    teacher = trained.load(lambda: (tokenizer, {"unk_token": "[UNK]"}))
    contents = [b" abc", b"abc", b"bcb", b" a bc", b"x", b"."]
    found = [[teacher.bytes_of(i) for i in ids] for ids in tokenize_bytes(teacher, contents)]
    assert found == [[b" a", b"bc"], [b"a", b"bc"], [b"bc", b"b"], [b" a", b" b", b"c"], [], [b"."]]


def test_sentencepiece_spells_what_is_no_character_in_bytes():
    teacher = trained.load(trained.sentencepiece)
    contents = ["▁".encode(), b"the\xe6 cat", b"\xff", "x▁ \u1234".encode()]
    for content, ids in zip(contents, tokenize_bytes(teacher, contents), strict=True):
        assert teacher.token_bytes.join(np.asarray(ids)) == content
    assert [teacher.bytes_of(i) for i in next(tokenize_bytes(teacher, ["▁".encode()]))] == [
        b"\xe2", b"\x96", b"\x81",
    ]  # fmt: skip


def test_counts_are_of_what_rows_are_and_not_of_their_weights():
    pair = trained.pair(trained.three_digits, trained.single_digits)
    projection = build_projection(pair)
    counts = count_rows(pair, projection)
    same = sum(
        content is not None and content in pair.teacher.token_bytes.table
        for content in pair.student.token_bytes.table
    )
    assert counts["bytes"] == same
    assert counts["role"] == 1
    assert counts["repeated"] >= 18  # 11, ..., 99 and 111, ..., 999
    assert counts["empty"] == 1  # BOS
    assert counts["several"] == ((projection.indices >= 0).sum(1) > 1).sum()
    assert sum(counts.values()) == pair.student.size


def test_at_least_one_entry():
    with pytest.raises(UserError, match="entries=0"):
        build_projection(trained.pair(trained.three_digits, trained.single_digits), entries=0)
