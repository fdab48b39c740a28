"""The file as a reader meets it: order of the sections, their sizes, no hidden state."""
import ast
import builtins
import re

from conftest import ROOT

SOURCE = (ROOT / "train_jepa.py").read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
LINES = SOURCE.splitlines()
SECTIONS = ["config", "runtime", "data", "SSD", "kernels", "blocks", "model", "losses", "schedules", "storage",
            "optimizers", "artifact", "checkpoint", "evaluation", "training", "evaluation alone and generation",
            "describe, bench, main"]


def section_starts() -> dict[str, int]:
    """First line (from 1) of each section: the comment under a bar, up to its colon."""
    starts = {"docstring and imports": 1}
    for number, line in enumerate(LINES[:-1], 1):
        if re.fullmatch("# -{60,}", line) and (title := re.match(r"# ([\w, ]+?)(:.*)?$", LINES[number])):
            starts[title[1]] = number
    return starts


STARTS = section_starts()


def section_of(line: int) -> int:
    """Index of the section that a line lies in."""
    return sum(start <= line for start in STARTS.values()) - 1


def bound_names(function) -> set[str]:
    """Names that a function, class, lambda or comprehension binds itself."""
    names = set()
    if isinstance(function, ast.ClassDef):  # only what stands directly in its body, such as methods
        return {node.name for node in function.body if isinstance(node, ast.FunctionDef)} | {
            target.id for node in function.body if isinstance(node, ast.Assign)
            for target in node.targets if isinstance(target, ast.Name)}
    if hasattr(function, "args"):
        a = function.args
        names |= {x.arg for x in [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]}
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node is not function:
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ExceptHandler) and node.name:
            names.add(node.name)
    return names


def module_names() -> dict[str, int]:
    """Line of the first definition of each name of the module."""
    names: dict[str, int] = {}
    for node in TREE.body:
        for part in ast.walk(node) if isinstance(node, (ast.If, ast.Try)) else [node]:
            if isinstance(part, (ast.FunctionDef, ast.ClassDef)):
                names.setdefault(part.name, part.lineno)
            elif isinstance(part, (ast.Import, ast.ImportFrom)):
                for alias in part.names:
                    names.setdefault((alias.asname or alias.name).split(".")[0], part.lineno)
            elif isinstance(part, (ast.Assign, ast.AnnAssign)):
                targets = part.targets if isinstance(part, ast.Assign) else [part.target]
                for target in (name for t in targets for name in ast.walk(t) if isinstance(name, ast.Name)):
                    names.setdefault(target.id, part.lineno)
    return names


def uses(node, local: frozenset = frozenset()):
    """(name, line) of every name that is read and not bound by an enclosing function."""
    scopes = (ast.FunctionDef, ast.ClassDef, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id not in local:
        yield node.id, node.lineno
    inner = local | bound_names(node) if isinstance(node, scopes) else local
    for child in ast.iter_child_nodes(node):
        yield from uses(child, frozenset(inner))


def test_sections_stand_in_the_order_of_the_docstring():
    assert list(STARTS)[1:] == SECTIONS
    documented = TREE.body[0].value.value
    assert [name for name in SECTIONS if name.split(",")[0].split(" ")[0] not in documented] == []


def test_each_section_uses_only_what_stands_above_it():
    names, wrong = module_names(), []
    for name, line in uses(TREE):
        if name in names and section_of(names[name]) > section_of(line):
            wrong.append(f"line {line} ({list(STARTS)[section_of(line)]}): {name} "
                         f"({list(STARTS)[section_of(names[name])]})")
    assert not wrong, "\n".join(wrong)
    assert {name for name, _ in uses(TREE)} - set(names) - set(dir(builtins)) <= {"__file__", "__name__"}


def test_the_order_test_sees_a_violation():
    """A name of a later section inside a nested function is found; a parameter of that name is not."""
    found = dict(uses(ast.parse("def f(a, train):\n    def g():\n        return later + train\n    return g")))
    assert found == {"later": 3}


def test_no_global_statement():
    assert not [node.lineno for node in ast.walk(TREE) if isinstance(node, (ast.Global, ast.Nonlocal))]


def test_importing_the_file_makes_nothing_and_prints_nothing(capfd):
    import subprocess
    import sys
    done = subprocess.run([sys.executable, "-c", "import train_jepa"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_report_of_sizes(capsys):
    """A report, not a limit: sizes of file and sections, longest functions."""
    full = [line for line in LINES if line.strip()]
    functions = [(node.end_lineno - node.lineno + 1, node.name) for node in ast.walk(TREE)
                 if isinstance(node, ast.FunctionDef)]
    ends = [*list(STARTS.values())[1:], len(LINES) + 1]
    report = [f"train_jepa.py: {len(LINES):,} lines, {len(SOURCE.encode()):,} bytes, mean line "
              f"{sum(map(len, LINES)) / len(LINES):.1f} columns ({sum(map(len, full)) / len(full):.1f} "
              f"without empty lines), {SOURCE.count(' = knob(')} knobs, {len(functions)} functions"]
    report += [f"  {end - start:>5} {name}" for (name, start), end in zip(STARTS.items(), ends)]
    report += [f"  longest: {name} {length}" for length, name in sorted(functions)[:-6:-1]]
    with capsys.disabled():
        print("\n" + "\n".join(report))
