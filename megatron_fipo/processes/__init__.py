"""The processes of a run on one machine: how they end, why they did, and what they leave."""
