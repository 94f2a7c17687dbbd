"""Seeded texts of the kinds that aligners break on; the same seed gives the same texts."""

# ruff: noqa: RUF001, SIM905

import unicodedata

import numpy as np

ENGLISH = (
    "The cat sat on the mat, and the dogs ran. It's twelve o'clock; nobody knew WHY! In the end, she "
    "re-read e.g. the U.S. report's appendix (twice), didn't she? Well... \"yes\", he said - and left."
).split(" ")
CODE = [
    *("def f(x):\n\treturn x", "for (int i = 0; i < n; ++i) {\n", "\t\tif a_b_c != __init__:\n", "}\n\n\n"),
    *("snake_case_name", "camelCaseName", "SCREAMING_CASE", "0xFF_FF", "1e-10", "a->b.c[::-1]", "  # note\n"),
    *("<div class='x'>", "</div>\r\n", "SELECT * FROM t;", "\\n\\t", "$x=~s/a/b/g", "    ", "\t", "    \t"),
    *("===", "!==", "//////", "/* */", "lambda *a, **k: None", '"""doc"""', "λ = 1", "__", "..."),
]
WORDS = {
    "cjk": "日本語 の テキスト 中文 文本 漢字 한국어 문장 。 、 「引用」 東京 龍 𠮷 ㍿ １２３ 　".split(" "),
    "arabic": "السلام عليكم مُحَمَّد كتاب ٢٠١ ۱۲۳ ، ؟ لا ﻻ ـــ العربية قَالَ".split(" "),
    "devanagari": "नमस्ते हिन्दी क्षत्रिय कि की ज़ ड़ क़ २०१ । संस्कृतम् श्री ऽ \u0958 \u095c".split(" "),
    "hebrew": "שלום עולם בְּרֵאשִׁית שׁ יִ 5,784 ״צ״ ירושלים־ \ufb2a \ufb1d".split(" "),
    "thai": "สวัสดี ภาษาไทย กำ น้ำ ๒๐๑ ฿ ที่นี่ เแ".split(" "),
    "european": "Привет мир Ελληνικά ﬁn Straße naïve théâtre İstanbul ǆ Ŀ ½ № ² Ω Å ſ €".split(" "),
}  # fmt: skip
EMOJI = [
    *("👍", "👍🏽", "👨\u200d👩\u200d👧\u200d👦", "🏳\ufe0f\u200d🌈", "🇩🇪", "🇩", "❤\ufe0f"),
    "🏴\U000e0067\U000e0062\U000e007f",
    *("❤\ufe0e", "1\ufe0f\u20e3", "☺", "👩🏿\u200d🚀", "\u200d", "\ufe0f", "🏽", "🫠", "🤌🏻"),
]  # fmt: skip
MARKS = [
    *("\u0301", "\u0300", "\u0323", "\u0302", "\u0308", "\u0303", "\u0327", "\u0328", "\u0345", "\u034f"),
    *("\u20d7", "\u0338", "\u3099", "\u093c", "\u05bc", "\u0651", "\u1dc4", "\u035c"),
]
COMPOSED = [*"éàüñçÅộǖẫΰᾷẛ̣ḹ", "각", "힣", "が", "パ", "क़", "שׁ", "\u212b", "\u2126", "\u0344", "\u1e9b\u0323"]
JAMO = [
    "\u1100\u1161",
    "\u1100\u1161\u11a8",
    "\u1112\u1175\u11c2",
    "\u1161",
    "\u11a8",
    "\uac00\u11a8",
    "ᄀ",
    "ㄱ",
]
BLANKS = [" ", "  ", "   ", " " * 7, " " * 31, "\t", "\t\t", "\n", "\n\n", "\n" * 5, "\r", "\r\n", "\r\n\r\n"]
OTHER_BLANKS = [*"\u00a0\u1680\u2000\u2003\u2007\u2009\u202f\u205f\u3000\u2028\u2029\x85\x0b\x0c", " \u00a0 "]
CONTROLS = [*map(chr, range(32)), "\x7f", *map(chr, range(0x80, 0xA0)), "\x1b[0m", "\x00\x00"]
ZERO_WIDTH = [*"\u200b\u200c\u200d\u200e\u200f\u2060\u2061\ufeff\u00ad\u180e\u202a\u202e\u2066\u2069\ufe00"]
STRANGE = [
    *("\ue000", "\uf8ff", "\U000f0000", "\U0010fffd", "\U0010ffff", "\ufdd0", "\ufffe", "\uffff", "\ufffd"),
    *("\u0378", "\u0530", "\U0001ffff", "\U00020000", "\U000323af", "\U000e0001", "\U000e0100", "\U00016d68"),
]
MARKERS = [
    *("<s>", "</s>", "<unk>", "<pad>", "<bos>", "<eos>", "<mask>", "<think>", "</think>", "<tool_call>"),
    *("<0x41>", "<0x0A>", "<0xE6>", "<0x", "▁", "▁▁", "▁the", "Ġ", "Ċ", "Ġthe", "ĉ", "Â", "##ing", "[CLS]"),
    *("[UNK]", "<|", "|>", "<|eot_id|>", "<|im_start|>", "<|endoftext|>", "<|start_header_id|>user"),
    *("<start_of_turn>", "\n\nHuman:", "<｜User｜>", "<｜begin▁of▁sentence｜>", "<EOT>", "<META>"),
    *("<unused7>", "[multimodal]", "<|start|>", "<2mass>"),
]  # fmt: skip


