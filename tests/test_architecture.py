"""The shape that must survive: how long files may get, who imports what, and that pages link to pages."""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlalign.plugins import names

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rlalign"
NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


def code_lines(source: str) -> int:
    """Lines that hold code: no blanks, no comments, no docstrings (those under fields are docstrings too)."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {n for token in tokens if token.type not in NO_CODE for n in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def imported(path: Path) -> set[str]:
    """The modules that a file imports by absolute name, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
    return found


def top_level(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(path)}


def test_code_lines_are_neither_blanks_nor_comments_nor_docstrings():
    source = '"""Doc\nstring."""\n\n# why\nx: int = 1  # [B]\n"""About x."""\ny = f(\n    x,\n)\ns = """two\nlines"""\n'
    assert code_lines(source) == 6


def test_the_loop_reads_on_one_screen():
    source = (PACKAGE / "loop.py").read_text()
    (train,) = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == "train"]
    assert code_lines(source) <= 80
    assert code_lines(ast.unparse(train)) <= 25


@pytest.mark.parametrize("name", names("algorithm"))
def test_an_algorithm_stays_under_120_lines(name: str):
    assert code_lines((PACKAGE / "algorithms" / f"{name}.py").read_text()) < 120


def test_ray_is_imported_in_the_runtime_alone():
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "rewards").rglob("*.py")]
    assert {p for p in files if "ray" in top_level(p)} <= set((PACKAGE / "runtime").rglob("*.py"))


@pytest.mark.parametrize("path", sorted((PACKAGE / "mdp").glob("*.py")), ids=lambda path: path.stem)
def test_the_maths_needs_torch_and_numpy_and_nothing_else(path: Path):
    assert top_level(path) - set(sys.stdlib_module_names) <= {"torch", "numpy", "rlalign"}
    assert {name for name in imported(path) if name.startswith("rlalign")} <= {
        "rlalign.types",
        *(f"rlalign.mdp.{p.stem}" for p in (PACKAGE / "mdp").glob("*.py")),
    }


@pytest.mark.parametrize("path", sorted((ROOT / "rewards").glob("*.py")), ids=lambda path: path.stem)
def test_a_reward_knows_the_types_and_the_reward_layer_alone(path: Path):
    own = {name for name in imported(path) if name.split(".")[0] == "rlalign"}
    assert all(name == "rlalign.types" or name.startswith("rlalign.scoring") for name in own)


def links() -> Iterator[tuple[Path, str]]:
    pages = [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *PACKAGE.rglob("*.md"),
        *(ROOT / "tests").rglob("*.md"),
    ]
    for page in sorted(pages):
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text):
            yield page, "".join(target)


def test_pages_link_to_pages_that_exist():
    internal = [(page, link) for page, link in links() if not re.match(r"https?:|mailto:", link)]
    missing = [f"{p.relative_to(ROOT)} -> {link}" for p, link in internal if not leads_somewhere(p, link)]
    assert internal
    assert not missing


def leads_somewhere(page: Path, link: str) -> bool:
    path, _, anchor = link.partition("#")
    target = (page.parent / path) if path else page
    if not target.exists():
        return False
    return not anchor or anchor in anchors(target)


def anchors(page: Path) -> set[str]:
    """What GitHub and mkdocs make of the headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
