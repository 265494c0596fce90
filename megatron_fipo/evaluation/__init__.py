"""What `megatron-fipo evaluate` is made of: which weights, samples that survive a kill, results with intervals."""
