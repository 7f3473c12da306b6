"""Shows two evaluations side by side: `python tools/compare_evaluations.py BEFORE AFTER`."""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

_SHOWN = 3


def main() -> None:
    """Prints the metrics and the same lessons before and after."""
    before, after = (json.loads(pathlib.Path(path).read_text()) for path in sys.argv[1:3])
    print(f"{'metric':<28}{'before':>9}{'after':>9}   95 % interval after")
    for name, interval in after["metrics"].items():
        was = before["metrics"][name]["value"]
        value, low, high = (interval[key] for key in ("value", "low", "high"))
        print(f"{name:<28}{was:>9.3f}{value:>9.3f}   {low:.3f} to {high:.3f}")
    for which, result in (("before", before), ("after", after)):
        print(
            f"{which}: wrong to right {result['improved']}, right to wrong {result['degraded']} of "
            f"{result['questions']}, McNemar p = {result['mcnemar_p']:.3g}"
        )
    for old, new in list(zip(before["samples"], after["samples"], strict=True))[:_SHOWN]:
        print(f"\nquestion: {new['question']} (answer: {new['ground_truth']})")
        for which, sample in (("before", old), ("after", new)):
            print(f"  lesson {which}: {_line(sample['teaching']) or '(none)'}")
            print(f"  answer {which}: {_line(_answer(sample))}")


def _answer(sample: dict[str, Any]) -> str:
    return sample["guided"]["text"] if sample["guided"] else ""


def _line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    main()
