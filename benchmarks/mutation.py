"""Would a test notice? Puts small bugs into the source, one at a time, and runs the tests that execute the place.

A mutant changes one place: a comparison, an arithmetic or logical operator, a constant, a condition, a statement
removed, two arguments swapped, or a keyword argument left out (as wiring is forgotten). Places are drawn by a seed,
as many from each room, out of functions' bodies; messages of errors and annotations are left alone. What is put in
is written to a copy of the repository; the working tree is never touched.

First each test file runs once under coverage, which says what each of its tests executes and how long it takes; what is
executed in a test's setup counts for all tests of the file. Then each mutant runs its tests, the shortest first, until
one fails. Every file and every mutant is a cell: what is done is kept, and a second start goes on. Processes are
forks of one that has imported the heavy libraries, so a mutant costs its tests and little more.

cosmic-ray and mutmut start the test command anew for every mutant (here 4 s before a first test), and leave out neither
statements nor keyword arguments; so the operators are written here.

Run it, in an environment that has coverage as well: ``python benchmarks/mutation.py map`` (about as long as the tests),
then ``... run --each 40``, then ``... table``. Results: ``benchmarks/results/mutation/ROOM.json``.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "mutation"
ROOMS = ("recipes", "algorithms", "server", "transforms", "clients")
TESTED_BY = ("server", "transforms", "laws", "clients", "algorithms", "core/collecting", "recipes", "equivalence")
COMPARED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
REACHED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
}
SETUP = "setup"
SPARED = re.compile(r"(Error|warn|Field|ConfigDict|TypeVar)$")
"""Calls whose arguments are words for people, or declarations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """One change of one place.

    Attributes:
        file: Below ``src/lichen``.
        line: Where its statement begins, from 1.
        last: Where the place ends.
        place: Bytes of the file that are replaced, from and to.
        kind: Of the change.
        before: What stands there.
        after: What is put there.
    """

    file: str
    line: int
    last: int
    place: tuple[int, int]
    kind: str
    before: str
    after: str

    @property
    def name(self) -> str:
        """Twelve hex digits of what it is."""
        return hashlib.sha256(f"{self.file}|{self.line}|{self.place}|{self.kind}|{self.after}".encode()).hexdigest()[
            :12
        ]

    def put(self, source: bytes) -> bytes:
        """The source with it."""
        return source[: self.place[0]] + self.after.encode() + source[self.place[1] :]


def mutants_of(source: str, file: str) -> list[Mutant]:
    """All mutants of a file.

    >>> [(m.kind, m.before, m.after) for m in mutants_of("def f(a, b):\\n    return a < b", "f.py")]
    [('comparison', 'a < b', 'a <= b')]
    """
    text = source.encode()
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    out = []
    for node, line, kind, after in _changes(ast.parse(source), line=0, inside=False):
        place = (starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset)
        before = text[slice(*place)].decode()
        out.append(
            Mutant(file=file, line=line, last=node.end_lineno, place=place, kind=kind, before=before, after=after)
        )
    return out


def _changes(node: ast.AST, *, line: int, inside: bool) -> Iterator[tuple[Any, int, str, str]]:
    """Places of the tree: the node, its statement's line, a kind of change, and what comes to stand there."""
    line = node.lineno if isinstance(node, ast.stmt) else line
    if isinstance(node, ast.Call) and SPARED.search(ast.unparse(node.func)):
        return
    if isinstance(node, ast.JoinedStr | ast.Raise | ast.AnnAssign) and not (isinstance(node, ast.AnnAssign) and inside):
        if isinstance(node, ast.Raise) and inside:
            yield node, line, "statement", "pass"
        return
    if inside:
        yield from ((place, line, kind, after) for place, kind, after in _of_expression(node))
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list") or isinstance(value, ast.arguments):
            continue
        deeper = inside or isinstance(node, ast.FunctionDef)
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _changes(child, line=line, inside=deeper)


def _of_expression(node: ast.AST) -> Iterator[tuple[Any, str, str]]:
    """Changes of one node."""

    def said(new: ast.AST) -> str:
        return f"({ast.unparse(new)})"

    match node:
        case ast.Compare(left, [op], others) if type(op) in COMPARED:
            yield node, "comparison", ast.unparse(ast.Compare(left, [COMPARED[type(op)]()], others))
        case ast.BinOp(left, op, right) if type(op) in REACHED and not isinstance(left, ast.Constant | ast.JoinedStr):
            yield node, "arithmetic", said(ast.BinOp(left, REACHED[type(op)](), right))
        case ast.BoolOp(op, values):
            yield node, "logic", said(ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values))
        case ast.UnaryOp(ast.Not() | ast.USub(), operand):
            yield node, "sign", said(operand)
        case ast.Constant(bool(value)):
            yield node, "constant", str(not value)
        case ast.Constant(int(value) | float(value)):
            yield node, "constant", str(value + 1)
        case ast.IfExp(test, body, orelse):
            yield node, "condition", said(ast.IfExp(test, orelse, body))
        case ast.If(test) | ast.While(test):
            yield test, "condition", f"not ({ast.unparse(test)})"
        case ast.AugAssign() | ast.Expr(ast.Call()):
            yield node, "statement", "pass"
        case ast.Call(func, args, keywords):
            if len(args) > 1 and not any(isinstance(arg, ast.Starred) for arg in args[:2]):
                yield node, "swapped", ast.unparse(ast.Call(func, [args[1], args[0], *args[2:]], keywords))
            for k in range(len(keywords)):
                yield node, "left out", ast.unparse(ast.Call(func, args, keywords[:k] + keywords[k + 1 :]))


