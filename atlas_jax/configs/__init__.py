"""Shipped configs: recipes in `run/`, presets of models in `model/` and of data in `data/`, judges.

A recipe of your own imports one of these and changes it:

    from atlas_jax.configs.run import teacher_rcl

    def get_config(argument=None):
        c = teacher_rcl.get_config(argument)
        c.learning_rate = 1e-6
        return c
"""
