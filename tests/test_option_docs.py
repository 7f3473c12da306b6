"""Documentation of options: every option is told with type, default and a sentence."""

import subprocess
import sys
from typing import Annotated

import pytest

from atlas_jax import config, option_docs
from atlas_jax.options import descriptions, fields
from tests.test_cli import run

OPTIONS = ("-m", "atlas_jax.train")


@pytest.mark.parametrize("entry", option_docs.entries(), ids=lambda entry: entry.name)
def test_the_meaning_of_every_option_is_a_sentence(entry):
    assert entry.meaning[:1].isupper() or entry.meaning.startswith("`"), entry.meaning
    assert entry.meaning.endswith(".")
    assert len(entry.meaning.split()) > 3
    assert entry.meaning.split()[0] not in ("Of", "For", "That", "What", "Those", "From", "How")


def test_every_option_is_told_once_for_each_recipe():
    told = [
        (entry.name, recipe)
        for entry in option_docs.entries()
        for recipe in entry.recipes.split(", ")
    ]
    assert len(told) == len(set(told))
    assert {*(name for name, _ in told), "algorithm"} == set(config.all_options())
    assert ("beta", "grpo") in told and ("beta", "gkd") in told


@pytest.mark.parametrize("algorithm", config.ALGORITHMS)
def test_every_option_has_an_own_default_that_it_allows(algorithm):
    schema = config.schema(algorithm)
    for name, value in config.flat(schema()).items():
        hint, default = config.option(schema, name)
        assert (name, default) == (name, value)
        assert fields.check(name, value, hint) == value


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--options", "^beta$"), ["beta=0.04 (grpo only)", "    a number of 0 or more"]),
        (("--options=packing",), ["packing=auto", "    one of auto, true, false"]),
        (("--options", "data.teacher_template"), ["teaching.teacher_template=", "    a text"]),
        (("--options", "sharding"), ["sharding=fsdp", "    one of fsdp, zero1, replicated"]),
    ],
)
def test_options_are_printed_by_name(words, told):
    result = run(*OPTIONS, *words)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[:2] == told


def test_all_options_are_printed_without_a_pattern():
    result = run(*OPTIONS, "--options")
    assert result.stdout.count("=") >= len(option_docs.entries())


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("lerning_rate", "did you mean 'learning_rate'?"), ("(", "write a regular expression")],
)
def test_a_pattern_that_finds_nothing_is_one_line(pattern, message):
    result = run(*OPTIONS, "--options", pattern)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: --options {pattern}: ")
    assert result.stderr.endswith(f"{message}\n") and result.stderr.count("\n") == 1


def test_options_are_printed_without_jax():
    code = (
        "import sys; from atlas_jax import option_docs; option_docs.plain(); "
        "print('jax' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "False\n", result.stderr


def test_a_function_of_the_users_own_can_be_a_choice():
    rule = fields.choices_or_function("grpo", "dapo")
    hint = Annotated[str, rule]
    assert descriptions.allowed(hint) == "one of grpo, dapo, package.module:function"
    for value in ("dapo", "my_package.losses:mine"):
        assert fields.check("loss_type", value, hint) == value
    for value in ("dap", "my package:mine", "grpo,dapo", "module:"):
        with pytest.raises(ValueError, match=r"^loss_type='.*' must be one of grpo, dapo, package"):
            fields.check("loss_type", value, hint)