def drawn(room: str, each: int, seed: int) -> list[Mutant]:
    """So many mutants of a room."""
    every = []
    for file in sorted((ROOT / "src" / "lichen" / room).rglob("*.py")):
        every += mutants_of(file.read_text(), str(file.relative_to(ROOT / "src" / "lichen")))
    return random.Random(f"{seed} {room}").sample(every, min(each, len(every)))


def copied(work: Path) -> Path:
    """A copy of the repository, its byte code bound to the sources' digests."""
    copy = work / "copy"
    if copy.exists():
        shutil.rmtree(copy)
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.splitlines():
        if not name.startswith("benchmarks/results/") and (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    compiled = [sys.executable, "-m", "compileall", "-q", "--invalidation-mode", "checked-hash", str(copy / "src")]
    subprocess.run(compiled, check=True)
    return copy


def forked(do: Callable[[], int], limit: float, log: Path) -> int:
    """Exit code of what a fork does in a session of its own; -1: killed after so many seconds."""
    child = os.fork()
    if child == 0:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        code = 70
        try:
            code = int(do())
        finally:
            sys.stdout.flush()
            os._exit(code)
    end, done = time.monotonic() + limit, 0
    try:
        while not done and time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            time.sleep(0.02)
        return os.waitstatus_to_exitcode(status) if done else -1
    finally:
        if not done:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)


def pytest_in(copy: Path, tests: Sequence[str], *plugins: object) -> int:
    """Run tests within the copy."""
    import pytest

    os.chdir(copy)
    sys.path.insert(0, str(copy / "src"))
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONPATH": str(copy / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    return int(pytest.main([*(() if plugins else ("-x",)), "-q", "--no-header", *tests], plugins=list(plugins)))


