"""Train LoRA adapters: a cohort of users on one frozen base, each with their own data, optimizer, schedule and stop.

``cohort`` trains, ``learner`` is one user's part of it, ``packed`` (CPU) and ``padded`` (CUDA) compute losses and gradients of many
users' rows in one pass, ``packing`` lays the rows out, ``lora`` holds the parameters.
"""
