"""What `megatron-fipo compare` is made of: runs read from their directories, groups, scores, tables and the page."""
