"""`xtoken generate`: its arguments and what it does."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from xtoken_jax.cli.tokenizers import print_json
from xtoken_jax.errors import UserError, printable

if TYPE_CHECKING:
    from rich.console import Console

TEXT = "what a model writes behind prompts"
HELP = """\
The likeliest token is taken at each step, unless a temperature is given. A text ends at the model's own
end tokens (config.json, generation_config.json and the tokenizer's EOS), at a --stop string, or after
--max-new-tokens. A prompt is plain text: a chat model's markers in it are letters, not control tokens;
with --chat it is what a user says, in the model's chat template.

example:
  xtoken generate runs/quickstart/student --prompt "347%5=" --stop $'\\n'
  xtoken generate DIR --prompt "Once upon" --temperature 0.8 --top-p 0.95 --seed 1
  xtoken generate DIR --prompt "1+1=" --prompt "2+2=" --json
"""
_ENDS = {"eos": "ended by itself", "stop": "ended at a stop string", "length": "cut at --max-new-tokens"}


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    sub.add_argument("model", metavar="DIR", help="Hugging Face folder or hub id")
    sub.add_argument(
        "--prompt", required=True, action="append", metavar="TEXT", help="text to go on from; can be repeated"
    )
    sub.add_argument("--chat", action="store_true", help="each prompt as a user's turn, to be answered")
    sub.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="tokens a prompt at most (default: 128)"
    )
    sub.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="above 0: sample (default: 0, greedy)"
    )
    sub.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="sample from the likeliest P only (default: 1)"
    )
    sub.add_argument("--seed", type=int, default=0, help="of sampling (default: 0)")
    sub.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end in front of this; can be repeated"
    )
    sub.add_argument("--batch-size", type=int, default=8, metavar="B", help="prompts at once (default: 8)")
    sub.add_argument(
        "--json", action="store_true", help="print a list of {prompt, text, tokens, finish} as JSON"
    )


def run(options: argparse.Namespace, console: Console) -> None:
    """Prints each prompt and what follows it on stdout, and how it ended on `console`."""
    import jax

    from xtoken_jax.distributed.mesh import single_device_mesh
    from xtoken_jax.evaluate.completions import chat_prompt, complete, end_tokens
    from xtoken_jax.hub import resolve_folder
    from xtoken_jax.models.generate import check_settings
    from xtoken_jax.models.load import ModelConfig, open_model
    from xtoken_jax.tokens.tokenizer import Tokenizer

    settings = {name: getattr(options, name) for name in ("max_new_tokens", "temperature", "top_p", "stop")}
    settings["batch_size"] = options.batch_size
    check_settings(**settings)
    if not options.max_new_tokens:
        raise UserError("--max-new-tokens 0: must be at least 1")
    if options.top_p < 1 and not options.temperature:
        raise UserError(
            f"--top-p {options.top_p:g}: only read when tokens are sampled; add --temperature 1, or leave it "
            "out"
        )
    key = jax.random.key(options.seed)
    tokenizer = Tokenizer.load(options.model)
    if tokenizer.warning:
        console.print(f"warning: {tokenizer.name}: {tokenizer.warning}", markup=False, style="yellow")
    mesh = single_device_mesh()
    with jax.set_mesh(mesh):
        model, params = open_model(ModelConfig(path=options.model), tokenizer.size, mesh=mesh, key=key)
        prompts = [chat_prompt(tokenizer, text) if options.chat else text for text in options.prompt]
        encoded = (
            [len(p) for p in prompts] if options.chat else map(len, tokenizer.encode_batch(options.prompt))
        )
        longest = max(encoded) + options.max_new_tokens
        if longest > model.config.max_position_embeddings:
            console.print(
                f"warning: texts may come to {longest:,} tokens; the model was made for "
                f"{model.config.max_position_embeddings:,}",
                style="yellow",
            )
        found = complete(
            model,
            params,
            tokenizer,
            prompts,
            eos_ids=end_tokens(model.config, tokenizer, resolve_folder(options.model)),
            key=key,
            console=console,
            **settings,
        )
    if options.json:
        rows = [
            {"prompt": prompt, "text": c.text, "tokens": c.tokens, "finish": c.finish}
            for prompt, c in zip(options.prompt, found, strict=True)
        ]
        print_json(rows)
        return
    for prompt, completion in zip(options.prompt, found, strict=True):
        text = completion.text if options.chat else prompt + completion.text
        print(printable(text) if sys.stdout.isatty() else text, flush=True)
        console.print(f"{len(completion.tokens)} tokens, {_ENDS[completion.finish]}", style="dim")
