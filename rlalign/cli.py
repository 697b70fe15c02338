"""The command line: arguments in, exit code out. What a command does stands in ``rlalign.commands``.

Exit codes: 0 done, 1 internal error (with its traceback), 2 bad input (one sentence), 130 interrupted, 143 terminated.
Commands import what they need when they run, so that `rlalign --help` does not wait for torch.
"""

import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal, NoReturn

import typer

from rlalign import __version__
from rlalign.commands.problems import BadInput

Weights = Literal["policy", "ema"]
MOST_PROMPTS = 1_000_000  # of a generated file: far below what the grammars hold, and drawn in a minute or two
# What click raises for wrong arguments: an ancestor of BadParameter, since newer typers bring a click of their own.
UsageError: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1", "DIFFUSERS_VERBOSITY": "error"}
"""For libraries that would draw loading bars into ours, or tell what they fall back to."""

app = typer.Typer(
    name="rlalign",
    help="Aligns diffusion and flow-matching models with rewards, online: sample, score, update, broadcast, again.",
    epilog="Start here: rlalign train quickstart",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
rewards = typer.Typer(help="The rewards that can be named in a run file.")
models = typer.Typer(help="The model families, and the models that are shipped.")
algorithms = typer.Typer(help="The algorithms, and the papers' presets.")
prompts = typer.Typer(help="Prompt files: look into them, generate them, convert public sets.")
cluster = typer.Typer(help="A Ray cluster of this machine and others, in token mode.")
app.add_typer(rewards, name="rewards")
app.add_typer(models, name="models")
app.add_typer(algorithms, name="algorithms")
app.add_typer(prompts, name="prompts")
app.add_typer(cluster, name="cluster")

RunFile = Annotated[str, typer.Argument(metavar="NAME|FILE", help="A shipped recipe (quickstart) or a run file.")]
Target = Annotated[str, typer.Argument(metavar="DIR|NAME|FILE", help="A run's folder, a recipe or a run file.")]
RunFolder = Annotated[Path, typer.Argument(metavar="DIR", help="A run's folder, such as runs/quickstart.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to replace, as in optimizer.lr=1e-4.")
]
WhichWeights = Annotated[Weights | None, typer.Option(help="Unless given: ema where the run keeps one, else policy.")]
Steps = Annotated[int | None, typer.Option(help="The same as steps=N.")]


@app.command(epilog="Examples: rlalign train quickstart  |  rlalign train my.yaml algorithm=nft optimizer.lr=3e-4")
def train(
    run_file: RunFile,
    overrides: Overrides = None,
    run_dir: Annotated[Path | None, typer.Option(help="Where the run goes; runs/NAME unless given.")] = None,
    steps: Steps = None,
    seed: Annotated[int | None, typer.Option(help="The same as seed=S.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Move an earlier run in that place aside.")] = False,
    address: Annotated[str | None, typer.Option(help="The same as runtime.address=HOST:PORT.")] = None,
) -> int:
    """Start a run, or go on with it: the same command does both, and nothing once it is finished."""
    from rlalign.commands.train import train

    given = _with(overrides, **{"steps": steps, "seed": seed, "runtime.address": address})
    return train(run_file, given, run_dir, fresh)


@app.command(epilog="Example: rlalign resume runs/quickstart")
def resume(run: RunFolder, steps: Annotated[int | None, typer.Option(help="Prolong it to so many.")] = None) -> int:
    """Go on with a run from its last checkpoint; needs nothing but its folder."""
    from rlalign.commands.train import resume

    return resume(run, _with(None, steps=steps))


@app.command(epilog="Example: rlalign submit my.yaml --address http://127.0.0.1:8265 --run-dir /shared/runs/my")
def submit(
    run_file: RunFile,
    overrides: Overrides = None,
    address: Annotated[str | None, typer.Option(help="Of the cluster's dashboard; of the one started here.")] = None,
    run_dir: Annotated[Path | None, typer.Option(help="Where the run goes, on storage that machines share.")] = None,
    working_dir: Annotated[Path | None, typer.Option(help="What the job sees; the run file's folder.")] = None,
    name: Annotated[str | None, typer.Option(help="Attempts are NAME-1, NAME-2 ...; the run's unless given.")] = None,
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="Show its log until it ends.")] = True,
    stop: Annotated[bool, typer.Option("--stop", help="Ask the attempt that is running to save and end.")] = False,
    exclude: Annotated[list[str] | None, typer.Option(help="Leave out of the upload, as in .gitignore.")] = None,
    pip: Annotated[list[str] | None, typer.Option(help="Install on every machine, for the job only.")] = None,
    env: Annotated[list[str] | None, typer.Option(help="NAME or NAME=VALUE for the job's processes.")] = None,
) -> int:
    """Run on a cluster, as a job: start it, follow it or go on with it. Ctrl-C leaves it running."""
    from rlalign.commands import submit as jobs

    wish = jobs.Wish(
        run_file, overrides or [], address, run_dir, working_dir, name, exclude or [], pip or [], env or []
    )
    return jobs.stop(wish) if stop else jobs.submit(wish, follow)


