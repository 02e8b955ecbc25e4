"""Finds dense code, and code that reads sentences: `make lint` calls it. Exit code 1 if there is any.

Usage: tools/plain.py [FOLDER ...]; by default scripts.

Decisions are: if, conditional expression, loop, except, case and its guard, each further operand of and/or and of a
display in all() or any(), each clause of a comprehension and each of its filters.

Sentences are made for people. Code that reads them breaks when their wording changes; it should read a field instead.
Lines that read another program's text have the comment `# another program's text`.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

MOST_IN_STATEMENT = 3
MOST_IN_FUNCTION = 15
SENTENCES = {"reason", "why", "method", "note", "notes", "message", "problem", "remedy", "warning"}
"""Names of values that hold sentences."""
OWN_ERRORS = {"UserError", "WorkFailed", "WrongMetric", "BadRow", "Rejected"}
METHODS = {"startswith", "endswith", "partition", "rpartition", "split", "removeprefix", "removesuffix"}
METHODS |= {"match", "fullmatch", "search", "findall", "finditer", "sub"}  # of re
MARK = "# another program's text"


def expressions(statement: ast.AST) -> Iterator[ast.AST]:
    """Expressions of a statement, without those of statements inside it."""
    for child in ast.iter_child_nodes(statement):
        part = child.guard if isinstance(child, ast.match_case) else child
        if part and not isinstance(part, ast.stmt | ast.ExceptHandler):
            yield part
            yield from expressions(part)


def decisions_inside(statement: ast.stmt) -> int:
    """Decisions in the expressions of a statement."""
    count = 0
    for node in expressions(statement):
        if isinstance(node, ast.IfExp):
            count += 1
        elif isinstance(node, ast.BoolOp):
            count += len(node.values) - 1
        elif isinstance(node, ast.comprehension):
            count += 1 + len(node.ifs)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("all", "any"):
            displays = [part for part in node.args if isinstance(part, ast.List | ast.Tuple | ast.Set)]
            count += sum(max(len(display.elts) - 1, 0) for display in displays)
    return count


def decisions_in_function(body: list[ast.stmt]) -> int:
    """Decisions of statements and of those inside them, without nested functions and classes."""
    count = 0
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        count += decisions_inside(statement)
        count += isinstance(statement, ast.If | ast.While | ast.For | ast.AsyncFor)
        for child in ast.iter_child_nodes(statement):
            if isinstance(child, ast.stmt):
                count += decisions_in_function([child])
            elif isinstance(child, ast.ExceptHandler):
                count += 1 + decisions_in_function(child.body)
            elif isinstance(child, ast.match_case):
                count += 1 + (child.guard is not None) + decisions_in_function(child.body)
    return count


def dense(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Lines of statements and functions with too many decisions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            count = decisions_in_function(node.body)
            if count > MOST_IN_FUNCTION:
                yield node.lineno, f"{node.name} makes {count} decisions; split it, at most {MOST_IN_FUNCTION}"
        elif isinstance(node, ast.stmt) and not isinstance(node, ast.ClassDef):
            count = decisions_inside(node)
            if count > MOST_IN_STATEMENT:
                yield node.lineno, f"{count} decisions in a statement; split it, at most {MOST_IN_STATEMENT}"


def is_sentence(node: ast.expr, errors: set[str | None]) -> bool:
    """True for a value named as in `SENTENCES`, str(error) of one of `errors`, and a place such as "datasets.0"."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name) | ast.Subscript(slice=ast.Constant(value=name)):
            return name in SENTENCES
        case ast.Call(func=ast.Attribute(attr="get"), args=[ast.Constant(value=name), *_]):
            return name in SENTENCES
        case ast.Call(func=ast.Name(id="str"), args=[argument]):
            is_error = isinstance(argument, ast.Name) and argument.id in errors
            return is_error or is_sentence(argument, errors)
        case ast.Constant(value=str(text)):
            return text.startswith("datasets")
    return False


def reads_sentence(node: ast.AST, errors: set[str | None]) -> bool:
    """True for an expression that examines a sentence."""
    match node:
        case ast.Call(func=ast.Attribute(value=value, attr=name), args=arguments) if name in METHODS:
            return any(is_sentence(part, errors) for part in (value, *arguments))
        case ast.Compare(left=left, ops=[ast.In() | ast.NotIn()], comparators=[right]):
            is_display = isinstance(right, ast.List | ast.Tuple | ast.Set)
            return is_sentence(right, errors) or (is_display and is_sentence(left, errors))
        case ast.Compare(left=left, ops=[ast.Eq() | ast.NotEq()], comparators=[ast.Constant(value=str(text))]):
            return is_sentence(left, errors) and text != ""
    return False


def caught(tree: ast.AST) -> Iterator[tuple[ast.AST, set[str | None]]]:
    """Handlers of this project's errors, each with the name of the error."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.type:
            types = {part.id for part in ast.walk(node.type) if isinstance(part, ast.Name)}
            if types & OWN_ERRORS:
                yield node, {node.name}


def sentences(tree: ast.AST, lines: list[str]) -> Iterator[tuple[int, str]]:
    """Lines that examine sentences, without lines with `MARK`."""
    for scope, errors in [(tree, set[str | None]()), *caught(tree)]:
        for node in ast.walk(scope):
            if isinstance(node, ast.expr) and reads_sentence(node, errors) and MARK not in lines[node.lineno - 1]:
                yield node.lineno, f"reads a sentence: {ast.unparse(node):.60}; read a field of a type instead"


def main() -> int:
    """Search the Python files of folders, and print what they contain."""
    places = set()
    for folder in sys.argv[1:] or ["scripts"]:
        for file in Path(folder).rglob("*.py"):
            text = file.read_text()
            tree = ast.parse(text)
            for line, problem in [*dense(tree), *sentences(tree, text.splitlines())]:
                places.add((str(file), line, problem))
    for name, line, problem in sorted(places):
        print(f"{name}:{line}: {problem}")
    return int(bool(places))


if __name__ == "__main__":
    sys.exit(main())
