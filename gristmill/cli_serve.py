"""`gristmill serve`: an OpenAI-compatible HTTP server over one artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gristmill.cli_options import (
    ARTIFACT,
    DEVICE,
    HUGEPAGES,
    MAX_LEN,
    PIN,
    TENSOR_PARALLEL,
    THREADS,
    named_adapters,
)
from gristmill.cli_output import note
from gristmill.runtime.errors import GristmillError

LOOPBACK = ("127.0.0.1", "::1", "localhost")
NO_QUEUE_OF_ITS_OWN = 2**31 - 1  # the server counts what waits
NEEDED = ("fastapi", "uvicorn", "httptools", "prometheus_client", "pydantic", "starlette")


@click.command("serve", no_args_is_help=True)
@ARTIFACT
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any free.")
@click.option("--model-name", help="The model's name for clients; default: that of the artifact's folder.")
@click.option(
    "--api-key-file", type=click.Path(), help="Keys, one a line; also GRISTMILL_API_KEYS (commas between)."
)
@click.option("--max-slots", type=int, help="Texts that run at once; default: as compiled.")
@click.option("--max-queue", type=int, default=256, show_default=True, help="Texts that may wait for a slot.")
@click.option("--max-new-tokens", type=int, help="The most a request may ask for; default: the context.")
@click.option(
    "--max-body", "max_body_bytes", type=int, default=2**21, show_default=True, help="Bytes of a request."
)
@click.option(
    "--deadline",
    "deadline_s",
    type=float,
    default=600.0,
    show_default=True,
    help="Seconds after which a text ends where it is.",
)
@click.option(
    "--grace",
    "grace_s",
    type=float,
    default=30.0,
    show_default=True,
    help="Seconds that SIGTERM leaves to requests under way.",
)
@click.option(
    "--stall",
    "stall_s",
    type=float,
    default=30.0,
    show_default=True,
    help="Seconds a client may take to send a request, or leave an answer unread.",
)
@click.option("--log", "log_path", type=click.Path(), help="File for JSON lines; default: stderr.")
@click.option("--log-prompts", is_flag=True, help="Also log what clients ask and get.")
@click.option(
    "--draft", type=click.Path(), help="Artifact of a smaller model, same tokenizer, that proposes tokens."
)
@click.option(
    "--adapter", "adapters", multiple=True, metavar="NAME=DIR", callback=named_adapters,
    help="PEFT adapter that requests choose by `model`; may be given several times.",
)  # fmt: skip
@click.option(
    "--replicas", type=click.IntRange(1), help="Engines over the artifact, as processes of Ray Serve [ray]."
)
@MAX_LEN
@DEVICE
@THREADS
@TENSOR_PARALLEL
@HUGEPAGES
@PIN
def serve_command(
    artifact: str, host: str, port: int, model_name: str | None, api_key_file: str | None,
    max_slots: int | None, log_path: str | None, draft: str | None, max_len: int | None, device: str,
    threads: int | None, tensor_parallel: int | None, hugepages: bool, pin: bool, adapters: dict[str, str],
    replicas: int | None, **limits: Any,
) -> None:  # fmt: skip
    """Serve an artifact over HTTP, as OpenAI's API: /v1/completions, /v1/chat/completions, /v1/models.

    /health says whether requests are taken, /metrics is for Prometheus. SIGTERM finishes what is under way.
    With --replicas, --max-slots and --max-queue are those of each replica, --threads of all together.

    \b
    gristmill serve chat.grist
    gristmill serve chat.grist --adapter sql=adapters/sql --adapter law=adapters/law
    gristmill serve chat.grist --host 0.0.0.0 --api-key-file keys.txt --max-slots 32
    gristmill serve chat.grist --replicas 2
    curl localhost:8000/v1/completions -H 'content-type: application/json' -d '{"prompt": "Once"}'
    """
    try:
        from gristmill.runtime.server.serve import bind, serve
    except ModuleNotFoundError as error:
        if str(error.name).split(".")[0] not in NEEDED:
            raise
        raise GristmillError(
            f"serving needs {error.name}; install it with `pip install 'gristmill[serve]'`"
        ) from error
    from gristmill.runtime.server.settings import Settings, read_keys
    from gristmill.runtime.session import load

    name = model_name if model_name is not None else Path(artifact).resolve().name
    if name in adapters:
        raise GristmillError(
            f"an adapter has the model's name, {name!r}; give it another one, or another --model-name"
        )
    settings = Settings(model=name, keys=read_keys(api_key_file), **limits)
    how: dict[str, Any] = {
        "threads": threads, "max_len": max_len, "max_slots": max_slots, "hugepages": hugepages,
        "draft": draft, "adapters": adapters,
    }  # fmt: skip
    if replicas is not None:
        _refuse_with_replicas(pin, tensor_parallel)
        options = _replica_options(artifact, device, replicas, how)
    else:
        session = load(
            artifact, device, pin=pin, max_waiting=NO_QUEUE_OF_ITS_OWN, tensor_parallel=tensor_parallel, **how
        )
        session.tokenizer  # noqa: B018  an artifact without one is refused before anything listens
    listening = bind(host, port)
    if host not in LOOPBACK and not settings.keys:
        note(f"warning: {host} may be reached by others, and no API key is asked for; see --api-key-file")
    where = listening.getsockname()[1]

    def announce() -> None:
        note(f"serving {name} at http://{_url(host)}:{where}")

    if replicas is None:
        serve(session, settings, listening, log_path, announce)
        return
    from gristmill.runtime.server.serve_replicas import serve_replicas

    serve_replicas(options, replicas, settings, listening, log_path, announce)


def _refuse_with_replicas(pin: bool, tensor_parallel: int | None) -> None:
    if pin:
        raise GristmillError("--pin would put all replicas on the same processors; leave it out")
    if tensor_parallel is not None:
        raise GristmillError(
            "--tensor-parallel and --replicas do not go together; serve one process, or leave it out"
        )


def _replica_options(artifact: str, device: str, replicas: int, how: dict[str, Any]) -> Any:
    """What each replica loads. Raises GristmillError for what none could load, before Ray is started."""
    from gristmill.runtime.artifact import open_artifact
    from gristmill.runtime.ray_session import require_ray
    from gristmill.runtime.session import load

    require_ray()
    try:
        from gristmill.runtime.server.ray_replicas import ReplicaOptions, share_of_threads
    except ImportError as error:  # ray alone, or an older one
        if str(error.name).startswith("gristmill"):
            raise
        raise GristmillError(
            f"this Ray is not as expected ({error}); install it with `pip install 'gristmill[ray]'`"
        ) from error

    paths = {"artifact": artifact, "draft": how["draft"]}  # a replica's directory is another one
    found: dict[str, Any] = {n: str(Path(path).resolve()) for n, path in paths.items() if path is not None}
    found["adapters"] = {n: str(Path(path).resolve()) for n, path in how["adapters"].items()}
    if device == "cuda":
        open_artifact(artifact)  # what a GPU has room for, the replicas find out on theirs
    else:
        session = load(artifact, device, **how)
        session.tokenizer  # noqa: B018
        how = {**how, "threads": share_of_threads(session.threads, replicas)} if device == "cpu" else how
    return ReplicaOptions(device=device, **{**how, **found})


def _url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
