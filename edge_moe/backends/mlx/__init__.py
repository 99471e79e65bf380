"""Runs a model pass by MLX: Apple's GPUs, or the CPU where there is none."""
