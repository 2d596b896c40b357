"""`mq-ao serve`: OpenAI's routes for one model."""

from __future__ import annotations

from typing import Annotated

import typer

from mq_ao.cli.console import err, step
from mq_ao.cli.opened import ANY_HELP, TOKENIZER_HELP, open_any
from mq_ao.errors import MqAoError
from mq_ao.extras import needs


def serve(
    *,
    model: Annotated[str, typer.Argument(help=ANY_HELP)],
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 is every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="What clients call the model; by default as it is named here.")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help=TOKENIZER_HELP)] = None,
    batch: Annotated[int, typer.Option(min=1, help="Requests that are decoded at a time.")] = 32,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait besides; more get status 429.")] = 256,
    max_prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt at most.")] = 32768,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 4096,
    prefix_megabytes: Annotated[int, typer.Option(min=0, help="Memory for beginnings that prompts share.")] = 256,
    api_key: Annotated[
        str | None, typer.Option(envvar="MQ_AO_API_KEY", help="Key that clients have to send; by default none.")
    ] = None,
) -> None:
    """Serve a model by OpenAI's protocol: /v1/completions, /v1/chat/completions, /v1/models.

    All requests are decoded as one batch, which new ones join at any step; what prompts begin with in common is read
    once. Ctrl-C lets running answers end.

    [bold]Examples[/bold]

    mq-ao serve demo

    mq-ao serve mamba-w8a8.ptn --tokenizer state-spaces/mamba-130m-hf --port 8080 --api-key secret

    curl localhost:8000/v1/completions -d '{"prompt": "import os", "max_tokens": 20}'
    """
    with step("starting"), needs("the server", "serve"):
        from mq_ao.memory import keep_freed
        from mq_ao.serving.app import Server
        from mq_ao.serving.limits import Limits
        from mq_ao.serving.model_thread import ModelThread
        from mq_ao.serving.run import run

    limits = Limits(
        batch=batch, queue=queue, prompt=max_prompt, new_tokens=max_new_tokens, prefix_bytes=prefix_megabytes * 2**20
    )
    keep_freed()
    thread = ModelThread()
    opened = thread.submit(open_any, model, tokenizer, states=True).result()
    server = Server(opened, name or model, limits, api_key, thread)
    if host not in ("127.0.0.1", "localhost", "::1") and api_key is None:
        err().print(f"warning: {host} can be reached from elsewhere, and no --api-key is asked for", style="yellow")
    try:
        run(server, host, port)
    except OSError as error:
        raise MqAoError(f"{host}:{port} cannot be listened at ({error.strerror}): give another --port.") from error
