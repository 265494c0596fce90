"""The files of an evaluation's directory, by which `compare` knows one too."""

SETTINGS_FILE, SAMPLES_FILE = "settings.json", "samples.jsonl"
PROBLEMS_FILE, RESULTS_FILE = "problems.parquet", "results.json"

ALL = "all"
"""The name, among data sources, of all of them together."""
