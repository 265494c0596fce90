"""The files of an evaluation's directory, by which `compare` recognises one."""

SETTINGS_FILE, SAMPLES_FILE = "settings.json", "samples.jsonl"
PROBLEMS_FILE, RESULTS_FILE = "problems.parquet", "results.json"

ALL = "all"
"""The name of the entry for all data sources together."""
