"""cluster/README.md: its commands parse, and what it names is there."""

import re
import shlex
from collections.abc import Iterator

import pytest
import typer
from torch import zeros

from rlalign import cli
from rlalign.runfile import parse
from rlalign.scoring import RewardConfig, load_reward
from tests.cluster.files import CLUSTER, ROOT

PAGES = [CLUSTER / "README.md", ROOT / "docs" / "cluster.md", ROOT / "SECURITY.md", ROOT / "docs" / "security.md"]


def commands() -> Iterator[list[str]]:
    """Every `rlalign ...` on the pages, at the start of a line or after what starts it for us."""
    for page in PAGES:
        text = page.read_text()
        blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL))
        inline = re.findall(r"`(rlalign [^`\n]*)`", text)
        found = re.findall(r'(?:^|until |three_nodes\.sh |"\$\()(rlalign [^;&)\n]*)', blocks, re.MULTILINE)
        yield from (shlex.split(line) for line in [*found, *inline] if "..." not in line)


def unique() -> list[str]:
    return sorted({shlex.join(words) for words in commands()})


@pytest.mark.parametrize("line", unique())
def test_a_command_parses(line: str):
    command, words = typer.main.get_command(cli.app), shlex.split(line)[1:]
    while hasattr(command, "commands") and words:
        command, words = command.commands[words[0]], words[1:]
    names_no_arguments = not words and any(parameter.required for parameter in command.params)
    if not names_no_arguments:  # as in "`rlalign submit` uploads ..."
        context = command.make_context(command.name, [*words])
        parse(context.params.get("overrides") or [])


def test_there_are_commands():
    assert {"rlalign cluster start", "rlalign submit my_run.yaml"} <= set(unique())


def test_files_that_are_named_are_there():
    text = re.sub(r"https?://\S+", "", (CLUSTER / "README.md").read_text())
    named = set(re.findall(r"\bcluster/[\w/.-]+\.\w+", text)) | {
        f"cluster/{name}" for name in re.findall(r"`((?:local|slurm|kuberay|ray-up|docker)/[\w.-]+)`", text)
    }
    assert len(named) > 8
    assert not [name for name in named if not (ROOT / name).exists()]


def test_links_lead_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (CLUSTER / "README.md").read_text())
    assert links and all((CLUSTER / link).exists() for link in links)


def test_every_file_is_said_to_have_run_or_not():
    table = (CLUSTER / "README.md").read_text().partition("| file | run for real |")[2].partition("\n\n")[0]
    for path in CLUSTER.rglob("*"):
        if path.suffix in (".yaml", ".sh", ".sbatch") or path.name == "Dockerfile":
            name = path.relative_to(CLUSTER).as_posix()
            assert f"`{name}`" in table or f"`{path.parent.name}/*{path.suffix}`" in table, name


def test_the_example_reward_is_one(tmp_path):
    """It is loaded from a folder outside the repository, as the page says."""
    (code,) = re.findall(r"```python\n(.*?)```", (CLUSTER / "README.md").read_text(), re.DOTALL)
    (tmp_path / "my_rewards.py").write_text(code)
    reward = load_reward(RewardConfig(use=f"{tmp_path}/my_rewards.py:sharpness"))
    assert reward.function(zeros(2, 3, 4, 4), ["a", "b"]).tolist() == [0, 0]


def test_no_file_calls_a_machine_wide_stop_but_where_the_machine_is_the_clusters_own():
    for path in [p for p in CLUSTER.rglob("*") if p.suffix in (".sh", ".sbatch", ".yaml") or p.name == "Dockerfile"]:
        code = "\n".join(line.partition("#")[0] for line in path.read_text().splitlines())
        assert "symmetric-run" not in code
        assert path.parent.name == "ray-up" or not re.search(r"\bray stop\b", code)
