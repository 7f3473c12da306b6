"""The package as `pip install` leaves it, used away from the checkout."""

import email
import json
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest

from tests import judge_server, tiny
from tests.tokenizers import chatml_tokenizer

COMMANDS = {
    "atlas-train": "--config.key=value", "atlas-evaluate": "--teacher DIR",
    "atlas-serve": "--token-file", "atlas-plan": "--target", "atlas-convert": "SRC DST",
    "atlas-report": "--watch",
}  # fmt: skip
OWN = """from atlas_jax.configs.run import quickstart_sft

def get_config(argument=None):
    c = quickstart_sft.get_config(argument)
    c.learning_rate, c.max_steps = 3e-4, 1
    return c
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this checkout, built in a copy: setuptools leaves files where it builds."""
    source = tmp_path_factory.mktemp("source")
    shutil.copytree("atlas_jax", source / "atlas_jax", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(name, source)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", source / "dist"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, source], check=True)
    (path,) = (source / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module", params=["", pytest.param("own", marks=pytest.mark.long)])
def venv(request, wheel, tmp_path_factory):
    """An environment with the wheel, and with this one's packages or with what the wheel needs."""
    path = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", path], check=True)
    alone = [] if request.param else ["--no-deps", "--no-index"]
    what = f"{wheel}[judges]" if request.param else wheel  # which recipes and sockets ask for
    pip = [sys.executable, "-m", "pip", "--quiet", "--python", path / "bin/python"]
    # By PYTHONPATH pip would see this checkout, and take the package for installed.
    bare = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([*pip, "install", *alone, what], check=True, env=bare)
    if not request.param:
        (packages,) = path.glob("lib/python*/site-packages")
        theirs = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
        # Of directories that a .pth file names, Python reads no .pth files: no editable atlas_jax.
        (packages / "borrowed.pth").write_text("".join(f"{folder}\n" for folder in theirs))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model whose tokens are bytes."""
    path = tmp_path_factory.mktemp("model")
    tiny.save("smollm2", path)
    sizes = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(sizes | {"max_position_embeddings": 2048}))
    chatml_tokenizer().save_pretrained(path)
    return path


def run(venv, cwd, program, *words, code=0):
    """Runs a program of the environment, which has no other way to this checkout."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
    result = subprocess.run(
        [venv / "bin" / program, *map(str, words)], cwd=cwd, env=environment, check=False,
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert result.returncode == code, result.stderr[-3000:]
    return result


def test_the_wheel_holds_every_file_of_the_package_and_no_other(wheel):
    files = {p for p in pathlib.Path("atlas_jax").rglob("*") if p.is_file()}
    expected = {p.as_posix() for p in files if "__pycache__" not in p.parts}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (path,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(path))
    assert names == expected
    assert {"atlas_jax/py.typed", "atlas_jax/configs/data/quickstart/train.jsonl"} <= names
    assert (metadata["License-Expression"], metadata["License-File"]) == ("Apache-2.0", "LICENSE")
    assert metadata["Author"] == "The atlas_jax authors"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_there_and_tells_its_use(venv, tmp_path, command):
    result = run(venv, tmp_path, command, "--help")
    assert COMMANDS[command] in result.stdout
    assert result.stderr == ""


def test_the_version_is_that_of_the_distribution(venv, tmp_path):
    code = (
        "import atlas_jax, importlib.metadata as m\n"
        "print(atlas_jax.__version__, m.version('atlas_jax'), atlas_jax.__file__)"
    )
    version, distribution, path = run(venv, tmp_path, "python", "-c", code).stdout.split()
    assert version == distribution
    assert venv in pathlib.Path(path).parents


def test_type_checkers_read_the_annotations(venv, tmp_path):
    """A package without `py.typed` is `Any` to them, which takes everything."""
    (tmp_path / "mine.py").write_text("from atlas_jax.types import Address\nAddress(port=1)\n")
    mypy = [sys.executable, "-m", "mypy", "--python-executable", venv / "bin/python", "mine.py"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run(
        mypy, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert 'mine.py:2: error: Unexpected keyword argument "port" for "Address"' in result.stdout


def test_every_shipped_recipe_and_preset_loads(venv, tmp_path):
    """Presets of data with one for GRPO, which takes all of them; shipped rows are there."""
    code = """
import os
from atlas_jax import config, config_files
for run in config_files.shipped("run"):
    config.validate(config.freeze(config_files.load(run)))
    print("run", run)
for kind in ("model", "data"):
    for name in config_files.shipped(kind):
        data = config.freeze(config_files.load(f"teacher_rcl:{kind}={name}")).data
        for path in filter(lambda path: "quickstart" in path, (data.dataset_path, data.eval_path)):
            assert os.path.isfile(path), path
        print(kind, name)
"""
    loaded = run(venv, tmp_path, "python", "-c", code).stdout.splitlines()
    assert loaded == [
        f"{kind} {path.stem}"
        for kind in ("run", "model", "data")
        for path in sorted(pathlib.Path("configs", kind).glob("*.py"))
    ]


@pytest.mark.parametrize(
    ("config", "steps", "rate"), [("quickstart_sft", 2, 1e-4), ("mine.recipe", 1, 3e-4)]
)
def test_a_recipe_trains_on_the_shipped_rows(venv, tmp_path, model, config, steps, rate):
    """By its name, and changed by five lines in a package of the user's directory."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/recipe.py").write_text(OWN)
    options = {
        "model_name_or_path": model, "output_dir": "out", "data.dataset_max_samples": 8,
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1,
        "max_seq_length": 2048, "data.length_buckets": "(2048,)",
    } | ({} if config == "mine.recipe" else {"max_steps": steps})  # fmt: skip
    words = [f"--config.{name}={value}" for name, value in options.items()]
    run(venv, tmp_path, "atlas-train", f"--config={config}", *words)
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert max(row["step"] for row in rows) == steps
    assert json.loads((tmp_path / "out/config.json").read_text())["learning_rate"] == rate
    run(venv, tmp_path, "atlas-convert", "out/final", "start")
    assert (tmp_path / "start/checkpoints/0").is_dir()


MINE = '''
"""Code of a user: a report, a judge that sees answers alone, and a config with every socket."""

import json

from atlas_jax.configs.run import rlvr_gsm8k
from atlas_jax.rewards import Judge

BREVITY = Judge(name="brevity", prompt="Is the answer short?", sees=("question", "answer"))


def report(step, values):
    with open("reported.jsonl", "a") as file:
        file.write(json.dumps({"step": step, **values}) + "\\n")


def get_config(argument=None):
    c = rlvr_gsm8k.get_config(argument)
    c.data.dataset_path = c.data.eval_path = ""
    c.data.source = "examples.custom_rows:rows"
    c.rollout.protocol = "examples.calculator_episode:ask"
    c.rollout.max_turns = 2
    c.loss_type = "examples.custom_loss:reinforce"
    c.reward.kind = "mixed"
    c.reward.names = ("exact_match", "examples.custom_reward:compiles", "mine:brevity")
    c.reward.rim.judges = ("mine:BREVITY",)
    judges = c.reward.rim.active_judges
    judges.helpfulness = judges.process = judges.diagnostic = False
    c.reward.rim.cache_dir = ""
    c.report_to = ("mine:report",)
    c.max_prompt_length, c.max_new_tokens, c.max_seq_length = 512, 24, 1200
    c.data.length_buckets = (600, 1200)
    c.num_generations = c.per_device_train_batch_size = 2
    c.train_batch_size, c.max_steps, c.beta, c.save_steps, c.eval_steps = 2, 1, 0.0, 0, 0
    return c


def brevity(sample):
    return 1.0 / (1 + len(sample.completion.text))
'''


def test_every_socket_takes_code_from_outside_the_package(venv, model, tmp_path):
    """One step of GRPO with the examples and a module of the user's, by the wheel alone."""
    shutil.copytree("examples", tmp_path / "examples")
    (tmp_path / "mine.py").write_text(MINE)
    with judge_server.running() as server:
        judges = [
            f"--config.reward.rim.{size}_model.{name}={value}"
            for size in ("small", "large")
            for name, value in (
                ("base_url", server.url), ("model", "agreeing"), ("api_key_env", ""),
                ("input_price", 0), ("output_price", 0),
            )
        ]  # fmt: skip
        run(
            venv, tmp_path, "atlas-train", "--config=mine.py",
            f"--config.model_name_or_path={model}", "--config.output_dir=out", *judges,
        )  # fmt: skip
    lines = (tmp_path / "reported.jsonl").read_text().splitlines()
    values = {k: v for line in lines for k, v in json.loads(line).items()}
    own = {
        "reward/exact_match", "reward/compiles", "reward/brevity", "rim_rewards/brevity",
        "rollout/turns", "policy/mean_logprob",
    }  # fmt: skip
    assert own <= values.keys()
    assert values["reward/error_frac"] == 0
    assert 0 < values["reward/brevity"] <= 1
    [sample, *_] = (
        json.loads(line)
        for path in (tmp_path / "out/rollouts").iterdir()
        for line in path.read_text().splitlines()
    )
    assert sample["messages"][0]["content"].startswith(sample["question"])
    assert sample["reward_details"]["rim"]["judges"]["brevity"]["score"] is not None
