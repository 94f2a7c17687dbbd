"""Text that aligners break on."""

from hypothesis import settings
from hypothesis import strategies as st

PIECES = [
    "201", "222", "1234567890", "3.14", "1,000", "٣٤",
    " ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", " \n", "\u00a0", "\u3000", "\u200b",
    "the cat", " sat", "Hello", "théâtre", "naïve", "def f(x):\n\treturn", ".\n\n", "...", "!?",
    "日本語", "中文", "Привет", "한국어", "नमस्ते",
    "👍🏽", "👨\u200d👩\u200d👧", "🏳\ufe0f\u200d🌈", "🇩🇪",
    "\x00", "\x07", "\x1b[0m", "\x7f", "\x85", "\u2028", "\ufeff", "\ufffd",
    "▁", "Ġ", "Ċ", "<0x41>", "<s>", "<|begin|>", "<|end|>", "</s>", "<unk>",
]  # fmt: skip
DECOMPOSED = ["e\u0301", "a\u0323\u0302", "\u1100\u1161", "\u212b", "n\u0303o"]

FEW = settings(derandomize=True, max_examples=50, deadline=None, database=None)


def texts(pieces=PIECES, *, anything=True):
    """Empty texts, single characters and sequences of hard pieces."""
    sequence = st.lists(st.sampled_from(pieces), max_size=8).map("".join)
    # Control characters, unassigned code points, all but surrogates.
    return sequence | st.text(max_size=12) | st.text(min_size=1, max_size=1) if anything else sequence
