"""README and docs: links resolve, commands and options exist, and the three commands run."""

import functools
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from atlas_jax import config as config_lib
from tests import tiny
from tests.tokenizers import CHATML, chatml_tokenizer

ROOT = pathlib.Path(__file__).parents[1]
PAGES = ("README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md")))
NEEDS = {
    "GPUs", "several hosts", "servers", "a database", "a model hub", "an API key",
    "a package index", "minutes",
}  # fmt: skip
LAUNCHERS = ("launch.sh", "launch_with_server.sh", "multihost.sh", "slurm_train.sbatch",
             "slurm_grpo.sbatch")  # fmt: skip
HERE = "tests/test_docs.py::test_the_three_commands_of_the_readme_run"


def read(page):
    return (ROOT / page).read_text()


def without_code(text):
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def anchors(text):
    """The anchors that GitHub gives to headings."""
    titles = re.findall(r"^#+ (.+)$", without_code(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links(page):
    return re.findall(r"\]\(([^)\s]+)\)", without_code(read(page)))


def blocks(page):
    """The command blocks of a page, each with the comment on the line before it."""
    found = re.findall(r"(?:<!-- (.*?) -->\n)?```bash\n(.*?)```", read(page), re.DOTALL)
    return [(mark, lines) for mark, lines in found]


BLOCKS = [(page, mark, lines) for page in PAGES for mark, lines in blocks(page)]


def commands(lines):
    """The commands of a block as lists of words, without comments."""
    whole = re.sub(r"\\\n", " ", lines)
    return [words for line in whole.splitlines() if (words := shlex.split(line, comments=True))]


def programs(words):
    """The scripts of the repository and the modules of the package that a command names."""
    files = [w for w in words if re.match(r"(tools|launch|tests)/[\w./]+\.(py|sh|sbatch|yaml)$", w)]
    return files + [w for w in words if w.startswith("atlas_jax.")]


def config_of(words):
    return next((w for w in words if re.match(r"configs/run/\w+\.py", w)), None)


def test_the_readme_can_be_read_in_a_few_minutes():
    assert len(read("README.md").splitlines()) <= 180


@pytest.mark.parametrize("page", PAGES)
def test_links_and_anchors_lead_somewhere(page):
    for link in links(page):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page} links to {link}"
        if anchor:
            assert anchor in anchors(target.read_text()), f"{page} links to {link}"


def test_the_readme_links_to_every_page():
    linked = {link.partition("#")[0] for link in links("README.md")}
    assert set(PAGES) - {"README.md"} <= linked


def test_the_picture_is_well_formed_and_says_what_it_shows():
    picture = ElementTree.parse(ROOT / "docs/teaching.svg").getroot()
    space = "{http://www.w3.org/2000/svg}"
    assert picture.find(f"{space}title").text
    assert "GRPO updates the teacher" in picture.find(f"{space}desc").text
    assert "docs/teaching.svg" in links("README.md")


@pytest.mark.parametrize("page", PAGES)
def test_pages_are_plain_english(page):
    prose = without_code(read(page)).lower()
    assert not re.findall(r"\b(?:behind|lacks|there is not)\b", " ".join(prose.split()))


def test_every_command_block_names_its_test_or_what_it_needs():
    assert len(BLOCKS) > 10
    for page, mark, lines in BLOCKS:
        kind, _, value = mark.partition(": ")
        assert kind in ("runs", "needs"), f"{page} has no mark before:\n{lines}"
        if kind == "needs":
            assert value in NEEDS, f"{page}: {value}"


@pytest.mark.parametrize(
    ("page", "mark", "lines"), [b for b in BLOCKS if b[1].startswith("runs: ")]
)
def test_the_named_test_has_the_commands_of_the_block(page, mark, lines):
    path, _, name = mark.removeprefix("runs: ").partition("::")
    text = read(path)
    assert not name or f"def {name}(" in text
    if mark == f"runs: {HERE}":
        return
    for words in commands(lines):
        for program in programs(words):
            assert pathlib.Path(program).stem in text, f"{page}: {path} does not run {program}"
        config = config_of(words)
        assert config is None or pathlib.Path(config.partition(":")[0]).stem in text


@pytest.mark.parametrize(("page", "mark", "lines"), BLOCKS)
def test_programs_and_configs_of_commands_exist(page, mark, lines):
    for words in commands(lines):
        for program in programs(words):
            names = (program, program.replace(".", "/") + ".py")
            assert any((ROOT / name).exists() for name in names), f"{page}: {program}"
        if config := config_of(words):
            get_config(config)


@pytest.mark.parametrize(("page", "mark", "lines"), BLOCKS)
def test_options_of_commands_are_options(page, mark, lines):
    for words in commands(lines):
        config = config_of(words)
        launched = any(pathlib.Path(word).name in LAUNCHERS for word in words)
        for word in words if config else ():
            given = word.startswith("--config.")
            if given or (launched and re.match(r"[a-z][\w.]*=", word)):
                option = word.removeprefix("--config.").partition("=")[0]
                assert option in options(config), f"{page}: {config} has no option {option}"


@functools.cache
def get_config(config):
    path, _, argument = config.partition(":")
    scope = {}
    exec(compile(read(path), path, "exec"), scope)
    return scope["get_config"](argument or None)


@functools.cache
def options(config):
    return set(config_lib.flat(config_lib.schema(get_config(config).algorithm)()))


def test_the_stops_of_the_ways_through_the_code_exist():
    rows = re.findall(
        r"^\| `([\w/]+\.py)` \| `(\w+)` \|", read("docs/architecture.md"), re.MULTILINE
    )
    assert len(rows) > 10
    for path, name in rows:
        assert re.search(rf"^ *(?:async )?def {name}\(", read(path), re.MULTILINE), (path, name)


@pytest.mark.timeout(600)
def test_the_three_commands_of_the_readme_run(tmp_path):
    model = tmp_path / "outputs/quickstart/smollm2"
    tiny.save("smollm2", model)
    settings = json.loads((model / "config.json").read_text())
    settings["max_position_embeddings"] = 2048  # room for a demonstration
    (model / "config.json").write_text(json.dumps(settings))
    chatml_tokenizer({"default": CHATML}).save_pretrained(model)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ATLAS_TRACEBACK": "1"}
    # The commands as they stand, with less work: one step of short texts of a tiny model.
    less = {
        "quickstart_sft": (
            "max_steps=1", "max_seq_length=2048", "data.length_buckets=(2048,)",
            "per_device_train_batch_size=1", "data.eval_path=",
        ),
        "quickstart_grpo": (
            "max_steps=1", "gradient_accumulation_steps=1", "max_prompt_length=1500",
            "max_seq_length=2048", "data.length_buckets=(2048,)", "max_new_tokens=4",
            "max_probe_tokens=4", "rollout.max_answer_tokens=4",
        ),
    }  # fmt: skip
    run = [
        words for _, mark, lines in BLOCKS if mark == f"runs: {HERE}" for words in commands(lines)
    ]
    assert [words[2] for words in run] == [
        "atlas_jax.train",
        "atlas_jax.train",
        "atlas_jax.evaluate",
    ]
    for words in run:
        name = pathlib.Path(config_of(words)).stem
        extra = [f"--config.{value}" for value in less[name]]
        if words[2] == "atlas_jax.evaluate":
            words = [*words, "--limit", "2"]
        done = subprocess.run(
            [sys.executable, *words[1:], *extra],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, (words, done.stderr[-3000:])
    assert (tmp_path / "outputs/quickstart/grpo/final/model.safetensors").exists()
    assert "student_accuracy" in done.stderr