def _sequence(rng, pieces, longest, glue=("",)):
    chosen = rng.integers(0, len(pieces), size=rng.integers(1, longest + 1))
    return "".join(pieces[i] + glue[rng.integers(len(glue))] for i in chosen)


def _digits(rng, zero, length):
    return "".join(chr(zero + d) for d in rng.integers(0, 10, size=length))


ZEROS = [0x660, 0x6F0, 0x966, 0xE50, 0xFF10, 0x1D7CE, 0x1D7F6, 0x0F20, 0x11F50]
SIGNS = [" ", ", ", "+", " - ", "=", "\n", ".", "/", ":", "%", "e", "  ", "\t", "_", ""]


def numbers(rng):
    return "".join(
        _digits(rng, 0x30, rng.integers(1, 12)) + SIGNS[rng.integers(len(SIGNS))]
        for _ in range(rng.integers(1, 12))
    )


def other_digits(rng):
    extra = [*"½¾²³①⑳Ⅷⅻ〇四五万", "㎏", "٫", "٬"]
    parts = []
    for _ in range(rng.integers(1, 8)):
        zero = ZEROS[rng.integers(len(ZEROS))] if rng.random() < 0.8 else 0x30
        parts.append(_digits(rng, zero, rng.integers(1, 7)))
        parts.append(
            SIGNS[rng.integers(len(SIGNS))] if rng.random() < 0.7 else extra[rng.integers(len(extra))]
        )
    return "".join(parts)


def accents(rng):
    parts = []
    for _ in range(rng.integers(1, 8)):
        base = _sequence(rng, [*"aeouncsyAEOk", "the ", " ", "α", "ï", "日", "क", "\n", "1", *COMPOSED], 3)
        parts.append(base + (_sequence(rng, MARKS, 3) if rng.random() < 0.6 else ""))
        if rng.random() < 0.3:
            parts.append(_sequence(rng, [*JAMO, *COMPOSED], 3))
    text = "".join(parts)
    form = rng.integers(4)
    return text if form == 0 else unicodedata.normalize(("NFD", "NFC", "NFKD")[form - 1], text)


def any_characters(rng):
    """Assigned or not, all planes, surrogates left out."""
    high = int(rng.choice([0x250, 0x3000, 0x10000, 0x20000, 0x110000]))
    points = rng.integers(0, high, size=rng.integers(1, 13))
    return "".join(chr(p) for p in points.tolist() if not 0xD800 <= p < 0xE000)


def sentence(rng, language, blanks=("", " ", "  ", "\n")):
    return _sequence(rng, WORDS[language] + ["the", "201"], 10, blanks)


KINDS = {
    "numbers": numbers,
    "other digits": other_digits,
    "code": lambda rng: _sequence(rng, CODE, 8),
    "English": lambda rng: _sequence(rng, ENGLISH, 20, (" ", " ", " ", "  ", "\n", ", ")),
    **{name: (lambda rng, name=name: sentence(rng, name)) for name in WORDS},
    "emoji": lambda rng: _sequence(rng, [*EMOJI, " ", "a"], 8),
    "accents": accents,
    "line ends": lambda rng: _sequence(rng, ["a", "The", "201", ".", *BLANKS[5:]], 12),
    "blanks": lambda rng: _sequence(rng, [*BLANKS, *OTHER_BLANKS, "a", "the", "7", "."], 10),
    "controls": lambda rng: _sequence(rng, [*CONTROLS, "a", " the"], 8),
    "zero width": lambda rng: _sequence(rng, [*ZERO_WIDTH, "a", " the", "日", "e", "\u0301", "1"], 10),
    "private and unassigned": lambda rng: _sequence(rng, [*STRANGE, "a", " ", "日"], 6),
    "any characters": any_characters,
}


def special_tokens(rng, names):
    """Spelled-out special and added tokens, whole, cut short and in running text."""
    pieces = [*MARKERS, *names]
    parts = []
    for _ in range(rng.integers(1, 6)):
        piece = pieces[rng.integers(len(pieces))]
        if rng.random() < 0.2:
            piece = piece[: rng.integers(1, len(piece) + 1)]
        parts.append(piece + ("", " ", "\n", "the", " 201")[rng.integers(5)])
    return "".join(parts)


def mixture(rng, parts=4):
    makes = list(KINDS.values())
    return "".join(makes[rng.integers(len(makes))](rng) for _ in range(rng.integers(1, parts + 1)))


def single_characters(rng):
    """Every character below U+0600 and a sample of all others; the empty text."""
    points = [*range(0x600), *rng.integers(0x600, 0x3100, 300).tolist(), *rng.integers(0x3100, 0x110000, 300)]
    return ["", *(chr(p) for p in points if not 0xD800 <= p < 0xE000)]


def long_text(rng, size=100_000):
    """One text of about 100 kB."""
    parts, total = [], 0
    while total < size:
        parts.append(mixture(rng))
        total += len(parts[-1].encode())
    return "".join(parts)


NAMES = [*KINDS, "special tokens", "single characters", "mixtures", "long"]


def texts(kind, count, special=(), seed=0):
    """`count` texts of a kind; of single characters there are always some 2,100, of the long text one."""
    rng = np.random.default_rng([seed, NAMES.index(kind)])
    if kind == "single characters":
        return single_characters(rng)
    if kind == "long":
        return [long_text(rng)]
    if kind == "mixtures":
        return [mixture(rng) for _ in range(count)]
    if kind == "special tokens":
        return [special_tokens(rng, list(special)) for _ in range(count)]
    return [KINDS[kind](rng) for _ in range(count)]
