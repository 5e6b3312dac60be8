"""A server under load: python -m benchmarks.serve [--out FILE] [--runs NAME=RUN ...] [--repeats N] [--seconds S].

Server and client are two processes that talk over loopback and share the cores of this process (`taskset -c 0,1`
chooses them). For every run:

maximum      so many connections ask again as soon as they are answered: requests a second
half         requests leave by the clock, half as many a second; latency counts from when each was due, so a slow
             answer also counts against those that had to wait for it
overload     more connections than --max-queue takes: each is answered, or told 503 with Retry-After; afterwards, how
             long until a request is answered again, and whether all are

Maximum and half are measured several times; what is told are medians, the least and the most. Beside them stands what
matters on a machine that does other things too: processor time of server and client for a request.

Without --runs, stage 1, a sequence model, their sum and (with --llm) a language model are trained on the sample shop.
With --soak, another program runs instead, see `benchmarks.soak`. A load that takes two minutes longer than it should is
given up as an error. It ends with 1 where an answer is missing or wrong; a target that is missed is no such fault.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import soak
from benchmarks.environment import environment, write_json
from benchmarks.load import PATIENCE, Connection, Usage, load, request, run_loop, server
from benchmarks.shops import recommend_bodies, trained_runs

CONNECTIONS = 64
OVERLOAD_CONNECTIONS, OVERLOAD_QUEUE = 256, 32
# Answers after an overload that must all be good.
AFTERWARDS = 50
TARGET = {"requests_per_second": 1000.0, "p99_ms_at_half": 50.0}


def measured(
    url: str, pid: int, requests: Sequence[bytes], seconds: float, rate: float | None = None
) -> dict[str, Any]:
    """One load, and the processor time of both sides."""
    usage = Usage(pid)
    before = usage.cpu_seconds(), time.process_time()
    found = run_loop(load(url, requests, CONNECTIONS, seconds, rate), seconds + PATIENCE)
    count = sum(found["statuses"].values())
    spent = usage.cpu_seconds() - before[0], time.process_time() - before[1]
    return found | {"server_cpu_ms": 1000 * spent[0] / count, "client_cpu_ms": 1000 * spent[1] / count}


def overload(url: str, requests: Sequence[bytes], seconds: float) -> dict[str, Any]:
    """More than waits in the queue; then one after another."""
    found = run_loop(load(url, requests, OVERLOAD_CONNECTIONS, seconds), seconds + PATIENCE)

    async def afterwards() -> dict[str, Any]:
        started, connection, statuses, first = time.perf_counter(), await Connection.open(url), [], None
        for number in range(AFTERWARDS):
            answer = await connection.ask(requests[number % len(requests)])
            statuses.append(answer.status)
            if answer.status == 200 and first is None:
                first = time.perf_counter() - started
        connection.close()
        return {"seconds_to_first": first, "answered": statuses.count(200), "asked": AFTERWARDS}

    found |= {"max_queue": OVERLOAD_QUEUE, "afterwards": run_loop(afterwards(), PATIENCE)}
    told = found["statuses"].get("503", 0)
    found["ok"] = (
        set(found["statuses"]) == {"200", "503"}
        and found.get("retry_after") == told
        and found["afterwards"]["answered"] == AFTERWARDS
    )
    return found


def summary(repeats: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Median, least and most of every number that all repeats have."""
    names = [name for name, value in repeats[0].items() if isinstance(value, float)]
    found = {name: [one[name] for one in repeats if name in one] for name in names}
    return {
        name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
        for name, values in found.items()
    }


def measure(run: Path, args: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Everything about one run."""
    requests = [request("POST", "/recommend", body) for body in recommend_bodies(run)]
    options = ["--no-request-log"] if args.no_request_log else []
    options += ["--llm", args.llm] if args.llm else []
    with server(run, *options) as (url, pid):
        measured(url, pid, requests, args.warm_up)
        most = [measured(url, pid, requests, args.seconds) for _ in range(args.repeats)]
        rate = statistics.median(one["requests_per_second"] for one in most) / 2
        half = [measured(url, pid, requests, args.seconds, rate) for _ in range(args.repeats)]
        found = {"maximum": summary(most) | {"repeats": most}, "half": summary(half) | {"repeats": half}}
        found["resident_bytes"] = Usage(pid).resident()
    with server(run, "--max-queue", str(OVERLOAD_QUEUE), *options) as (url, _):
        found["overload"] = overload(url, requests, args.seconds)
    speed, p99 = found["maximum"]["requests_per_second"]["median"], found["half"]["p99_ms"]["median"]
    found["met"] = speed >= TARGET["requests_per_second"] and p99 <= TARGET["p99_ms_at_half"]
    good = all(set(one["statuses"]) == {"200"} for one in [*most, *half])
    found["ok"] = good and found["overload"]["ok"]
    say(
        f"{speed:.0f} requests/s, at half of it p50 {found['half']['p50_ms']['median']:.1f} ms, p99 {p99:.1f} ms; "
        f"processor time of the server {found['maximum']['server_cpu_ms']['median']:.2f} ms a request, at half "
        f"{found['half']['server_cpu_ms']['median']:.2f} ms; overload {found['overload']['statuses']}, then "
        f"{found['overload']['afterwards']['answered']} of {AFTERWARDS} answered"
        f"{'' if found['ok'] else ': NOT AS IT SHOULD BE'}"
    )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="results, as JSON")
    parser.add_argument("--runs", nargs="+", default=[], metavar="NAME=RUN")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each repeat, and of the overload")
    parser.add_argument("--warm-up", type=float, default=2.0, help="seconds")
    parser.add_argument("--soak", type=float, metavar="SECONDS", help="steady load with events, items and reloads")
    parser.add_argument("--llm", help="language model of a fine-tuning run, such as smollm2-135m")
    parser.add_argument("--no-request-log", action="store_true", help="for the server")
    parser.add_argument("--num-users", type=int, default=1000, help="of the sample shop")
    parser.add_argument("--num-items", type=int, default=1000, help="of the sample shop")
    args = parser.parse_args()
    sizes = {"num_users": args.num_users, "num_items": args.num_items}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.soak is not None:
            runs = [trained_runs(folder, seed=seed, **sizes)["fused"] for seed in range(2)]
            found = soak.soak(runs, folder / "soak", args.soak)
            record = {"environment": environment(), "soak": found}
            ok = found["ok"]
        else:
            runs = {name: Path(path) for name, _, path in (one.partition("=") for one in args.runs)}
            runs = runs or trained_runs(folder, llm=args.llm, **sizes)
            results = {
                name: measure(run, args, lambda text, name=name: print(f"{name}: {text}", flush=True))
                for name, run in runs.items()
            }
            record = {"environment": environment(), "target": TARGET, "runs": results}
            ok = all(one["ok"] for one in results.values())
        if args.out is not None:
            write_json(args.out, record)
    return 0 if ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
