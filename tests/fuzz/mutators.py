"""Changes of sound things: trees of values as JSON has them, and bytes."""

import copy
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def mutate(rng: random.Random, tree: Any, values: Sequence[Any], names: Sequence[str]) -> bool:
    """Remove, rename (to one of `names`) or replace (by one of `values`) a part at some depth; False if it has none."""
    part = tree
    while isinstance(part, dict | list) and part:
        key = rng.choice(list(part)) if isinstance(part, dict) else rng.randrange(len(part))
        if isinstance(part[key], dict | list) and part[key] and rng.random() < 0.6:
            part = part[key]
            continue
        change = rng.random()
        if change < 0.15:
            del part[key]
        elif change < 0.25 and isinstance(part, dict):
            part[rng.choice(names)] = part.pop(key)
        else:
            part[key] = copy.deepcopy(rng.choice(values))
        return True
    return False


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Bytes cut off, overwritten, inserted or taken out."""
    place = rng.randrange(len(content)) if content else 0
    some = bytes(rng.randrange(256) for _ in range(rng.randint(1, 8)))
    return rng.choice(
        [
            content[:place],
            content[:place] + some + content[place + len(some) :],
            content[:place] + some + content[place:],
            content[:place] + content[place + len(some) :],
            some + content,
            content.decode("latin-1").encode("utf-16"),
            b"\xef\xbb\xbf" + content,
            content[:place] + b"\x00" * 8 + content[place + 8 :],
        ]
    )


def spoil_json(rng: random.Random, path: Path, values: Sequence[Any], names: Sequence[str]) -> str:
    """Change some values of a JSON file, or its bytes; what was done."""
    if rng.random() < 0.3:
        return spoil_file(rng, path)
    tree = json.loads(path.read_text())
    for _ in range(rng.randint(1, 2)):
        mutate(rng, tree, values, names)
    path.write_text(json.dumps(tree), encoding="utf-8")
    return f"{path.name}: {json.dumps(tree)[:1000]}"


def spoil_file(rng: random.Random, path: Path) -> str:
    """Damage a file's bytes, or have something else or nothing in its place; what was done."""
    change = rng.random()
    if change < 0.75:
        path.write_bytes(damaged(path.read_bytes(), rng))
        return f"{path.name}: other bytes"
    path.unlink()
    if change < 0.80:
        return f"{path.name}: missing"
    if change < 0.85:
        path.mkdir()
    elif change < 0.90:
        path.symlink_to(path.name)
    elif change < 0.95:
        path.touch()
    else:
        path.write_bytes(bytes(rng.randrange(256) for _ in range(rng.randint(1, 3000))))
    return f"{path.name}: something else in its place"
