"""The page of the demo's run, from what the repository keeps of it."""

import pathlib
import subprocess
import sys

from atlas_jax.report import guide, run_files

RUN = pathlib.Path("examples/demo/grpo")


def test_the_kept_run_makes_a_page_that_is_small(tmp_path):
    page = tmp_path / "report.html"
    command = [sys.executable, "-m", "atlas_jax.report", str(RUN), "--output", str(page)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    assert 50_000 < page.stat().st_size < 2_000_000
    kept = sum(path.stat().st_size for path in RUN.parent.rglob("*") if path.is_file())
    assert kept < 2_000_000


def test_its_verdict_is_that_of_the_documents():
    verdict = guide.judge(run_files.read(str(RUN)))
    assert verdict.sentence.startswith(
        "The lessons help: right answers taught 70.8 %, alone 12.0 %"
    )
    results = pathlib.Path("docs/results.md").read_text()
    assert "questions: right answers taught 70.8 %, alone 12.0 %. They make its" in results
