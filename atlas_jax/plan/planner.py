"""The plan of a config on a named target."""

from __future__ import annotations

from typing import NamedTuple

from atlas_jax.options.train import TrainConfig
from atlas_jax.plan import architectures, estimate, programs, rates, targets
from atlas_jax.plan.report import Plan


class Assumptions(NamedTuple):
    """Assumptions of a plan that the config does not hold."""

    model_config: str = ""
    """A `config.json` of the model that is trained; empty looks for its own."""
    segments: int = 1
    """Texts of equal length in each packed row."""
    rates_file: str = ""
    """File of measured rates; empty takes those of the data sheet."""


def plan(
    config: TrainConfig,
    target_name: str,
    assumptions: Assumptions = Assumptions(),  # noqa: B008  (a tuple)
    only: str = "",
) -> Plan:
    """Compiles the programs of a run for a target.

    Args:
        config: of the run.
        target_name: as `targets.parse` takes it.
        assumptions: what the config does not say.
        only: compiles only programs whose names begin so; empty compiles all.

    Raises:
        ValueError: for what the run itself would refuse, or a target that cannot be compiled for.
    """
    target = targets.parse(target_name)
    device = target.device
    speeds = rates.published(device)
    if assumptions.rates_file:
        speeds = rates.read(assumptions.rates_file, device)
    _ = target.usable_bytes  # a wrong share of the memory is an error before anything is compiled
    architecture = architectures.find(config.model_name_or_path, assumptions.model_config)
    other = config.student or config.teacher
    student = architectures.find(other) if other else None
    devices = targets.devices(target)
    run = programs.build(config, target, devices, architecture, student, assumptions.segments)
    chosen = [program for program in run.programs if program.name.startswith(only)]
    measured = [estimate.measure(run, program, target, speeds) for program in chosen]
    return Plan(target=target, run=run, programs=measured, rates=speeds)
