"""Plain English words and sentences for texts that are made from a seed, the same for everyone."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator


def _words(text: str) -> list[str]:
    return text.split()


ADJECTIVES = _words(
    """
    amber ancient autumn bitter blue brave brief bright broken bronze calm careful clever cloudy
    cold copper coral curious damp dark deep distant dusty early eager empty faint familiar fancy
    fast fierce flat foggy formal fresh frozen gentle giant glad golden grand gray green happy heavy
    hidden hollow honest humble icy idle jolly keen large lazy light little lively lonely loud lucky
    mellow mild misty modern narrow neat new noble odd old orange pale patient plain polite proud
    purple quick quiet rapid rare red rough round royal rusty scarlet secret shallow sharp shiny
    silent silver simple sleepy slow small smooth soft solid steady strange sturdy sunny swift tall
    tame tender thin tidy tiny tired upper vast velvet violet warm white wide wild windy wise wooden
    yellow young
    """
)

NOUNS = _words(
    """
    acorn anchor apple arrow attic badge bakery balcony banjo barrel basket bay beach beacon bell
    bench berry bicycle blanket boat bottle bridge brook broom bucket button cabin cable cactus
    camel candle canoe canyon cape carpet castle cave cedar cellar chair chapel cherry chimney
    circle cliff clock cloak cloud clover coach coast coin column comet compass cottage cradle crane
    crater creek crown cup curtain daisy desert desk dock dolphin donkey door dove dragon drawer
    drum eagle elbow elm engine falcon farm feather fence fern ferry field fiddle flag flute forest
    fork fountain fox garden gate geyser glacier globe glove goat goose grape grove guitar hammer
    harbor harp hat hawk hedge helmet heron hill hinge horn horse hotel island ivy jacket jar jungle
    kettle key kitchen kite ladder lagoon lake lamp lantern lemon leopard letter library lily lion
    lizard lobster locket loom magnet mansion maple market meadow melon mill mirror monkey moon moth
    mountain museum mushroom needle nest oak oar ocean olive onion orchard otter oven owl palace
    paper parade parrot path peach pearl pebble pelican pencil pepper piano pier pigeon pillow pine
    planet plaza plum pocket pond pony poppy porch potato prairie pump puzzle quarry quilt rabbit
    raft rail raven reef ribbon ridge ring river road robin rocket roof rope rose ruby saddle sail
    salmon school seal shell shelf ship shore shovel signal sled spider spoon spring squirrel stable
    staircase stone stork street swan table teapot temple tent theater thistle tiger torch tower
    trail train tray tree trumpet tulip tunnel turtle umbrella valley vase village violin wagon
    walnut wall walrus wheel willow window wolf yard
    """
)

_SCENES = (
    "The {a} {n} stood behind the {m} all morning.",
    "Nobody had moved the {n} since the {a} {m} arrived.",
    "A {a} {n} passed the {m}, and then it was calm again.",
    "They carried the {n} to the {m} before the {a} weather came.",
    "Near the {m} there was a {a} {n} that people liked to draw.",
    "Someone painted the {n} in the color of a {a} {m}.",
    "In the evening, the {a} {n} could be seen from the {m}.",
    "Two visitors asked about the {n}, but not about the {a} {m}.",
    "We left the {m} early and found the {n} {a} and clean.",
    "If the {n} is {a}, the {m} will need less care.",
    "The keeper of the {m} wrote three pages about a {a} {n}.",
    "Between the {n} and the {m} lies a {a} piece of ground.",
)


def sentences(rng: random.Random) -> Iterator[str]:
    """Yield sentences without end, none of which holds a digit or a hyphen."""
    while True:
        noun, other = rng.sample(NOUNS, 2)
        scene = rng.choice(_SCENES).format(a=rng.choice(ADJECTIVES), n=noun, m=other)
        yield re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", scene)


def names(rng: random.Random) -> Iterator[str]:
    """Yield different names, such as amber-canoe, in random order, until there are no more."""
    order = list(range(len(ADJECTIVES) * len(NOUNS)))
    rng.shuffle(order)
    for number in order:
        yield f"{ADJECTIVES[number // len(NOUNS)]}-{NOUNS[number % len(NOUNS)]}"
