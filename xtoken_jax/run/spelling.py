"""The other spelling: settings of `distill` written as options, and options of other commands as settings."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence

_SETTING = re.compile(r"[+~]*([A-Za-z_][\w/]*(?:\.[\w-]+)*)=(.*)", re.DOTALL)
_OPTION = re.compile(r"--?([A-Za-z][\w.-]*)(?:=(.*))?", re.DOTALL)

# Names of one thing. A command has it as one of these options, or as its first word, a folder.
_FOLDER = {"path", "model", "student", "run", "run_dir", "dir", "folder", "checkpoint_dir", "input"}
_MEANS: tuple[set[str], ...] = (
    {
        "data",
        "text_file",
        "file",
        "text",
        "dataset",
        "train",
        "valid",
        "validation",
        "eval_data",
        "test_file",
    },
    {"length", "student_length", "max_length", "seq_length", "seq_len", "context", "teacher_length"},
    {"batch_size", "bs", "per_device_batch_size"},
    {"max_new_tokens", "max_tokens", "new_tokens", "tokens", "max_length", "num_tokens", "n"},
    {"out", "output", "output_dir", "out_dir", "o", "save", "destination", "run_dir"},
    {"step", "steps", "checkpoint"},
    {"temperature", "temperatures", "temp"},
    {"dtype", "export_dtype", "precision", "compute_dtype"},
    {"overwrite", "force", "f", "replace"},
    {"top_k", "topk", "k"},
    {"top_p", "topp", "nucleus"},
    {"json", "j", "format"},
    {"prompt", "prompts", "text", "input"},
    {"entries", "k", "top_k"},
    {"clean", "clear", "delete", "remove"},
)

# What other programs call the settings of `distill`.
KEYS = {
    "student": "student.path", "teacher": "teacher.path", "student_model": "student.path",
    "teacher_model": "teacher.path", "model": "student.path", "path": "student.path",
    "lr": "optimizer.learning_rate", "rate": "optimizer.learning_rate", "wd": "optimizer.weight_decay",
    "warmup": "optimizer.warmup_steps", "max_steps": "train.steps", "num_steps": "train.steps",
    "gradient_accumulation_steps": "train.accumulate", "bs": "data.batch_size",
    "per_device_train_batch_size": "data.batch_size", "train_batch_size": "data.batch_size",
    "length": "data.student_length", "max_length": "data.student_length", "seq_len": "data.student_length",
    "max_seq_length": "data.student_length", "data": "data.train.text.path",
    "dataset": "data.train.text.path", "text": "data.train.text.path", "text_file": "data.train.text.path",
    "train_file": "data.train.text.path", "train_data": "data.train.text.path",
    "valid": "data.validation.text.path", "validation_file": "data.validation.text.path",
    "validation": "data.validation.text.path", "eval_data": "data.validation.text.path",
    "out": "run_dir", "output": "run_dir", "output_dir": "run_dir", "out_dir": "run_dir",
    "seed": "train.seed", "eval_every": "train.evaluate_every", "eval_steps": "train.evaluate_every",
    "save_steps": "train.save_every", "logging_steps": "train.log_every", "rank": "student.lora.rank",
    "lora_rank": "student.lora.rank", "lora_r": "student.lora.rank", "dtype": "student.compute_dtype",
    "bf16": "student.compute_dtype", "temperature": "loss.temperature", "top_k": "loss.top_k",
    "cache": "teacher.cache", "config": "experiment", "config_name": "experiment", "kind": "loss",
    "tensor_parallel": "mesh.tensor", "epochs": "train.steps", "num_train_epochs": "train.steps",
}  # fmt: skip


def advice(
    command: str,
    words: Sequence[str],
    options: Sequence[str],
    places: Sequence[str],
    unplaced: Sequence[str] = (),
    several: Sequence[str] = (),
) -> str | None:
    """Say how a command that takes options spells words that it does not know; None if there are none.

    Args:
        command: such as `xtoken audit`.
        words: what follows the command.
        options: the command's own, such as `--student`.
        places: names of its positional arguments, such as DIR.
        unplaced: words that the parser could not place; without, all words are suspects.
        several: those among `options` that take several words.
    """
    settings: dict[str, str] = {}
    for word, name, value in _foreign(words, options, unplaced, several):
        option, place = _option_of(name, options, places)
        if option and _SETTING.fullmatch(word):
            settings[word] = f"{option} {value}".rstrip()
        elif not settings:
            return _advised(command, word, name, value, option, place, options)
    if not settings:
        return None
    return f"{' '.join(settings)}: {command} takes options, not key=value: {' '.join(settings.values())}"


def _advised(
    command: str, word: str, name: str, value: str, option: str | None, place: str, options: Sequence[str]
) -> str:
    """Say what to write instead of one word: an option, or a folder as the positional argument `place`."""
    what = "option" if word.startswith("-") else "argument"
    if option is None:
        close = difflib.get_close_matches(f"--{name.replace('_', '-')}", options, n=1)
        nearest = f", did you mean {close[0]}?" if close else ""
        return f"unknown {what} {word!r}{nearest}; see {command} --help"
    if not option:
        return f"{word}: {command} takes {place} as a word by itself: {command} {value or place} ..."
    return f"unknown {what} {word!r}, did you mean {option}?; see {command} --help"


def _foreign(
    words: Sequence[str], options: Sequence[str], unplaced: Sequence[str], several: Sequence[str]
) -> Iterator[tuple[str, str, str]]:
    """Word, name and value of what is a setting, or an option of another command."""
    before = ""  # the option that the word is a value of
    for last, word, following in zip(["", *words], words, [*words[1:], ""], strict=False):
        before = last if last.startswith("--") else before if before in several else ""
        if unplaced and word not in unplaced:
            continue
        setting, option = _SETTING.fullmatch(word), _OPTION.fullmatch(word)
        if option and (unplaced or not any(o.startswith(word.partition("=")[0]) for o in (*options, "-h"))):
            yield word, _plain(option[1]), option[2] or ("" if following.startswith("-") else following)
        elif setting and (unplaced or not before):
            yield word, _plain(setting[1]), setting[2]
        elif unplaced:
            yield word, word, ""


def _plain(name: str) -> str:
    """The name of a key or option: `data.train.text.path` is data, `--Text-File` is text_file."""
    parts = name.lower().replace("-", "_").split(".")
    if parts[-1] == "path" and len(parts) > 1:
        return parts[0]
    return parts[-1]


def _option_of(name: str, options: Sequence[str], places: Sequence[str]) -> tuple[str | None, str]:
    """The option of a name, or "" and the positional argument; None if the command has neither."""
    own = f"--{name.replace('_', '-')}"
    if own in options:
        return own, ""
    if places and name in _FOLDER:
        return "", places[0]
    for group in _MEANS:
        option = next((o for o in options if _plain(o[2:]) in group), None)
        if name in group and option is not None:
            return option, ""
    return None, ""


def as_settings(
    command: str, words: Sequence[str], unknown: Sequence[str], keys: Sequence[str], groups: Sequence[str]
) -> str:
    """Say how `xtoken distill` spells options that it does not know.

    Args:
        command: such as `xtoken distill`.
        words: what follows the command.
        unknown: those among them that begin with a dash and are not its options.
        keys: all keys of the config, such as train.steps.
        groups: the config's groups, such as loss.
    """
    first = unknown[0]
    pairs = dict(_options(words, unknown))
    spelled = {option: _key_of(option, keys, groups) for option in pairs}
    missing = next((option for option, key in spelled.items() if key is None), None)
    if missing is not None or not spelled:
        wrong = (missing or first).partition("=")[0]
        nearest = _nearest_key(wrong, keys)
        return f"unknown option {wrong}{nearest}; settings are key=value, see {command} --help"
    instead = " ".join(f"{spelled[option]}={value or '...'}" for option, value in pairs.items())
    given = " ".join(o if "=" in o or not value else f"{o} {value}" for o, value in pairs.items())
    return f"unknown option {given}; settings are key=value: write {instead}"


def _options(words: Sequence[str], unknown: Sequence[str]) -> Iterator[tuple[str, str]]:
    for number, word in enumerate(words):
        if word not in unknown:
            continue
        _, equals, value = word.partition("=")
        following = words[number + 1] if number + 1 < len(words) else ""
        loose = following and not following.startswith("-") and not _SETTING.fullmatch(following)
        yield word, value if equals else following if loose else ""


def _key_of(option: str, keys: Sequence[str], groups: Sequence[str]) -> str | None:
    name = option.partition("=")[0].lstrip("-").replace("-", "_")
    if name in keys or (name in groups and name not in KEYS):
        return name
    if name in KEYS:
        return KEYS[name]
    same = [key for key in keys if key.rpartition(".")[2] == name.lower()]
    joined = [key for key in keys if key.replace(".", "_") == name.lower()]
    return next(iter([*joined, *same]), None)


def _nearest_key(option: str, keys: Sequence[str]) -> str:
    name = option.lstrip("-").replace("-", "_")
    ends: Mapping[str, str] = {key.rpartition(".")[2]: key for key in reversed(keys)}
    close = difflib.get_close_matches(name, [*ends, *keys], n=1)
    return f", did you mean {ends.get(close[0], close[0])}=...?" if close else ""
