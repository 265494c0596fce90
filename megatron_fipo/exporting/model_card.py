"""README.md of an exported model: the base model, how it was trained, and the results."""

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from megatron_fipo.config.model_places import hub_id
from megatron_fipo.files import write_atomically

CARD, BASE_CARD = "README.md", "README-base.md"
_TAKEN_OVER = ("license", "license_name", "license_link", "language")
_FENCE = "---\n"


def write_card(directory: Path, run: Path | None, step: int | None) -> None:
    """Write the card into a model directory. The base model's card, if there is one, is kept beside it.

    Without a run there is nothing to report, and an existing card is kept. The license and the languages are copied
    from the base model's card. Directories are named by their last part, so that no card contains a user's name.
    """
    path = directory / CARD
    base = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if run is None:
        return
    config = _yaml(run / "config.yaml")
    if base:
        path.replace(directory / BASE_CARD)
    write_atomically(path, _card(config, _front_matter(base), _facts(config, run, step), step))


def _card(config: dict[str, Any], base: dict[str, Any], facts: dict[str, str], step: int | None) -> str:
    path = str(_at(config, "model.path") or "")
    header: dict[str, Any] = {name: base[name] for name in _TAKEN_OVER if name in base}
    if (hub := hub_id(path)) is not None:
        header["base_model"] = hub[0]
    header |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    header["tags"] = ["reinforcement-learning", "megatron-core", *filter(None, [_at(config, "algorithm.name")])]
    rows = "".join(f"| {name} | {_cell(value)} |\n" for name, value in facts.items())
    name, version = _at(config, "run.name") or "model", metadata.version("megatron_fipo")
    return (
        f"{_FENCE}{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}{_FENCE}\n"
        f"# {name}{'' if step is None else f', step {step}'}\n\n"
        f"{_cell(_name(path))}, trained by reinforcement learning with megatron_fipo {version}.\n\n"
        f"| | |\n|---|---|\n{rows}\n"
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")\n'
        'model = AutoModelForCausalLM.from_pretrained("DIRECTORY")\n'
        "```\n\n"
        "`vllm serve DIRECTORY` serves it.\n"
    )


def _facts(config: dict[str, Any], run: Path, step: int | None) -> dict[str, str]:
    at = {
        name: _at(config, key)
        for name, key in (
            ("algorithm", "algorithm.name"),
            ("loss", "algorithm.loss_mode"),
            ("environment", "environment.name"),
            ("reward", "reward.rule"),
            ("prompts per step", "algorithm.prompts_per_step"),
            ("responses per prompt", "algorithm.samples_per_prompt"),
            ("learning rate", "optimizer.lr"),
            ("seed", "run.seed"),
        )
    }
    facts = {} if step is None else {"training steps": str(step)}
    facts |= {name: str(value) for name, value in at.items() if value is not None}
    trained_on = _at(config, "data.train") or _at(config, "data.task")
    if trained_on:
        entries = trained_on if isinstance(trained_on, list) else [trained_on]
        facts["training data"] = ", ".join(_name(str(entry)) for entry in entries)
    environment = _json(run / "environment.json")
    if environment.get("commit"):
        facts["commit of megatron_fipo"] = str(environment["commit"])
    summary = _json(run / "summary.json")
    if step is not None and summary.get("steps") == step:
        for label, key in (("held-out accuracy", "accuracy"), ("held-out response length", "response_length")):
            before, after = summary.get(f"{key}_before"), summary.get(f"{key}_after")
            if isinstance(before, int | float) and isinstance(after, int | float):
                facts[f"{label}, before → after"] = f"{before:.4g} → {after:.4g}"
    return facts


def _name(path: str) -> str:
    """Return a hub id as it is, and the last part of a path on a disk."""
    return path if hub_id(path) is not None or ":" in path else Path(path).name


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _at(config: dict[str, Any], key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _front_matter(card: str) -> dict[str, Any]:
    """Return the YAML header of a card; empty if it has no readable header."""
    if not card.startswith(_FENCE):
        return {}
    try:
        header = yaml.safe_load(card[len(_FENCE) :].partition("\n" + _FENCE)[0])
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return header if isinstance(header, dict) else {}


def _yaml(path: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