class Watch:
    """Which lines of the library each test executes: a pytest plugin."""

    def __init__(self, copy: Path) -> None:
        import coverage

        self.prefix = str(copy / "src" / "lichen") + "/"
        self.coverage = coverage.Coverage(data_file=None, config_file=False, include=[self.prefix + "*"])
        self.seconds = dict[str, float]()
        self.coverage.start()

    def pytest_runtest_setup(self) -> None:
        """Counts for all tests of the file."""
        self.coverage.switch_context(SETUP)

    def pytest_runtest_call(self, item: Any) -> None:
        """Counts for the test."""
        self.coverage.switch_context(item.nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """After each phase."""
        self.coverage.switch_context(SETUP)
        if report.when == "call" and report.passed:
            self.seconds[report.nodeid] = report.duration

    def lines(self) -> dict[str, list[str]]:
        """``FILE:LINE`` of what each test has executed."""
        self.coverage.stop()
        data, out = self.coverage.get_data(), dict[str, list[str]]()
        for file in sorted(data.measured_files()):
            for line, contexts in data.contexts_by_lineno(file).items():
                for context in contexts:
                    out.setdefault(context, []).append(f"{file.removeprefix(self.prefix)}:{line}")
        return out


def watched(copy: Path, test: str, out: Path) -> int:
    """Run a test file once and keep what it executes."""
    watch, start = Watch(copy), time.monotonic()
    code = pytest_in(copy, [test], watch)
    seconds, lines = time.monotonic() - start, watch.lines()
    tests = {node: {"seconds": took, "lines": lines.get(node, [])} for node, took in watch.seconds.items()}
    out.write_text(
        json.dumps({"seconds": seconds, "code": code, "setup": lines.get(SETUP, []), "tests": tests}), encoding="utf-8"
    )
    return code


def tests_for(mutant: Mutant, maps: Mapping[str, Mapping[str, Any]], budget: float) -> tuple[list[str], float, int]:
    """Tests that execute the place, the shortest first, within a budget; their seconds; how many were left out."""
    lines = {f"{mutant.file}:{line}" for line in range(mutant.line, mutant.last + 1)}
    module = "lichen." + mutant.file.removesuffix(".py").replace("/", ".")
    found = []
    for file, seen in maps.items():
        direct = module in (ROOT / file).read_text()
        for node, test in seen["tests"].items():
            if not lines.isdisjoint(test["lines"]) or not lines.isdisjoint(seen["setup"]):
                found.append((not direct, test["seconds"], node))
    found.sort()
    tests, total = list[str](), 0.0
    for _, seconds, node in found:
        if tests and total + seconds > budget:
            break
        tests.append(node)
        total += seconds
    return tests, total, len(found) - len(tests)


def tried(mutant: Mutant, copy: Path, maps: Mapping[str, Any], budget: float, log: Path) -> dict[str, Any]:
    """What became of it."""
    tests, seconds, left = tests_for(mutant, maps, budget)
    start, file = time.monotonic(), copy / "src" / "lichen" / mutant.file
    verdict, by = "uncovered", ""
    if tests:
        source = file.read_bytes()
        file.write_bytes(mutant.put(source))
        try:
            code = forked(lambda: pytest_in(copy, tests), 60 + 8 * seconds, log)
        finally:
            file.write_bytes(source)
        verdict = {0: "survived", -1: "caught"}.get(code, "caught")
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", log.read_text(encoding="utf-8", errors="replace"), re.M)
        by = "time" if code == -1 else failed[0] if failed else f"exit {code}" if code else ""
    took = round(time.monotonic() - start, 1)
    return {**asdict(mutant), "verdict": verdict, "by": by, "tests": len(tests), "left_out": left, "seconds": took}


def make_maps(work: Path, copy: Path, limit: float, only: str) -> None:
    """A cell for each test file: what it executes."""
    (work / "map").mkdir(exist_ok=True)
    for file in (path for room in TESTED_BY for path in sorted((ROOT / "tests" / room).rglob("test_*.py"))):
        test = str(file.relative_to(ROOT))
        out = work / "map" / (test.replace("/", "+") + ".json")
        if only in test and not out.exists():
            code = forked(lambda: watched(copy, test, out), limit, work / "log.txt")  # noqa: B023
            print(test, "too long" if code == -1 else f"exit {code}", flush=True)
            if code == -1:
                out.write_text(json.dumps({"seconds": limit, "code": code, "setup": [], "tests": {}}))


def run(work: Path, copy: Path, args: argparse.Namespace) -> None:
    """A cell for each mutant."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.minutes
    done = {room: _read(room) for room in ROOMS}
    draws = {room: drawn(room, args.each, args.seed) for room in args.rooms}
    for k in range(args.each):  # in turns, so that a run cut short has something of each room
        maps = {p.stem.replace("+", "/"): json.loads(p.read_text()) for p in sorted((work / "map").glob("*.json"))}
        for room, mutants in draws.items():
            if time.monotonic() > end or k >= len(mutants):
                continue
            mutant, before = mutants[k], done[room].get(mutants[k].name)
            if before is not None and (not args.again or before["verdict"] == "caught" or "equivalent" in before):
                continue
            done[room][mutant.name] = tried(mutant, copy, maps, args.budget, work / "log.txt")
            (RESULTS / f"{room}.json").write_text(json.dumps(done[room], indent=1, sort_keys=True) + "\n")
    table(done)


def _read(room: str) -> dict[str, Any]:
    file = RESULTS / f"{room}.json"
    return json.loads(file.read_text()) if file.exists() else {}


def table(done: Mapping[str, Mapping[str, Any]]) -> None:
    """Sampled, caught and surviving by room; equivalent ones carry a note why nothing can notice them."""
    print("| Room | sampled | caught | survived | equivalent | uncovered | caught of those that matter |")
    print("|---|---|---|---|---|---|---|")
    for room, of_room in done.items():
        cells = list(of_room.values())
        count = {v: sum(c["verdict"] == v for c in cells) for v in ("caught", "survived", "uncovered")}
        same = sum("equivalent" in c and c["verdict"] != "caught" for c in cells)
        share = f"{count['caught'] / (len(cells) - same):.0%}" if len(cells) > same else ""
        row = [room, len(cells), count["caught"], count["survived"], same, count["uncovered"], share]
        print("| " + " | ".join(map(str, row)) + " |")
    for of_room in done.values():
        for name, cell in of_room.items():
            if cell["verdict"] != "caught" and "equivalent" not in cell:
                place = f"{name} {cell['file']}:{cell['line']} {cell['kind']}"
                print(
                    f"{cell['verdict']} {place}: {cell['before']!r} -> {cell['after']!r}, left out {cell['left_out']}"
                )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("do", choices=["map", "run", "table"])
    parser.add_argument("--rooms", nargs="+", default=ROOMS, choices=ROOMS)
    parser.add_argument("--each", type=int, default=40, help="mutants of each room")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", action="store_true", help="try what was not caught once more")
    parser.add_argument("--budget", type=float, default=30.0, help="seconds of tests for a mutant")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for a test file that is watched")
    parser.add_argument("--minutes", type=float, default=600.0, help="after which no mutant begins")
    parser.add_argument("--only", default="", help="part of the names of test files to watch")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "mutation")
    args = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the fork at work goes too
    if args.do == "table":
        table({room: _read(room) for room in ROOMS})
        return
    work = args.work / args.do
    work.mkdir(parents=True, exist_ok=True)
    if args.do == "run" and not (args.work / "map" / "map").exists():
        parser.error("no map yet: run `map` first")
    copy = copied(work)
    import hypothesis  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401

    if args.do == "map":
        make_maps(work, copy, args.limit, args.only)
    else:
        (work / "map").unlink(missing_ok=True)
        (work / "map").symlink_to(args.work.resolve() / "map" / "map")
        run(work, copy, args)


if __name__ == "__main__":
    main()
