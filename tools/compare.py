#!/usr/bin/env python3
"""compare.py: runs grouped by configuration, with paired t-tests over equal seeds.

    python tools/compare.py RUNS="runs/a* runs/b*" [OUT=compare]

Writes compare.md, compare.csv and compare.png into OUT and prints the tables; the last line of
stdout is JSON. The configuration of the first run is the baseline. Runs without a result are listed
and drawn, but not averaged. Where data, tokenizer or a cap differs from the baseline's, a warning
and a column say so, for then the differences have other causes, too. Settings are NAME=value
arguments or environment variables (arguments win).
"""
from __future__ import annotations

import csv
import dataclasses
import glob
import json
import math
import os
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from train_jepa import (  # noqa: E402
    Config,
    UserError,
    format_knob,
    knob,
    parse_knob,
    write_atomically,
)

# -----------------------------------------------------------------------------------------------
# knobs of the trainer: which of them make an experiment
# -----------------------------------------------------------------------------------------------

# Knobs of v0.1 that train_jepa.py no longer has: those that never made an experiment, and those
# that changed nothing at their defaults. So runs of v0.1 are grouped with runs of today's script.
FORMER_FREE_KNOBS = frozenset(
    "RUN RUNS OUT TRACK AUTHOR GITHUB_ID SUBMISSION_NAME BLURB DRY_RUN".split())
FORMER_DEFAULTS = dict(
    SEQ_LEN_START=0, SEQ_LEN_FULL=0.5, BATCH_TOKENS_START=0, BATCH_TOKENS_FULL=0.5,
    MUON_NS="quintic", JEPA_TARGET="latent", JEPA_CHUNK=8, JEPA_ACTION=False,
    SIGREG_SYNC=False, SIGREG_RESAMPLE=False, SIGREG_SCALE=False, CARRY_RESET=False)


def configuration(config: Mapping[str, Any]) -> dict[str, Any]:
    """The knobs of config.json that make a run's experiment: not its seed, folder or logging.

    A knob that the run's script did not have yet counts as its default. Data and tokenizer count by
    name, wherever they lie; a byte model has no tokenizer."""
    knobs, free, result = Config.knobs(), Config.tagged("free"), Config.tagged("result")
    values = {name: config.get(name, f.default) for name, f in knobs.items()
              if name != "SEED" and (name not in free or name in result)}
    for name, value in config.items():
        default = name in FORMER_DEFAULTS and value == FORMER_DEFAULTS[name]
        if name not in knobs and name not in FORMER_FREE_KNOBS and not default:
            values[name] = value
    if values["TOKENIZER"] == "byte":
        values["TOKENIZER_PATH"] = ""
    return values | {name: Path(str(values[name])).name for name in ("DATA_PATH", "TOKENIZER_PATH")}


# -----------------------------------------------------------------------------------------------
# run folders
# -----------------------------------------------------------------------------------------------

# The ways in which a run may be scored. A run is known by the first of these that it has.
SCORES = dict(carried="state carried through, one pass", sliding="sliding window",
              tempered="temperature-scaled", roundtrip="round trip")


class RunRecord(NamedTuple):
    """What a run folder holds; config and result are empty where the run has not written them."""
    path: Path
    config: dict[str, Any]
    result: dict[str, Any]
    metrics: list[dict]
    damage: list[str] = []  # what cannot be read of these files, a line each

    seed = property(lambda self: self.config.get("SEED"))

    def number(self, name: str) -> float | None:
        """A value of the result; None where it is missing or no finite number."""
        value = self.result.get(name)
        return value if isinstance(value, (int, float)) and math.isfinite(value) else None

    def score(self, kind: str) -> float | None:
        """Bits per byte of a kind of SCORES."""
        return self.number(f"{kind}_val_bpb")

    @property
    def kind(self) -> str | None:
        """The kind of SCORES that the run is known by."""
        return next((kind for kind in SCORES if self.score(kind) is not None), None)

    @property
    def finished(self) -> bool:
        """Whether the run has a finite score of its artifact."""
        return self.score("roundtrip") is not None


def read_file(path: Path) -> tuple[bytes, str]:
    """Content of a file, empty if it is missing; and what kept it from being read, else empty."""
    try:
        if path.exists() and not path.is_file():  # reading a FIFO would never end
            return b"", f"{path}: is no file"
        return path.read_bytes(), ""
    except FileNotFoundError:
        return b"", ""
    except OSError as error:
        return b"", f"{path}: cannot be read ({error.strerror})"


