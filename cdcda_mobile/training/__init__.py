"""Train LoRA adapters: a cohort of users on one frozen base, each with their own data, optimizer, schedule and stop.

``cohort`` divides the work, a ``group`` of users takes its steps together, a ``learner`` is one user's state, a ``schedule`` their rows and
rates. ``packed`` (CPU) and ``padded`` (CUDA) compute the passes; ``lora`` lays out the parameters.
"""
