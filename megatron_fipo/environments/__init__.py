"""Environments: what answers the policy after it has spoken, each sample's in a process that can be killed."""
