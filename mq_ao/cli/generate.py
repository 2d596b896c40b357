"""`mq-ao generate`: continues a prompt."""

from __future__ import annotations

import sys
from itertools import chain
from typing import Annotated

import typer

from mq_ao.cli.console import step
from mq_ao.cli.opened import ANY_HELP, TOKENIZER_HELP, open_any
from mq_ao.errors import MqAoError


def generate(
    *,
    model: Annotated[str, typer.Argument(help=ANY_HELP)],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Tokens to write.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from the k likeliest tokens; 0: from all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that make up this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    tokenizer: Annotated[str | None, typer.Option(help=TOKENIZER_HELP)] = None,
) -> None:
    """Continue a prompt until the tokenizer's end of text; the text is written to stdout as it is made.

    [bold]Examples[/bold]

    mq-ao generate demo --prompt "def "

    mq-ao generate demo-w8a8.ptn -p "import os" -n 500 --temperature 0.7 --top-p 0.95 --seed 1
    """
    if not prompt:
        raise MqAoError("the prompt is empty: give at least one character with --prompt.")
    with step("starting"):
        from mq_ao.models import Sampling
        from mq_ao.writing import written
    sampling = Sampling(temperature, top_k, top_p, seed)
    opened = open_any(model, tokenizer, states=True)
    pieces = written(opened, opened.needed_codec.documents(prompt.encode())[-1], max_new_tokens, sampling)
    for piece in chain([prompt], pieces):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
