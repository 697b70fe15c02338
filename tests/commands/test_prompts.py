"""Prompt files through the command line."""

import json
from pathlib import Path

import pytest

from rlalign.prompts import PromptSet
from rlalign.prompts.matching import identity
from tests.runs import call, run_file, without_pages

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    run_file(tmp_path)
    without_pages(monkeypatch)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_generate_writes_two_sides(capsys: Capture) -> None:
    arguments = ["--num", "60", "--to", "new/train.jsonl", "--heldout", "new/heldout.jsonl", "--num-heldout", "12"]
    done = call(capsys, "prompts", "generate", "geneval", *arguments)
    assert done.code == 0 and "60 prompts in new/train.jsonl: single_object 10" in done.out
    train, heldout = (PromptSet.read(Path("new", f"{name}.jsonl")).prompts for name in ("train", "heldout"))
    assert (len(train), len(heldout)) == (60, 12)
    assert not {identity(prompt) for prompt in train} & {identity(prompt) for prompt in heldout}
    again = call(capsys, "prompts", "generate", "geneval", *arguments)
    assert again.code == 2 and "new/train.jsonl is there already" in again.complaints[0]


def test_convert_writes_what_a_run_reads(capsys: Capture) -> None:
    Path("PartiPrompts.tsv").write_text("Prompt\tCategory\tChallenge\tNote\na walrus\tAnimals\tBasic\t\n")
    done = call(capsys, "prompts", "convert", "parti", "PartiPrompts.tsv", "--to", "parti.jsonl")
    assert done.code == 0 and "1 prompts in parti.jsonl" in done.out
    (prompt,) = PromptSet.read(Path("parti.jsonl")).prompts
    assert prompt.text == "a walrus" and prompt.metadata == {"tag": "Animals", "challenge": "Basic"}


def test_convert_writes_pairs(capsys: Capture) -> None:
    Path("hpd/train").mkdir(parents=True)
    entry = {"prompt": "a fox", "file_path": ["a.jpg", "b.jpg"], "human_preference": [0, 1]}
    for name in entry["file_path"]:
        Path("hpd/train", name).write_bytes(b"")
    Path("hpd/train.json").write_text(json.dumps([entry]))
    done = call(capsys, "prompts", "convert", "hpdv2", "hpd/train.json", "--to", "pairs/train.jsonl", "--pairs")
    assert done.code == 0 and "1 groups of judged images" in done.out
    recorded = PromptSet.read(Path("pairs/train.jsonl")).recorded(samples=2)
    recorded.require_images()
    assert recorded.prompts[0].metadata["scores"] == [0, 1]


def test_show_a_file(capsys: Capture) -> None:
    rows = [{"text": "a cat", "metadata": {"tag": "pets"}}, {"text": "A cat.", "metadata": {"tag": "pets"}}]
    rows += [{"text": "a car", "weight": 2}, rows[0]]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = call(capsys, "prompts", "show", "p.jsonl", "--examples", "3")
    assert done.code == 0
    for words in (
        "3 different ones: pets 2, (no tag) 1",
        "1 of them ask for the same as an earlier one",
        "drawn by weight; at step 0: pets 50.0%, (no tag) 50.0%",
        "1 lines repeat a text, 'a cat' 2 times",
    ):
        assert words in done.out, words


def test_show_a_file_of_which_nothing_is_drawn(capsys: Capture) -> None:
    Path("p.jsonl").write_text('{"text": "a", "weight": 0}\n{"text": "b", "weight": 0}')
    done = call(capsys, "prompts", "show", "p.jsonl")
    assert done.code == 0 and "at step 0: nothing, since all weights are 0" in done.out


def test_show_a_run(capsys: Capture) -> None:
    Path("heldout.txt").write_text("d\nA\n")
    done = call(capsys, "prompts", "show", "run.yaml")
    assert done.code == 0 and "1 prompts of train ask for the same as one of heldout, 'a' for one" in done.out
    apart = call(capsys, "prompts", "show", "run.yaml", "prompts.disjoint=true")
    assert "train        2 different ones" in apart.out and "0 prompts of train" in apart.out


def test_a_run_on_shares_is_judged_on_prompts_that_it_never_saw(capsys: Capture) -> None:
    Path("train.txt").write_text("\n".join(f"prompt {number}" for number in range(40)))
    shares = ["prompts.heldout=0.3", "prompts.test=0.2"]
    assert call(capsys, "train", "run.yaml", *shares).code == 0
    done = call(capsys, "evaluate", "runs/run", "--prompts", "test")
    assert done.code == 0 and "prompts      test" in done.out
    found = json.loads(Path("evaluations/run_step_000002_test/metrics.json").read_text())
    assert found["prompts"] == "test" and 0 <= found["reward/mean"] <= 1
    without = call(capsys, "evaluate", "run.yaml", "--prompts", "test")
    assert without.code == 2 and "prompts.test" in without.complaints[0]


@pytest.mark.parametrize("weights", ["{}", "{easy: 3}", "{easy: [[0, 1], [3, 0]]}"])
def test_a_run_by_weights_goes_on_as_if_it_had_not_stopped(weights: str, capsys: Capture) -> None:
    rows = [{"text": str(number), "metadata": {"tag": "easy" if number % 2 else "hard"}} for number in range(9)]
    Path("train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    chosen = ["prompts.train=train.jsonl", f"prompts.weights={weights}"]
    call(capsys, "train", "run.yaml", *chosen, "steps=4", "--run-dir", "whole")
    call(capsys, "train", "run.yaml", *chosen, "steps=2", "--run-dir", "parts")
    assert call(capsys, "resume", "parts", "--steps", "4").code == 0
    rewards = [
        [json.loads(line)["reward/mean"] for line in Path(run, "metrics.jsonl").read_text().splitlines()]
        for run in ("whole", "parts")
    ]
    assert rewards[0] == rewards[1] and len(rewards[0]) == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["show", "nosuch.txt"], "there is no prompts file nosuch.txt"),
        (["show", "nosuch"], "no run file or recipe 'nosuch'"),
        (["show", "train.txt", "steps=3"], "has no settings to override such as steps=3"),
        (["generate", "geneval", "--to", "t.csv"], "t.csv must end in .jsonl"),
        (["generate", "geneval", "--to", "t.jsonl", "--heldout", "t.jsonl"], "name the same file"),
        (["generate", "poems", "--to", "t.jsonl"], "poems"),
        (["convert", "partii", "x", "--to", "t.jsonl"], "did you mean 'parti'"),
        (["convert", "parti", "x", "--to", "t.jsonl"], "there is no x"),
        (["convert", "parti", "train.txt", "--to", "t.jsonl", "--split", "val"], "the layout parti has no splits"),
        (["convert", "parti", "train.txt", "--to", "t.jsonl", "--pairs"], "has no judged images"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(arguments: list[str], words: str, capsys: Capture) -> None:
    done = call(capsys, "prompts", *arguments)
    assert done.code == 2 and len(done.complaints) == 1 and words in done.complaints[0], done
    assert not list(Path().glob("t.*"))
