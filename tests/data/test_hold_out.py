"""Documents held out of the training sources: which, how many, and that training sees none of them."""

import json

import pytest

from xtoken_jax.data.hold_out import MOST, hold_out, number_in_source
from xtoken_jax.data.sources import SourceConfig, SourceKind, read_sources
from xtoken_jax.errors import UserError


def source(path, texts, **settings):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return SourceConfig(path=str(path), **settings)


@pytest.mark.parametrize(
    ("count", "share", "wanted"),
    [(10, 0.02, [5]), (100, 0.02, [25, 75]), (50, 0.1, [5, 15, 25, 35, 45]), (10, 0.5, [1, 3, 5, 7, 9])],
)
def test_they_are_spread_evenly_and_not_trained_on(count, share, wanted, tmp_path):
    texts = [f"text {n}" for n in range(count)]
    train, held_out = hold_out(read_sources({"a": source(tmp_path / "a.jsonl", texts)}), share)
    assert list(held_out["a"]) == [texts[n] for n in wanted]
    assert list(train["a"]) == [text for n, text in enumerate(texts) if n not in wanted]
    assert [number_in_source(held_out["a"], n) for n in range(len(wanted))] == wanted
    assert number_in_source(train["a"], len(train["a"]) - 1) == max(set(range(count)) - set(wanted))
    assert held_out["a"].where(0).endswith(f":{wanted[0] + 1}")


def test_blank_documents_are_not_chosen_and_a_limit_counts(tmp_path):
    texts = ["" if n in (5, 6) else f"text {n}" for n in range(40)]
    train, held_out = hold_out(read_sources({"a": source(tmp_path / "a.jsonl", texts, limit=10)}), 0.1)
    assert list(held_out["a"]) == ["text 7"]
    assert len(train["a"]) == 9


def test_large_sources_give_so_many_at_most(tmp_path):
    texts = [f"text {n}" for n in range(60 * MOST)]
    train, held_out = hold_out(read_sources({"a": source(tmp_path / "a.jsonl", texts)}), 0.1)
    assert len(held_out["a"]) == MOST
    assert len(train["a"]) == 59 * MOST


def test_generated_sources_and_small_ones_beside_them(tmp_path):
    sources = {
        "sums": SourceConfig(kind=SourceKind.arithmetic, documents=30, wrong_share=0.5),
        "few": source(tmp_path / "few.jsonl", ["one", "two"]),
    }
    train, held_out = hold_out(read_sources(sources), 0.1)
    assert {name: len(documents) for name, documents in train.items()} == {"sums": 27, "few": 2}
    assert {name: len(documents) for name, documents in held_out.items()} == {"sums": 3}
    assert not set(held_out["sums"]) & set(train["sums"])


def test_too_few_documents_are_one_message(tmp_path):
    sources = {"a": source(tmp_path / "a.jsonl", ["x"] * 9), "b": source(tmp_path / "b.jsonl", ["y"])}
    with pytest.raises(
        UserError, match=r"9 in a, 1 in b; a source needs 10\).* or data.validation=none"
    ) as error:
        hold_out(read_sources(sources), 0.02)
    assert "\n" not in str(error.value)


def test_the_digests_name_the_choice(tmp_path):
    read = read_sources({"a": source(tmp_path / "a.jsonl", [f"text {n}" for n in range(99)])})
    digests = set()
    for share in (0.0, 0.02, 0.03, 0.5):
        for part in hold_out(read, share):
            digests |= {documents.digest for documents in part.values()}
    again = {documents.digest for part in hold_out(read, 0.03) for documents in part.values()}
    assert len(digests) == 7
    assert again < digests
