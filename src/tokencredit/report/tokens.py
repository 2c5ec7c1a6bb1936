"""The token view's data: some completions of every run, with every score of every token, small enough to embed.

What is left out is said on the page. Prompts that several runs answered come first, so that runs can be compared on
them; then prompts answered both correctly and incorrectly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from tokencredit.lm.prompts import readable
from tokencredit.report.page import embedded_json
from tokencredit.report.section import Material, Section, compact, text
from tokencredit.runs import Run

MAX_BYTES, PER_PROMPT = 3_600_000, 4
# (steps per run, completions per step, tokens per completion): the first that fits is taken. Fewer steps are always
# among the more.
SIZES = (
    (3, 24, 1200),
    (3, 16, 1200),
    (3, 12, 1200),
    (3, 8, 1200),
    (2, 8, 1200),
    (2, 6, 1200),
    (1, 6, 1200),
    (1, 4, 1200),
    (1, 2, 1200),
    (1, 1, 1200),
    (1, 1, 300),
)
COLUMNS = {"step", "group", "prompt", "completion", "reward", "success", "reason", "token_ids", "tokens", "role"}


def spread(items: list[int], limit: int) -> list[int]:
    """At most `limit` of the items, evenly spread, the last one always and the first one if there is room."""
    if len(items) <= limit:
        return items
    return (
        [items[-1]] if limit == 1 else [items[round(place * (len(items) - 1) / (limit - 1))] for place in range(limit)]
    )


def chosen(rows: list[dict[str, Any]], shared: Counter[str], limit: int) -> list[dict[str, Any]]:
    """At most `limit` rows, prompt by prompt, correct and incorrect ones in turn."""
    prompts: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        prompts.setdefault(row["prompt"], []).append(row)
    order = sorted(prompts, key=lambda prompt: (-shared[prompt], len({row["success"] for row in prompts[prompt]}) == 1))
    picked, rest = [], []
    for prompt in order:
        right = [row for row in prompts[prompt] if row["success"]]
        wrong = [row for row in prompts[prompt] if not row["success"]]
        turns = [
            row
            for place in range(max(len(right), len(wrong)))
            for row in (*right[place : place + 1], *wrong[place : place + 1])
        ]
        picked += turns[:PER_PROMPT]
        rest += turns[PER_PROMPT:]
    # When all prompts fit, what room is left goes to further completions of theirs, kept beside their own.
    places = {prompt: place for place, prompt in enumerate(order)}
    return sorted((picked + rest)[:limit], key=lambda row: places[row["prompt"]])


def placed(values: list[Any], value: Any) -> int:
    """Where a value stands in a list, at whose end it is put where it is not there yet."""
    if value not in values:
        values.append(value)
    return values.index(value)


def packed(row: Mapping[str, Any], num_tokens: int, prompts: list[Any], roles: list[str]) -> dict[str, Any]:
    """A row as the page holds it: prompt and roles by index into these lists, numbers at four digits, the first
    `num_tokens` tokens.
    """
    scores = {
        name: compact(value[:num_tokens])
        for name, value in row.items()
        if name not in COLUMNS and isinstance(value, list)
    }
    return {
        "prompt": placed(prompts, readable(row["prompt"])),
        "reward": compact(row.get("reward")),
        "success": row.get("success"),
        "reason": row.get("reason"),
        "tokens": row["tokens"][:num_tokens],
        "num_tokens": len(row["tokens"]),
        "scores": scores,
        "role": [placed(roles, name) for name in row["role"][:num_tokens]] if row.get("role") else None,
    }


def _describe(material: Material, run: Run) -> dict[str, Any]:
    if run.kind == "study":
        return {"label": run.info["study"], "name": run.path.name, "colour": 0}
    method = run.info["method_name"]
    return {
        "label": f"{material.label(method)}, seed {run.info['seed']}",
        "name": run.info["name"],
        "colour": material.colour(method),
    }


def _pack(
    material: Material, size: tuple[int, int, int], read: dict[tuple[int, int], list[dict[str, Any]]]
) -> dict[str, Any]:
    """The data of the token view at one size."""
    num_steps, limit, num_tokens = size
    steps = {place: spread(run.token_steps(), num_steps) for place, run in enumerate(material.runs)}
    rows = {key: read[key] for key in read if key[1] in steps[key[0]]}
    shared = Counter(prompt for each in rows.values() for prompt in {row["prompt"] for row in each})
    prompts: list[Any] = []
    roles: list[str] = []
    runs = []
    for place, run in enumerate(material.runs):
        shown = []
        for step in steps[place]:
            picked = [packed(row, num_tokens, prompts, roles) for row in chosen(rows[place, step], shared, limit)]
            shown.append({"step": step, "num_rows": len(rows[place, step]), "rows": picked})
        if shown:
            runs.append({**_describe(material, run), "num_steps": len(run.token_steps()), "steps": shown})
    return {"runs": runs, "prompts": prompts, "roles": roles}


def _left_out(data: dict[str, Any]) -> str:
    steps = [step for run in data["runs"] for step in run["steps"]]
    shown, total = sum(len(step["rows"]) for step in steps), sum(step["num_rows"] for step in steps)
    cut = [len(row["tokens"]) for step in steps for row in step["rows"] if row["num_tokens"] > len(row["tokens"])]
    said = [
        f"{len(steps)} of {sum(run['num_steps'] for run in data['runs'])} recorded steps (over all runs)",
        f"{shown} of {total} completions of these steps",
    ]
    said += [f"the first {cut[0]} tokens of {len(cut)} longer completions"] if cut else []
    whole = not cut and shown == total and len(steps) == sum(run["num_steps"] for run in data["runs"])
    return "This page embeds " + "; ".join(said) + ("." if whole else ". The run directories hold the rest.")


def build(material: Material) -> Section | None:
    """The largest selection that fits; nothing when no run recorded tokens."""
    read = {
        (place, step): run.tokens(step)
        for place, run in enumerate(material.runs)
        for step in spread(run.token_steps(), SIZES[0][0])
    }
    if not any(read.values()):
        return None
    for size in SIZES:
        data = _pack(material, size, read)
        if len(embedded_json(data).encode("utf-8", "backslashreplace")) <= MAX_BYTES:
            break
    return Section("Tokens", f'<p class="note">{text(_left_out(data))}</p>', data, "tokens.js")
