"""The training loop: data loaders, one step, schedules, evaluation."""
