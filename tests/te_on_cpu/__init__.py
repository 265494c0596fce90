"""Transformer Engine's layers on a CPU: its own Python code over kernels written here in plain torch.

What runs is real: Megatron-Core's Transformer Engine specification, Transformer Engine's modules, autograd functions,
recipes, quantizers and FP8 tensors, and torch's own rounding to E4M3 and E5M2. What does not are its CUDA kernels and
cuDNN's attention, so nothing here says anything about them; tests/gpu does.
"""
