"""Prints results.jsonl of the device check as a short table: python table.py results.jsonl."""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """Returns the table of some results."""
    out = ["VALUES"]
    for row in (r for r in rows if r["case"].startswith("values")):
        shown = {k: v for k, v in row.items() if k not in ("t", "good", "case")}
        out.append(f"  {'ok ' if row.get('good', True) else 'BAD'} {row['case']} {shown}")
    out.append("PROGRAMS  step s | tok/s | MFU | peak GiB | compiled | plan | estimated s | plan s")
    for row in (r for r in rows if "step_s" in r):
        plan = row.get("plan") or {}
        gib = plan.get("total_gib", float("nan"))
        secs = plan.get("secs", float("nan"))
        out.append(
            f"  {row['case']:26s} {row['step_s']:8.4f} {row['tok_s']:9d} {row['mfu']:7.1%} "
            f"{row['peak_gib']:8.2f} {row['compiled_gib']:8.2f} {gib:8.2f} "
            f"{row['estimated_s']:8.4f} {secs:8.4f}"
        )
    out.append("GENERATION")
    for row in (r for r in rows if r["case"] == "generate" and "rows" in r):
        out.append(
            f"  {row['weights']:18s} rows {row['rows']:4d} top_p {row['top_p']:.2f} "
            f"{row['tok_s']:8d} tok/s {row['ms_a_token']:7.3f} ms a token, "
            f"peak {row['peak_gib']:.2f} GiB"
        )
    out.append("RATES")
    for row in (r for r in rows if r["case"].startswith("rates")):
        out.append(f"  { ({k: v for k, v in row.items() if k not in ('t', 'case')}) }")
    out += [f"NOT DONE {row}" for row in rows if "failed" in row or "skipped" in row]
    return out


if __name__ == "__main__":
    text = pathlib.Path(sys.argv[1]).read_text()
    print("\n".join(lines([json.loads(line) for line in text.splitlines()])))
