"""Parts of `megatron-fipo evaluate`: finding the weights, samples that survive a kill, results with intervals."""