@app.command(epilog="Example: rlalign plan my.yaml rollout.micro_batch=4")
def plan(
    run: Target,
    overrides: Overrides = None,
    measure: Annotated[bool, typer.Option("--measure", help="Load a large model too, to measure its memory.")] = False,
    gpus: Annotated[int | None, typer.Option(min=1, help="Say how to use so many; those here unless given.")] = None,
    gpu_memory: Annotated[float | None, typer.Option(help="GiB of one GPU; of that here unless given.")] = None,
) -> int:
    """Say what a run will do, what memory it takes and how to divide machines, before anything starts."""
    from rlalign.commands.plan import plan

    return plan(run, overrides or [], measure, gpus, gpu_memory)


@app.command()
def doctor() -> int:
    """Look at versions, devices, the shipped model and what is missing."""
    from rlalign.commands.doctor import doctor

    return doctor()


@app.command(epilog='Examples: rlalign sample runs/quickstart  |  rlalign sample zoo:scenes --prompt "a red circle"')
def sample(
    of: Annotated[str, typer.Argument(metavar="DIR|NAME|FILE|MODEL", help="A run, a run file, or say zoo:scenes.")],
    overrides: Overrides = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Repeat for more; unless given, held-out prompts.")] = None,
    num: Annotated[int, typer.Option(min=1, help="Pictures of each prompt.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Of the initial noise.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; as in the run's evaluation.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; as in the run's evaluation.")] = None,
    weights: WhichWeights = None,
    latents: Annotated[Path | None, typer.Option(help="Initial latents to start from: safetensors, `latents`.")] = None,
    save_latents: Annotated[Path | None, typer.Option(help="Write the initial latents to this file.")] = None,
    image: Annotated[Path | None, typer.Option(help="What the prompts start from, for editing and animation.")] = None,
    to: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("samples"),
) -> int:
    """Make pictures with a run's model, or with a model as it is."""
    from rlalign.commands.sample import Wish, sample

    return sample(
        Wish(of, overrides or [], prompt or [], num, seed, steps, guidance, weights, latents, save_latents, to, image)
    )


