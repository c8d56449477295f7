"""Making a model quantized: trace, plan, apply."""
