"""Data sets, their domains, splits and batches."""
