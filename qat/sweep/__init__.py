"""Grids of runs: methods × bits × targets × seeds × presets, resumable, with one table at the end."""