def read_object(path: Path) -> tuple[dict, str]:
    """A JSON object and what is wrong with its file; {} if there is none."""
    data, fault = read_file(path)
    try:
        value = json.loads(data) if data else {}
    except (ValueError, RecursionError):  # ValueError: no UTF-8, too
        value = None
    if isinstance(value, dict):
        return value, fault
    return {}, f"{path}: holds no JSON object"


def read_journal(path: Path) -> tuple[list[dict], str]:
    """The lines of metrics.jsonl that are JSON objects and, in a line, what the others are.

    A last line without its end is still being written."""
    data, fault = read_file(path)
    lines, damaged = [], []
    for number, line in enumerate(data.split(b"\n")[:-1], 1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            lines.append(value)
        else:
            damaged.append(number)
    if damaged:
        fault = (f"{path}: {len(damaged)} of {len(damaged) + len(lines)} lines are no JSON objects "
                 f"(the first is line {damaged[0]}); left out")
    return lines, fault


def read_run(path: Path) -> RunRecord:
    """Read a run folder in any state: empty, running, failed, finished, damaged."""
    config, result = read_object(path / "config.json"), read_object(path / "result.json")
    metrics = read_journal(path / "metrics.jsonl")
    faults = [fault for _, fault in (config, result, metrics) if fault]
    return RunRecord(path, config[0], result[0], metrics[0], faults)


def find_runs(patterns: str, knob_name: str) -> list[RunRecord]:
    """Run folders for space-separated names and globs, in that order, each once.

    Raises UserError, which names `knob_name`, for a pattern that matches no folder."""
    runs: dict[Path, RunRecord] = {}
    for pattern in patterns.split() or [""]:
        folders = [Path(name) for name in sorted(glob.glob(pattern)) if os.path.isdir(name)]
        if not folders:
            raise UserError(f"{knob_name}={pattern}: no such folder; give run folders or globs, "
                            f"such as {knob_name}=\"runs/a* runs/b*\"")
        for path in folders:
            runs.setdefault(path.resolve(), read_run(path))
    return list(runs.values())


# -----------------------------------------------------------------------------------------------
# command line of a tool: its settings are the fields of a dataclass
# -----------------------------------------------------------------------------------------------

def tool_knobs(settings: type) -> dict[str, dataclasses.Field]:
    """Field of every setting by its upper-case name."""
    return {f.name.upper(): f for f in dataclasses.fields(settings)}


def read_settings(settings: type, environ: Mapping[str, str], argv: Sequence[str] = ()) -> Any:
    """An instance of `settings` from NAME=value arguments and the environment (arguments win).

    An empty value means the default. Raises UserError with a line for every wrong name or value."""
    knobs, errors, values = tool_knobs(settings), [], {}
    texts = {name: environ[name] for name in knobs if name in environ}
    for argument in argv:
        name, equals, text = argument.partition("=")
        if equals and name in knobs:
            texts[name] = text
        else:
            errors.append(f"{argument}: no such argument; arguments are NAME=value, quoted where "
                          f"the value has spaces, with the names {', '.join(knobs)}")
    for name, text in texts.items():
        try:
            if text:
                values[name.lower()] = parse_knob(name, knobs[name], text)
        except UserError as error:
            errors.append(str(error))
    if errors:
        raise UserError("\n".join(errors))
    return settings(**values)


def help_text(settings: type, description: str) -> str:
    """What --help prints: the tool's docstring, then its settings."""
    lines = [description.strip(), ""]
    for name, f in tool_knobs(settings).items():
        choices = f" ({', '.join(f.metadata['choices'])})" if f.metadata["choices"] else ""
        setting = f"  {name}={format_knob(f.default)} "
        lines.append(setting.ljust(22) + f.metadata["help"] + choices)
    return "\n".join(lines)


def run_tool(name: str, description: str, settings: type, work: Callable[[Any], dict],
             argv: Sequence[str] | None = None) -> int:
    """Read the settings, do the work, print its report as one line of JSON.

    Returns the exit code: 0, or 2 for invalid input, which is explained on stderr, a line each."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if "-h" in argv or "--help" in argv:
            print(help_text(settings, description), flush=True)
        else:
            print(json.dumps(work(read_settings(settings, os.environ, argv))), flush=True)
        return 0
    except UserError as error:
        for line in str(error).splitlines():
            print(f"{name}: {line}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader has gone, as after `| head`; Python would complain at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


# -----------------------------------------------------------------------------------------------
# statistics
# -----------------------------------------------------------------------------------------------

def deviation(values: Sequence[float]) -> float | None:
    """Sample standard deviation (n - 1); None for a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def paired_test(deltas: Sequence[float]) -> dict[str, Any]:
    """Mean difference, its 95% confidence interval and p-value by the paired t-test (two-sided).

    `deltas` are the differences of pairs. Interval and p are None for a single pair; p is None,
    too, where all differences are 0. Raises UserError without scipy."""
    mean, spread = float(np.mean(deltas)), deviation(deltas)
    facts = dict(n=len(deltas), difference=mean, std=spread, low=None, high=None, p=None,
                 deltas=list(deltas))
    if spread is None:
        return facts
    if spread == 0:  # the t statistic is infinite, or 0/0
        return facts | dict(low=mean, high=mean, p=0.0 if mean else None)
    try:
        from scipy import stats  # here, because submit.py needs no statistics
    except ImportError:
        raise UserError("scipy is not installed; the paired t-test needs it: "
                        f"{sys.executable} -m pip install scipy") from None
    test = stats.ttest_1samp(deltas, 0.0)  # on the differences: the paired test
    low, high = test.confidence_interval(0.95)
    return facts | dict(low=float(low), high=float(high), p=float(test.pvalue))


# -----------------------------------------------------------------------------------------------
# groups: runs of one configuration
# -----------------------------------------------------------------------------------------------

class Column(NamedTuple):
    """A value of result.json that the tables show."""
    label: str
    form: str
    paired: bool = False  # compared by seed


COLUMNS = dict(
    roundtrip_val_bpb=Column("round trip BPB", ".5f", paired=True),
    sliding_val_bpb=Column("sliding BPB", ".5f", paired=True),
    carried_val_bpb=Column("carried BPB", ".5f", paired=True),
    total_bytes=Column("bytes", ",.0f"),
    steps=Column("steps", ",.0f"),
    train_seconds=Column("seconds", ",.0f"),
    ms_per_step=Column("ms/step", ".1f"))
PAIRED = [name for name, column in COLUMNS.items() if column.paired]
# Knobs that make runs unlike in more than the recipe, by what the tables call them.
UNLIKE_KNOBS = dict(
    DATA_PATH="data", TOKENIZER="tokenizer", TOKENIZER_PATH="tokenizer", VOCAB_SIZE="tokenizer",
    VAL_MAX_TOKENS="validation cap", ITERATIONS="step cap", MAX_WALLCLOCK_SECONDS="time cap")


class RunGroup(NamedTuple):
    """Runs of one configuration."""
    name: str    # the run if it is one; else the knobs that tell it from the baseline if they are
    #              few, else the first run
    knobs: str   # the knobs that tell it from the baseline; empty where these are many
    finished: list[RunRecord]
    unfinished: list[RunRecord]
    unlike: Mapping[str, list[str]] = {}  # words of UNLIKE_KNOBS that differ from the baseline:
    #                                       NAME=value of each

    runs = property(lambda self: self.finished + self.unfinished)

    def values(self, column: str) -> list[tuple[Any, float]]:
        """(seed, value) of every finished run that has the column."""
        pairs = [(run.seed, run.number(column)) for run in self.finished]
        return [(seed, value) for seed, value in pairs if value is not None]

    def by_seed(self, column: str) -> dict[Any, float]:
        """Value per seed; the mean where a seed was run more than once."""
        values: dict[Any, list[float]] = {}
        for seed, value in self.values(column):
            values.setdefault(seed, []).append(value)
        return {seed: float(np.mean(repeats)) for seed, repeats in values.items()}

    def summary(self) -> dict[str, Any]:
        """Counts, seeds, folders; mean, deviation and number of values for each of COLUMNS."""
        facts: dict[str, Any] = dict(
            name=self.name, n=len(self.finished), unfinished=len(self.unfinished),
            unlike=list(self.unlike),
            seeds=[run.seed for run in self.runs], runs=[str(run.path) for run in self.runs])
        for column in COLUMNS:
            values = [value for _, value in self.values(column)]
            facts[column] = dict(mean=float(np.mean(values)) if values else None,
                                 std=deviation(values), n=len(values))
        return facts


def differing(configs: Sequence[dict[str, Any]]) -> dict[str, list]:
    """Values in each configuration (None where missing) of the knobs that are not all equal."""
    names = dict.fromkeys(name for config in configs for name in config)
    columns = {name: [config.get(name) for config in configs] for name in names}
    return {name: column for name, column in columns.items()
            if any(value != column[0] for value in column)}


def knob_word(name: str, value: Any) -> str:
    """NAME=value for people: floats without trailing zeros."""
    return f"{name}={value:g}" if isinstance(value, float) else f"{name}={format_knob(value)}"


def group_runs(runs: Sequence[RunRecord]) -> tuple[list[RunGroup], dict[str, list]]:
    """Groups in order of first appearance, and the values of the knobs that differ between them.

    The first group is named by all of these knobs, each other group by those in which it differs
    from the first."""
    by_configuration: dict[str, list[RunRecord]] = {}
    for run in runs:
        key = json.dumps(configuration(run.config), sort_keys=True)
        by_configuration.setdefault(key, []).append(run)
    members = list(by_configuration.values())
    varied = differing([configuration(group[0].config) for group in members])
    groups: list[RunGroup] = []
    for i, group in enumerate(members):
        other = {name: knob_word(name, values[i]) for name, values in varied.items()
                 if i == 0 or values[i] != values[0]}
        knobs = ", ".join(other.values()) if len(other) <= 3 else ""
        name = group_name(group, knobs)
        if name in [earlier.name for earlier in groups] or (len(group) > 1 and len(other) > 3):
            name = f"{i + 1}: {name}"
        unlike: dict[str, list[str]] = {}
        for knob_name, word in other.items():
            if i and knob_name in UNLIKE_KNOBS:
                unlike.setdefault(UNLIKE_KNOBS[knob_name], []).append(word)
        groups.append(RunGroup(name, knobs, [run for run in group if run.finished],
                               [run for run in group if not run.finished], unlike))
    return groups, varied


def group_name(runs: Sequence[RunRecord], knobs: str) -> str:
    """What the tables call the runs of one configuration."""
    if len(runs) == 1:
        return runs[0].path.name
    return knobs or f"{runs[0].path.name} etc."


def pair_groups(groups: Sequence[RunGroup]) -> list[dict[str, Any]]:
    """Paired tests of every group but the first against the first, for each of PAIRED."""
    tests, baseline = [], groups[0]
    for group in groups[1:]:
        for column in PAIRED:
            values, base = group.by_seed(column), baseline.by_seed(column)
            seeds = sorted(set(values) & set(base), key=str)
            if seeds:
                facts = dict(name=group.name, baseline=baseline.name, column=column, seeds=seeds,
                             unlike=list(group.unlike))
                tests.append(facts | paired_test([values[seed] - base[seed] for seed in seeds]))
    return tests


def validations(run: RunRecord) -> list[tuple[int, float]]:
    """(step, bits per byte) of the validations during training, the finite ones."""
    return [(line["step"], line["val_bpb"]) for line in run.metrics
            if line.get("kind") == "validation" and isinstance(line.get("step"), int)
            and isinstance(line.get("val_bpb"), (int, float)) and math.isfinite(line["val_bpb"])]


def run_state(run: RunRecord) -> dict[str, Any]:
    """How far a run without a finite score came: last step, last validation, and both in words."""
    steps = [line["step"] for line in run.metrics if isinstance(line.get("step"), int)]
    step = max(steps, default=0)
    val_step, val_bpb = (validations(run) or [(None, None)])[-1]
    parts = ["finished without a finite round-trip BPB" if run.result else "no result"]
    if not run.result:
        steps = run.config.get("ITERATIONS")
        limit = f" of at most {steps:,}" if isinstance(steps, int) else ""
        parts.append(f"step {step:,}{limit}")
    parts.append("never validated" if val_step is None else
                 f"last validation {val_bpb:.4f} BPB at step {val_step:,}")
    journals = [run.path / name for name in ("log.txt", "metrics.jsonl")]
    times = [path.stat().st_mtime for path in journals if path.exists()]
    if times:
        parts.append(f"last written {(time.time() - max(times)) / 60:,.0f} min ago")
    return dict(step=step, val_bpb=val_bpb, val_step=val_step, text="; ".join(parts))


# -----------------------------------------------------------------------------------------------
# report: compare.md and compare.csv
# -----------------------------------------------------------------------------------------------

def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text, the first the heading, as a GitHub table with numbers to the right."""
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    rule = "|---|" + "---:|" * (len(rows[0]) - 1)
    return "\n".join([line(rows[0]), rule, *map(line, rows[1:])])


def number_text(value: float | None, form: str = "+.5f") -> str:
    """A formatted number; a dash for None."""
    return "–" if value is None else f"{value:{form}}"


def summary_table(summaries: Sequence[dict]) -> str:
    """A row per configuration: mean ± deviation of the columns that some run has."""
    columns = {name: column for name, column in COLUMNS.items()
               if name == PAIRED[0] or any(facts[name]["n"] for facts in summaries)}
    labels = [column.label for column in columns.values()]
    rows = [["configuration", *labels, "n", "unfinished", "seeds"]]
    for facts in summaries:
        cells = []
        for name, column in columns.items():
            cell = number_text(facts[name]["mean"], column.form)
            if facts[name]["std"] is not None:
                cell += f" ± {facts[name]['std']:{column.form}}"
            cells.append(cell)
        rows.append([facts["name"], *cells, str(facts["n"]), str(facts["unfinished"]),
                     ", ".join(map(str, facts["seeds"]))])
    return markdown_table(rows)


def varied_table(groups: Sequence[RunGroup], varied: dict[str, list]) -> str:
    """A row per knob that differs, a column per configuration."""
    rows = [["knob", *(group.name for group in groups)]]
    for name, values in varied.items():
        rows.append([name, *("–" if value is None else format_knob(value) for value in values)])
    return markdown_table(rows)


def paired_table(tests: Sequence[dict]) -> str:
    """A row per configuration and score: difference to the baseline, interval and p."""
    rows = [["configuration", "score", "pairs", "difference", "95% interval", "p", "also differs"]]
    for test in tests:
        interval = "–"
        if test["low"] is not None:
            interval = f"{number_text(test['low'])} to {number_text(test['high'])}"
        rows.append([test["name"], COLUMNS[test["column"]].label, str(test["n"]),
                     number_text(test["difference"]), interval, number_text(test["p"], ".2g"),
                     ", ".join(test["unlike"]) or "–"])
    return markdown_table(rows)


def unlike_warnings(groups: Sequence[RunGroup]) -> list[str]:
    """A line per configuration whose differences to the baseline have causes beside the recipe."""
    warnings = []
    for group in groups[1:]:
        if group.unlike:
            words = ", ".join(word for words in group.unlike.values() for word in words)
            warnings.append(f"{group.name} differs from the baseline {groups[0].name} in "
                            f"{' and '.join(group.unlike)} ({words}), not only in the recipe")
    return warnings


def comparison_notes(groups: Sequence[RunGroup], tests: Sequence[dict]) -> list[str]:
    """What a reader must know before trusting the tables, a line each."""
    tested = {test["name"] for test in tests}
    notes = [f"{group.name}: no finished seed in common with the baseline, so no test"
             for group in groups[1:] if group.name not in tested]
    for group in groups:
        if len({run.seed for run in group.finished}) < len(group.finished):
            notes.append(f"{group.name}: a seed was run more than once; the pairs take its mean")
    results = [run.result for group in groups for run in group.finished]
    machines = sorted({f"{result.get('world_size', 1)} x {result.get('device')}"
                       for result in results})
    if len(machines) > 1:
        notes.append(f"different machines ({', '.join(machines)}): compare ms/step with care")
    scripts = {result.get("script_sha256") for result in results}
    if len(scripts) > 1:
        notes.append(f"the runs were made by {len(scripts)} versions of train_jepa.py")
    return notes


def comparison_text(groups: Sequence[RunGroup], summaries: Sequence[dict], varied: dict[str, list],
                    tests: Sequence[dict], states: dict[str, dict], damage: Sequence[str]) -> str:
    """The comparison as Markdown."""
    baseline = "; the first row is the baseline" if len(groups) > 1 else ""
    parts = [f"# Comparison\n\nMean ± standard deviation over finished runs{baseline}.\n",
             *(f"**Warning:** {warning}.\n" for warning in unlike_warnings(groups)),
             summary_table(summaries)]
    if varied:
        parts += ["\n## Knobs that differ\n", varied_table(groups, varied)]
    if tests:
        parts += [f"\n## Paired by seed, against {groups[0].name}\n", paired_table(tests),
                  "\nA difference below 0 is better than the baseline. Interval and p: Student's t "
                  "on the differences of equal seeds. Reviewers of the challenge took less than "
                  "0.005 BPB for noise and more than 0.01 for real."]
    if states:
        parts += ["\n## Runs without a result\n"]
        parts += [f"- {path}: {state['text']}" for path, state in states.items()]
    notes = [*damage, *comparison_notes(groups, tests)]
    if notes:
        parts += ["\n## Notes\n", *(f"- {note}" for note in notes)]
    return "\n".join(parts) + "\n"


def write_csv(path: Path, summaries: Sequence[dict], tests: Sequence[dict]) -> None:
    """A row per configuration: mean, std and n per column, then its paired difference."""
    rows = []
    for facts in summaries:
        row = dict(configuration=facts["name"], n=facts["n"], unfinished=facts["unfinished"],
                   also_differs=", ".join(facts["unlike"]))
        for column in COLUMNS:
            row |= {f"{column}_{part}": facts[column][part] for part in ("mean", "std", "n")}
        by_column = {test["column"]: test for test in tests if test["name"] == facts["name"]}
        for column in PAIRED:
            test = by_column.get(column, {})
            row |= {f"{column}_paired_{part}": test.get(part)
                    for part in ("n", "difference", "low", "high", "p")}
        rows.append(row)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


# -----------------------------------------------------------------------------------------------
# figure: compare.png
# -----------------------------------------------------------------------------------------------

# Okabe and Ito's colours, which colour-blind readers can tell apart, without the pale yellow
# (https://jfly.uni-koeln.de/color/). Markers tell groups apart as well, in print and where there
# are more than 7 groups.
COLORS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7")
MARKERS = "osD^vPX"
# The score whose differences are drawn: the first of these that a group shares with the baseline.
DRAWN_SCORES = ("sliding_val_bpb", "roundtrip_val_bpb")


def group_styles(groups: Sequence[RunGroup]) -> dict[str, dict[str, str]]:
    """Colour and marker by the group's name; the pair is unique among 49 groups."""
    count = len(COLORS)
    return {group.name: dict(color=COLORS[i % count], marker=MARKERS[(i + i // count) % count])
            for i, group in enumerate(groups)}


def figure_label(group: RunGroup, remarks: Sequence[str] = ()) -> str:
    """Names of the runs (first and last of many), the knobs that tell the group apart, remarks."""
    names, remarks = [run.path.name for run in group.runs], list(remarks)
    label = ", ".join(names)
    if len(names) > 3:
        label, remarks = f"{names[0]} … {names[-1]}", [f"{len(names)} runs", *remarks]
    if group.knobs:
        label += f": {group.knobs}"
    if remarks:
        label += f" ({', '.join(remarks)})"
    return textwrap.fill(label, 52)


def draw_validations(axes, groups: Sequence[RunGroup], styles: dict[str, dict]) -> None:
    """Validation curves over steps, a line per run; dashed for runs without a result."""
    late: list[float] = []  # values after the steep start: these set the scale
    for group in groups:
        style = dict(linewidth=1.2, alpha=0.85, markersize=4, **styles[group.name])
        remarks = ["baseline"] if group is groups[0] and len(groups) > 1 else []
        if group.unfinished:
            remarks.append(f"dashed: {len(group.unfinished)} unfinished")
        axes.plot([], [], label=figure_label(group, remarks), **style)
        for run in group.runs:
            points = validations(run)
            points = points[1:] if len(points) > 2 else points  # without the untrained model's
            late += [value for _, value in points[len(points) // 5:]]
            if points:
                axes.plot(*zip(*points), linestyle="-" if run.finished else "--",
                          markevery=max(1, len(points) // 12), **style)
    if late:
        margin = 0.05 * (max(late) - min(late)) or 0.01
        axes.set_ylim(min(late) - margin, max(late) + margin)
    axes.set(xlabel="step", ylabel="bits per byte",
             title="Validation BPB before storage, a line per run")
    axes.legend(frameon=False, fontsize=9)


def draw_differences(axes, groups: Sequence[RunGroup], tests: Sequence[dict],
                     styles: dict[str, dict]) -> None:
    """Mean paired difference with its interval per group, and a tick per seed."""
    axes.set_yticks([])
    if not tests:
        axes.text(0.5, 0.5, "no seed finished in two configurations", ha="center",
                  transform=axes.transAxes)
        return
    labels = {group.name: figure_label(group) for group in groups}
    for row, test in enumerate(reversed(tests)):
        mean, style = test["difference"], styles[test["name"]]
        reach = None
        if test["low"] is not None:
            reach = [[mean - test["low"]], [test["high"] - mean]]
        axes.plot(test["deltas"], [row] * test["n"], "|", color=style["color"], markersize=11,
                  alpha=0.7)
        axes.errorbar(mean, row, xerr=reach, capsize=4, linewidth=1.6, **style)
        text = f"{labels[test['name']]}\n{mean:+.4f} {COLUMNS[test['column']].label}, "
        text += f"{test['n']} pair{'s' if test['n'] > 1 else ''}"
        if test["p"] is not None:
            text += f", p = {test['p']:.2g}"
        axes.annotate(text, (0.02, row), (0, 9), xycoords=("axes fraction", "data"),
                      textcoords="offset points", va="bottom", fontsize=9,
                      bbox=dict(facecolor="white", edgecolor="none", alpha=0.8, pad=1))
    axes.axvline(0, color="0.5", linewidth=1)
    axes.set(ylim=(-0.5, len(tests)), xlabel="bits per byte minus the baseline's (below 0: better)",
             title="Paired differences: mean, 95% interval, | each seed")
    axes.locator_params(axis="x", nbins=6)


def plot_comparison(path: Path, groups: Sequence[RunGroup], tests: Sequence[dict]) -> None:
    """Validation curves on the left, paired differences on the right.

    Without matplotlib one line on stderr says so, and no figure is written."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print(f"compare.py: no {path}, because matplotlib is not installed", file=sys.stderr)
        return
    drawn: dict[str, dict] = {}  # one test per group
    for column in DRAWN_SCORES:
        for test in tests:
            if test["column"] == column:
                drawn.setdefault(test["name"], test)
    ordered = [drawn[group.name] for group in groups if group.name in drawn]
    size = (13, max(4.8, 1.6 + 0.85 * len(ordered)))
    figure, (left, right) = plt.subplots(1, 2, figsize=size, layout="constrained",
                                         width_ratios=(3, 2))
    styles = group_styles(groups)
    draw_validations(left, groups, styles)
    draw_differences(right, groups, ordered, styles)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


# -----------------------------------------------------------------------------------------------
# main
# -----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Settings:
    """Settings of compare.py."""
    runs: str = knob("", "run folders, globs allowed; the first gives the baseline")
    out: str = knob("compare", "folder for compare.md, compare.csv and compare.png")


def compare(settings: Settings) -> dict[str, Any]:
    """Print the comparison of the runs and write it to OUT; returns the report."""
    runs = find_runs(settings.runs, "RUNS")
    with_config = [run for run in runs if run.config]
    if not with_config:
        raise UserError(f"RUNS={settings.runs}: no run there has begun (no config.json in any of "
                        f"the {len(runs)} folders)")
    damage = [line for run in runs for line in run.damage]
    groups, varied = group_runs(with_config)
    summaries, tests = [group.summary() for group in groups], pair_groups(groups)
    states = {str(run.path): run_state(run) for run in runs if not (run.config and run.finished)}
    text = comparison_text(groups, summaries, varied, tests, states, damage)
    out = Path(settings.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_csv(out / "compare.csv", summaries, tests)
        plot_comparison(out / "compare.png", groups, tests)
    except OSError as error:
        raise UserError(f"OUT={out}: cannot be written ({error.strerror})") from error
    write_atomically(out / "compare.md", text.encode())
    print(text)
    return dict(out=str(out), groups=summaries, knobs=varied, paired=tests, unfinished=states,
                warnings=unlike_warnings(groups), damage=damage)


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool("compare.py", __doc__, Settings, compare, argv)


if __name__ == "__main__":
    sys.exit(main())
