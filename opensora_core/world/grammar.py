"""Scenes of the invented world, and the many ways to put one into words.

What a caption leaves out is not decided by it, with three leanings that make short prompts behave as one expects:
no weather said means clear seven times out of eight, no sky said means day more often than not, and no motion said
means still. Colour and shape are always said.

`HELD_OUT` lists the pairs of values that never occur in training. A model that draws them anyway has learnt the
attributes, not the pairs.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from functools import cache
from typing import Literal, get_args

from numpy.random import Generator

Color = Literal["red", "yellow", "green", "blue", "purple", "pink"]
Shape = Literal["ball", "cube", "pyramid"]
Size = Literal["small", "large"]
Motion = Literal["left", "right", "up", "down", "still", "bouncing"]
Sky = Literal["day", "sunset", "night"]
Ground = Literal["grass", "sand", "sea", "snow"]
Weather = Literal["clear", "rain", "snow"]
Split = Literal["train", "seen", "held-out"]


@dataclass(frozen=True)
class Scene:
    """All there is to know about a clip except where exactly things are."""

    color: Color
    shape: Shape
    size: Size
    motion: Motion
    sky: Sky
    ground: Ground
    weather: Weather


ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "color": get_args(Color),
    "shape": get_args(Shape),
    "size": get_args(Size),
    "motion": get_args(Motion),
    "sky": get_args(Sky),
    "ground": get_args(Ground),
    "weather": get_args(Weather),
}
"""Every attribute of a scene with its values."""

HELD_OUT: dict[tuple[str, str], tuple[tuple[str, str], ...]] = {
    ("color", "shape"): (
        ("red", "pyramid"),
        ("yellow", "cube"),
        ("blue", "pyramid"),
        ("purple", "ball"),
        ("pink", "cube"),
    ),
    ("color", "motion"): (
        ("red", "up"),
        ("yellow", "left"),
        ("green", "bouncing"),
        ("blue", "down"),
        ("pink", "right"),
    ),
}
"""Pairs of values that no training clip has. Each value on its own stays frequent: a colour loses at most one of its
three shapes and one of its six motions."""

_SAID: dict[str, dict[str, float]] = {
    "size": dict.fromkeys(get_args(Size), 0.6),
    "motion": {**dict.fromkeys(get_args(Motion), 1.0), "still": 0.75},
    "sky": {"day": 0.6, "sunset": 0.85, "night": 0.85},
    "ground": dict.fromkeys(get_args(Ground), 0.85),
    "weather": {"clear": 0.3, "rain": 0.9, "snow": 0.9},
}
"""How often a caption says each value; clear weather, half of all training clips, mostly goes without saying."""

_TYPO_RATE = 0.04

_WORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "color": {
        "red": ("red", "red", "red", "scarlet", "crimson"),
        "yellow": ("yellow", "yellow", "yellow", "lemon yellow", "golden"),
        "green": ("green", "green", "green", "emerald"),
        "blue": ("blue", "blue", "blue", "cobalt blue"),
        "purple": ("purple", "purple", "purple", "violet", "lilac"),
        "pink": ("pink", "pink", "pink", "hot pink", "magenta"),
    },
    "shape": {
        "ball": ("ball", "ball", "ball", "sphere", "circle", "orb", "disc"),
        "cube": ("cube", "cube", "cube", "square", "box", "block"),
        "pyramid": ("pyramid", "pyramid", "triangle", "triangle", "cone"),
    },
    "size": {
        "small": ("small", "small", "small", "little", "tiny", "mini"),
        "large": ("large", "large", "large", "big", "big", "huge", "giant", "enormous"),
    },
}

_GROUND: dict[str, tuple[str, ...]] = {
    "grass": (
        "green grass",
        "the grass",
        "grass",
        "a meadow",
        "a green meadow",
        "the lawn",
        "a grassy field",
        "a field",
    ),
    "sand": ("the sand", "sand", "yellow sand", "the beach", "a sandy beach", "the desert", "the dunes"),
    "sea": ("the sea", "the ocean", "the water", "blue water", "the waves", "a calm sea", "the blue sea", "a lake"),
    "snow": ("the snow", "white snow", "snow", "a snowy field", "snow-covered ground", "fresh snow", "the ice"),
}
_OVER: tuple[str, ...] = ("over", "over", "on", "across", "above")
_ON: tuple[str, ...] = ("on", "on", "over")

_SKY: dict[str, tuple[str, ...]] = {
    "day": (
        "in daylight",
        "during the day",
        "under a blue sky",
        "by day",
        "at noon",
        "on a sunny day",
        "in the afternoon",
    ),
    "sunset": (
        "at sunset",
        "at sunset",
        "at dusk",
        "in the evening",
        "under an orange sky",
        "as the sun sets",
        "at twilight",
    ),
    "night": (
        "at night",
        "at night",
        "under the night sky",
        "after dark",
        "under the stars",
        "in the moonlight",
        "at midnight",
    ),
}
_SKY_SENTENCE: dict[str, tuple[str, ...]] = {
    "day": ("it is day", "it is daytime", "the sky is blue"),
    "sunset": ("it is sunset", "it is evening", "the sun is setting", "the sun sets"),
    "night": ("it is night", "it is dark", "the stars are out", "the moon shines"),
}
_WEATHER: dict[str, tuple[str, ...]] = {
    "clear": ("in clear weather", "in dry weather", "in fine weather", "without rain or snow", "under a clear sky"),
    "rain": ("in the rain", "in the rain", "while it rains", "as rain falls", "in rainy weather", "in a storm"),
    "snow": (
        "in falling snow",
        "while it snows",
        "as snow falls",
        "in snowy weather",
        "in a snowfall",
        "in a blizzard",
    ),
}
_WEATHER_SENTENCE: dict[str, tuple[str, ...]] = {
    "clear": ("the weather is clear", "the weather is fine", "the air is clear"),
    "rain": ("it is raining", "rain is falling", "rain falls", "it rains"),
    "snow": ("it is snowing", "snow is falling", "snowflakes are falling", "snow falls", "it snows"),
}

_MOVING: tuple[tuple[str, str], ...] = (
    ("moving", "moves"),
    ("moving", "moves"),
    ("drifting", "drifts"),
    ("sliding", "slides"),
    ("going", "goes"),
    ("gliding", "glides"),
    ("travelling", "travels"),
)
_ROLLING: tuple[tuple[str, str], ...] = (("rolling", "rolls"),) * 5
_RISING: tuple[tuple[str, str], ...] = (("rising", "rises"), ("climbing", "climbs"), ("floating up", "floats up"))
_SINKING: tuple[tuple[str, str], ...] = (("sinking", "sinks"), ("descending", "descends"), ("dropping", "drops"))
_BOUNCING: tuple[tuple[str, str], ...] = (
    ("bouncing", "bounces"),
    ("bouncing", "bounces"),
    ("bouncing up and down", "bounces up and down"),
    ("hopping", "hops"),
    ("jumping up and down", "jumps up and down"),
    ("jumping", "jumps"),
)
_RESTING: tuple[tuple[str, str], ...] = (
    ("standing still", "stands still"),
    ("staying still", "stays still"),
    ("resting", "rests"),
    ("not moving", "does not move"),
    ("sitting still", "sits still"),
    ("lying motionless", "lies motionless"),
)
_WAYS: dict[str, tuple[str, ...]] = {
    "left": ("to the left", "to the left", "left", "leftwards", "towards the left", "from right to left"),
    "right": ("to the right", "to the right", "right", "rightwards", "towards the right", "from left to right"),
    "up": ("up", "up", "upwards", "upward", "into the air"),
    "down": ("down", "down", "downwards", "downward", "to the ground"),
}


def draw_scene(rng: Generator, split: Split = "train") -> Scene:
    """Draw a scene.

    Args:
        rng: every draw comes from it.
        split: `train` is what training sees: no held-out pair, clear weather half of the time. `seen` has the same
            pairs with every weather equally often, for measuring; `held-out` is like it, but has at
            least one held-out pair.
    """
    choices = dict(ATTRIBUTES)
    if split == "train":
        choices["weather"] = ("clear", *ATTRIBUTES["weather"])  # twice in the urn
    while True:
        values = {name: options[int(rng.integers(len(options)))] for name, options in choices.items()}
        if is_held_out(values) == (split == "held-out"):
            return Scene(**values)  # type: ignore[arg-type]


def is_held_out(scene: Scene | dict[str, str]) -> bool:
    """Whether a scene, or what is said of one, has a pair of values that training never shows."""
    values = asdict(scene) if isinstance(scene, Scene) else scene
    return any((values.get(a), values.get(b)) in pairs for (a, b), pairs in HELD_OUT.items())


def canonical_caption(scene: Scene) -> str:
    """The one plain sentence that says everything about a scene."""
    doing = {
        "left": "moving to the left",
        "right": "moving to the right",
        "up": "moving up",
        "down": "moving down",
        "still": "standing still",
        "bouncing": "bouncing",
    }
    ground = {"grass": "green grass", "sand": "the sand", "sea": "the sea", "snow": "white snow"}
    sky = {"day": "during the day", "sunset": "at sunset", "night": "at night"}
    weather = {"clear": "in clear weather", "rain": "in the rain", "snow": "in falling snow"}
    return (
        f"a {scene.size} {scene.color} {scene.shape} {doing[scene.motion]} over {ground[scene.ground]}"
        f" {sky[scene.sky]} {weather[scene.weather]}"
    )


def caption(scene: Scene, rng: Generator) -> str:
    """One of the many ways to describe a scene: words, order, sentences, case and the odd slip of the finger vary."""

    def pick(options: tuple[str, ...]) -> str:
        return options[int(rng.integers(len(options)))]

    said = {name for name, shares in _SAID.items() if rng.random() < shares[getattr(scene, name)]}
    thing = f"{pick(_WORDS['color'][scene.color])} {pick(_WORDS['shape'][scene.shape])}"
    if "size" in said:
        thing = f"{pick(_WORDS['size'][scene.size])} {thing}"
    article = "an" if thing[0] in "aeio" else "a"
    thing = f"{pick((article, article, article, 'the', 'one', ''))} {thing}".strip()
    if rng.random() < 0.08:
        thing = f"{pick(('a video of', 'a clip of', 'there is', 'we see', 'a view of'))} {thing}"

    finite = rng.random() < 0.4 and " of " not in thing and "there is" not in thing and "we see" not in thing
    where = (
        [f"{pick(_ON if scene.motion in ('still', 'bouncing') else _OVER)} {pick(_GROUND[scene.ground])}"]
        if "ground" in said
        else []
    )
    around = []
    if "sky" in said:
        around.append(("sky", pick(_SKY[scene.sky])))
    if "weather" in said:
        around.append(("weather", pick(_WEATHER[scene.weather])))
    if len(around) == 2 and rng.random() < 0.5:
        around.reverse()

    # A second sentence takes over some of the tail: the motion ("it moves left"), the sky or the weather.
    sentences = []
    doing = _doing(scene, rng, finite) if "motion" in said else ""
    if doing and rng.random() < 0.12:
        sentences.append(f"it {_doing(scene, rng, finite=True)}")
        doing = ""
    if around and rng.random() < 0.25:
        name, _ = around.pop()
        sentences.append(pick((_SKY_SENTENCE if name == "sky" else _WEATHER_SENTENCE)[getattr(scene, name)]))

    tail = [phrase for _, phrase in around]
    lead = tail.pop() if tail and rng.random() < 0.25 else ""
    middle = [doing, *where] if doing and not (where and rng.random() < 0.15) else [*where, doing]
    first = " ".join(part for part in (thing, *middle) if part)
    comma = ", " if rng.random() < 0.3 else " "
    first = comma.join([first, *tail])
    if lead:
        first = f"{lead}{', ' if rng.random() < 0.8 else ' '}{first}"
    return _written(_with_typo([first, *sentences], rng), rng)


def _doing(scene: Scene, rng: Generator, finite: bool) -> str:
    """The motion of a scene as a verb with its direction."""
    way = ""
    if scene.motion == "still":
        verbs = _RESTING
    elif scene.motion == "bouncing":
        verbs = _BOUNCING
    else:
        ways = _WAYS[scene.motion]
        way = " " + ways[int(rng.integers(len(ways)))]
        verbs = _MOVING
        if scene.motion in ("left", "right") and scene.shape == "ball":
            verbs = _ROLLING + _MOVING
        elif scene.motion in ("up", "down") and rng.random() < 0.4:
            # these verbs say the direction by themselves
            verbs, way = (_RISING if scene.motion == "up" else _SINKING), ""
    return verbs[int(rng.integers(len(verbs)))][int(finite)] + way


def _with_typo(sentences: list[str], rng: Generator) -> list[str]:
    """Once in a while, drop, double, swap or replace a letter of one longer word."""
    if rng.random() >= _TYPO_RATE:
        return sentences
    which = int(rng.integers(len(sentences)))
    words = sentences[which].split(" ")
    long = [index for index, word in enumerate(words) if len(word) >= 5 and word.isalpha()]
    if not long:
        return sentences
    at = long[int(rng.integers(len(long)))]
    word, spot = words[at], int(rng.integers(1, len(words[at]) - 1))
    slip = (
        word[:spot] + word[spot + 1 :],
        word[:spot] + word[spot] + word[spot:],
        word[:spot] + word[spot + 1] + word[spot] + word[spot + 2 :],
        word[:spot] + "aeionrst"[int(rng.integers(8))] + word[spot + 1 :],
    )[int(rng.integers(4))]
    if slip not in vocabulary() and _corrected(slip) == word:
        words[at] = slip
    return [*sentences[:which], " ".join(words), *sentences[which + 1 :]]


def _written(sentences: list[str], rng: Generator) -> str:
    """Join sentences in one of the ways people type: lower case, proper sentences, titles, or shouting."""
    style = rng.random()
    if style < 0.5:
        return (". " if rng.random() < 0.6 else ", ").join(sentences)
    if style < 0.88:
        text = ". ".join(sentence[:1].upper() + sentence[1:] for sentence in sentences)
        return text + ("." if len(sentences) > 1 or rng.random() < 0.6 else "")
    text = ". ".join(sentences)
    return text.title() if style < 0.95 else text.upper()


@cache
def _lexicon() -> dict[tuple[str, ...], tuple[str, str]]:
    """Every phrase that says something, as words, with the attribute and the value that it says."""
    phrases: dict[str, tuple[str, str]] = {}

    def add(attribute: str, value: str, *texts: str) -> None:
        for text in texts:
            phrases[text] = (attribute, value)

    for attribute, words in _WORDS.items():
        for value, texts in words.items():
            add(attribute, value, *texts)
    for table, attribute in ((_GROUND, "ground"), (_SKY, "sky"), (_SKY_SENTENCE, "sky"), (_WEATHER, "weather")):
        for value, texts in table.items():
            add(attribute, value, *texts)
    for value, texts in _WEATHER_SENTENCE.items():
        add("weather", value, *texts)
    for value, ways in _WAYS.items():
        add("motion", value, *ways)
    for value, verbs in (("up", _RISING), ("down", _SINKING), ("still", _RESTING), ("bouncing", _BOUNCING)):
        add("motion", value, *(form for pair in verbs for form in pair))

    # Parts of those phrases, and other forms of those words, that mean the same alone.
    add("color", "pink", "rose")
    add("shape", "ball", "balls", "spheres")
    add("shape", "cube", "cubes", "squares")
    add("shape", "pyramid", "pyramids", "triangles")
    add("motion", "left", "leftward")
    add("motion", "right", "rightward")
    add("motion", "up", "rise", "climb")
    add("motion", "down", "falling", "falls", "fall", "sink", "drop", "descend")
    add("motion", "still", "still", "motionless", "at rest", "sitting", "standing")
    add("motion", "bouncing", "bounce", "jump", "hop")
    add("ground", "grass", "meadow", "lawn", "grassy", "green field", "green lawn")
    add("ground", "sand", "beach", "desert", "sandy", "dunes", "golden sand")
    add("ground", "sea", "sea", "ocean", "water", "waves", "lake", "blue ocean")
    add("ground", "snow", "snow", "snow covered", "snowy ground", "white ground", "ice")
    add("sky", "day", "day", "daylight", "daytime", "noon", "midday", "sunny", "blue sky", "afternoon")
    add("sky", "sunset", "sunset", "dusk", "evening", "twilight", "orange sky", "red sky", "pink sky")
    add("sky", "night", "night", "in the dark", "midnight", "moonlight", "moon", "stars")
    add("weather", "clear", "clear", "dry", "no rain", "no snow")
    add("weather", "rain", "rain", "rainy", "raining", "storm", "falling rain", "rain falling")
    add("weather", "snow", "snowy", "snowing", "snowfall", "snowflakes", "falling snow", "snow falling", "blizzard")
    articles = ("a ", "an ", "the ")
    stripped = dict(phrases)
    for text, said in phrases.items():
        for article in articles:
            if text.startswith(article):
                stripped.setdefault(text.removeprefix(article), said)
    return {tuple(_tokens(text)): said for text, said in stripped.items()}


@cache
def vocabulary() -> frozenset[str]:
    """Every word, in lower case, that a caption without typos can have or that `parse` knows."""
    words = {word for phrase in _lexicon() for word in phrase}
    for text in (
        *_OVER,
        "a an the one it is there we see video clip view of",
        *(f for p in _MOVING + _ROLLING for f in p),
    ):
        words.update(_tokens(text))
    return frozenset(words)


def parse(prompt: str) -> dict[str, str]:
    """Find what a free prompt says about a scene.

    Longer phrases win over shorter ones ("over green grass" says nothing about a green object), the first mention of
    an attribute over later ones, and a word with one slip of the finger counts as the word.

    Returns:
        Attribute -> value for what is said; empty when no word of the prompt means anything in this world.
    """
    lexicon = _lexicon()
    longest = max(len(phrase) for phrase in lexicon)
    words = [_corrected(word) for word in _tokens(prompt)]
    said: dict[str, str] = {}
    at = 0
    while at < len(words):
        for length in range(min(longest, len(words) - at), 0, -1):
            if found := lexicon.get(tuple(words[at : at + length])):
                said.setdefault(*found)
                at += length
                break
        else:
            at += 1
    return said


def _tokens(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text.lower())


@cache
def _by_deletion() -> dict[str, tuple[str, ...]]:
    """Each known word of four letters or more, and each of those with one letter left out, -> the known words."""
    table: dict[str, set[str]] = {}
    for word in vocabulary():
        if len(word) >= 4:
            for shorter in {word, *(word[:spot] + word[spot + 1 :] for spot in range(len(word)))}:
                table.setdefault(shorter, set()).add(word)
    return {shorter: tuple(sorted(words)) for shorter, words in table.items()}


def _corrected(word: str) -> str:
    """The known word that is one slip away, if there is exactly one."""
    if word in vocabulary() or len(word) < 4:
        return word
    table = _by_deletion()
    near = set(table.get(word, ()))
    for spot in range(len(word)):
        near.update(table.get(word[:spot] + word[spot + 1 :], ()))
    near = {known for known in near if known[0] == word[0]}  # a train is not rain
    return near.pop() if len(near) == 1 else word
