"""`hellm serve`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from hellm.cli._parser import new_parser, parse

__all__ = ["run", "store_of"]

_KEY = "HELLM_API_KEY"
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def run(argv: Sequence[str]) -> int:
    args = parse(_parser(), argv)
    if not 0 <= args.port <= 65535:
        raise ValueError(f"--port must be in 0..65535, got {args.port}")
    key = _api_key(args.api_key_file)
    if args.host not in _LOOPBACK and key is None:
        raise ValueError(
            f"--host {args.host} lets other machines ask, so it needs a key: --api-key-file FILE, or {_KEY} in the "
            "environment"
        )
    try:
        from hellm.serve.app import create_app
        from hellm.serve.server import serve
    except ImportError as error:
        raise ImportError(f'serving needs the package {error.name}: pip install "hellm[serve]"') from None
    import torch

    from hellm._devices import resolve_device
    from hellm.serve.service import Source
    from hellm.serve.settings import Settings
    from hellm.serve.store import Store

    if args.num_threads < 1:
        raise ValueError(f"--num-threads must be >= 1, got {args.num_threads}")
    torch.set_num_threads(args.num_threads)
    source = Source(
        args.run,
        args.reload_from,
        device=resolve_device(args.device),
        language_model=args.llm,
        onnx=args.onnx,
        encoders=_encoders(args.encoder or []),
        compared=args.compare,
    )
    settings = Settings(
        api_key=key,
        allowed_hosts=_hosts(args.host, args.allowed_host or []),
        log_requests=not args.no_request_log,
        answer_log=args.answer_log,
        max_batch=args.max_batch,
        max_wait=args.max_wait / 1000,
        max_queue=args.max_queue,
        timeout=args.timeout,
        max_body=args.max_body << 20,
        skip_selftest=args.skip_selftest,
    )
    with contextlib.ExitStack() as stack:
        store = None
        path = store_of(args.run, args.store)
        if path is not None:
            store = Store(path)
            stack.callback(store.close)
        app = create_app(source, store, settings, data=args.data)
        version = app.state.service.snapshot.model_version

        def say(host: str, port: int) -> None:
            name = f"[{host}]" if ":" in host else host
            print(f"serving {args.run} ({version}) on http://{name}:{port}", flush=True)

        return serve(app, args.host, args.port, on_listening=say)


def store_of(run: str, given: str | None) -> str | None:
    """Where the events and items of a run are kept; None where none are."""
    return None if given == "none" else given or f"{run.rstrip('/')}.events.sqlite"


def _parser():
    parser = new_parser(
        "serve",
        "RUN [options]",
        "Serve a finished run over HTTP: recommendations, reasons, events and new items as they come. It listens on "
        "this machine only unless --host says otherwise. Events and items are on disk before they are answered, and "
        "are taken up again at the next start. SIGTERM ends it after what is open has been answered.",
    )
    parser.add_argument("run", metavar="RUN", help="run directory, what Recommender.save wrote, or a link to one")
    parser.add_argument(
        "--data", metavar="DATA", help="the data of the run, for the page: pictures, and what deserves a look in it"
    )
    parser.add_argument("--host", default="127.0.0.1", metavar="NAME", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="port; 0 takes a free one")
    parser.add_argument(
        "--api-key-file",
        metavar="FILE",
        help=f"file with the key that requests must bring; or {_KEY} in the environment",
    )
    parser.add_argument(
        "--allowed-host",
        nargs="+",
        type=str,
        metavar="NAME",
        help="names under which requests may come; with --host 0.0.0.0 any, unless given",
    )
    parser.add_argument(
        "--store", metavar="FILE", help="where events and items are kept, or none; default: RUN.events.sqlite"
    )
    parser.add_argument(
        "--answer-log",
        metavar="FILE",
        help="note what is asked, ids of people among it, and a digest of each answer, for hellm replay",
    )
    parser.add_argument(
        "--reload-from", metavar="DIR", help="run that POST /admin/reload takes over; default: RUN, read again"
    )
    parser.add_argument(
        "--compare", metavar="OTHER", help="another run of the same data, which the page for research sets beside RUN"
    )
    parser.add_argument(
        "--encoder",
        nargs="+",
        type=str,
        metavar="MODALITY=NAME",
        help="what encodes new items, such as text=FOLDER, where the run names no packaged encoder",
    )
    parser.add_argument("--device", default="auto", metavar="NAME", help="reads histories: auto, cpu, cuda or cuda:N")
    parser.add_argument("--llm", metavar="PATH", help="where the language model of a fine-tuning run is, if moved")
    parser.add_argument(
        "--onnx", metavar="DIR", help="read histories by onnxruntime: what hellm export RUN --to onnx wrote"
    )
    parser.add_argument("--num-threads", type=int, default=1, metavar="N", help="threads of the model")
    parser.add_argument("--max-batch", type=int, default=32, metavar="N", help="requests in one turn of the model")
    parser.add_argument("--max-wait", type=float, default=0.0, metavar="MS", help="time a turn waits for more requests")
    parser.add_argument("--max-queue", type=int, default=1024, metavar="N", help="requests that may wait; then 503")
    parser.add_argument("--timeout", type=float, default=10.0, metavar="S", help="time to an answer; then 503")
    parser.add_argument("--max-body", type=int, default=16, metavar="MB", help="largest request")
    parser.add_argument("--no-request-log", action="store_true", help="log only what goes wrong")
    parser.add_argument("--skip-selftest", action="store_true", help="do not check the operators before serving")
    return parser


def _api_key(file: str | None) -> str | None:
    """The key from a file or the environment; None where there is none."""
    if file is None:
        key = os.environ.get(_KEY)
        where = f"{_KEY} in the environment"
    else:
        key, where = Path(file).read_text(encoding="utf-8"), file
    if key is None:
        return None
    key = key.strip()
    if len(key) < 16 or not key.isascii() or any(sign.isspace() for sign in key):
        raise ValueError(f"{where}: an API key must have at least 16 letters of ASCII and no blanks")
    return key


def _hosts(host: str, allowed: Sequence[str]) -> tuple[str, ...] | None:
    """Names that requests may be for; None is any."""
    if host in ("0.0.0.0", "::") and not allowed:
        return None
    return (*_LOOPBACK, host.lower(), *(name.lower() for name in allowed))


def _encoders(pairs: Sequence[str]) -> dict[str, str]:
    found = {}
    for pair in pairs:
        modality, equals, name = pair.partition("=")
        if not (modality and equals and name):
            raise ValueError(f"--encoder must be of the form MODALITY=NAME, got {pair!r}")
        found[modality] = name
    return found
