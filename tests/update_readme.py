"""Writes the knob table of README.md from train_jepa.knob_table(): python tests/update_readme.py"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def table() -> str:
    """The Markdown between the two marks of README.md."""
    import train_jepa
    rows, last = ["", "| knob | default | meaning |", "|---|---|---|"], ""
    for group, name, default, text in train_jepa.knob_table():
        if group != last:
            rows.append(f"| **{group}** | | |")
            last = group
        shown = f"`{default}`" if default else ""
        rows.append(f"| `{name}` | {shown} | {text} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition("<!-- knobs -->")
    after = rest.partition("<!-- /knobs -->")[2]
    readme.write_text(before + "<!-- knobs -->" + table() + "<!-- /knobs -->" + after, "utf-8")
