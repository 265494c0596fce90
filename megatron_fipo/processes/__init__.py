"""The processes of a run on one machine: how they end, the reason why, and what they leave behind."""
