"""Whether `transformers.AutoTokenizer` gives the ids that `tokenizer.json` gives."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers

from xtoken_jax.errors import UserError
from xtoken_jax.files import read_json, to_json, write_whole
from xtoken_jax.files.trust import is_trusted
from xtoken_jax.hub import cache_folder, private_folder

_FOLDER = "auto_tokenizer"

# Text on which a rebuilt pre-tokenizer, normalizer or merge table shows.
_PROBES = [
    "The quick brown fox jumps over the lazy dog, doesn't it? We'LL see: 1234567 and 3.14!",
    "    indented\n\tdef f(x_1):\n\n\n        return {'a': [1, 22, 333]}  # ok\r\n",
    "théâtre naïve e\u0301 ﬁ \u212b Привет мир 日本語のテキスト 한국어 مرحبا नमस्ते",
    "👨\u200d👩\u200d👧 🏳\ufe0f\u200d🌈 \u00a0\u3000\u200b x\u2028y",
    " leading, trailing and  double  blanks ",
    "HELLO World camelCase snake_case https://example.org/a?b=c&d=1.5e-3 <b>&amp;</b>",
]
_MOST_LAYERS = 10_000


def compare_auto_tokenizer(
    folder: Path, config: dict[str, Any], backend: tokenizers.Tokenizer, fingerprint: str
) -> str | None:
    """One line that says how the ids differ, None where they are equal or transformers is not installed.

    The answer is kept in the cache folder, by fingerprint, version of transformers and what else in
    the folder decides how the tokenizer is rebuilt.

    Args:
        folder: where it would be loaded from.
        config: the content of its `tokenizer_config.json`.
        backend: what `tokenizer.json` makes.
        fingerprint: of the tokenizer.
    """
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return None
    named, model = config.get("tokenizer_class"), folder / "config.json"
    if named is None and not model.is_file():
        return None  # nothing to rebuild from
    if model.is_file() and not _in_proportion(model):
        return None  # loading the model says what is wrong
    settings = json.dumps(config, sort_keys=True).encode() + (model.read_bytes() if model.is_file() else b"")
    key = hashlib.sha256(f"{fingerprint} {version} ".encode() + settings).hexdigest()
    kept = cache_folder() / _FOLDER / f"{key}.json"
    if is_trusted(kept):
        with contextlib.suppress(UserError):
            answer = read_json(kept, what="a comparison of tokenizers").get("difference", kept)
            if isinstance(answer, str | None):
                return answer
    difference = _difference(folder, backend, named)
    with contextlib.suppress(UserError, OSError):  # otherwise it is compared again next time
        private_folder(_FOLDER)
        write_whole(kept, to_json({"difference": difference}), mode=0o600)
    return difference


def _in_proportion(path: Path) -> bool:
    """Return False for a config.json with too many layers; transformers makes a list of them."""
    try:
        content = read_json(path, what="the settings of a model")
    except UserError:
        return False
    parts = [content, *(part for part in content.values() if isinstance(part, dict))]
    counts = (value for part in parts for key, value in part.items() if "layer" in key)
    return not any(isinstance(value, int) and value > _MOST_LAYERS for value in counts)


@contextlib.contextmanager
def quiet_import() -> Iterator[None]:
    """transformers says on import what it could not find; none of it matters to a tokenizer."""
    before = os.environ.get("TRANSFORMERS_VERBOSITY")
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("TRANSFORMERS_VERBOSITY", None)  # another thread may have been faster
        else:
            os.environ["TRANSFORMERS_VERBOSITY"] = before


def _difference(folder: Path, backend: tokenizers.Tokenizer, named: str | None) -> str | None:
    with quiet_import():
        from transformers import AutoTokenizer
        from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        auto = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        theirs = [auto(text, add_special_tokens=False)["input_ids"] for text in _PROBES]
    # whatever a class in a folder raises, the folder's tokenizer.json can still be used
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"AutoTokenizer cannot load it ({reason}); tokenizer.json is used"
    finally:
        logging.set_verbosity(level)
    ours = [e.ids for e in backend.encode_batch(_PROBES, add_special_tokens=False)]
    wrong = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != list(b)]
    if not wrong:
        return None
    return (
        f"AutoTokenizer (tokenizer_class {named!r}) gives other ids than tokenizer.json for "
        f"{len(wrong)} of {len(_PROBES)} texts, first {_PROBES[wrong[0]]!r}; tokenizer.json is used, as it "
        "should be everywhere: set tokenizer_class to 'PreTrainedTokenizerFast'"
    )
