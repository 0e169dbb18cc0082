"""Georgian for whoever cannot read it: every letter has one Latin spelling, and names end in -i."""

import unicodedata
from collections.abc import Mapping

# The national system of romanisation (Georgian Academy of Sciences and State Department of Geodesy
# and Cartography, 2002), in alphabetical order.
ALPHABET = "აბგდევზთიკლმნოპჟრსტუფქღყშჩცძწჭხჯჰ"
SPELLINGS = "a b g d e v z t i k' l m n o p' zh r s t' u p k gh q' sh ch ts dz ts' ch' kh j h"
LATIN = dict(zip(ALPHABET, SPELLINGS.split(), strict=True))


def reads(name: str) -> str:
    """A name as it is read: "ბრემენი" is "bremeni". Other letters stay as they are."""
    return "".join(LATIN.get(letter, letter) for letter in name)


CONSONANTS, OTHER_VOWELS = "bcdfghjklmnpqrstvwxz", "aeou"


def share_with_i(written: Mapping[str, str], after: str) -> float:
    """How many of the Georgian names end in -i, in {Latin name: Georgian name}, where the Latin one
    ends in a letter of `after`, such as CONSONANTS; accents do not count."""
    ends = [name.endswith("ი") for town, name in written.items() if last_letter(town) in after]
    return sum(ends) / len(ends)


def last_letter(town: str) -> str:
    """The last letter of a name, in lower case and without its accent."""
    letters = filter(str.isalpha, unicodedata.normalize("NFD", town.casefold()))
    return list(letters)[-1]
