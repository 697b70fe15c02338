"""What there is to choose from: rewards, models, algorithms."""

import inspect
from importlib.metadata import entry_points

from rlalign import plugins
from rlalign.commands.problems import in_preparation
from rlalign.overlays import presets
from rlalign.paths import zoo_names
from rlalign.scoring import find_reward, reward_names
from rlalign.scoring.loading import CATALOGUE


def list_rewards() -> int:
    for name in reward_names():
        (found, *_) = entry_points(group=CATALOGUE, name=name)
        try:
            about = _summary(inspect.getdoc(find_reward(name)))
        except ValueError as error:  # an extra is missing, for one
            about = f"cannot be loaded: {error}"
        print(f"{name:28} {about}  [{found.value}]")
    print("\nyour own: module:function, path/to/file.py:function or a URL; `rlalign rewards show NAME` says more")
    return 0


def show_reward(name: str) -> int:
    with in_preparation():
        reward = find_reward(name)
    place = inspect.getsourcefile(inspect.unwrap(reward))
    print(f"{name}{inspect.signature(reward)}\n{place}\n\n{inspect.getdoc(reward) or ''}")
    return 0


def list_models() -> int:
    for name in plugins.names("model"):
        print(f"{name:12} {_summary(plugins.load('model', name).__doc__)}")
    print(f"\nshipped, for model.path: {', '.join(f'zoo:{name}' for name in zoo_names()) or 'none'}")
    print("your own: model.family may be a module or path/to/file.py")
    return 0


def list_algorithms() -> int:
    named = presets()
    for name in plugins.names("algorithm"):
        module = plugins.load("algorithm", name)
        print(f"{name:12} {_summary(module.__doc__)}")
        own = [preset for preset, (home, _) in named.items() if home is module]
        if own:
            print(f"{'':12} presets: {', '.join(own)}")
    print("\nchoose one with algorithm=NAME; your own: algorithm.name may be a module or path/to/file.py")
    return 0


def _summary(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]
