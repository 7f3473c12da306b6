"""Rows of one's own: sums up to 9, made when the run starts.

    atlas-train --config rlvr_gsm8k --config.data.dataset_path=none
      --config.data.eval_path=none --config.data.source=examples.custom_rows:rows

`rows` may read any source: a table, a service, another library's data set. It must give the same
rows each time, or a run that was stopped does not continue.
"""


def rows(split):
    """Yields the questions of a split, `train` or `eval`."""
    for a in range(10):
        for b in range(10 - a):
            is_held_out = (a + b) % 5 == 0
            if is_held_out == (split == "eval"):
                # A lone `prompt` and `completion` make the same rows usable by SFT.
                yield {
                    "question": f"{a} + {b} =",
                    "answer": str(a + b),
                    "prompt": f"{a} + {b} =",
                    "completion": f" {a + b}",
                }
