"""Keeps the figures of a finished study beside those of the benchmarks, for the documentation to be held against:

    python benchmarks/_keep.py runs/correlation correlation          # -> benchmarks/results/correlation.json

takes command, seed, settings, findings and every figure's value, interval and p-values to seven digits; not the tokens,
curves and tables that a page draws.
"""

import argparse
import json
import math
from pathlib import Path

KEPT = ("value", "low", "high", "p", "holm", "num", "verdict")
ABOUT = ("study", "command", "seed", "seeds", "num", "config", "findings", "claims", "target", "verdicts", "cost")


def rounded(x):
    """Floats to seven digits, NaN and infinities to None, all the way down."""
    if isinstance(x, dict):
        return {name: rounded(each) for name, each in x.items()}
    if isinstance(x, list):
        return [rounded(each) for each in x]
    if isinstance(x, float):
        return float(f"{x:.7g}") if math.isfinite(x) else None
    return x


def kept(result: dict) -> dict:
    about = {name: result[name] for name in ABOUT if name in result}
    figures = {name: {key: f[key] for key in KEPT if key in f} for name, f in result.get("figures", {}).items()}
    return rounded(about | {"figures": figures} if figures else result)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="a study's directory, or its JSON file")
    parser.add_argument("name", help="of the file in benchmarks/results")
    parser.add_argument("--only", nargs="+", default=[""], metavar="PREFIX", help="of the names of figures")
    parser.add_argument("--note", help="what the command does not say of the result")
    options = parser.parse_args()
    source = options.result / "result.json" if options.result.is_dir() else options.result
    found = kept(json.loads(source.read_text())) | ({"note": options.note} if options.note else {})
    if "figures" in found:
        chosen = tuple(options.only)
        found["figures"] = {name: each for name, each in found["figures"].items() if name.startswith(chosen)}
    path = Path(__file__).parent / "results" / f"{options.name}.json"
    lines = [f"{json.dumps(name)}: {json.dumps(each)}" for name, each in found.pop("figures", {}).items()]
    rest = [f"{json.dumps(name)}: {json.dumps(each)}" for name, each in found.items()]
    if lines:
        rest.append('"figures": {\n' + ",\n".join(lines) + "\n}")
    path.write_text("{\n" + ",\n".join(rest) + "\n}\n")
    print(f"{path.name}: {len(lines)} figures, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
