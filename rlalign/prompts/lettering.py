"""A grammar of prompts that ask for written text, with it in metadata["text"] as the reward `ocr` reads it.

Texts are words, numbers and short phrases; settings are what they stand on. Both are rlalign's own. A text is a number,
and so is how it is asked for: in which case, on what, in which words.
"""

from rlalign.types import Prompt

KINDS = ("word", "phrase", "call", "number")
"""Tags: one word; adjective and noun; verb, "the" and noun; digits."""

_NOUNS = """
    anchor apple arrow autumn bakery balloon basket beacon bicycle blanket bottle breeze bridge butter button cabin
    camera candle canyon carpet castle cellar cherry circus clover coffee comet copper corner cotton crystal desert
    dragon engine falcon feather fiddle forest fountain garden ginger glacier hammer harbor helmet honey hotel island
    jacket jungle kettle kitchen ladder lagoon lantern lemon library lion locket magnet maple market meadow melody
    mirror monkey morning mountain museum needle nickel ocean olive orchard oven owl paddle palace panther paper
    parrot pepper piano pillow pilot planet pocket pony pottery puzzle rabbit railway raven ribbon river robot rocket
    saddle salmon school shadow shelter saucer sparrow spring station summer sunset temple theater thunder ticket
    tiger timber tower tractor tunnel turtle valley velvet village violin wagon walnut whistle window winter yellow
    zipper
""".split()  # noqa: SIM905 (a table of words reads better than a list of strings)
_ADJECTIVES = """
    amber ancient brave bright calm clever cold crimson curious dusty eager early electric famous fresh gentle giant
    golden happy hidden honest humble jolly lazy little lonely lucky midnight mighty modern narrow noble northern
    odd open patient plain proud quick quiet royal secret seven silent simple sleepy small smooth steady sunny sweet
    tall tiny twin urban warm western wild windy young
""".split()  # noqa: SIM905
_VERBS = """
    ask bring build carry catch choose climb count cross draw enjoy find follow greet hold join keep learn lift love
    mind open paint plant protect read ring save share sing taste touch visit watch
""".split()  # noqa: SIM905
_SETTINGS = (
    "a wooden sign at the edge of a forest",
    "a neon sign in a rainy street at night",
    "a birthday cake with icing letters",
    "the cover of an old leather book",
    "a chalkboard in a small cafe",
    "a paper cup on an office desk",
    "a white T-shirt on a hanger",
    "the side of a delivery van",
    "a road sign in the desert",
    "a brick wall covered in graffiti",
    "a letter on yellowed paper beside an inkwell",
    "a shop window seen from across the street",
    "a poster in an underground station",
    "a brass plate beside a blue door",
    "a kite in a clear sky",
    "a banner over a crowded square",
    "a postage stamp under a magnifying glass",
    "a tin box on a kitchen shelf",
    "a boat's bow in a calm harbour",
    "a page of a notebook",
    "a screen in a dark control room",
    "a balloon tied to a park bench",
    "a stone set into an old bridge",
    "wet sand on a beach",
    "a menu held by a waiter",
    "a patch sewn onto a denim jacket",
    "a snow-covered roof seen from above",
    "a coffee mug with steam rising from it",
    "a license plate on a dusty pickup",
    "a knitted scarf on a wooden chair",
)
_WRITTEN = (
    '{setting} that says "{text}"',
    '{setting}, with the text "{text}"',
    '{setting}, bearing the words "{text}"',
    'the text "{text}" on {setting}',
    'a photo of {setting}, on which "{text}" can be read',
)
_CASES = (str.upper, str.title, str.lower)
_NUMBERS = 10_000


def sizes(kind: str) -> tuple[int, int]:
    """Numbers of the texts of a kind, and of the ways to ask for each."""
    return _texts(kind), len(_CASES) * len(_SETTINGS) * len(_WRITTEN)


def prompt(kind: str, number: int, wording: int) -> Prompt:
    """That text, asked for in that way."""
    rest, case = divmod(wording, len(_CASES))
    written, setting = divmod(rest, len(_SETTINGS))
    asked = _CASES[case](_text(kind, number))
    text = _WRITTEN[written].format(setting=_SETTINGS[setting], text=asked)
    return Prompt(text, metadata={"tag": kind, "text": asked})


def _texts(kind: str) -> int:
    nouns = len(_NOUNS)
    return {"word": nouns, "phrase": len(_ADJECTIVES) * nouns, "call": len(_VERBS) * nouns, "number": _NUMBERS}[kind]


def _text(kind: str, number: int) -> str:
    first, noun = divmod(number, len(_NOUNS))
    if kind == "number":
        return str(number)
    if kind == "word":
        return _NOUNS[noun]
    return f"{_ADJECTIVES[first]} {_NOUNS[noun]}" if kind == "phrase" else f"{_VERBS[first]} the {_NOUNS[noun]}"
