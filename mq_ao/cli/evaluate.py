"""`mq-ao eval`: bits per byte and perplexity of a text, float against quantized; or tasks of lm-evaluation-harness."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mq_ao.cli.console import bar, check_json, megabytes, out, step, write_json
from mq_ao.cli.evaluate_tasks import evaluate_tasks
from mq_ao.cli.opened import ANY_HELP, TOKENIZER_HELP, Opened, open_any
from mq_ao.errors import MqAoError
from mq_ao.opening import WINDOW

if TYPE_CHECKING:
    from mq_ao.evaluate import Comparison, Evaluation


def evaluate(
    *,
    model: Annotated[str, typer.Argument(help=ANY_HELP)],
    text: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            readable=True,
            help="Text, or token ids (.npy, .safetensors). Default for byte-level models: the bundled text.",
        ),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Reference to compare with, usually the float model: " + ANY_HELP)
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            help="Start from a zero state every so many tokens; by default only at documents, and for models without "
            f"states every {WINDOW}."
        ),
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help=TOKENIZER_HELP)] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-evaluation-harness instead of a text, by name: arc_easy,piqa,lambada_openai."),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Folder with more tasks, as lm-eval has them.")
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples before each question of a task.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each task at most, for trying out.")] = None,
    json: Annotated[
        str | None, typer.Option("--json", metavar="FILE|-", help="Write the figures as JSON; - is stdout.")
    ] = None,
) -> None:
    """Cost of a text under a model, in bits per byte and perplexity.

    [bold]Examples[/bold]

    mq-ao eval demo

    mq-ao eval demo-w8a8.ptn --against demo

    mq-ao eval mamba-w8a8.ptn --text wiki.txt --tokenizer state-spaces/mamba-130m-hf --json -

    mq-ao eval mamba-w8a8.ptn --tasks arc_easy,arc_challenge,piqa,winogrande,hellaswag
    """
    check_json(json)
    if tasks is not None:
        evaluate_tasks(
            *(model, tokenizer, tasks, include_path, num_fewshot, limit, json),
            others={"--text": text, "--against": against, "--window": window},
        )
        return
    if include_path or num_fewshot or limit:
        raise MqAoError("--include-path, --num-fewshot and --limit are for tasks: name some with --tasks.")
    opened = open_any(model, tokenizer)
    reference = None if against is None else open_any(against, tokenizer)
    with step("starting"):
        from mq_ao.evaluate import compare
        from mq_ao.evaluate import evaluate as run
        from mq_ao.models import demo
        from mq_ao.text import BYTE_VOCABULARY, TOKEN_FILES, read_tokens
    if text is None:
        if opened.vocab_size != BYTE_VOCABULARY:
            raise MqAoError("there is nothing to evaluate on: give text or token ids with --text FILE.")
        text = demo.HELDOUT
    codecs = (opened.codec, reference.codec if reference else None) if text.suffix not in TOKEN_FILES else (None,)
    tokens = read_tokens(text, opened.vocab_size, next((codec for codec in codecs if codec is not None), None))
    if reference is not None and reference.vocab_size != opened.vocab_size:
        raise MqAoError(
            f"{model} has {opened.vocab_size} tokens and {against} has {reference.vocab_size}: compare a "
            "program with the model that it was made from."
        )
    every = [opened] if reference is None else [opened, reference]
    chunks: dict[str, int] = {}
    if not all(item.has_states for item in every):
        # What has no states reads a window in one call.
        window = WINDOW if window is None else window
        chunks = {"chunk": window}
    with bar(f"evaluating {tokens.predicted} tokens", tokens.predicted) as advance:
        if reference is None:
            comparison = None
            rows = [(opened, run(opened.step, tokens, window=window, progress=advance, **chunks))]
        else:
            comparison = compare(reference.step, opened.step, tokens, window=window, progress=advance, **chunks)
            rows = [(reference, comparison.reference), (opened, comparison.other)]
    if json is not None:
        write_json(json, _content(str(text), rows, comparison))
    if json != "-":
        _print(str(text), rows, comparison)


def _content(text: str, rows: list[tuple[Opened, Evaluation]], comparison: Comparison | None) -> dict[str, Any]:
    models = [{"model": opened.source, "weight_bytes": opened.weight_bytes, **row.to_dict()} for opened, row in rows]
    return {"text": text, "models": models, "comparison": comparison.to_dict() if comparison else None}


def _print(text: str, rows: list[tuple[Opened, Evaluation]], comparison: Comparison | None) -> None:
    from rich.table import Table

    table = Table(title=f"{text}: {rows[0][1].tokens} tokens", title_justify="left")
    for name in ("model", "bits per byte", "perplexity", "top-1", "weights", "tokens/s"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for opened, row in rows:
        bits = "-" if row.bits_per_byte is None else f"{row.bits_per_byte:.4f}"
        table.add_row(
            opened.source,
            bits,
            f"{row.perplexity:.4f}",
            f"{row.accuracy:.4f}",
            megabytes(opened.weight_bytes),
            f"{row.tokens / row.seconds:.0f}",
        )
    console = out()
    console.print(table)
    if comparison is not None:
        console.print(
            f"cost {100 * (comparison.relative_cost - 1):+.3f} % against {rows[0][0].source}; "
            f"mean KL {comparison.divergence:.5f} nats a token; "
            f"same likeliest token {100 * comparison.agreement:.2f} %",
            markup=False,
        )
