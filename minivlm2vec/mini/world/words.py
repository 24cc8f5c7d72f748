"""English for the sets: class names, articles, plurals, and which names can be counted."""

import re

SUBGROUP_NAMES = {
    "face-smiling": "smiling face",
    "face-affection": "affectionate face",
    "face-tongue": "face with tongue",
    "face-hand": "face with hands",
    "face-neutral-skeptical": "neutral or skeptical face",
    "face-sleepy": "sleepy face",
    "face-unwell": "unwell face",
    "face-hat": "face with a hat",
    "face-glasses": "face with glasses",
    "face-concerned": "concerned face",
    "face-negative": "angry face",
    "face-costume": "costume or creature",
    "cat-face": "cat face",
    "monkey-face": "monkey face",
    "heart": "heart",
    "emotion": "sign of emotion",
    "hand-fingers-open": "hand with open fingers",
    "hand-fingers-partial": "hand sign",
    "hand-single-finger": "pointing finger",
    "hand-fingers-closed": "hand with closed fingers",
    "hands": "pair of hands",
    "hand-prop": "hand with an object",
    "body-parts": "part of the body",
    "person": "person",
    "person-gesture": "person making a gesture",
    "person-role": "person at work",
    "person-fantasy": "fantasy person",
    "person-activity": "person doing something",
    "person-sport": "person doing sports",
    "person-resting": "person resting",
    "family": "couple or family",
    "person-symbol": "symbol of people",
    "animal-mammal": "mammal",
    "animal-bird": "bird",
    "animal-amphibian": "amphibian",
    "animal-reptile": "reptile",
    "animal-marine": "marine animal",
    "animal-bug": "bug",
    "plant-flower": "flower",
    "plant-other": "plant",
    "food-fruit": "fruit",
    "food-vegetable": "vegetable",
    "food-prepared": "prepared food",
    "food-asian": "Asian food",
    "food-marine": "seafood",
    "food-sweet": "sweets",
    "drink": "drink",
    "dishware": "dishware",
    "place-map": "globe or map",
    "place-geographic": "landscape",
    "place-building": "building",
    "place-religious": "religious building",
    "place-other": "place to visit",
    "transport-ground": "vehicle on the ground",
    "transport-water": "vehicle on water",
    "transport-air": "vehicle in the air",
    "hotel": "hotel item",
    "time": "time",
    "sky-weather": "sky or weather",
    "event": "event or holiday",
    "award-medal": "medal",
    "sport": "sport",
    "game": "game or hobby",
    "arts-crafts": "arts and crafts",
    "light-video": "light or camera",
    "book-paper": "book or paper",
    "office": "office item",
    "lock": "lock or key",
    "tool": "tool",
    "science": "science equipment",
    "medical": "medical item",
    "household": "household item",
    "other-object": "other object",
    "transport-sign": "transport sign",
    "warning": "warning sign",
    "arrow": "arrow",
    "religion": "religious symbol",
    "zodiac": "zodiac sign",
    "av-symbol": "media button",
    "gender": "gender sign",
    "math": "math symbol",
    "currency": "currency symbol",
    "other-symbol": "other symbol",
    "keycap": "keypad character",
    "alphanum": "letter button",
    "geometric": "shape",
    "flag": "flag",
    "country-flag": "country flag",
    "subdivision-flag": "flag of a part of a country",
    "musical-instrument": "musical instrument",
}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def is_countable(label: str) -> bool:
    """Whether "a LABEL" and "two LABELs" are English: a short singular noun."""
    words = label.lower().split()
    plain = re.fullmatch(r"[A-Za-z][a-z-]*( [a-z-]+){0,2}", label) is not None
    already_plural = words[-1].endswith("s") and not words[-1].endswith(("ss", "us"))
    modified = any(word in _NO_NOUN or word.endswith("wards") for word in words)
    mass = not _MASS.isdisjoint({words[-1], *words[-1].split("-")})
    return plain and not (already_plural or modified or mass)


def with_article(noun: str) -> str:
    """ "apple" -> "an apple"; by letter, with the few exceptions that occur."""
    vowel = noun[0].lower() in "aeiou" and not noun.lower().startswith(("uni", "eu", "ewe", "one"))
    return f"{'an' if vowel else 'a'} {noun}"


def plural(noun: str) -> str:
    """ "canoe" -> "canoes"; of several words the last one changes."""
    *rest, last = noun.split()
    if last in _IRREGULAR:
        last = _IRREGULAR[last]
    elif last.endswith(("s", "x", "z", "ch", "sh")):
        last += "es"
    elif last.endswith("y") and last[-2] not in "aeiou":
        last = last[:-1] + "ies"
    else:
        last += "s"
    return " ".join([*rest, last])


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# nouns without an article or a plural
_MASS = _words("""
bacon badminton bread broccoli butter candy cityscape construction cooking coral cricket dango dna dvd fire fog
food football garlic ginger green herb hockey hotel ice kaaba lacrosse lightning link liquid locked luggage
mahjong mate memo metro money motorway oden park pong popcorn rail rice sake salt soap spaghetti station sunrise
sunset sushi tennis thirty thread tofu vehicle way wedding wood x-ray yarn
""")
# words that make a label something else than a noun
_NO_NOUN = _words("""
americas and arrival at behind bowling camping decreasing departure done facing fluttering foggy fuji high in
inbox incoming increasing locked low lying medium moon muted not o'clock of on outbox over place quarter showing
tear-off thirty tilted unlocked with without
""")
_IRREGULAR = dict(
    pair.split(":")
    for pair in _words("""
bison:bison blowfish:blowfish calf:calves deer:deer die:dice fish:fish foot:feet goose:geese jellyfish:jellyfish
knife:knives leaf:leaves loaf:loaves mango:mangoes moose:moose mosquito:mosquitoes mouse:mice ox:oxen
person:people potato:potatoes scarf:scarves sheep:sheep shrimp:shrimp snowman:snowmen squid:squid
tomato:tomatoes tooth:teeth volcano:volcanoes wolf:wolves
""")
)
