"""Rewards in an environment of their own: another interpreter, another version of a package, and what if it dies."""

import gc
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from rlalign.scoring import RewardConfig, RewardError, Scoring, apart, environment, load_reward, load_rewards
from rlalign.scoring.call import call
from rlalign.types import Prompt, Unit
from tests.scoring import environments
from tests.scoring.helpers import numbered_images

HERE, THERE = 1.0, 3.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the rewards' file, and the environment `venv`."""
    folder = tmp_path_factory.mktemp("apart")
    (folder / "mine.py").write_text(environments.REWARDS)
    environments.environment(folder / "venv", shade=THERE)
    environments.palette(folder / "here", HERE)
    return folder


@pytest.fixture(autouse=True)
def no_child_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a test does, its children end with their rewards; this process has a `palette` of its own."""
    monkeypatch.syspath_prepend(str(folder / "here"))
    before = set(psutil.Process().children())
    yield
    gc.collect()
    assert set(psutil.Process().children()) <= before


def settings(reward: str, **more: Any) -> RewardConfig:
    plain = {"use": f"mine.py:{reward}", "retries": 0, "backoff_s": 0.0, "timeout_s": 20.0, "venv": "venv"}
    return RewardConfig(**plain | more)


def counted(folder: Path, scratch: Path, **more: Any) -> Scoring:
    """An engine whose reward writes down what it scored."""
    return Scoring([load_reward(settings("Counted", options={"folder": str(scratch)}, **more), folder)])


def asked(*texts: str) -> tuple[Tensor, Unit]:
    """Two pictures a prompt."""
    prompts = tuple(Prompt(text) for text in texts)
    return numbered_images(2 * len(texts)), Unit(7, tuple(range(len(texts))), prompts, samples=2)


def scored(scratch: Path) -> Counter[int]:
    return Counter(int(row) for row in (scratch / "scored").read_text().split())


def test_two_rewards_of_a_run_with_two_versions_of_a_package(folder: Path, images: Tensor, unit: Unit) -> None:
    here, there = settings("shade", venv=None, name="here"), settings("shade", name="there")
    scores = Scoring(load_rewards([here, there], folder)).score(images, unit)
    one, other = scores.rewards["here"].values, scores.rewards["there"].values
    assert one.max() > 0 and torch.equal(other, one * THERE / HERE)
    pids = scores.rewards["there"].details["pid"].unique()
    assert len(pids) == 1 and int(pids[0]) != os.getpid()


def test_numbers_are_those_of_the_reward_called_here(folder: Path, unit: Unit) -> None:
    """To the last bit, also of one that is differentiable and so gets floats."""
    images = torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    alone, other = (RewardConfig(use="saturation", venv=venv) for venv in (None, str(folder / "venv")))
    expected = Scoring([load_reward(alone)]).score(images, unit)
    assert torch.equal(Scoring([load_reward(other)]).score(images, unit).total, expected.total)


def test_a_groupwise_reward_gets_one_group_in_a_call(folder: Path, images: Tensor, unit: Unit) -> None:
    scores = Scoring([load_reward(settings("rank"), folder)]).score(images, unit)
    assert torch.equal(scores.total, torch.arange(4.0).expand(3, 4))


def test_a_child_that_is_killed_is_replaced_and_nothing_is_lost_or_scored_twice(folder: Path, tmp_path: Path) -> None:
    """Between two calls, and in the midst of one."""
    engine = counted(folder, tmp_path, batch_size=2)
    first = engine.score(*asked("a cat", "a dog"))
    (tmp_path / "scored").unlink()
    psutil.Process(int(first.rewards["Counted"].details["pid"][0, 0])).kill()
    second = engine.score(*asked("a cat", "die once", "a dog"))
    assert second.valid.all() and torch.equal(second.total, torch.arange(6.0).reshape(3, 2))
    assert scored(tmp_path) == Counter(range(6))
    pids = second.rewards["Counted"].details["pid"]
    assert len({*pids.flatten().tolist(), *first.rewards["Counted"].details["pid"].flatten().tolist()}) == 3
    assert engine.stats()["runtime/reward/Counted/errors"] == 0


def test_a_call_that_ends_every_child_fails_and_the_policy_decides(folder: Path, tmp_path: Path) -> None:
    engine = counted(folder, tmp_path, batch_size=2, on_failure="drop_group", min_group_size=1)
    scores = engine.score(*asked("a cat", "die", "a dog"))
    assert scores.valid.tolist() == [[True, True], [False, False], [True, True]]
    assert scored(tmp_path) == Counter([0, 1, 4, 5])


def test_a_call_that_hangs_is_given_up_at_its_timeout(folder: Path, tmp_path: Path) -> None:
    engine = counted(folder, tmp_path, batch_size=2, timeout_s=0.5, on_failure="drop_group", min_group_size=1)
    scores = engine.score(*asked("hang", "a cat"))
    assert scores.valid.tolist() == [[False, False], [True, True]]
    assert engine.stats()["runtime/reward/Counted/timeouts"] == 1


def test_a_child_that_cannot_even_notice_is_killed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apart, "GRACE_S", 0.2)
    reward = load_reward(settings("Counted", options={"folder": str(tmp_path)}, timeout_s=0.2), folder)
    function = reward.function
    assert isinstance(function, apart.Apart) and function._process is not None
    psutil.Process(function._process.pid).suspend()
    with pytest.raises(apart.TimedOut, match=r"no answer within 0\.2 s"):
        function(*asked("a cat")[:1], [Prompt("a cat")] * 2)
    assert function(*asked("a cat")[:1], [Prompt("a cat")] * 2)["score"] == [0, 1]


def test_what_the_reward_raises_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    engine = counted(folder, tmp_path)
    with pytest.raises(RewardError, match=r"ValueError: this picture is ugly \(mine\.py, line \d+\)"):
        engine.score(*asked("raise"))
    with pytest.raises(RewardError, match="a prompt's metadata cannot be sent as JSON"):
        engine.score(numbered_images(2), Unit(7, (0,), (Prompt("a cat", metadata={"what": object()}),), samples=2))


@pytest.mark.parametrize("order", ["fork and die once", "fork in C and die"])
def test_what_a_dead_child_had_started_holds_nothing_up(
    folder: Path, tmp_path: Path, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apart, "GRACE_S", 0.2)
    monkeypatch.setattr(apart, "END_S", 0.2)
    engine = counted(folder, tmp_path, batch_size=2, timeout_s=1.0, on_failure="drop_group", min_group_size=1)
    python = "in C" not in order  # which lets go of the pipes, so that the death is seen at once
    assert engine.score(*asked(order, "a cat")).valid.tolist() == [[python, python], [True, True]]
    assert engine.stats()["runtime/reward/Counted/timeouts"] == (not python)
    helper = int((tmp_path / "helpers").read_text())
    assert not psutil.pid_exists(helper) or psutil.Process(helper).status() == psutil.STATUS_ZOMBIE


def test_a_child_that_has_become_full_is_replaced_and_a_fresh_one_is_not(folder: Path, tmp_path: Path) -> None:
    engine = counted(folder, tmp_path, batch_size=2)
    scores = engine.score(*asked("a cat", "fill memory once"))
    assert scores.valid.all() and scores.rewards["Counted"].details["pid"].unique().numel() == 2
    assert engine.stats()["runtime/reward/Counted/errors"] == 0
    with pytest.raises(RewardError, match="MemoryError"):
        engine.score(*asked("fill memory"))


def test_a_coroutine_that_is_late_costs_no_child(folder: Path) -> None:
    late = load_reward(settings("late", timeout_s=0.3), folder)
    images, calm = numbered_images(2), [Prompt("a cat")] * 2
    before = call(late, images, calm).score
    with pytest.raises(apart.TimedOut, match=r"no answer within 0\.3 s$"):
        call(late, images, [Prompt("hang")] * 2)
    assert call(late, images, calm).score.tolist() == before.tolist()


def test_a_child_that_never_loads_is_given_up(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = counted(folder, tmp_path)
    scores = engine.score(*asked("a cat"))
    psutil.Process(int(scores.rewards["Counted"].details["pid"][0, 0])).kill()
    monkeypatch.setattr(apart, "LOAD_S", 0.1)
    with pytest.raises(RewardError, match=r"venv/bin/python did not load the reward within 0\.1 s"):
        engine.score(*asked("a cat"))


def test_what_is_printed_or_read_while_it_starts_stays_out_of_the_pipes(tmp_path: Path) -> None:
    package = tmp_path / "rlalign" / "scoring"
    package.mkdir(parents=True)
    (tmp_path / "rlalign" / "__init__.py").touch()
    (package / "__init__.py").write_text("print('welcome to torch', input.__name__, open(0).read())")
    (package / "child.py").write_text("import os\ndef main(source, target): os.write(target, os.read(source, 5))")
    done = subprocess.run([sys.executable, *apart.CHILD], cwd=tmp_path, input=b"hello", capture_output=True)
    assert (done.stdout, done.stderr) == (b"hello", b"welcome to torch input \n")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"venv": "nowhere"}, "there is no interpreter .*/nowhere/bin/python; make the environment first, or name its"),
        ({"use": "mine.py:Broken"}, "^reward 'Broken': Broken cannot be constructed with no options: FileNotFoundErr"),
        ({"use": "recorded"}, "reads the run's own recordings and cannot be in another process"),
    ],
)
def test_what_cannot_be_loaded_is_one_sentence(folder: Path, changes: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        load_reward(settings("shade", **changes), folder)
    assert "\n" not in str(caught.value)


def test_an_environment_without_rlalign_is_told_what_it_lacks(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")]
    subprocess.run(command, check=True)
    reward = settings("shade", venv=str(tmp_path / "bare"))
    with pytest.raises(ValueError, match=r"(?s)bare/bin/python ended while it loaded .*Error: .*; `pip: \[\]` beside"):
        load_reward(reward, folder)


def test_a_file_that_is_no_interpreter_is_told(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    with pytest.raises(ValueError, match="bin/python cannot be started: Permission denied"):
        load_reward(settings("shade", venv=str(tmp_path)), folder)


def test_packages_make_an_environment_where_it_is_named_or_below_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[Path, list[str]]] = []

    def python_of(where: Path, packages: list[str]) -> Path:
        made.append((where, [*packages]))
        return where / "bin" / "python"

    monkeypatch.setattr(environment, "python_of", python_of)
    monkeypatch.setenv("RLALIGN_HOME", str(tmp_path / "home"))
    wanted = [["hpsv2", "transformers<5"], ["hpsv2", "transformers<5"], []]
    first, again, other = (environment.interpreter(None, packages).parents[1] for packages in wanted)
    assert first == again != other and first.parent == other.parent == tmp_path / "home" / "environments"
    monkeypatch.setattr(environment, "ourselves", lambda: ["-e", "/another/clone"])
    assert environment.interpreter(None, []).parents[1] != other
    made.pop()
    environment.interpreter(tmp_path / "mine", ["hpsv2"])
    assert made == [(first, wanted[0]), (first, wanted[0]), (other, []), (tmp_path / "mine", ["hpsv2"])]


def test_an_environment_whose_change_broke_off_is_made_up_to_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if what it should hold is what it held before."""
    installed: list[str] = []

    def run(what: str, *command: str) -> None:
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / "python").touch()
        installed.append(command[-1])
        if command[-1] == "broken":
            raise ValueError("pip ended")

    monkeypatch.setattr(environment, "_run", run)
    environment.python_of(tmp_path, ["hpsv2"])
    with pytest.raises(ValueError, match="pip ended"):
        environment.python_of(tmp_path, ["broken"])
    assert installed.count("hpsv2") == 1
    environment.python_of(tmp_path, ["hpsv2"])
    assert installed.count("hpsv2") == 2


def test_what_goes_nowhere_is_refused() -> None:
    with pytest.raises(ValidationError, match="a URL runs on its server; leave venv and pip out"):
        RewardConfig(use="http://host/beauty", pip=("hpsv2",))
    with pytest.raises(ValidationError):
        RewardConfig(use="ocr", venv="")


def test_it_ends_when_its_parent_is_killed(folder: Path, tmp_path: Path) -> None:
    """Which has no chance to say so."""
    code = (
        "from pathlib import Path; from rlalign.scoring import RewardConfig, load_reward; import time\n"
        f"reward = load_reward(RewardConfig(use='mine.py:shade', venv='venv'), Path({str(folder)!r}))\n"
        f"Path({str(tmp_path / 'up')!r}).touch(); time.sleep(3600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while not (tmp_path / "up").exists() and parent.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    children = psutil.Process(parent.pid).children()
    parent.kill()
    parent.wait()
    assert len(children) == 1
    assert psutil.wait_procs(children, timeout=20)[1] == []
