"""The plan of a config on a named target."""

from __future__ import annotations

from atlas_jax.options.train import TrainConfig
from atlas_jax.plan import architectures, estimate, programs, targets
from atlas_jax.plan.report import Plan


def plan(config: TrainConfig, target_name: str, model_config: str = "") -> Plan:
    """Compiles the programs of a run for a target.

    Args:
        config: of the run.
        target_name: as `targets.parse` takes it.
        model_config: a `config.json` of the model that is trained; empty looks for its own.

    Raises:
        ValueError: for what the run itself would refuse, or a target that cannot be compiled for.
    """
    target = targets.parse(target_name)
    architecture = architectures.find(config.model_name_or_path, model_config)
    student = architectures.find(config.student) if config.student else None
    devices = targets.devices(target)
    run = programs.build(config, target, devices, architecture, student)
    return Plan(target, run, [estimate.measure(run, p, target) for p in run.programs])
