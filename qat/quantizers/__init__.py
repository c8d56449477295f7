"""Quantizers: modules that round one tensor to a grid and train the grid."""
