"""Runs: their recipe, their folder, and the model that a recipe names."""
