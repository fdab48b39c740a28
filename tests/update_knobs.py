"""Writes KNOBS.md from train_jepa.knob_table(): python tests/update_knobs.py"""
import sys
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

HEAD = """\
# Knobs

Every setting of `train_jepa.py`, written by `.venv/bin/python tests/update_knobs.py`; a test holds this file equal to
`--help`. A knob is an environment variable or a `NAME=value` argument; arguments win.

The defaults here are those of `train_jepa.py` alone. The run scripts set many others. This command shows what holds,
and from where: `bash run_jepa_bpe.sh MODE=describe`.

Two kinds of settings are not in the table. The head of `setup_jepa.sh` lists those of data and environment.
`tools/compare.py` and `tools/submit.py` list theirs with `--help`.
"""


def document() -> str:
    """The text of KNOBS.md: a table per group of knobs."""
    import train_jepa
    parts = [HEAD]
    for group, rows in groupby(train_jepa.knob_table(), key=lambda row: row[0]):
        lines = [f"## {group}\n", "| knob | default | meaning |", "|---|---|---|"]
        for _, name, default, text in rows:
            shown = f"`{default}`" if default else ""
            lines.append(f"| `{name}` | {shown} | {text.replace('|', ', ')} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    (ROOT / "KNOBS.md").write_text(document(), "utf-8")
