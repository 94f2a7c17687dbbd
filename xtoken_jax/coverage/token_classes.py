"""Which kind of text a token stands for: numerals, punctuation, words, scripts, code, special tokens."""

from __future__ import annotations

import functools
import re
import string
import unicodedata

from xtoken_jax.tokens.tokenizer import Tokenizer

_MARKS = frozenset(string.punctuation)
_LETTERS = frozenset(string.ascii_letters)

_INDIC = (
    "DEVANAGARI", "BENGALI", "GURMUKHI", "GUJARATI", "ORIYA", "TAMIL", "TELUGU", "KANNADA", "MALAYALAM",
    "SINHALA", "VEDIC",
)  # fmt: skip
# First word of a letter's Unicode name -> class. Letters whose name begins otherwise are of another script.
_SCRIPTS = {
    **dict.fromkeys(("LATIN", "FEMININE", "MASCULINE"), "Latin with accents"),
    **dict.fromkeys(("GREEK", "MICRO"), "Greek"),
    "CYRILLIC": "Cyrillic",
    "ARABIC": "Arabic",
    "HEBREW": "Hebrew",
    **dict.fromkeys(_INDIC, "Devanagari and other Indic"),
    "THAI": "Thai",
    **dict.fromkeys(("CJK", "KANGXI", "IDEOGRAPHIC"), "Han"),
    **dict.fromkeys(("HIRAGANA", "KATAKANA"), "Kana"),
    "HANGUL": "Hangul",
}
_WIDTH = re.compile(r"^(FULLWIDTH|HALFWIDTH|EXTENDED) ")
# Letters by category, of no script by use: mathematics and marks that any script borrows (U+0301, U+FE0F).
_BORROWED = ("MATHEMATICAL", "COMBINING", "VARIATION", "MODIFIER")
_LETTERLIKE_SYMBOLS = range(0x2100, 0x2150)  # double-struck capitals, the litre, the Planck constant

SCRIPTS = tuple(dict.fromkeys(_SCRIPTS.values()))
TEXT_CLASSES = (
    "1-digit numerals", "2-digit numerals", "3-digit numerals", "longer numerals",
    "ASCII punctuation", "punctuation runs",
    "words with leading space", "words", "code and mixed", "whitespace runs",
    *SCRIPTS, "other scripts", "emoji and symbols", "pieces of characters",
    "other",
)  # fmt: skip
CRITICAL = ("2-digit numerals", "3-digit numerals", "ASCII punctuation")

NO_ROLE = "special, no role"
UNUSED = "unused and reserved"
SHADOWED = "bytes behind a token"
_ROLE_CLASS = "special: "


def text_class(content: bytes) -> str:
    """The class of an ordinary token; the first of these that holds.

    - numerals: ASCII digits, with or without one blank in front, by their number.
    - ASCII punctuation: one of the 32 ASCII marks, with or without one blank in front. The paper's
      Table 8 counts 88 such tokens in Llama 3 without saying which; this rule gives 64 there, and of
      the marks with a blank or line end beside them, doubled or of one category, no natural set has 88.
    - punctuation runs: other tokens of marks and blanks alone, such as `!!` or `;` with a line end.
      They are apart from the single marks because runs of a dozen slashes differ between any two
      vocabularies.
    - words: ASCII letters alone; with leading space: behind one blank.
    - whitespace runs: nothing but blanks, tabs and line ends.
    - code and mixed: ASCII with a letter and something else, such as `_name`, `.get`, `x1`, a tab and a word.
    - scripts: text beyond ASCII, by its first letter beyond ASCII (`_script`); pieces of characters:
      bytes that are not UTF-8 alone.
    - other: what is left, such as control characters.
    """
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return "pieces of characters"
    if not text.isascii():
        return "whitespace runs" if text.isspace() else _script(text)
    bare = text.removeprefix(" ")
    if bare.isdigit():
        return f"{len(bare)}-digit numerals" if len(bare) <= 3 else "longer numerals"
    if len(bare) == 1 and bare in _MARKS:
        return "ASCII punctuation"
    if _LETTERS.issuperset(bare) and bare:
        return "words" if bare == text else "words with leading space"
    stripped = text.strip(string.whitespace)
    if not stripped:
        return "whitespace runs"
    if all(c in _MARKS or c in string.whitespace for c in stripped):
        return "punctuation runs"
    if not _LETTERS.isdisjoint(text) and all(part.isprintable() for part in stripped.split()):
        return "code and mixed"
    return "other"


def _script(text: str) -> str:
    """The script of the first letter, mark or digit beyond ASCII; symbols if there is none.

    The first beyond ASCII, so that `…the` is a symbol and `naïve` is Latin with accents.
    """
    return next((s for c in text if not c.isascii() and (s := _script_of(c))), "emoji and symbols")


@functools.cache
def _script_of(character: str) -> str | None:
    """None for what belongs to no script: punctuation, emoji, symbols, combining accents."""
    category = unicodedata.category(character)
    name = _WIDTH.sub("", unicodedata.name(character, ""))
    if category[0] not in "LMN" or name.startswith(_BORROWED) or ord(character) in _LETTERLIKE_SYMBOLS:
        return None
    rest = "other scripts" if category[0] in "LM" or category == "Nd" else None
    return _SCRIPTS.get(re.split(r"[ -]", name)[0], rest)


def class_names(tokenizer: Tokenizer) -> list[str]:
    """The class of every id, a list of V names; each id is in exactly one.

    Besides `text_class`: `special: ROLE` for a token with a role (the first of its roles), special
    tokens without one, ids that are kept in reserve or have no token, and byte-fallback ids of
    characters with a token of their own, which the tokenizer never gives.
    """
    table = tokenizer.token_bytes
    roles: dict[int, str] = {}
    for role, token_id in sorted(tokenizer.roles.items(), key=lambda item: _role_order(item[0])):
        roles.setdefault(token_id, role)
    names = []
    for token_id, content in enumerate(table.table):
        if token_id in table.unused:
            name = UNUSED
        elif token_id in roles:
            name = _ROLE_CLASS + roles[token_id]
        elif token_id in table.special:
            name = NO_ROLE
        elif not content:
            name = UNUSED
        else:
            name = SHADOWED if token_id in table.shadowed else text_class(content)
        names.append(name)
    return names


def _role_order(role: str) -> tuple[bool, str]:
    return role not in ("bos", "eos", "pad", "unk"), role


def sort_key(name: str) -> tuple[int, bool, str]:
    """Order of classes for display: text as in `TEXT_CLASSES`, special by role, then what is not text."""
    if name in TEXT_CLASSES:
        return TEXT_CLASSES.index(name), False, ""
    if name.startswith(_ROLE_CLASS):
        return len(TEXT_CLASSES), *_role_order(name.removeprefix(_ROLE_CLASS))
    return len(TEXT_CLASSES) + 1 + (NO_ROLE, UNUSED, SHADOWED).index(name), False, ""
