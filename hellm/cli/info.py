"""`hellm info`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hellm.cli._output import print_json, table
from hellm.cli._parser import new_parser, parse

__all__ = ["run"]


def run(argv: Sequence[str]) -> int:
    parser = new_parser("info", "[options]", "Versions, processor, usable backends and installed extras.")
    parser.add_argument("--selftest", action="store_true", help="check every usable operator against its definition")
    parser.add_argument("--json", action="store_true", help="print everything as one line of JSON")
    args = parse(parser, argv)
    from hellm.info import collect, run_selftest

    report = collect()
    rows = run_selftest() if args.selftest else None
    failed = [row for row in rows or [] if not row["ok"]]
    if args.json:
        print_json(report | ({"selftest": rows} if rows is not None else {}))
        return 1 if failed else 0
    _print(report)
    if rows is not None:
        print("\nself test: largest error against the definition, and the largest allowed")
        print(_selftest_table(rows))
        print(f"{len(rows) - len(failed)} of {len(rows)} passed" + (f", {len(failed)} FAILED" if failed else ""))
    return 1 if failed else 0


def _print(report: dict[str, Any]) -> None:
    for name, version in report["versions"].items():
        print(f"  {name:<12} {version}")
    cpu = report["cpu"]
    print(f"\n  {'processor':<12} {cpu['model']}, {cpu['cores']} cores, torch uses {cpu['threads']} threads")
    kernels = ", ".join(cpu["instruction_sets"]) or "none"
    print(f"  {'kernels':<12} {kernels}" + (f" (in use: {cpu['in_use']})" if cpu["in_use"] else ""))
    for device in report["devices"]:
        print(f"  {'device':<12} {device}")
    print("\nbackends of hellm.ops")
    for backend in report["backends"]:
        state = "usable" if backend["usable"] else f"not usable: {backend['reason']}"
        state += f" ({backend['note']})" if backend["note"] else ""
        print(f"  {backend['name']:<8} {backend['device']:<5} {state}")
    print("\nextras")
    for extra in report["extras"]:
        found = ", ".join(f"{name} {version}" for name, version in extra["found"].items())
        missing = f"missing {', '.join(extra['missing'])}: {extra['install']}" if extra["missing"] else ""
        print(f"  {extra['name']:<12} {'; '.join(part for part in (found, missing) if part)}")


def _selftest_table(rows: Sequence[dict[str, Any]]) -> str:
    cells = [
        [
            row["op"],
            row["backend"],
            str(row["instruction_set"] or "-"),
            row["dtype"],
            f"{row['worst_error']:.1e}",
            f"{row['budget']:.1e}",
            "ok" if row["ok"] else "FAILED",
            f"{row['case']}: {row['failure']}" if row["failure"] else row["case"],
        ]
        for row in rows
    ]
    return table(("operator", "backend", "kernels", "dtype", "error", "allowed", "", "closest on"), cells)
