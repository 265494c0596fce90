"""Parts of `megatron-fipo compare`: runs read from their directories, groups, scores, tables and the page."""