@app.command(epilog="Example: rlalign evaluate runs/quickstart evaluation.num_images=128")
def evaluate(
    run: Target,
    overrides: Overrides = None,
    weights: WhichWeights = None,
    to: Annotated[Path | None, typer.Option(help="Folder for metrics.json and the grid.")] = None,
    part: Annotated[
        Literal["heldout", "test"], typer.Option("--prompts", help="test: those that nothing was chosen by.")
    ] = "heldout",
    features: Annotated[
        Path | None, typer.Option(help="FID and KID too, by this network: a .safetensors or a folder.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(metavar="base|DIR", help="To the base model's pictures, or to those of a folder.")
    ] = None,
) -> int:
    """Judge a run's last checkpoint, or a run file's untrained model, on held-out prompts."""
    from rlalign.commands.evaluate import Wish, evaluate

    return evaluate(Wish(run, overrides or [], weights, to, features, reference, part))


@app.command(epilog="Example: rlalign record quickstart --to pairs --prompts 500 --num 4")
def record(
    run: Target,
    to: Annotated[Path, typer.Option(help="Folder for train.jsonl and its images.")],
    overrides: Overrides = None,
    prompts: Annotated[int, typer.Option(min=1, help="How many, from the top of the training file.")] = 100,
    num: Annotated[int, typer.Option(min=2, help="Pictures of each.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise that they start from.")] = 0,
    weights: WhichWeights = None,
) -> int:
    """Write a model's pictures and their rewards, for runs with rollout.source=data."""
    from rlalign.commands import record as recording

    return recording.record(recording.Wish(run, overrides or [], prompts, num, seed, weights, to))


@app.command(epilog="Examples: rlalign export runs/quickstart --to my_lora  |  ... --to my_model --full")
def export(
    run: RunFolder,
    to: Annotated[Path, typer.Option(help="Folder to write, or a file.safetensors.")],
    full: Annotated[bool, typer.Option("--full", help="The whole pipeline, adapters added into its weights.")] = False,
    single_file: Annotated[
        bool, typer.Option("--single-file", help="One file as ComfyUI reads it: a LoRA, or with --full the net.")
    ] = False,
    weights: WhichWeights = None,
    push: Annotated[str | None, typer.Option(metavar="ORG/NAME", help="Upload the new folder to the Hub.")] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push: for everybody to see.")] = False,
) -> int:
    """Write trained weights with a model card: a LoRA, the whole pipeline, or a single file."""
    from rlalign.commands.export import Wish, export

    return export(Wish(run, to, full, single_file, weights, push, public))


@app.command(epilog="Examples: rlalign report runs/quickstart  |  rlalign report runs/quickstart --trace")
def report(
    run: RunFolder,
    trace: Annotated[bool, typer.Option("--trace", help="Write what every worker did when, for Perfetto.")] = False,
    to: Annotated[Path | None, typer.Option(help="The trace's file; DIR/trace.json unless given.")] = None,
) -> int:
    """Write a run's report.html, also while it is still going on."""
    from rlalign.commands.report import report

    return report(run, trace or to is not None, to)


@app.command("serve-reward", epilog="Example: rlalign serve-reward my_rewards.py:Beauty device=cuda --workers 2")
def serve_reward(
    name: Annotated[str, typer.Argument(help="A reward's short name, module:function or path/to/file.py:function.")],
    options: Annotated[list[str] | None, typer.Argument(metavar="[OPTION=VALUE]...", help="Of the reward.")] = None,
    host: Annotated[str, typer.Option(help="Wider than this machine only with a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8470,
    workers: Annotated[int, typer.Option(min=1, help="Processes that hold the reward.")] = 1,
    token_file: Annotated[Path | None, typer.Option(help="Made if missing; ~/.rlalign/reward_token if needed.")] = None,
    gpus: Annotated[str | None, typer.Option(help="Dealt out to the workers in turn, as in 0,1,2.")] = None,
    more: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE, as in batch_size=64; see the docs.")
    ] = None,
    venv: Annotated[Path | None, typer.Option(help="Run it in this environment, which is made if missing.")] = None,
    pip: Annotated[
        list[str] | None, typer.Option(help="Install there, as in 'transformers<5'; repeat for more.")
    ] = None,
) -> int:
    """Run a reward as a service that runs elsewhere ask by URL: `- {use: http://HOST:PORT/NAME}`."""
    from rlalign.commands.serve_reward import Wish, serve_reward

    wish = Wish(name, options or [], host, port, workers, token_file, gpus, more or [], venv, pip or [])
    return serve_reward(wish)


@cluster.command("start", epilog="Examples: rlalign cluster start  |  rlalign cluster start --address 10.0.0.5:6379")
def cluster_start(
    more: Annotated[
        list[str] | None, typer.Argument(metavar="[RAY_OPTION]...", help="After --: more for `ray start`.")
    ] = None,
    address: Annotated[str | None, typer.Option(help="Join the cluster of this head, HOST:PORT.")] = None,
    port: Annotated[int | None, typer.Option(help="Of the head; 6379, or a free one.")] = None,
    dashboard_host: Annotated[str, typer.Option(help="Wider than this machine only with a token.")] = "127.0.0.1",
    dashboard_port: Annotated[int | None, typer.Option(help="Where jobs come in; 8265, or a free one.")] = None,
    num_cpus: Annotated[int | None, typer.Option(min=0, help="Unless given, all.")] = None,
    num_gpus: Annotated[int | None, typer.Option(min=0, help="Unless given, all.")] = None,
) -> int:
    """Start a cluster with this machine as its head, or join one."""
    from rlalign.commands.cluster import start

    return start(address, port, dashboard_host, dashboard_port, num_cpus, num_gpus, more or [])


@cluster.command("stop")
def cluster_stop(
    address: Annotated[str | None, typer.Option(help="Of the cluster's head, HOST:PORT.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Of all clusters that were started here.")] = False,
) -> int:
    """End what `rlalign cluster start` started on this machine, and nothing else."""
    from rlalign.commands.cluster import stop

    return stop(address, every)


@cluster.command("status")
def cluster_status() -> int:
    """Say what was started on this machine."""
    from rlalign.commands.cluster import status

    return status()


@cluster.command("wait", epilog="Example: rlalign cluster wait --address 10.0.0.5:6379 --nodes 3")
def cluster_wait(
    address: Annotated[str, typer.Option(help="Of the cluster's head, HOST:PORT.")],
    num_nodes: Annotated[int, typer.Option("--nodes", min=1, help="The head counts.")],
    timeout: Annotated[float, typer.Option(min=0, help="Seconds, after which to give up.")] = 600,
) -> int:
    """Wait until so many nodes of a cluster are alive."""
    from rlalign.commands.cluster import wait

    return wait(address, num_nodes, timeout)


@cluster.command("token")
def cluster_token() -> int:
    """Print the path of the file with the cluster's token, which is made if there is none."""
    from rlalign.commands.cluster import token

    return token()


@prompts.command("show", epilog="Examples: rlalign prompts show train.jsonl  |  rlalign prompts show my.yaml")
def prompts_show(
    target: Annotated[
        str, typer.Argument(metavar="FILE|DIR|NAME", help="A prompt file, or a run file, run or recipe.")
    ],
    overrides: Overrides = None,
    examples: Annotated[int, typer.Option(min=0, help="How many to print of each part.")] = 5,
) -> int:
    """Count prompts by tag, find duplicates and what stands on both sides of a split, and print some."""
    from rlalign.commands.prompts import show

    return show(target, overrides or [], examples)


@prompts.command(
    "generate", epilog="Example: rlalign prompts generate geneval --to train.jsonl --heldout heldout.jsonl"
)
def prompts_generate(
    kind: Annotated[Literal["geneval", "ocr"], typer.Argument(help="Compositions for GenEval's tasks, or lettering.")],
    to: Annotated[Path, typer.Option(help="The .jsonl file for training.")],
    num: Annotated[int, typer.Option(min=1, max=MOST_PROMPTS, help="Prompts for training.")] = 5000,
    heldout: Annotated[Path | None, typer.Option(help="Another .jsonl file, of what is never in the first.")] = None,
    num_heldout: Annotated[int, typer.Option(min=1, max=MOST_PROMPTS, help="Prompts in it.")] = 500,
    share: Annotated[float, typer.Option(min=0.001, max=0.5, help="Of compositions or texts to hold out.")] = 0.1,
    seed: Annotated[int, typer.Option(min=0, help="Decides what is drawn and what is held out.")] = 0,
) -> int:
    """Write prompts by rlalign's own grammar, with metadata that the rewards geneval and ocr read."""
    from rlalign.commands import prompts as writing

    return writing.generate(writing.Wish(kind, to, num, heldout, num_heldout, share, seed))


@prompts.command("convert", epilog="Example: rlalign prompts convert parti PartiPrompts.tsv --to parti.jsonl")
def prompts_convert(
    layout: Annotated[str, typer.Argument(help="geneval, drawbench, parti, hpdv2, pickapic or t2i_compbench.")],
    path: Annotated[Path, typer.Argument(help="The set's file or folder, as published.")],
    to: Annotated[Path, typer.Option(help="The .jsonl file to write.")],
    split: Annotated[
        str | None, typer.Option(help="Of a folder of t2i_compbench or pickapic, train for instance.")
    ] = None,
    pairs: Annotated[
        bool, typer.Option("--pairs", help="Judged images too, for rollout.source=data: hpdv2, pickapic.")
    ] = False,
) -> int:
    """Write the prompts of a public set as a prompt file."""
    from rlalign.commands.prompts import convert

    return convert(layout, path, to, split, pairs)


@rewards.command("list")
def rewards_list() -> int:
    """Name the installed rewards."""
    from rlalign.commands.lists import list_rewards

    return list_rewards()


@rewards.command("show")
def rewards_show(name: Annotated[str, typer.Argument(help="A reward's name, or module:function.")]) -> int:
    """Say what a reward does and which options it has."""
    from rlalign.commands.lists import show_reward

    return show_reward(name)


@models.command("list")
def models_list() -> int:
    """Name the model families."""
    from rlalign.commands.lists import list_models

    return list_models()


@algorithms.command("list")
def algorithms_list() -> int:
    """Name the algorithms and presets."""
    from rlalign.commands.lists import list_algorithms

    return list_algorithms()


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"rlalign {__version__}")
        raise typer.Exit


def run(arguments: Sequence[str]) -> int:
    """One command, or the help where there is none; its exit code. An internal error is raised, not returned."""
    try:
        return app(list(arguments) or ["--help"], prog_name="rlalign", standalone_mode=False) or 0
    except UsageError as error:
        return _complain(_usage(error))
    except BadInput as error:
        return _complain(str(error))
    except (KeyboardInterrupt, typer.Abort):
        print("rlalign: interrupted", file=sys.stderr)
        return 130


def main() -> NoReturn:
    """The entry point of the `rlalign` command."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    log = logging.getLogger("rlalign")
    log.addHandler(Warnings())
    log.propagate = False
    signal.signal(signal.SIGTERM, _terminated)
    sys.exit(run(sys.argv[1:]))


class Warnings(logging.Handler):
    """Log records as plain lines on what standard error is at that moment: a progress bar may have replaced it."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"{record.levelname.lower()}: {record.getMessage()}", file=sys.stderr)


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def _complain(sentence: str) -> int:
    print(f"rlalign: {sentence}", file=sys.stderr)
    return 2


def _usage(error: Any) -> str:
    words = " ".join(error.format_message().split()).rstrip(".").replace(". Did you", "; did you")
    return f"{words} (rlalign --help shows what there is)"


def _with(overrides: list[str] | None, **options: int | str | None) -> list[str]:
    return [*(overrides or []), *(f"{key}={value}" for key, value in options.items() if value is not None)]
