"""The order of lmtpd.py: a section uses only the sections above it, and the map at its top lists them all."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

MODULE = Path(__file__).parent.parent / "lmtpd.py"
SOURCE = MODULE.read_text()
BANNER = re.compile(r"^# ={70}\n# (.+)\n#\n((?:# .+\n)+)# ={70}$", re.MULTILINE)
MAP_ROW = re.compile(r"^# (\S+(?: \S+)*)  +\S.*$", re.MULTILINE)
SECTION_LINES, CLASS_LINES = 720, 200


@functools.cache
def sections() -> dict[str, range]:
    """The lines of each section, by its title."""
    found = [(match[1], SOURCE.count("\n", 0, match.start()) + 1) for match in BANNER.finditer(SOURCE)]
    ends = [line for _, line in found[1:]] + [SOURCE.count("\n") + 1]
    return {title: range(start, end) for (title, start), end in zip(found, ends)}


def section_of(line: int) -> int:
    """The number of the section that has this line; -1 before the first."""
    return next((number for number, lines in enumerate(sections().values()) if line in lines), -1)


def defined_names(tree: ast.Module) -> dict[str, int]:
    """The line of the definition of each name of the module."""
    names = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names[node.name] = node.lineno
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            stored = (name for name in ast.walk(node) if isinstance(name, ast.Name))
            names.update({name.id: node.lineno for name in stored if isinstance(name.ctx, ast.Store)})
    return names


def global_uses(node: ast.AST, local: frozenset[str] = frozenset()) -> Iterator[ast.Name]:
    """Each use of a name in the node that is not local to a function, annotations included."""
    if isinstance(node, (ast.FunctionDef, ast.Lambda)):
        inner = local | local_names(node)
        outside = [node.args, *([*node.decorator_list, node.returns] if isinstance(node, ast.FunctionDef) else [])]
        for part in filter(None, outside):
            yield from global_uses(part, local)
        for part in node.body if isinstance(node, ast.FunctionDef) else [node.body]:
            yield from global_uses(part, inner)
    elif isinstance(node, ast.Name):
        if isinstance(node.ctx, ast.Load) and node.id not in local:
            yield node
    else:
        for part in ast.iter_child_nodes(node):
            yield from global_uses(part, local)


def local_names(function: ast.FunctionDef | ast.Lambda) -> frozenset[str]:
    """The names that a function binds: its arguments, and what it assigns or imports."""
    names = set()
    for node in ast.walk(function):
        if isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).partition(".")[0])
    return frozenset(names)


def uses_of_later_sections(tree: ast.Module) -> list[str]:
    """Where a section uses a name of a section below it."""
    names = defined_names(tree)
    titles = list(sections())
    return [
        f"line {use.lineno}: {titles[section_of(use.lineno)]} uses {use.id} of {titles[section_of(names[use.id])]}"
        for use in global_uses(tree)
        if use.id in names and 0 <= section_of(use.lineno) < section_of(names[use.id])
    ]


def test_a_section_uses_only_the_sections_above_it() -> None:
    assert uses_of_later_sections(ast.parse(SOURCE)) == []


@pytest.mark.parametrize(
    "code",
    [
        "def probe(session: Session) -> None: ...",
        "def probe() -> Session | None: ...",
        "probe: Session",
        "def probe(): return Session",
        "class Probe:\n    def probe(self): return [Session for _ in ()]",
        "probe = lambda: Session.VERBS",
    ],
)
def test_the_rule_finds_uses_of_every_kind(code: str) -> None:
    tree = ast.parse(SOURCE)
    probe = ast.parse(code).body
    first = next(iter(sections().values())).start
    for node in (part for statement in probe for part in ast.walk(statement) if hasattr(part, "lineno")):
        node.lineno = first
    tree.body[:0] = probe
    name = next(iter(sections()))
    assert uses_of_later_sections(tree) == [f"line {first}: {name} uses Session of Session"]


def test_no_name_has_two_definitions() -> None:
    names = [
        name.id if isinstance(name, ast.Name) else name.name
        for node in ast.parse(SOURCE).body
        for name in (ast.walk(node) if isinstance(node, (ast.Assign, ast.AnnAssign)) else [node])
        if isinstance(name, (ast.FunctionDef, ast.ClassDef))
        or (isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store) and name.id.isupper())
    ]
    assert [name for name in set(names) if names.count(name) > 1] == []


def test_a_local_name_is_no_use_of_a_later_section() -> None:
    tree = ast.parse("def probe(Session): return [Session]\ndef other():\n    Session = 1\n    return lambda: Session")
    assert [use.id for use in global_uses(tree)] == []


def test_the_map_lists_the_sections_in_order() -> None:
    first = next(iter(sections().values())).start
    assert MAP_ROW.findall("\n".join(SOURCE.splitlines()[: first - 1])) == list(sections())
    assert len(sections()) == SOURCE.count(f"\n# {'=' * 70}\n") / 2, "a banner is malformed"


def test_each_banner_says_what_its_section_owns_and_must_not_know() -> None:
    for title, text in BANNER.findall(SOURCE):
        assert re.match(r"# Owns .+\n(?:# .+\n)*# Must not know .+\.\n", text), title


def test_no_section_and_no_class_is_too_long() -> None:
    long_sections = {title: len(lines) for title, lines in sections().items() if len(lines) > SECTION_LINES}
    classes = [node for node in ast.parse(SOURCE).body if isinstance(node, ast.ClassDef)]
    sizes = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in classes}
    assert long_sections == {}
    assert {name: size for name, size in sizes.items() if size > CLASS_LINES} == {}
